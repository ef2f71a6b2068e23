"""
The verbs of `hf-rad`: each turns the words of a command line into one call of [`trainers.actions`] or
[`trainers.pipeline`] and shows what came out. What a verb needs is imported when it runs.
"""

import argparse
import dataclasses
import json
import shlex
from pathlib import Path

from rich.console import Console
from rich.table import Table


def score(args: argparse.Namespace) -> None:
    """Scores a teacher's heads."""
    from trainers import actions
    from trainers.shared_work import is_main_process

    settings = {
        "probe": _probe(args),
        "num_examples": args.num_examples,
        "min_accuracy": args.min_accuracy,
        "dtype": args.dtype,
        "ablation": args.ablation,
        "answers": args.answers,
        "screen": args.screen,
        "survivors": args.survivors,
    }
    scores = actions.score(_workshop(args, score=settings), Path(args.out))
    if not is_main_process():
        return
    rows = [
        {
            "layer": layer,
            "head": head,
            "accuracy drop": scores.accuracy_drop[layer][head],
            "log-probability drop": scores.logprob_drop[layer][head],
        }
        for layer, head in scores.ranking()[: args.show]
    ]
    files = {"scores": f"{args.out}/scores.json", "heat_map": f"{args.out}/scores.png"}
    _show(args, {**files, "accuracy": scores.base_accuracy}, f"The {len(rows)} heads that cost most", rows)


def select(args: argparse.Namespace) -> None:
    """Chooses the kept heads."""
    from trainers import selection
    from trainers.actions import draw
    from trainers.head_scores import HeadScores

    scores = HeadScores.load(args.scores)
    budget = {"heads": args.heads, "fraction": args.fraction}
    if args.cache_bytes is not None:
        budget["cache"] = selection.CacheBudget(args.cache_bytes, args.tokens, args.state_size)
    if args.method == "every-nth-layer":
        if args.n is None:
            raise ValueError("--method every-nth-layer keeps one layer in n; give --n.")
        head_map = selection.every_nth_layer(scores.teacher, args.n)
    elif args.threshold is not None:
        head_map = selection.threshold(scores, accuracy_drop=args.threshold)
    elif args.method == "random":
        head_map = selection.random_heads(scores.teacher, seed=args.seed, **budget)
    elif args.method == "uniform-layers":
        head_map = selection.uniform_layers(scores.teacher, **budget)
    elif args.method == "top-groups":
        head_map = selection.top_groups(scores, **budget)
    else:
        head_map = selection.top_k(scores, fill_groups=args.fill_groups, **budget)
    head_map.save(args.out)
    picture = Path(args.out).with_suffix(".png")
    draw(scores, head_map, picture)
    _show(args, {"head_map": args.out, "heat_map": str(picture)}, *_kept(head_map))


def convert(args: argparse.Namespace) -> None:
    """Makes a student."""
    from trainers.actions import convert_student
    from trainers.head_map_repo import find_head_map
    from trainers.pipeline import conversion_tables

    if args.head_map is None:
        raise ValueError("There is no head map: name a file, a folder, the teacher of a shipped map, or a Hub id.")
    workshop = _workshop(
        args,
        convert={"mixing": args.mixing, "state_size": args.state_size},
        calibrate={"tokens": args.tokens},
        data={"text": args.text},
    )
    head_map = find_head_map(args.head_map, workshop.teacher_name, args.head_map_revision)
    outcome = convert_student(workshop, head_map, Path(args.out), args.scores and Path(args.scores))
    if args.format == "human" and not args.quiet:
        Console().print(*conversion_tables(outcome))
    _show(args, {"student": args.out, **({} if args.format == "human" else outcome)})


def pack(args: argparse.Namespace) -> None:
    """Packs training data."""
    from trainers import packing
    from trainers.data import source_from_settings
    from trainers.recipe import DataSettings, Recipe
    from trainers.workshop import EXCERPT

    workshop = _workshop(args)
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
    _show(args, facts, "Sources", rows)


def teach(args: argparse.Namespace) -> None:
    """Stores a teacher's likeliest tokens."""
    from trainers.precision import resolve_dtype
    from trainers.teaching import teach as store
    from trainers.workshop import default_device

    workshop = _workshop(args)
    teacher = workshop.teacher_in(resolve_dtype(args.dtype, default_device()))
    options = {"top_k": args.top_k, "batch_size": args.batch_size, "progress": workshop.progress}
    taught = store(args.out, args.packed, teacher, workshop.teacher_name, **options)
    _show(args, {"taught": args.out, "top_k": taught.top_k, "files": taught.files})


def distill(args: argparse.Namespace) -> None:
    """Trains one stage."""
    from trainers.distill import main

    quiet = ["--disable_tqdm", "true"] if args.quiet or args.format == "json" else []
    folder = main(["--help"] if args.help_all else [*args.rest, *quiet])
    _show(args, {"student": str(folder)})


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
    workshop = _workshop(args, eval=settings, data={"text": args.text})
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
        _command(args),
        suite,
    )
    write_json(args.out, report)
    if args.format == "json":
        print(json.dumps(report, indent=1))
    elif not args.quiet:
        Console().print(comparison_table(report, f"{workshop.teacher_name} and its student"))
        _done({"report": args.out})


def publish(args: argparse.Namespace) -> None:
    """Stages and pushes a student."""
    from trainers.hub_upload import changes_table
    from trainers.publish import publish as push
    from trainers.staging import stage

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
    _show(args, {name: value for name, value in facts.items() if value is not None})
    if args.format == "human" and not args.quiet and not args.dry_run:
        print(f"\n{publication.snippet}")


def verify(args: argparse.Namespace) -> None:
    """Checks a student as data."""
    from trainers.inspection import inspect_student

    seen = inspect_student(args.student, args.revision, progress=args.format == "human" and not args.quiet)
    code = "the same as this hf-rad's" if seen.own_code else "of another version or another author: read it first"
    facts = {"student": seen.source, "commit": seen.commit, "code": code}
    _show(args, {name: value for name, value in facts.items() if value is not None})


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


def show_heads(args: argparse.Namespace) -> None:
    """Shows a head map."""
    from trainers.head_map_repo import find_head_map

    head_map = find_head_map(args.head_map, args.teacher, args.revision)
    facts = {"teacher": head_map.teacher.id, "layout": head_map.teacher.layout, "source": head_map.source}
    _show(args, facts, *_kept(head_map))


def compare_heads(args: argparse.Namespace) -> None:
    """Compares two head maps."""
    from trainers.head_compare import compare
    from trainers.head_map_repo import find_head_map

    found = compare(find_head_map(args.first), find_head_map(args.second))
    if args.format == "json":
        print(json.dumps(found, indent=1))
        return
    rows = [{"best heads": int(count), "overlap": value} for count, value in found.pop("overlap").items()]
    _show(args, found, "Overlap of the rankings", rows)


def draw_curves(args: argparse.Namespace) -> None:
    """Measures a teacher with its best heads kept, and removed."""
    from trainers import actions
    from trainers.head_scores import HeadScores

    scores = HeadScores.load(args.scores)
    every = scores.teacher.num_heads
    counts = args.counts or [0, *(2**i for i in range(every.bit_length()) if 2**i < every), every]
    out = Path(args.out)
    curves = actions.draw_curves(_workshop(args), scores, counts, args.ablation, out, args.num_examples)
    rows = [
        {"heads": count, **{name: one["accuracy"][i] for name, one in curves.items()}}
        for i, count in enumerate(counts)
    ]
    facts = {"curves": f"{args.out}/curves.json", "figure": f"{args.out}/curves.png", "ablation": args.ablation}
    _show(args, facts, "Accuracy", rows)


def show_kinds(args: argparse.Namespace) -> None:
    """Labels the kept heads of a map."""
    from trainers import actions
    from trainers.head_map_repo import find_head_map

    kinds = actions.draw_kinds(_workshop(args), find_head_map(args.head_map), args.num_examples, Path(args.out))
    _show(args, {"kinds": f"{args.out}/kinds.json"}, "What the kept heads do", kinds)


def locate(args: argparse.Namespace) -> None:
    """Ablates the heads of a student."""
    from transformers import AutoTokenizer

    from trainers.actions import load_student
    from trainers.files import write_json
    from trainers.probes import probe_from_settings
    from trainers.recipe import ScoreSettings
    from trainers.student_heads import locate_retrieval

    probe = probe_from_settings(ScoreSettings().probe)
    student, tokenizer = load_student(args.student), AutoTokenizer.from_pretrained(args.student)
    shown = not args.quiet and args.format == "human"
    found = locate_retrieval(
        student, tokenizer, probe, args.num_examples, args.seed, args.random_heads, progress=shown
    )
    write_json(args.out, found.to_dict())
    if args.format == "json":
        print(json.dumps(found.to_dict(), indent=1))
    elif not args.quiet:
        Console().print(found.table(f"Retrieval of {args.student}, {probe.name}"))
        _done({"located": args.out})


def push_heads(args: argparse.Namespace) -> None:
    """Adds head maps to a repository."""
    from trainers.head_map import shipped_head_maps
    from trainers.head_map_repo import push_head_maps, shipped_scores
    from trainers.hub_upload import changes_table

    upload = push_head_maps(
        args.head_map or shipped_head_maps(),
        args.repo_id,
        scores=args.scores if args.head_map else [*args.scores, *shipped_scores()],
        private=args.private or None,
        revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.commit_message,
        dry_run=args.dry_run,
    )
    if args.format == "human" and not args.quiet:
        Console().print(changes_table(upload.changes, args.repo_id))
    facts = {"url": upload.url, "commit": upload.commit, "pull_request": upload.pull_request}
    _show(args, {name: value for name, value in facts.items() if value is not None})


def pull_heads(args: argparse.Namespace) -> None:
    """Fetches a head map."""
    from trainers.head_map_repo import find_head_map

    head_map = find_head_map(args.repo_id, args.teacher, args.revision)
    head_map.save(args.out)
    _show(args, {"head_map": args.out, "teacher": head_map.teacher.id}, *_kept(head_map))


def _walk(args: argparse.Namespace, recipe: dict) -> None:
    from trainers.pipeline import Pipeline
    from trainers.recipe import Recipe

    if args.dry_run:
        _dry_run(args, Recipe.from_dict(recipe))
        return
    quiet = args.quiet or args.format == "json"
    report = Pipeline(Recipe.from_dict(recipe), _command(args), quiet, args.fresh).run()
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
    plan = Pipeline(recipe, _command(args), True, args.fresh).plan()
    if args.format == "human":
        Console().print(plan_table(plan, f"Plan of {recipe.out}"))
    else:
        print(json.dumps({"steps": plan, "stages": [dataclasses.asdict(e) for e in estimates]}, indent=1))


def _workshop(args: argparse.Namespace, **settings):
    from trainers.recipe import Recipe
    from trainers.workshop import Workshop

    recipe = {"teacher": args.teacher, "teacher_revision": args.revision, "seed": args.seed, **settings}
    return Workshop(Recipe.from_dict(recipe), progress=not args.quiet and args.format == "human")


def _probe(args: argparse.Namespace) -> dict:
    """Settings of the probe that `hf-rad score` asks."""
    names = {"format": args.probe_format, "pairs": args.pairs, "shots": args.shots, "values": args.values}
    probes = []
    for word in args.probe or ["kv"]:
        try:
            settings = json.loads(word) if word.startswith("{") else {"name": word}
        except json.JSONDecodeError as error:
            raise ValueError(f"--probe is {word!r}; write the name of a probe, or its settings as JSON.") from error
        probes.append({"name": "kv", **names, "queries": args.queries} if word == "kv" else settings)
    return probes[0] if len(probes) == 1 else {"name": "mean", "probes": probes}


def _tasks(args: argparse.Namespace) -> list[dict]:
    from trainers.recipe import EvalSettings

    tasks = [{**task, "num_examples": args.num_examples} for task in EvalSettings().tasks]
    tasks += [{"reading": path, "num_examples": args.num_examples} for path in args.reading]
    return tasks + [{"choices": path, "num_examples": args.num_examples} for path in args.choices]


def _kept(head_map) -> tuple[str, list[dict]]:
    shape = head_map.teacher
    groups = shape.num_hidden_layers * shape.num_key_value_heads
    title = f"{head_map.num_kept} of {shape.num_heads} heads, {len(head_map.kv_groups)} of {groups} KV groups"
    kept = enumerate(head_map.kept_heads)
    return title, [{"layer": layer, "kept query heads": heads} for layer, heads in kept if heads]


def _show(args: argparse.Namespace, facts: dict, title: str = "", rows: list[dict] | None = None) -> None:
    """Prints facts, and rows as a table; as JSON both in one object."""
    if args.format == "json":
        print(json.dumps({**facts, **({"rows": rows} if rows is not None else {})}, indent=1))
        return
    if rows and not args.quiet:
        table = Table()
        for name in rows[0]:
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*(_cell(value) for value in row.values()))
        Console().print(f"[bold]{title}[/bold]", table, sep="\n", highlight=False)
    _done(facts)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _done(facts: dict) -> None:
    console = Console()
    console.print("[green]✓ Done[/green]")
    for name, value in facts.items():
        console.print(f"{name.replace('_', ' ')}: {value}", highlight=False, markup=False, soft_wrap=True)


def _command(args: argparse.Namespace) -> str:
    return shlex.join(["hf-rad", *args.words])


VERBS = {
    "score": score,
    "select": select,
    "convert": convert,
    "pack": pack,
    "teach": teach,
    "distill": distill,
    "eval": evaluate,
    "publish": publish,
    "verify": verify,
    "run": run,
    "demo": demo,
    "heads show": show_heads,
    "heads compare": compare_heads,
    "heads curves": draw_curves,
    "heads kinds": show_kinds,
    "heads locate": locate,
    "heads push": push_heads,
    "heads pull": pull_heads,
}
