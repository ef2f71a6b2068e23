"""
Selectors at equal cache bytes: each makes a student of the same teacher, with the same fit, the same short alignment and
the same questions. The budget is as many KV groups as `--layers` whole layers have, wherever they stand.

    python -m benchmarks.selectors --out runs/selectors --tokens 1_048_576 --batch-tokens 16384 --rows 32 --prompts 100
    python -m benchmarks.selectors --out runs/try --tokens 4096 --num-examples 8       a rehearsal on a CPU

Everything lies in `--out` as soon as it is made, and is not made again when the command is given anew. It runs on the
GPU where there is one. Prints one table and writes `selectors.json` and `selectors.png`.
"""

import argparse
import shutil
import time
from pathlib import Path

from trainers import actions, head_actions
from trainers.evaluation import hardware, versions
from trainers.files import read_json, write_json
from trainers.heads.head_map import HeadMap
from trainers.heads.head_scores import HeadScores
from trainers.heads.selection import (
    CacheBudget,
    best_layers,
    every_nth_layer,
    no_heads,
    random_heads,
    top_groups,
    top_k,
    uniform_layers,
)
from trainers.plots import accuracy_bars
from trainers.recipe import Recipe, StageSettings
from trainers.workshop import Workshop


def main() -> None:
    args = parse()
    out = Path(args.out)
    workshop = Workshop(Recipe.from_dict(recipe(args)))
    scores = scored(workshop, args, out)
    cache, maps = budget(scores.teacher, args), head_maps(workshop, scores, args, out)
    report = {}
    for name, head_map in maps.items():
        if args.students and name not in args.students:
            continue
        begun = time.perf_counter()
        # Two selectors that choose the same heads share one student.
        first = next(other for other in maps if maps[other].pairs == head_map.pairs)
        measured = student(workshop, maps[first], args, out / first.replace(" ", "-"))
        cost = cache.cost(scores.teacher, head_map.pairs)
        report[name] = {**measured, "cache_bytes": cost, "summary": head_map.summary}
        print(f"{name}: {time.perf_counter() - begun:.0f} s", flush=True)
    show(report, cache, args, out)


def student(workshop, head_map: HeadMap, args, folder: Path) -> dict:
    """Converts, fits, aligns and measures the student of a head map, as far as that is not done."""
    converted, aligned, measured = folder / "student", folder / "alignment", folder / "measured.json"
    head_map.save(folder / "head_map.json")
    if not measured.is_file():
        if not (aligned / actions.TRAINING).is_file():
            if not converted.is_dir():
                actions.convert_student(workshop, head_map, converted)
                config = converted / "config.json"
                write_json(config, read_json(config) | {"ssm_backend": args.backend})
            at_once = {"per_device_train_batch_size": args.rows} if args.rows else {}
            settings = StageSettings(args.tokens, args.batch_tokens, {"mixer_learning_rate": 2e-3, **at_once})
            actions.train(workshop, converted, aligned, "alignment", settings)
        suite = actions.suite(workshop.recipe.eval.tasks, workshop.recipe.data.probes)
        write_json(measured, actions.measure_student(workshop, aligned, suite))
        shutil.rmtree(converted, ignore_errors=True)
    return read_json(measured)


def recipe(args) -> dict:
    """The demo's data; no distillation."""
    probes = [{"name": "kv", "format": "json", "pairs": pairs} for pairs in (10, 20, 40)]
    probes += [{"name": "kv", "format": "json", "pairs": 20, "values": "words"}]
    return {
        "teacher": args.teacher,
        "seed": args.seed,
        "data": {"length": 512, "probes": probes},
        "calibrate": {"tokens": args.fit_tokens},
        "eval": {
            "text_tokens": 4096,
            "batch_size": args.prompts,
            "tasks": [
                {"probe": {"name": "kv", "shots": 2, "queries": 4, **probe}, "num_examples": args.num_examples}
                for probe in (
                    {"format": "json", "pairs": 20},
                    {"format": "json", "pairs": 20, "values": "words"},
                    {"format": "lines", "pairs": 20},
                    {"name": "phone_book", "pairs": 10},
                )
            ],
        },
    }


def scored(workshop, args, out: Path) -> HeadScores:
    """The scores given, or those of the teacher."""
    path = Path(args.scores) if args.scores else out / "scores.json"
    return HeadScores.load(path) if path.is_file() else head_actions.score(workshop, out)


def budget(teacher, args) -> CacheBudget:
    """The KV cache of whole layers, and the states of the other heads where each KV group has one kept head."""
    whole = uniform_layers(teacher, heads=args.layers * teacher.num_attention_heads)
    one_each = [(layer, head) for layer, head in whole.pairs if head % teacher.queries_per_group == 0]
    return CacheBudget(CacheBudget(0, args.cache_tokens).cost(teacher, one_each), args.cache_tokens)


def head_maps(workshop, scores: HeadScores, args, out: Path) -> dict[str, HeadMap]:
    """One map for each selector."""
    cache, teacher = budget(scores.teacher, args), scores.teacher
    if not (out / "layers.json").is_file():
        head_actions.measure_layers(workshop, args.num_examples, args.text_tokens, out / "layers.json")
    layers = read_json(out / "layers.json")
    return {
        "top groups": top_groups(scores, cache=cache),
        "top-k": top_k(scores, cache=cache),
        "leave one layer out": best_layers(teacher, layers["leave-one-layer-out"], "leave-one-layer-out", cache=cache),
        "KL-guided layers": best_layers(teacher, layers["kl-guided"], "kl-guided", cache=cache),
        "uniform layers": uniform_layers(teacher, cache=cache),
        "every n-th layer": every_nth_layer(teacher, teacher.num_hidden_layers // args.layers),
        "random heads": random_heads(teacher, cache=cache, seed=args.seed),
        "no heads": no_heads(teacher),
    }


def show(report: dict, cache: CacheBudget, args, out: Path) -> None:
    """Prints the table, and draws it."""
    trained = f"fit on {args.fit_tokens:,} tokens, alignment on {args.tokens:,}, one run, seed {args.seed}"
    print(f"{args.teacher}: {cache.bytes / 1e6:.2f} MB of cache at {cache.tokens} tokens; {trained}; {hardware()}")
    results = next(iter(report.values()))["results"]
    tasks = list(results)
    print(f"{'':22s}", *(f"{task:>24s}" for task in tasks), f"{'loss on text':>14s}{'MB of cache':>13s}  kept")
    print(f"{'':22s}", *(f"{'trained on' if results[task]['trained_on'] else 'held out':>24s}" for task in tasks))
    for name, measured in report.items():
        values = (f"{measured['results'][task]['score']:24.2f}" for task in tasks)
        megabytes = measured["cache_bytes"] / 1e6
        print(f"{name:22s}", *values, f"{measured['text_loss']:14.2f}{megabytes:13.2f}  {measured['summary']}")
    bars = {name: {task: one["results"][task]["score"] for task in tasks} for name, one in report.items()}
    accuracy_bars(bars, out / "selectors.png", f"Selectors at {cache.bytes / 1e6:.1f} MB of cache", "top groups")
    write_json(
        out / "selectors.json",
        {
            "budget": cache.bytes,
            "tokens": cache.tokens,
            "trained": trained,
            "versions": versions(),
            "students": report,
        },
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of what is made")
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--scores", help="scores.json of the teacher, where it was scored before")
    parser.add_argument("--layers", type=int, default=2, help="whole layers that set the budget (default: 2)")
    parser.add_argument("--cache-tokens", type=int, default=8192, help="tokens at which bytes are counted")
    parser.add_argument("--fit-tokens", type=int, default=24_576, help="tokens of the closed-form fit")
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens of the alignment (default: 65536)")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens of a step (default: 2048)")
    parser.add_argument("--text-tokens", type=int, default=8192, help="tokens of text for the KL-guided layers")
    parser.add_argument("--num-examples", type=int, default=100, help="questions of each task (default: 100)")
    parser.add_argument("--rows", type=int, help="rows of 512 tokens that a step runs at once (default: at most 8)")
    parser.add_argument("--prompts", type=int, default=25, help="questions asked at once (default: 25)")
    parser.add_argument("--students", nargs="+", help="make these only; several commands can share the work")
    parser.add_argument("--backend", default="auto", help="back end of the recurrence's scan (default: auto)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
