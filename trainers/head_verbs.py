"""The verbs that score, select and look at heads."""

import argparse
import json
from pathlib import Path

from rich.console import Console

from trainers.cli_output import done, show, workshop_of


def score(args: argparse.Namespace) -> None:
    """Scores a teacher's heads."""
    from trainers import head_actions
    from trainers.heads.shared_work import is_main_process

    settings = {
        "probe": _probe(args),
        "num_examples": args.num_examples,
        "min_accuracy": args.min_accuracy,
        "dtype": args.dtype,
        "ablation": args.ablation,
        "answers": args.answers,
        "screen": args.screen,
        "survivors": args.survivors,
        "text_tokens": args.text_tokens,
    }
    scores = head_actions.score(workshop_of(args, score=settings), Path(args.out))
    if not is_main_process():
        return
    rows = [
        {
            "layer": layer,
            "head": head,
            "accuracy drop": scores.accuracy_drop[layer][head],
            "log-probability drop": scores.logprob_drop[layer][head],
            **({} if scores.text_kl is None else {"KL on text": scores.text_kl[layer][head]}),
        }
        for layer, head in scores.ranking()[: args.show]
    ]
    files = {"scores": f"{args.out}/scores.json", "heat_map": f"{args.out}/scores.png"}
    show(args, {**files, "accuracy": scores.base_accuracy}, f"The {len(rows)} heads that cost most", rows)


def select(args: argparse.Namespace) -> None:
    """Chooses the kept heads."""
    from trainers.files import read_json
    from trainers.head_actions import LAYER_METHODS, draw
    from trainers.heads import selection
    from trainers.heads.head_scores import HeadScores

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
    elif args.method in LAYER_METHODS:
        if args.layers is None:
            raise ValueError(f"--method {args.method} needs --layers, the file that `hf-rad heads layers` writes.")
        importance = read_json(args.layers)[args.method]
        head_map = selection.best_layers(scores.teacher, importance, args.method, **budget)
    elif args.method == "uniform-layers":
        head_map = selection.uniform_layers(scores.teacher, **budget)
    elif args.method == "top-groups":
        head_map = selection.top_groups(scores, **budget)
    else:
        head_map = selection.top_k(scores, fill_groups=args.fill_groups, by=args.by, **budget)
    head_map.save(args.out)
    picture = Path(args.out).with_suffix(".png")
    draw(scores, head_map, picture)
    show(args, {"head_map": args.out, "heat_map": str(picture)}, *_kept(head_map))


def show_heads(args: argparse.Namespace) -> None:
    """Shows a head map."""
    from trainers.hub.head_map_repo import find_head_map

    head_map = find_head_map(args.head_map, args.teacher, args.revision)
    facts = {"teacher": head_map.teacher.id, "layout": head_map.teacher.layout, "source": head_map.source}
    show(args, facts, *_kept(head_map))


def compare_heads(args: argparse.Namespace) -> None:
    """Compares two head maps."""
    from trainers.heads.head_compare import compare
    from trainers.hub.head_map_repo import find_head_map

    found = compare(find_head_map(args.first), find_head_map(args.second))
    if args.format == "json":
        print(json.dumps(found, indent=1))
        return
    rows = [{"best heads": int(count), "overlap": value} for count, value in found.pop("overlap").items()]
    show(args, found, "Overlap of the rankings", rows)


def draw_curves(args: argparse.Namespace) -> None:
    """Measures a teacher with its best heads kept, and removed."""
    from trainers import head_actions
    from trainers.heads.head_scores import HeadScores

    scores = HeadScores.load(args.scores)
    every = scores.teacher.num_heads
    counts = args.counts or [0, *(2**i for i in range(every.bit_length()) if 2**i < every), every]
    out = Path(args.out)
    curves = head_actions.draw_curves(workshop_of(args), scores, counts, args.ablation, out, args.num_examples)
    rows = [
        {"heads": count, **{name: one["accuracy"][i] for name, one in curves.items()}}
        for i, count in enumerate(counts)
    ]
    facts = {"curves": f"{args.out}/curves.json", "figure": f"{args.out}/curves.png", "ablation": args.ablation}
    show(args, facts, "Accuracy", rows)


def show_kinds(args: argparse.Namespace) -> None:
    """Labels the kept heads of a map."""
    from trainers import head_actions
    from trainers.hub.head_map_repo import find_head_map

    kinds = head_actions.draw_kinds(workshop_of(args), find_head_map(args.head_map), args.num_examples, Path(args.out))
    names = {
        "entries_drop": "lost at the entries",
        "question_drop": "lost at the question",
        "gather_attention": "attention to the key",
        "aggregate_attention": "attention to the value",
    }
    rows = [{names.get(name, name): value for name, value in kind.items()} for kind in kinds]
    show(args, {"kinds": f"{args.out}/kinds.json"}, "What the kept heads do (losses in nats)", rows)


def measure_layers(args: argparse.Namespace) -> None:
    """Leaves out each layer's attention."""
    from trainers import head_actions

    workshop = workshop_of(args, data={"text": args.text})
    layers = head_actions.measure_layers(workshop, args.num_examples, args.text_tokens, Path(args.out))
    rows = [
        {"layer": i, **{name: layers[name][i] for name in layers}} for i in range(workshop.shape.num_hidden_layers)
    ]
    show(args, {"layers": args.out}, "What is lost without a layer's attention, in nats", rows)


def locate(args: argparse.Namespace) -> None:
    """Ablates the heads of a student."""
    from transformers import AutoTokenizer

    from trainers.actions import load_student
    from trainers.files import write_json
    from trainers.heads.student_heads import locate_retrieval
    from trainers.probes import probe_from_settings
    from trainers.recipe import ScoreSettings

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
        done({"located": args.out})


def push_heads(args: argparse.Namespace) -> None:
    """Adds head maps to a repository."""
    from trainers.heads.head_map import shipped_head_maps
    from trainers.hub.head_map_repo import push_head_maps, shipped_scores
    from trainers.hub.hub_upload import changes_table

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
    show(args, {name: value for name, value in facts.items() if value is not None})


def pull_heads(args: argparse.Namespace) -> None:
    """Fetches a head map."""
    from trainers.hub.head_map_repo import find_head_map

    head_map = find_head_map(args.repo_id, args.teacher, args.revision)
    head_map.save(args.out)
    show(args, {"head_map": args.out, "teacher": head_map.teacher.id}, *_kept(head_map))


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


def _kept(head_map) -> tuple[str, list[dict]]:
    shape = head_map.teacher
    groups = shape.num_hidden_layers * shape.num_key_value_heads
    title = f"{head_map.num_kept} of {shape.num_heads} heads, {len(head_map.kv_groups)} of {groups} KV groups"
    kept = enumerate(head_map.kept_heads)
    return title, [{"layer": layer, "kept query heads": heads} for layer, heads in kept if heads]
