"""
How far a ranking of heads can be trusted: exact scores over seeds and formats, the screens and the greedy order beside
them, and what is left of the teacher with only its best heads, or without them.

    python -m benchmarks.head_rankings --out runs/rankings                       SmolLM2-135M-Instruct, 100 questions
    python -m benchmarks.head_rankings --out runs/try --num-examples 10 --seeds 0 --formats json --steps 2

Everything lies in `--out` as soon as it is measured, and is not measured again when the command is given anew. It runs
on the GPU where there is one. Prints one table of overlaps and writes `curves-<format>.json` and `.png`.
"""

import argparse
import itertools
from pathlib import Path

from trainers.evaluation import hardware, versions
from trainers.files import read_json, write_json
from trainers.heads.ablation import tokens_at_once
from trainers.heads.head_compare import overlap, spearman
from trainers.heads.head_curves import curve, greedy
from trainers.heads.head_scores import HeadScores
from trainers.heads.head_scoring import score_heads
from trainers.heads.screens import SCREENS, screen_heads
from trainers.plots import accuracy_curves
from trainers.precision import DTYPES
from trainers.probes import KVRetrieval
from trainers.probes.probe_rows import PackedExamples, pack
from trainers.recipe import Recipe
from trainers.workshop import Workshop


# Each format with the values that SmolLM2-135M-Instruct answers in it.
FORMATS = {"json": "numbers", "lines": "words", "paper": "numbers"}


def main() -> None:
    args = parse()
    out = Path(args.out)
    workshop = Workshop(Recipe(teacher=args.teacher))
    rankings = {}
    for form, seed in itertools.product(args.formats, args.seeds):
        probe = KVRetrieval(format=form, values=FORMATS[form], pairs=20, shots=2, queries=10)
        scores = exact(workshop, probe, seed, args, out / f"scores-{form}-{seed}.json")
        rankings[form, seed, "ablation"] = scores.ranking()
        for screen in args.screens:
            rankings[form, seed, screen] = screened(workshop, probe, seed, screen, args, out)
        rankings[form, seed, "greedy"] = greedily(workshop, probe, seed, scores, args, out)
        if seed == args.seeds[0]:
            draw(workshop, probe, seed, scores, args, out)
    print(f"{workshop.teacher_name}, {args.num_examples} questions, {args.dtype}, {hardware()}, {versions()}")
    write_json(out / "overlaps.json", {**overlaps(rankings, args), "survivors": survivors(rankings, args)})


def exact(workshop, probe, seed: int, args, path: Path) -> HeadScores:
    """All heads ablated on all questions."""
    if not path.is_file():
        score_heads(
            workshop.teacher,
            workshop.tokenizer,
            probe,
            args.num_examples,
            seed,
            teacher=workshop.shape,
            dtype=DTYPES[args.dtype],
            min_accuracy=0.5,
            partial_path=path.with_suffix(".partial.jsonl"),
        ).save(path)
    return HeadScores.load(path)


def screened(workshop, probe, seed: int, screen: str, args, out: Path) -> list[tuple[int, int]]:
    """The ranking that a screen gives by itself."""

    def measure() -> dict:
        examples = probe.examples(args.num_examples, seed)
        return {"table": screen_heads(workshop.teacher, workshop.tokenizer, examples, screen)}

    table = kept(out / f"{screen}-{probe.format}-{seed}.json", measure)["table"]
    pairs = [(layer, head) for layer, row in enumerate(table) for head in range(len(row))]
    return sorted(pairs, key=lambda pair: -table[pair[0]][pair[1]])


def greedily(workshop, probe, seed: int, scores: HeadScores, args, out: Path) -> list[tuple[int, int]]:
    """The best heads, each looked for beside those that are removed already."""

    def measure() -> dict:
        pool = scores.ranking()[: args.pool]
        batches = questions(workshop, probe, args.greedy_examples, seed, len(pool))
        return greedy(workshop.teacher, workshop.tokenizer, batches, pool, args.steps).to_dict()

    return [tuple(pair) for pair in kept(out / f"greedy-{probe.format}-{seed}.json", measure)["order"]]


def draw(workshop, probe, seed: int, scores: HeadScores, args, out: Path) -> None:
    """Keep-only and remove-top curves, with ablated heads at zero and at their means."""

    def measure() -> dict:
        every, order = scores.teacher.num_heads, scores.ranking()
        counts = [0, *(2**i for i in range(every.bit_length()) if 2**i < every), every]
        # Other questions than those that chose the order.
        batches = questions(workshop, probe, args.num_examples, seed + 1000, len(counts))
        curves = {}
        for mode, ablation in itertools.product(("keep", "remove"), ("zero", "mean")):
            one = curve(workshop.teacher, workshop.tokenizer, batches, order, counts, mode, ablation)
            curves[f"{'only the best kept' if mode == 'keep' else 'the best removed'}, {ablation}"] = one.to_dict()
        return curves

    curves = kept(out / f"curves-{probe.format}.json", measure)
    lines = {name: (one["counts"], one["accuracy"]) for name, one in curves.items()}
    title = f"{workshop.teacher_name.split('/')[-1]}, {probe.name}"
    accuracy_curves(lines, out / f"curves-{probe.format}.png", title, f"heads, of {scores.teacher.num_heads}")
    print(f"{probe.name}: accuracy with the best heads of {scores.teacher.num_heads}")
    for name, (counts, accuracies) in lines.items():
        print(f"  {name:26s}", *(f"{count}: {value:.2f}" for count, value in zip(counts, accuracies, strict=True)))


def questions(workshop, probe, number: int, seed: int, copies: int) -> list[PackedExamples]:
    """Questions in batches of which so many copies fit into a forward call."""
    model, examples = workshop.teacher, probe.examples(number, seed)
    return pack(workshop.tokenizer, examples, None, model.device, tokens=tokens_at_once(model, None) // copies)


def overlaps(rankings: dict, args) -> dict:
    """Prints and returns how alike the rankings are."""

    def mean(pairs: list[tuple], count: int) -> float | None:
        values = [overlap(one, two, count) for one, two in pairs if min(len(one), len(two)) >= count]
        return sum(values) / len(values) if values else None

    reference = {key[:2]: order for key, order in rankings.items() if key[2] == "ablation"}
    groups = {
        "ablation, other seed": [
            (reference[form, one], reference[form, two])
            for form in args.formats
            for one, two in itertools.combinations(args.seeds, 2)
        ],
        "ablation, other format": [
            (reference[one, seed], reference[two, seed])
            for one, two in itertools.combinations(args.formats, 2)
            for seed in args.seeds
        ],
    }
    for method in (*args.screens, "greedy"):
        groups[f"{method} against ablation"] = [
            (reference[key[:2]], order) for key, order in rankings.items() if key[2] == method
        ]
    report = {}
    print(f"{'overlap of the best heads':34s}{'@4':>7s}{'@8':>7s}{'@20':>7s}{'Spearman':>10s}")
    for name, pairs in groups.items():
        row = {str(count): mean(pairs, count) for count in (4, 8, 20)}
        correlations = [value for one, two in pairs if (value := spearman(one, two)) is not None]
        row["spearman"] = sum(correlations) / len(correlations) if correlations else None
        report[name] = {**row, "pairs": len(pairs)}
        print(f"{name:34s}", *(f"{'-' if value is None else f'{value:.2f}':>6s}" for value in row.values()))
    return report


def survivors(rankings: dict, args) -> dict:
    """Prints and returns how many heads a screen must let through to miss none of the best, for each format and seed."""
    needed = {}
    for screen, count in itertools.product(args.screens, (8, 20)):
        ranks = {
            f"{form}, seed {seed}": max(map(rankings[form, seed, screen].index, order[:count])) + 1
            for (form, seed, method), order in rankings.items()
            if method == "ablation"
        }
        needed[f"{screen}, best {count}"] = ranks
        print(f"{screen} has the best {count} among its first:", "; ".join(f"{run}: {n}" for run, n in ranks.items()))
    return needed


def kept(path: Path, measure) -> dict:
    """What is in the file, or what is measured now and put there."""
    if not path.is_file():
        write_json(path, measure())
    return read_json(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of what is measured")
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--num-examples", type=int, default=100, help="questions (default: 100)")
    parser.add_argument("--formats", nargs="+", default=["json", "lines"], choices=FORMATS)
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the exact scores (default: float32)")
    parser.add_argument("--screens", nargs="*", default=list(SCREENS), choices=SCREENS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pool", type=int, default=40, help="best heads that the greedy order chooses from")
    parser.add_argument("--steps", type=int, default=8, help="heads that it orders (default: 8)")
    parser.add_argument("--greedy-examples", type=int, default=40, help="questions it asks (default: 40)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
