"""Compare routers, scales and ranks on a model of 2 million parameters: leads and a guard against regressions, no evidence.

python benchmarks/router_bed.py FOLDER            run what is missing; the first call pretrains the model (minutes)
python benchmarks/router_bed.py FOLDER --table    print the table of what is there

A small Llama is pretrained on the packaged true facts, medical questions and SQL (query first, then its question), and
fine-tuned on rows it has not seen: `facts` (64 counterfactual edits; held out: their paraphrases), `few` (48 rows of
text-to-SQL, many epochs: here restraint should pay) and `sql` (256 rows, two epochs). Every contender has one learning rate.
The figure is the held-out loss.
"""

import argparse
import gzip
import importlib.resources
import itertools
import json
import random
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

from molf import MoLF
from molf.files import atomic_write
from molf.scores import EPD, Evidence

Pair = tuple[str, str]
RATES = (3e-4, 1e-3, 3e-3)
SEEDS = (1, 2, 3)
MATCHED: dict[str, Any] = {"lora_lr": "matched"}


class LoraOnly(EPD):
    """LoRA alone: its expert always wins."""

    name = "lora_only"

    def scores(self, evidence: Evidence) -> torch.Tensor:
        """Return 1 for the last expert and 0 for the others."""
        return torch.eye(evidence.lr.shape[1], dtype=torch.float64)[-1].expand(evidence.lr.shape)


def contenders() -> dict[str, dict[str, Any]]:
    """Return the arguments of MoLF by name."""
    fixed: dict[str, dict[str, Any]] = {
        "fft": {"ranks": ()},
        "lora r8 matched": {"ranks": (8,), "score": LoraOnly(), **MATCHED},
        "lora r32 matched": {"ranks": (32,), "score": LoraOnly(), **MATCHED},
        "both r32 matched": {"ranks": (32,), "top_k": 2, **MATCHED},
    }
    for rank, score in itertools.product((8, 32), ("random", "epd", "coherence")):
        fixed[f"{score} r{rank} matched"] = {"ranks": (rank,), "score": score, **MATCHED}
    for alpha, score in itertools.product((8, 128), ("random", "epd")):
        fixed[f"{score} r32 alpha {alpha}"] = {
            "ranks": (32,),
            "score": score,
            "lora_lr": None,
            "lora_alpha": float(alpha),
        }
    return fixed


def rows(name: str) -> list[dict[str, Any]]:
    """Read a packaged slice."""
    packed = importlib.resources.files("molf.tasks") / "data" / f"{name}.jsonl.gz"
    return [json.loads(line) for line in gzip.decompress(packed.read_bytes()).splitlines()]


def fact(record: dict[str, Any], prompt: str, target: str) -> Pair:
    """Return a prompt and its answer."""
    return prompt, " " + record["requested_rewrite"][target]["str"]


def sql(row: dict[str, str]) -> Pair:
    """Return tables and question, and the query."""
    return f"{row['sql_context']}\n{row['sql_prompt']}\n", row["sql"]


@dataclass
class Setting:
    """A fine-tuning task: rows to train on and rows held out, and the number of epochs."""

    train: list[Pair]
    held_out: list[Pair]
    epochs: int


def data() -> tuple[list[str], dict[str, Setting]]:
    """Return the texts of pretraining and the settings of fine-tuning, from rows apart."""
    facts, queries = rows("counterfact_sample"), rows("sql_create_context_train_sample")
    texts = []
    for record in facts[:800]:
        prompts = [*record["neighborhood_prompts"], *record["paraphrase_prompts"]]
        texts += ["".join(fact(record, prompt, "target_true")) for prompt in prompts]
    texts += [f"{row['question']} {row['op' + 'abcd'[row['cop']]]}" for row in rows("medmcqa_train_sample")]
    texts += [f"{row['sql_context']}\n{row['sql']}\n{row['sql_prompt']}" for row in queries[800:]]
    edits = facts[800:864]
    asked = [(r, r["requested_rewrite"]["prompt"].format(r["requested_rewrite"]["subject"])) for r in edits]
    return texts, {
        "facts": Setting(
            [fact(r, prompt, "target_new") for r, prompt in asked],
            [fact(r, prompt, "target_new") for r in edits for prompt in r["paraphrase_prompts"]],
            epochs=10,
        ),
        "few": Setting([sql(row) for row in queries[:48]], [sql(row) for row in queries[700:800]], epochs=8),
        "sql": Setting([sql(row) for row in queries[48:304]], [sql(row) for row in queries[700:800]], epochs=2),
    }


def batch(tokenizer: ByteLevelBPETokenizer, pairs: list[Pair]) -> dict[str, torch.Tensor]:
    """Return padded ids with labels on the answers; a text without a prompt is all answer. Rows end with token 0."""
    encoded = [(tokenizer.encode(prompt).ids, [*tokenizer.encode(answer).ids, 0]) for prompt, answer in pairs]
    length = min(160, max(len(prompt) + len(answer) for prompt, answer in encoded))
    ids, labels = (torch.full((len(pairs), length), fill) for fill in (0, -100))
    for i, (prompt, answer) in enumerate(encoded):
        whole = torch.tensor((prompt + answer)[-length:])
        ids[i, : len(whole)] = whole
        start = max(0, len(whole) - len(answer))
        labels[i, start : len(whole)] = whole[start:]
    return {"input_ids": ids, "labels": labels}


def held_out_loss(model: LlamaForCausalLM, tokenizer: ByteLevelBPETokenizer, pairs: list[Pair]) -> float:
    """Return the mean loss of the answers' tokens."""
    total, count = 0.0, 0
    with torch.no_grad():
        for i in range(0, len(pairs), 50):
            inputs = batch(tokenizer, pairs[i : i + 50])
            answers = int((inputs["labels"][:, 1:] != -100).sum())
            total, count = total + float(model(**inputs).loss) * answers, count + answers
    return total / count


def train(
    model: LlamaForCausalLM, tokenizer: ByteLevelBPETokenizer, pairs: list[Pair], epochs: int, size: int, **molf: Any
) -> MoLF:
    """Train with a cosine schedule and a tenth of warm-up; the order of the rows hangs on torch's seed."""
    order = random.Random(torch.initial_seed())
    optimizer = MoLF(model, **molf)
    steps = epochs * -(-len(pairs) // size)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    for _ in range(epochs):
        shuffled = order.sample(pairs, len(pairs))
        for i in range(0, len(pairs), size):
            optimizer.zero_grad()
            model(**batch(tokenizer, shuffled[i : i + size])).loss.backward()
            optimizer.step()
            schedule.step()
    return optimizer


def pretrained(folder: Path, texts: list[str]) -> ByteLevelBPETokenizer:
    """Pretrain the model in ``folder``, if it is not there, and return its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=2048, special_tokens=["<end>"], show_progress=False)
    if (folder / "base" / "config.json").exists():
        return tokenizer
    torch.manual_seed(0)
    sizes = {"vocab_size": 2048, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    short = [
        ("", text) for text in texts if len(text) < 200
    ]  # characters: long rows would fill the others with padding
    train(model, tokenizer, short, epochs=1, size=32, ranks=(), lr=2e-3)
    model.save_pretrained(folder / "base")
    return tokenizer


def table(results: dict[str, dict[str, float]]) -> str:
    """Return the mean held-out loss, over the seeds that are there, of every contender at every rate."""
    settings = sorted({key.split("|")[0] for key in results})
    lines = ["| contender | " + " | ".join(f"{s} {lr:g}" for s in settings for lr in RATES) + " |"]
    lines.append("| --- |" + " ---: |" * (len(settings) * len(RATES)))
    for name in contenders():
        cells = []
        for setting in settings:
            for lr in RATES:
                keys = [f"{setting}|{name}|{lr:g}|{seed}" for seed in SEEDS]
                found = [results[key]["held_out"] for key in keys if key in results]
                cells.append(f"{statistics.mean(found):.3f}" if found else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    path = args.folder / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if args.table:
        print(table(results))
        return
    texts, settings = data()
    tokenizer = pretrained(args.folder, texts)
    for seed, (setting, task), lr, (name, molf) in itertools.product(
        SEEDS, settings.items(), RATES, contenders().items()
    ):
        key = f"{setting}|{name}|{lr:g}|{seed}"
        if key in results:
            continue
        torch.manual_seed(seed)
        model = LlamaForCausalLM.from_pretrained(args.folder / "base")
        optimizer = train(model, tokenizer, task.train, task.epochs, 16, lr=lr, **molf)
        results[key] = {
            "held_out": held_out_loss(model, tokenizer, task.held_out),
            "train": held_out_loss(model, tokenizer, task.train),
            "fft_share": optimizer.routing.share("fft") if optimizer.routing else 1.0,
        }
        print(key, results[key], flush=True)
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(results, indent=0))


if __name__ == "__main__":
    main()
