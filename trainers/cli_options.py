"""Options that several verbs of `hf-rad` share."""

import argparse


HEAD_MAP = "head map file, folder with one, name of a shipped map, or Hub id"


def add_verb(verbs, name: str, summary: str, *examples: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        name,
        help=summary,
        description=summary,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # An abbreviated --token would not be known as one where command lines are recorded.
        allow_abbrev=False,
    )
    parser.epilog = "Examples:\n" + "\n".join(f"  {parser.prog} {example}".rstrip() for example in examples)
    parser.set_defaults(verb=parser.prog.removeprefix("hf-rad "))
    add_conventions(parser)
    return parser


def add_conventions(parser: argparse.ArgumentParser) -> None:
    """Options that every verb has, as those of `hf` do."""
    parser.add_argument("--format", choices=("human", "json"), default="human", help="how to print the outcome")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bars, no tables")
    parser.add_argument("--token", help="access token of the Hub (default: the one of `hf auth login`)")


def add_teacher(parser: argparse.ArgumentParser, required: bool = True) -> None:
    where = "Hub id, folder, .gguf file, or `smollm2` for the default teacher"
    parser.add_argument("teacher", nargs=None if required else "?", help=where)
    parser.add_argument("--revision", help="branch, tag or commit of the teacher's Hub repo")
