"""What the verbs of `hf-rad` share: the workshop that a command line asks for, and how an outcome is printed."""

import argparse
import json
import shlex

from rich.console import Console
from rich.table import Table


def workshop_of(args: argparse.Namespace, **settings):
    from trainers.recipe import Recipe
    from trainers.workshop import Workshop

    recipe = {"teacher": args.teacher, "teacher_revision": args.revision, "seed": args.seed, **settings}
    return Workshop(Recipe.from_dict(recipe), progress=not args.quiet and args.format == "human")


def show(args: argparse.Namespace, facts: dict, title: str = "", rows: list[dict] | None = None) -> None:
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
    done(facts)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def done(facts: dict) -> None:
    console = Console()
    console.print("[green]✓ Done[/green]")
    for name, value in facts.items():
        console.print(f"{name.replace('_', ' ')}: {value}", highlight=False, markup=False, soft_wrap=True)


def command_line(args: argparse.Namespace) -> str:
    return shlex.join(["hf-rad", *args.words])
