"""
What each part of the recipe is worth: students of one teacher that differ from a base recipe in one thing.

    python -m benchmarks.recipe_ablation --out runs/ablation
    python -m benchmarks.recipe_ablation --out runs/try --tokens 2048 --num-examples 4     a rehearsal

A cell is a chain of steps; every step is a folder in `--out` that cells with the same beginning share. The command
given anew goes on where it was stopped, from a checkpoint in the middle of a step. Prints one table and writes
`ablation.json` and `ablation.png`. Every cell is one run, on the same rows in the same order.
"""

import argparse
import dataclasses
import shutil
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from modeling_rad_hybrid import RadHybridForCausalLM
from trainers import actions
from trainers.distillation.distill_trainer import NEW_PARTS
from trainers.evaluation import hardware, versions
from trainers.files import atomic_path, read_json, write_json
from trainers.heads.head_map import HeadMap
from trainers.recipe import ConvertSettings, Recipe, StageSettings
from trainers.workshop import Workshop


# Name of a cell: its steps. A first step `convert` may name what it builds otherwise.
CELLS = {
    "calibration alone": ("convert", "fit"),
    "alignment alone": ("convert", "fit", "align"),
    "base": ("convert", "fit", "align", "distil"),
    "teacher's own weights at 0": ("convert", "fit", "align", "distil at 0"),
    "teacher's own weights at 2e-4": ("convert", "fit", "align", "distil at 2e-4"),
    "not calibrated": ("convert", "align", "distil"),
    "not calibrated, as many tokens": ("convert", "align more", "distil"),
    "random start": ("convert", "random", "fit", "align", "distil"),
    "distillation alone": ("convert", "fit", "distil alone"),
    "distillation alone, mixers at 1e-3": ("convert", "fit", "distil alone at 1e-3"),
    "mixing parallel": ("convert parallel", "fit", "align", "distil"),
    "d_state 4": ("convert 4", "fit", "align", "distil"),
    "d_state 16": ("convert 16", "fit", "align", "distil"),
    "orientation first": ("convert", "orient", "align less", "distil"),
}
CONVERSIONS = {
    "convert": ConvertSettings(),
    "convert parallel": ConvertSettings(mixing="parallel"),
    "convert 4": ConvertSettings(state_size=4),
    "convert 16": ConvertSettings(state_size=16),
}
# Of the tokens trained on, the share of the alignment, and of an orientation before it; the rest is for the distillation.
ALIGNED, ORIENTED = 0.75, 0.25
ALIGNMENT_RATE, RATE = 1e-3, 2e-5
JSON = "kv-json-20x2-numbers"


def main() -> None:
    args = parse()
    out = Path(args.out)
    settings, written = (
        {key: value for key, value in vars(args).items() if key not in ("out", "quiet")},
        out / "settings.json",
    )
    if written.is_file() and read_json(written) != settings:
        raise SystemExit(f"{out} holds cells of other settings, {read_json(written)}. Name another folder with --out.")
    write_json(written, settings)
    measured_by = {name: out / "measured" / f"{name.replace(' ', '-')}.json" for name in ("teacher", *CELLS)}
    workshop = Workshop(recipe(args), progress=not args.quiet)
    if not measured_by["teacher"].is_file():
        write_json(measured_by["teacher"], actions.measure_teacher(workshop, suite(workshop)))
    for name, steps in CELLS.items():
        if measured_by[name].is_file():
            continue
        for number in range(1, len(steps) + 1):
            take(workshop, args, out, steps[:number])
        print(f"{name}: measuring", flush=True)
        write_json(measured_by[name], actions.measure_student(workshop, folder(out, steps), suite(workshop)))
        missing = [cell for cell in CELLS if not measured_by[cell].is_file()]
        needed = {folder(out, CELLS[cell][:n]) for cell in missing for n in range(1, len(CELLS[cell]) + 1)}
        for made in (folder(out, steps[:n]) for n in range(1, len(steps) + 1)):
            if made not in needed:
                shutil.rmtree(made, ignore_errors=True)
        show({cell: read_json(path) for cell, path in measured_by.items() if path.is_file()}, args, out)
    show({cell: read_json(path) for cell, path in measured_by.items()}, args, out)


def folder(out: Path, steps: tuple[str, ...]) -> Path:
    """The folder of a student after these steps."""
    return out / "students" / "+".join(steps).replace(" ", "-")


def take(workshop: Workshop, args, out: Path, steps: tuple[str, ...]) -> None:
    """Takes the last of these steps, unless it is done."""
    *before, step = steps
    source, made = folder(out, tuple(before)), folder(out, steps)
    if (made / actions.TRAINING).is_file():
        return
    print(f"{' > '.join(steps)}", flush=True)
    if step in CONVERSIONS:
        settings = dataclasses.replace(
            workshop.recipe,
            convert=CONVERSIONS[step],
            calibrate=dataclasses.replace(workshop.recipe.calibrate, tokens=0),
        )
        actions.convert_student(Workshop(settings, workshop.progress), HeadMap.load(args.head_map), made)
    elif step in ("random", "fit"):
        student = actions.load_student(source)
        training = read_json(source / actions.TRAINING)
        if step == "random":
            student = forgotten(student, args.seed)
        else:
            actions.fit_readout(workshop, student)
            training["tokens_trained"] += args.fit_tokens
        actions.save_student(student, workshop, made, HeadMap.load(source), None, training)
    else:
        stage, settings = stages(args)[step]
        actions.train(workshop, source, made, stage, settings, resume=True)


@torch.no_grad()
def forgotten(student: RadHybridForCausalLM, seed: int) -> RadHybridForCausalLM:
    """The student with the model's own random start in all that conversion had taken over into recurrent heads."""
    torch.manual_seed(seed)
    fresh = RadHybridForCausalLM(student.config).eval()
    kept = {name: t for name, t in student.state_dict().items() if not any(part in name for part in NEW_PARTS)}
    fresh.load_state_dict(kept, strict=False)
    return fresh


def stages(args) -> dict[str, tuple[str, StageSettings]]:
    """Training steps by name: stage of the trainer, tokens and arguments."""
    aligned, oriented = (round(s * args.tokens / args.batch_tokens) * args.batch_tokens for s in (ALIGNED, ORIENTED))
    common = {"isolate_documents": False, "save_strategy": "steps", "save_steps": 12, "save_total_limit": 1}

    def distillation(tokens: int, rate: float, mixer_rate: float) -> tuple[str, StageSettings]:
        rates = {"learning_rate": rate, "mixer_learning_rate": mixer_rate, "kl_positions": 128, "warmup_steps": 0.2}
        return "distillation", StageSettings(tokens, args.batch_tokens, {**rates, **common})

    def by_layer(stage: str, tokens: int) -> tuple[str, StageSettings]:
        return stage, StageSettings(tokens, args.batch_tokens, {"mixer_learning_rate": ALIGNMENT_RATE, **common})

    return {
        "orient": by_layer("orientation", oriented),
        "align": by_layer("alignment", aligned),
        "align more": by_layer("alignment", aligned + args.fit_tokens),
        "align less": by_layer("alignment", aligned - oriented),
        "distil": distillation(args.tokens - aligned, RATE, RATE),
        "distil at 0": distillation(args.tokens - aligned, 0.0, RATE),
        "distil at 2e-4": distillation(args.tokens - aligned, 10 * RATE, RATE),
        "distil alone": distillation(args.tokens, RATE, RATE),
        "distil alone at 1e-3": distillation(args.tokens, RATE, ALIGNMENT_RATE),
    }


def suite(workshop: Workshop) -> list:
    return actions.suite(workshop.recipe.eval.tasks, workshop.recipe.data.probes)


def recipe(args) -> Recipe:
    """The demo's data."""
    probes = [{"name": "kv", "format": "json", "pairs": pairs} for pairs in (10, 20, 40)]
    probes += [{"name": "kv", "format": "json", "pairs": 20, "values": "words"}]
    probes += [{"name": "kv", "format": "paper", "pairs": 20}]
    asked = ({"format": "json"}, {"format": "json", "values": "words"}, {"format": "lines"})
    return Recipe.from_dict(
        {
            "teacher": args.teacher,
            "seed": args.seed,
            # More than one, so that the teacher is asked once about the rows of the distillation.
            "students": ["found", "none"],
            "data": {"length": 512, "probes": probes},
            "calibrate": {"tokens": args.fit_tokens},
            "eval": {
                "text_tokens": 4096,
                "tasks": [
                    {
                        "probe": {"name": "kv", "pairs": 20, "shots": 2, "queries": 4, **probe},
                        "num_examples": args.num_examples,
                    }
                    for probe in asked
                ],
            },
        }
    )


def show(report: dict[str, dict], args, out: Path) -> None:
    """Prints the table, and writes and draws it."""
    conditions = (
        f"fit on {args.fit_tokens:,} tokens, training on {args.tokens:,}; {args.num_examples} questions a task; "
    )
    conditions += f"one run, seed {args.seed}; {hardware()}"
    results = report["teacher"]["results"]
    print(f"\n{args.teacher}; {conditions}")
    kinds = ("trained on" if result["trained_on"] else "held out" for result in results.values())
    titles = [f"{task}, {kind}" for task, kind in zip(results, kinds, strict=True)]
    print("|", " | ".join([" " * 34, *titles, "text loss", "tokens seen"]), "|")
    print("| --- |" + " ---: |" * (len(titles) + 2))
    for name, measured in report.items():
        scores = (
            f"{measured['results'][task]['score']:{len(title)}.2f}"
            for task, title in zip(results, titles, strict=True)
        )
        tokens = f"{measured.get('tokens_trained') or 0:,}"
        print(f"| {name:34s} | {' | '.join(scores)} | {measured['text_loss']:9.3f} | {tokens:>11s} |", flush=True)
    about = {"teacher": args.teacher, "conditions": conditions, "settings": vars(args), "versions": versions()}
    write_json(out / "ablation.json", {**about, "steps": CELLS, "cells": report})
    draw(report, out / "ablation.png")


def draw(report: dict[str, dict], path: Path) -> None:
    """Two bars a cell: retrieval, and how far its loss on text is above the teacher's."""
    cells = [name for name in report if name != "teacher"]
    if not cells:
        return
    least = report["teacher"]["text_loss"]
    panels = {
        f"accuracy, {JSON}": [report[name]["results"][JSON]["score"] for name in cells],
        "text loss above the teacher's (nats)": [report[name]["text_loss"] - least for name in cells],
    }
    figure = Figure(figsize=(9, 0.32 * len(cells) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, values) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        colours = ["#e4572e" if name == "base" else "#5b8fd0" for name in cells]
        axes.bar_label(axes.barh(cells, values, color=colours), fmt="%.2f", padding=2, fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=160, format="png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of what is made")
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--head-map", default="hub_cards/head_maps/HuggingFaceTB--SmolLM2-135M-Instruct.json")
    parser.add_argument(
        "--fit-tokens", type=int, default=16_384, help="tokens of the closed-form fit (default: 16384)"
    )
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens trained on (default: 16384)")
    parser.add_argument("--batch-tokens", type=int, default=512, help="tokens of a step (default: 512)")
    parser.add_argument("--num-examples", type=int, default=48, help="questions of each task (default: 48)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
