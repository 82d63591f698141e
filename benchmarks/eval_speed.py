"""How fast evaluations are, against a loop that asks one thing at a time.

    python benchmarks/eval_speed.py --model bundled:smollm2-135m --task fact --records 8

Both answer the same requests about the same records of the packaged slices and compute the same metrics; the loop reads every
prompt anew for every request, as the shortest code would. ``--model tiny`` has random weights and SmolLM2's tokenizer.
"""

import argparse
import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from models import SHAPES
from molf.integrations.bundled import locate
from molf.study.engine.evaluate import evaluate
from molf.tasks import TASKS, Generate, NextToken, OptionScores, TargetScores, get_task
from molf.tasks.few_shot import with_examples
from timing import machine, ratio, take_turns

SLICES = [name for name in ("fact", "med", "sql") if name in TASKS]


def load(name):
    """Return a model and its tokenizer."""
    if name != "tiny":
        source = locate(name)
        return AutoModelForCausalLM.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(locate("bundled:smollm2-135m"))
    config = SHAPES["tiny"].__class__(**SHAPES["tiny"].to_dict() | {"vocab_size": len(tokenizer)})
    return AutoModelForCausalLM.from_config(config).eval(), tokenizer


@torch.inference_mode()
def ask(model, tokenizer, request):
    """Answer one request by itself."""
    prompt = tokenizer(request.prompt).input_ids
    if isinstance(request, Generate):
        return continue_prompt(model, tokenizer, prompt, request)
    if isinstance(request, NextToken):
        scores = [score(model, tokenizer, prompt, request.prompt + option) for option in request.options]
        return OptionScores(tuple(s.logprobs[0] for s in scores), tuple(s.token_ids[0] for s in scores))
    return score(model, tokenizer, prompt, request.prompt + request.target)


def score(model, tokenizer, prompt, text):
    ids = tokenizer(text).input_ids
    start = next((i for i, (one, other) in enumerate(zip(prompt, ids, strict=False)) if one != other), len(prompt))
    logprobs = model(torch.tensor([ids], device=model.device)).logits[0, start - 1 : -1].float().log_softmax(-1)
    target = ids[start:]
    values = logprobs[torch.arange(len(target)), target].tolist()
    return TargetScores(
        tuple(values), tuple(target), tuple((logprobs.argmax(-1).cpu() == torch.tensor(target)).tolist())
    )


def continue_prompt(model, tokenizer, prompt, request):
    settings = {"do_sample": False, "max_new_tokens": request.max_new_tokens, "eos_token_id": tokenizer.eos_token_id}
    config = GenerationConfig(**settings, pad_token_id=tokenizer.eos_token_id, stop_strings=list(request.stop) or None)
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, tokenizer=tokenizer)
    text = tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)
    return text[: min((text.index(stop) for stop in request.stop if stop in text), default=len(text))]


def compare(model, tokenizer, name, records, few_shot, rounds):
    """Return records per second of the engine and of the loop, and the ratio of the two with its spread."""
    task = get_task(name)
    split = task.load(None, sample=True, limit=records + few_shot, seed=0)
    if few_shot:
        task, split = with_examples(task, split, few_shot, seed=0)
    rows = split.eval[:records]
    found = {}

    def engine():
        found["engine"] = evaluate(model, tokenizer, task, rows).metrics

    def loop():
        answers = [[ask(model, tokenizer, request) for request in task.requests(row)] for row in rows]
        found["loop"] = task.score(rows, answers)

    seconds = take_turns({"engine": engine, "loop": loop}, rounds, warmup=0)
    one, other = (found[side][task.headline].value for side in ("engine", "loop"))
    if abs(one - other) > 1e-3:
        print(f"{name}: the two disagree in {task.headline}: {one:.4f} and {other:.4f}")
    speed = {side: len(rows) * rounds / sum(times) for side, times in seconds.items()}
    return {"records": len(rows), **speed, "ratio": ratio(seconds["loop"], seconds["engine"])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled:smollm2-135m", help="bundled model, folder, Hub id, or tiny")
    parser.add_argument("--task", nargs="+", choices=SLICES, default=SLICES)
    parser.add_argument("--records", type=int, default=8)
    parser.add_argument("--few_shot", type=int, default=0, help="examples before every prompt")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="end with a line of JSON")
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    report = {}
    print(f"{args.model}; {machine()}; records per second")
    for name in args.task:
        report[name] = found = compare(model, tokenizer, name, args.records, args.few_shot, args.rounds)
        middle, least, greatest = found["ratio"]
        speeds = f"engine {found['engine']:8.2f}   one at a time {found['loop']:8.2f}"
        print(
            f"{name:6} {found['records']} records   {speeds}   x{middle:.1f} ({least:.1f} to {greatest:.1f})",
            flush=True,
        )
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
