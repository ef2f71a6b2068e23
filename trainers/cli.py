"""
`hf-rad`: one verb for each step from a pretrained teacher to a published hybrid, and two that walk the whole way.

    score ──► select ──► convert ──► distill ──► eval ──► publish          run --config recipe.yaml     demo

Installed as an extension of the Hub's own command (`hf extensions install`), the same verbs answer to `hf rad`.
Verbs import what they need when they run: `hf-rad --help` must not wait for PyTorch.
"""

import argparse
import os
import sys

from trainers.cli_heads import add_heads, add_score, add_select
from trainers.cli_options import HEAD_MAP, add_conventions, add_teacher, add_verb
from trainers.completion import SHELLS, completion_script


DISTILL_EXAMPLE = """Examples:
  hf-rad distill --config distill.yaml
  hf-rad distill --model_name_or_path student --teacher_model_name_or_path smollm2 --stage distillation \\
      --text corpus.jsonl --num_tokens 1000000 --max_length 1024 --num_train_epochs 1 --output_dir distilled

Every field of RadDistillationConfig (TRL's SFTConfig and transformers' TrainingArguments among them) and of
trainers.distill.DistillArguments is an option; `hf-rad distill --help-all` lists them with their meaning.
On several GPUs: accelerate launch -m trainers.cli distill --config distill.yaml"""


def main(argv: list[str] | None = None) -> int:
    """
    Runs one command line.

    Args:
        argv (`list[str]`, *optional*):
            Words after the program's name; by default those it was started with.

    Returns:
        `int`: exit code: 0, 1 after an error told in one line, 2 for a command line that cannot be read.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--"]:
        words = words[1:]  # `hf extensions exec rad -- ...` hands its own separator on.
    parser = make_parser()
    args, rest = parser.parse_known_args(words)
    if rest and args.verb != "distill":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.words, args.rest = without_token(words), rest
    if args.token:
        # Where the Hub client looks for it, in this process and in those that it starts.
        os.environ["HF_TOKEN"] = args.token
    # transformers is chatty while it loads; what matters is said by the verbs themselves.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if args.verb == "completion":
        print(completion_script(parser, args.shell))
        return 0
    try:
        from trainers.verbs import VERBS

        VERBS[args.verb](args)
    except KeyboardInterrupt:
        return _fail("Interrupted. `hf-rad run` and `hf-rad demo` go on where they stopped when called again.")
    except Exception as error:
        from huggingface_hub.errors import StrictDataclassError

        if not isinstance(error, (ValueError, OSError, StrictDataclassError)):
            raise
        return _fail(str(error))
    return 0


def without_token(words: list[str]) -> list[str]:
    """Returns the words of a command line without `--token` and what follows it: reports and cards repeat the rest."""
    kept, skip = [], False
    for word in words:
        if not skip and word != "--token" and not word.startswith("--token="):
            kept.append(word)
        skip = word == "--token"
    return kept


def _fail(message: str) -> int:
    colour, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{colour}Error: {' '.join(message.split())}{plain}", file=sys.stderr)
    return 1


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of `hf-rad` with all its verbs."""
    parser = argparse.ArgumentParser(
        prog="hf-rad",
        description="Retrieval-aware distillation: keep the attention heads that retrieve, make the others recurrent.",
        epilog="Learn more: `hf-rad VERB --help`; the paper is https://huggingface.co/papers/2602.11374",
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_steps(verbs)
    _add_pack(verbs)
    _add_teach(verbs)
    _add_distill(verbs)
    _add_eval(verbs)
    _add_publish(verbs)
    _add_walks(verbs)
    add_heads(verbs)
    _add_completion(verbs)
    return parser


def _add_steps(verbs) -> None:
    add_score(verbs)
    add_select(verbs)
    parser = add_verb(
        verbs,
        "convert",
        "Turn teacher and head map into a hybrid student, its recurrent heads fitted in closed form.",
        "smollm2 runs/smollm2/head_map.json --out runs/smollm2/student",
        "meta-llama/Llama-3.2-1B meta-llama/Llama-3.2-1B-Instruct --out student --tokens 0",
        "smollm2 --head-map me/head-maps --head-map-revision v1 --out student",
    )
    add_teacher(parser)
    # The same thing as a word or as an option; suppressed, so that the word's default does not undo the option.
    parser.add_argument("head_map", nargs="?", default=argparse.SUPPRESS, help=HEAD_MAP)
    parser.add_argument("--head-map", dest="head_map", metavar="HEAD_MAP", help="the same, as an option")
    parser.add_argument("--head-map-revision", metavar="REVISION", help="branch, tag or commit of the map's Hub repo")
    parser.add_argument("--out", required=True, help="folder of the student")
    parser.add_argument("--scores", help="scores.json behind the head map, to keep with the student")
    parser.add_argument("--mixing", choices=("replace", "parallel"), default="replace", help="see the README")
    parser.add_argument("--state-size", type=int, default=8, help="state size of a recurrent head (default: 8)")
    parser.add_argument("--tokens", type=int, default=50_000, help="tokens of the closed-form fit; 0: no fit")
    parser.add_argument("--text", help="text to fit on: file, folder or Hub data set (default: the excerpt)")
    parser.add_argument("--seed", type=int, default=0)


def _add_pack(verbs) -> None:
    parser = add_verb(
        verbs,
        "pack",
        "Tokenise a weighted mixture of texts, chats and probes once, into a folder that training reads.",
        "smollm2 --out packed --length 1024 --tokens 50_000_000 --source corpus.jsonl.zst 0.8 --probe json 0.2",
        "smollm2 --out packed --tokens 1_000_000 --config recipes/demo.yaml",
    )
    add_teacher(parser)
    parser.add_argument("--out", required=True, help="folder to write; it appears once it is whole")
    parser.add_argument("--tokens", type=int, required=True, help="tokens of the whole")
    parser.add_argument("--length", type=int, help="tokens of a row (default: the recipe's, or 512)")
    parser.add_argument("--config", metavar="RECIPE", help="recipe whose `data` says what to mix")
    pair = {"nargs": 2, "action": "append", "default": []}
    parser.add_argument(
        "--source", metavar=("TEXT", "WEIGHT"), help="file, folder or Hub data set, and weight", **pair
    )
    parser.add_argument(
        "--chat", metavar=("TEXT", "WEIGHT"), help="the same, with conversations in `messages`", **pair
    )
    parser.add_argument("--probe", metavar=("FORMAT", "WEIGHT"), help="key-value probe: json, paper or lines", **pair)
    parser.add_argument("--seed", type=int, default=0)


def _add_teach(verbs) -> None:
    parser = add_verb(
        verbs,
        "teach",
        "Store a teacher's likeliest next tokens beside packed rows, so that students train without the teacher.",
        "smollm2 --packed packed --out taught --top-k 32",
    )
    add_teacher(parser)
    parser.add_argument("--packed", required=True, help="folder of `hf-rad pack`")
    parser.add_argument("--out", required=True, help="folder to write; it appears once it is whole")
    parser.add_argument("--top-k", type=int, default=32, help="tokens of each position (default: 32)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows read at once (default: 8)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)


def _add_distill(verbs) -> None:
    parser = verbs.add_parser(
        "distill",
        help="Train a student on its teacher: one stage: orientation, alignment or distillation.",
        description="Train a student on its teacher: one stage: orientation, alignment or distillation.",
        epilog=DISTILL_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # Everything else belongs to TRL's parser; an abbreviation must not be taken here.
        allow_abbrev=False,
    )
    parser.set_defaults(verb="distill")
    add_conventions(parser)
    parser.add_argument("--help-all", action="store_true", help="list every option (takes some seconds)")


def _add_eval(verbs) -> None:
    parser = add_verb(
        verbs,
        "eval",
        "Measure a teacher and its students: retrieval, loss on text, coverage, cache bytes.",
        "runs/smollm2/student --teacher smollm2 --out runs/smollm2/eval.json",
        "student --teacher smollm2 --control '0 heads=control/' --num-examples 200 --out eval.json",
        "student --teacher smollm2 --reading squad_v1.1_dev.jsonl.xz --choices arc_easy.jsonl.xz --out eval.json",
    )
    parser.add_argument("student", help="folder or Hub id of the student")
    parser.add_argument("--teacher", required=True, help="Hub id, folder, .gguf file, or `smollm2`")
    parser.add_argument("--revision", help="branch, tag or commit of the teacher's Hub repo")
    parser.add_argument("--control", action="append", default=[], metavar="NAME=STUDENT", help="a further student")
    parser.add_argument("--out", required=True, help="eval.json to write")
    parser.add_argument("--num-examples", type=int, default=100, help="questions of each task (default: 100)")
    parser.add_argument(
        "--reading", action="append", default=[], metavar="FILE", help="questions on texts, JSON Lines"
    )
    parser.add_argument("--choices", action="append", default=[], metavar="FILE", help="multiple choice, JSON Lines")
    parser.add_argument("--text", help="text to measure the loss on: file, folder or Hub data set")
    parser.add_argument("--text-tokens", type=int, default=32_768, help="tokens of it; 0: no loss on text")
    parser.add_argument("--batch-size", type=int, default=25, help="prompts generated for at once (default: 25)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")
    parser.add_argument("--floor", type=float, default=0.2, help="teacher's score below which a task is left out")
    parser.add_argument("--seed", type=int, default=0)


def _add_publish(verbs) -> None:
    parser = add_verb(
        verbs,
        "publish",
        "Stage a student with code, card and head map, and push it in one commit.",
        "runs/demo/distillation --eval runs/demo/eval.json --out runs/demo/published",
        "runs/demo/distillation --eval runs/demo/eval.json --repo-id me/smollm2-135m-rad8 --private",
    )
    parser.add_argument("student", help="folder of the student")
    parser.add_argument("--eval", help="eval.json for the card")
    parser.add_argument("--out", help="folder to stage in (default: beside the student, `published`)")
    parser.add_argument("--teacher", help="folder or Hub id of the teacher, to look up its licence")
    parser.add_argument("--license", help="licence of the teacher's weights, where it cannot be looked up")
    parser.add_argument("--repo-id", help="Hub repository to push to; without it the staged folder is all")
    parser.add_argument("--revision", help="branch to push to (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--tag", help="tag of the commit (default: the next of v1, v2, ...)")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--commit-message", help="message of the commit")
    parser.add_argument("--language", action="append", metavar="CODE", help="language, for the card (default: en)")
    parser.add_argument(
        "--dataset", action="append", default=[], metavar="ID", help="Hub data set trained on, for the card"
    )
    parser.add_argument("--prompt", default="My name is", help="what the reloaded student continues")
    parser.add_argument("--dry-run", action="store_true", help="only say what would change")

    parser = add_verb(
        verbs,
        "verify",
        "Check a student, somebody else's too, before its code may run: weights, code, head map, card.",
        "somebody/student --revision v1",
        "runs/demo/published",
    )
    parser.add_argument("student", help="Hub id, or folder that was staged")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repo")


def _add_walks(verbs) -> None:
    parser = add_verb(
        verbs,
        "run",
        "Walk all the way of a recipe, skipping what is there and still matches.",
        "--config recipes/demo.yaml",
        "--config recipe.yaml --dry-run",
    )
    parser.add_argument("--config", required=True, metavar="RECIPE", help="YAML file, see recipes/")
    parser.add_argument("--out", help="folder of the run, instead of the recipe's")
    _add_walk_options(parser)

    parser = add_verb(
        verbs,
        "demo",
        "SmolLM2-135M-Instruct to a published hybrid in one go, with a student of 0 heads for comparison.",
        "",
        "--controls --out runs/demo",
        "--heads 5 --text my_corpus.jsonl --out runs/demo5",
    )
    parser.add_argument("--controls", action="store_true", help="add a student with as many random heads")
    parser.add_argument("--heads", type=int, help="number of kept heads (default: the recipe's 8)")
    parser.add_argument("--text", help="text to train on: file, folder or Hub data set (default: the excerpt)")
    parser.add_argument("--out", help="folder of the run (default: runs/demo)")
    _add_walk_options(parser)


def _add_walk_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="print the plan and do nothing")
    parser.add_argument("--fresh", action="store_true", help="do every step anew, whatever is there")


def _add_completion(verbs) -> None:
    parser = verbs.add_parser(
        "completion",
        help="Print what makes a shell complete the words of hf-rad.",
        description="Print what makes a shell complete the words of hf-rad.",
        epilog="Examples:\n  source <(hf-rad completion bash)\n  hf-rad completion bash >> ~/.bash_completion",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(verb="completion", token=None)
    parser.add_argument("shell", choices=SHELLS, help="zsh reads the bash one through its own bashcompinit")


if __name__ == "__main__":
    sys.exit(main())
