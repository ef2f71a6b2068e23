"""
Shell completion: a script that knows the verbs and options of a command line, written from its parser.

    source <(hf-rad completion bash)

Where neither a verb nor an option fits, the shell completes file names.
"""

import argparse
import itertools


SHELLS = ("bash", "zsh")
SCRIPT = """\
{prelude}{function}() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=
  case " ${{COMP_WORDS[*]:1:COMP_CWORD-1}} " in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F {function} {program}"""


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """
    Writes the script.

    Args:
        parser (`argparse.ArgumentParser`):
            Parser with its subparsers.
        shell (`str`):
            `"bash"`, or `"zsh"`, which reads the same through its `bashcompinit`.
    """
    # The longest path of verbs comes first: `heads push` before `heads`, and that before nothing at all.
    paths = sorted(_walk(parser, ""), key=lambda pair: -len(pair[0]))
    return SCRIPT.format(
        prelude="autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else "",
        function=f"_{parser.prog.replace('-', '_')}",
        program=parser.prog,
        cases="\n".join(f"    {path}) {_case(inner)} ;;" for path, inner in paths),
    )


def _walk(parser: argparse.ArgumentParser, verbs: str):
    """Yields (pattern of the words so far, parser) for a parser and all that are below it."""
    yield (f'" {verbs}"*' if verbs else "*"), parser
    for name, inner in _subparsers(parser).items():
        yield from _walk(inner, f"{verbs}{name} ")


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    # argparse names what a parser consists of nowhere else.
    groups = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(itertools.chain.from_iterable(group.items() for group in groups))


def _case(parser: argparse.ArgumentParser) -> str:
    """The words that may follow: values of the option before, else verbs or choices, else options."""
    words, values = [], ""
    for action in parser._actions:
        choices = [str(choice) for choice in action.choices or ()]
        if not action.option_strings:
            words += choices
        elif choices:
            values += f" {'|'.join(action.option_strings)}) words={' '.join(choices)!r};;"
        elif action.nargs != 0:
            # Its value is anything; the shell offers files.
            values += f" {'|'.join(action.option_strings)}) ;;"
    options = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
    words = words or options
    return f"case $before in{values} *) words={' '.join(words)!r};; esac"
