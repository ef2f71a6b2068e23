"""
Measures one model of the paper's tables by the code of `hf-rad eval`, in a process of its own.

    python -m benchmarks.paper.measure teacher --out runs/paper/teacher.json
    python -m benchmarks.paper.measure runs/paper/good/distillation --out runs/paper/good/measured.json
    python -m benchmarks.paper.measure runs/paper/good/distillation --out runs/paper/good/ablated.json --ablate

`--curve` asks a shorter suite (the retrieval tasks, a third of the questions), for the points of a curve. `--ablate`
looks where a student's retrieval sits: its heads ablated, kept ones singly and in groups (the paper's Table 6).
"""

import argparse
import dataclasses
import datetime
import time
from pathlib import Path

from benchmarks.paper.cell import RECIPE
from trainers import actions
from trainers.evaluation import hardware, versions
from trainers.files import write_json
from trainers.heads.student_heads import locate_retrieval
from trainers.precision import resolve_dtype
from trainers.probes import KVRetrieval, PhoneBook
from trainers.recipe import Recipe
from trainers.tasks import ChoiceTask, Task
from trainers.workshop import Workshop, default_device


CURVE_EXAMPLES = 80
ABLATED = [KVRetrieval(format="json", pairs=20, queries=4), PhoneBook(pairs=10, queries=4)]
ABLATED_EXAMPLES = 100


def asked(workshop: Workshop, curve: bool = False) -> list[Task]:
    """The recipe's tasks, marked as trained on where the packed rows hold their format; for a curve the shorter suite."""
    suite = actions.suite(workshop.recipe.eval.tasks, workshop.trained_probes)
    if not curve:
        return suite
    return [
        dataclasses.replace(task, num_examples=min(task.num_examples, CURVE_EXAMPLES))
        for task in suite
        if not isinstance(task, ChoiceTask)
    ]


def measure(name: str, recipe: Recipe, out: Path, curve: bool = False, ablate: bool = False) -> None:
    """
    Measures the teacher (`name` is `"teacher"`) or the student of a folder and writes what
    [`trainers.actions.measure_student`] gives, with the settings of the tasks and how it was measured.
    """
    workshop, began = Workshop(recipe, progress=False), time.monotonic()
    suite = asked(workshop, curve)
    if name == "teacher":
        measured = actions.measure_teacher(workshop, suite)
    else:
        measured = actions.measure_student(workshop, name, suite)
    measured |= {"tasks": {task.name: task.settings() for task in suite}, "seed": recipe.seed}
    measured |= {"hardware": hardware(), "versions": versions(), "date": datetime.date.today().isoformat()}
    measured["seconds"] = round(time.monotonic() - began, 1)
    write_json(out, measured)
    print(f"{name}: measured in {measured['seconds']} s", flush=True)


def ablate(folder: str, recipe: Recipe, out: Path) -> None:
    """Ablates a student's own heads on a trained format and on one that no training data holds."""
    workshop = Workshop(recipe, progress=False)
    student = actions.load_student(folder, resolve_dtype(recipe.eval.dtype, default_device()))
    found = {
        probe.name: locate_retrieval(student, workshop.tokenizer, probe, ABLATED_EXAMPLES, progress=False).to_dict()
        for probe in ABLATED
    }
    write_json(out, found)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.measure")
    parser.add_argument("model", help="`teacher`, or the folder of a student")
    parser.add_argument("--recipe", default=str(RECIPE))
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--curve", action="store_true", help="the shorter suite")
    parser.add_argument("--ablate", action="store_true", help="ablate the student's own heads instead")
    args = parser.parse_args(arguments)
    recipe = Recipe.load(args.recipe)
    if args.ablate:
        ablate(args.model, recipe, Path(args.out))
    else:
        measure(args.model, recipe, Path(args.out), args.curve)


if __name__ == "__main__":
    main()
