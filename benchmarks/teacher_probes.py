"""
Which retrieval probes a teacher passes: one row for each probe, as a Markdown table.

    python -m benchmarks.teacher_probes --ranked
    python -m benchmarks.teacher_probes --teacher some/folder --examples 100 --dtype float32
    python -m benchmarks.teacher_probes --probe '{name: copy, length: 24}' --probe '{name: mqar, pairs: 8}'

`exact` is the part of the questions whose greedy answer is right as a whole, `tokens` the part of the answers' tokens in
their places, `ranked` the part where the right candidate is the likeliest, `chance` what a guess among the candidates
gets. The heads of a teacher can be ranked by a probe that it passes (0.6 by default).
"""

import argparse

import torch
import yaml

from trainers.precision import resolve_dtype
from trainers.probes import is_correct, probe_from_settings, ranked_accuracy, token_accuracy, token_ids
from trainers.tasks import ProbeTask
from trainers.teachers import load_teacher
from trainers.workshop import resolve_teacher


# Questions on one text share its cost.
SHARED = {"queries": 5}
PROBES = [
    {"name": "kv", "format": "json", "pairs": 20, **SHARED},
    {"name": "kv", "format": "json", "pairs": 20, "values": "words", **SHARED},
    {"name": "kv", "format": "lines", "pairs": 20, "values": "words", **SHARED},
    {"name": "kv", "format": "paper", "pairs": 20, **SHARED},
    {"name": "phone_book", "pairs": 10, **SHARED},
    {"name": "mqar", "pairs": 20, **SHARED},
    {"name": "mqar", "pairs": 20, "values": "words", **SHARED},
    {"name": "copy", "values": "words", "length": 16},
    {"name": "copy", "values": "words", "length": 32},
    {"name": "copy", "values": "letters", "length": 16},
    {"name": "copy", "values": "letters", "length": 32},
    {"name": "copy", "values": "words", "length": 16, "copies": 1, "shots": 2},
    {"name": "ngram", "format": "suffix", **SHARED},
    {"name": "ngram", "format": "suffix", "repeats": True, **SHARED},
    {"name": "ngram", "format": "prefix"},
    {"name": "needle", "length": 200},
    {"name": "needle", "length": 200, "needles": 4, "shots": 1, "queries": 3},
    {"name": "choice", "options": 4, "shots": 4},
    {"name": "variables", "chains": 8, "hops": 1, **SHARED},
    {"name": "variables", "chains": 8, "hops": 2, **SHARED},
    {"name": "kv", "format": "json", "pairs": 100, **SHARED},
    {"name": "kv", "format": "json", "pairs": 5, "shots": 1, "values": "uuids", "queries": 4},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--teacher", default="smollm2", help="folder, Hub id or GGUF file (default: smollm2)")
    parser.add_argument("--probe", action="append", type=yaml.safe_load, help="settings of a probe; may be repeated")
    parser.add_argument("--examples", type=int, default=20, help="questions of each probe (default: 20)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument(
        "--ranked", action="store_true", help="rank the candidates as well, which reads every prompt anew"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    teacher = resolve_teacher(args.teacher)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_teacher(teacher, dtype=resolve_dtype(args.dtype, device), device=device)
    print(f"{args.teacher}, {args.examples} questions each, seed {args.seed}, {args.dtype} on {device}\n")
    print("| probe | prompt tokens | exact | tokens | ranked | chance |\n|---|---|---|---|---|---|")
    for settings in args.probe or PROBES:
        print(row(model, tokenizer, settings, args), flush=True)


def row(model, tokenizer, settings: dict, args: argparse.Namespace) -> str:
    """Measures one probe and writes its row."""
    task = ProbeTask(probe_from_settings(settings), num_examples=args.examples)
    pairs = task.ask(model, tokenizer, args.batch_size, args.seed, progress=False)
    examples = [example for example, _ in pairs]
    exact = sum(is_correct(text, example.answer) for example, text in pairs) / len(pairs)
    tokens = sum(token_accuracy(tokenizer, example, text) for example, text in pairs) / len(pairs)
    length = round(sum(len(token_ids(tokenizer, example.prompt)) for example in examples) / len(examples))
    ranked, chance = "-", "-"
    if len(examples[0].candidates) > 1:
        if args.ranked:
            correct, _ = ranked_accuracy(model, tokenizer, examples, progress=False)
            ranked = f"{sum(correct) / len(correct):.2f}"
        chance = f"{sum(1 / len(example.candidates) for example in examples) / len(examples):.2f}"
    return f"| `{task.name}` | {length} | {exact:.2f} | {tokens:.2f} | {ranked} | {chance} |"


if __name__ == "__main__":
    main()
