"""
The verbs of `hf-rad`: each turns the words of a command line into one call of [`trainers.actions`] or
[`trainers.pipeline`] and shows what came out. What a verb needs is imported when it runs.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from rich.console import Console

from trainers import head_verbs
from trainers.cli_output import command_line, done, show, workshop_of


def convert(args: argparse.Namespace) -> None:
    """Makes a student."""
    from trainers.actions import convert_student
    from trainers.hub.head_map_repo import find_head_map
    from trainers.pipeline import conversion_tables

    if args.head_map is None:
        raise ValueError("There is no head map: name a file, a folder, the teacher of a shipped map, or a Hub id.")
    workshop = workshop_of(
        args,
        convert={"mixing": args.mixing, "state_size": args.state_size},
        calibrate={"tokens": args.tokens},
        data={"text": args.text},
    )
    head_map = find_head_map(args.head_map, workshop.teacher_name, args.head_map_revision)
    outcome = convert_student(workshop, head_map, Path(args.out), args.scores and Path(args.scores))
    if args.format == "human" and not args.quiet:
        Console().print(*conversion_tables(outcome))
    show(args, {"student": args.out, **({} if args.format == "human" else outcome)})


def pack(args: argparse.Namespace) -> None:
    """Packs training data."""
    from trainers.data import packing, source_from_settings
    from trainers.recipe import DataSettings, Recipe
    from trainers.workshop import EXCERPT

    workshop = workshop_of(args)
    data = Recipe.load(args.config).data if args.config else DataSettings()
    sources = [{"text": text, "weight": float(weight)} for text, weight in args.source]
    sources += [{"text": text, "weight": float(weight), "field": "messages"} for text, weight in args.chat]
    for probe_format, weight in args.probe:
        sources.append({"probe": {"name": "kv", "format": probe_format}, "weight": float(weight)})
    settings = sources or data.mixture(str(EXCERPT / "train.jsonl.xz"))
    length = args.length or data.length
    manifest = packing.pack(
        args.out,
        workshop.tokenizer,
        [source_from_settings(source, args.seed, length) for source in settings],
        settings,
        length,
        args.tokens,
        args.seed,
        workshop.teacher_name,
        workshop.progress,
    )
    rows = [
        {"source": source.get("text") or source["probe"]["name"], **given, "share": given["tokens"] / manifest.tokens}
        for source, given in zip(manifest.sources, manifest.given, strict=True)
    ]
    facts = {"packed": args.out, "tokens": manifest.tokens, "rows": manifest.rows, "digest": manifest.digest}
    facts["megabytes"] = round(sum(file["bytes"] for file in manifest.files) / 1e6, 1)
    show(args, facts, "Sources", rows)


def teach(args: argparse.Namespace) -> None:
    """Stores a teacher's likeliest tokens."""
    from trainers.distillation.teaching import teach as store
    from trainers.precision import resolve_dtype
    from trainers.workshop import default_device

    workshop = workshop_of(args)
    teacher = workshop.teacher_in(resolve_dtype(args.dtype, default_device()))
    options = {"top_k": args.top_k, "batch_size": args.batch_size, "progress": workshop.progress}
    taught = store(args.out, args.packed, teacher, workshop.teacher_name, **options)
    show(args, {"taught": args.out, "top_k": taught.top_k, "files": taught.files})


def distill(args: argparse.Namespace) -> None:
    """Trains one stage."""
    from trainers.distill import main

    quiet = ["--disable_tqdm", "true"] if args.quiet or args.format == "json" else []
    folder = main(["--help"] if args.help_all else [*args.rest, *quiet])
    show(args, {"student": str(folder)})


def evaluate(args: argparse.Namespace) -> None:
    """Measures a teacher and its students."""
    from trainers import actions
    from trainers.evaluation import comparison_table, make_report
    from trainers.files import write_json

    settings = {
        "tasks": _tasks(args),
        "text_tokens": args.text_tokens,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
    }
    workshop = workshop_of(args, eval=settings, data={"text": args.text})
    controls = {}
    for control in args.control:
        name, equals, folder = control.partition("=")
        if not equals or not name or not folder:
            raise ValueError(f"--control is {control!r}; write NAME=FOLDER, such as '0 heads=control/'.")
        controls[name] = folder
    suite = actions.suite(workshop.recipe.eval.tasks, actions.trained_probes(args.student))
    report = make_report(
        workshop.teacher_name,
        actions.measure_teacher(workshop, suite),
        actions.measure_student(workshop, args.student, suite),
        {name: actions.measure_student(workshop, folder, suite) for name, folder in controls.items()},
        args.floor,
        args.seed,
        command_line(args),
        suite,
    )
    write_json(args.out, report)
    if args.format == "json":
        print(json.dumps(report, indent=1))
    elif not args.quiet:
        Console().print(comparison_table(report, f"{workshop.teacher_name} and its student"))
        done({"report": args.out})


def publish(args: argparse.Namespace) -> None:
    """Stages and pushes a student."""
    from trainers.hub.hub_upload import changes_table
    from trainers.hub.publish import publish as push
    from trainers.hub.staging import stage

    folder = stage(
        args.student,
        args.out or Path(args.student).parent / "published",
        report=args.eval,
        teacher=args.teacher,
        license=args.license,
        datasets=tuple(args.dataset),
        language=tuple(args.language or ("en",)),
    )
    publication = push(
        folder,
        args.repo_id,
        private=args.private or None,
        revision=args.revision,
        create_pr=args.create_pr,
        tag=args.tag,
        commit_message=args.commit_message,
        dry_run=args.dry_run,
        prompt=args.prompt,
    )
    facts = {"folder": str(folder), "url": publication.url, "commit": publication.commit, "tag": publication.tag}
    facts["pull_request"] = publication.pull_request
    if publication.reload is not None:
        facts["max_logit_difference"] = publication.reload.max_difference
        facts["generated"] = publication.reload.text
    if args.format == "json":
        facts["snippet"] = publication.snippet
    elif not args.quiet:
        Console().print(changes_table(publication.changes, args.repo_id or str(folder)))
    show(args, {name: value for name, value in facts.items() if value is not None})
    if args.format == "human" and not args.quiet and not args.dry_run:
        print(f"\n{publication.snippet}")


def verify(args: argparse.Namespace) -> None:
    """Checks a student as data."""
    from trainers.hub.inspection import inspect_student

    seen = inspect_student(args.student, args.revision, progress=args.format == "human" and not args.quiet)
    code = "the same as this hf-rad's" if seen.own_code else "of another version or another author: read it first"
    facts = {"student": seen.source, "commit": seen.commit, "code": code}
    show(args, {name: value for name, value in facts.items() if value is not None})


def run(args: argparse.Namespace) -> None:
    """Walks a recipe."""
    from trainers.recipe import Recipe

    recipe = Recipe.load(args.config).to_dict()
    _walk(args, {**recipe, "out": args.out or recipe["out"]})


def demo(args: argparse.Namespace) -> None:
    """Walks the recipe of the demo."""
    from trainers.recipe import Recipe, shipped_recipe

    recipe = Recipe.load(shipped_recipe("demo")).to_dict()
    if args.heads is not None:
        recipe["select"] = {"heads": args.heads}
    if args.text is not None:
        recipe["data"]["text"] = args.text
    if args.controls:
        recipe["students"] = ["found", "none", "random"]
    _walk(args, {**recipe, "out": args.out or recipe["out"]})


def _walk(args: argparse.Namespace, recipe: dict) -> None:
    from trainers.pipeline import Pipeline
    from trainers.recipe import Recipe

    if args.dry_run:
        _dry_run(args, Recipe.from_dict(recipe))
        return
    quiet = args.quiet or args.format == "json"
    report = Pipeline(Recipe.from_dict(recipe), command_line(args), quiet, args.fresh).run()
    if args.format == "json":
        print(json.dumps(report, indent=1))


def _dry_run(args: argparse.Namespace, recipe) -> None:
    """Prints what a recipe will cost, then, where its data is there, the steps to take."""
    from trainers.estimates import check_data, recipe_estimates
    from trainers.pipeline import Pipeline, estimates_table, plan_table
    from trainers.workshop import default_device

    estimates = recipe_estimates(recipe, default_device())
    if args.format == "human":
        Console().print(estimates_table(estimates))
    check_data(recipe)
    plan = Pipeline(recipe, command_line(args), True, args.fresh).plan()
    if args.format == "human":
        Console().print(plan_table(plan, f"Plan of {recipe.out}"))
    else:
        print(json.dumps({"steps": plan, "stages": [dataclasses.asdict(e) for e in estimates]}, indent=1))


def _tasks(args: argparse.Namespace) -> list[dict]:
    from trainers.recipe import EvalSettings

    tasks = [{**task, "num_examples": args.num_examples} for task in EvalSettings().tasks]
    tasks += [{"reading": path, "num_examples": args.num_examples} for path in args.reading]
    return tasks + [{"choices": path, "num_examples": args.num_examples} for path in args.choices]


VERBS = {
    "score": head_verbs.score,
    "select": head_verbs.select,
    "convert": convert,
    "pack": pack,
    "teach": teach,
    "distill": distill,
    "eval": evaluate,
    "publish": publish,
    "verify": verify,
    "run": run,
    "demo": demo,
    "heads show": head_verbs.show_heads,
    "heads compare": head_verbs.compare_heads,
    "heads curves": head_verbs.draw_curves,
    "heads kinds": head_verbs.show_kinds,
    "heads layers": head_verbs.measure_layers,
    "heads locate": head_verbs.locate,
    "heads push": head_verbs.push_heads,
    "heads pull": head_verbs.pull_heads,
}
