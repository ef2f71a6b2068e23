"""
`hf-rad`: one verb for each step from a pretrained teacher to a published hybrid, and two that walk the whole way.

    score ──► select ──► convert ──► distill ──► eval ──► publish          run --config recipe.yaml     demo

Installed as an extension of the Hub's own command (`hf extensions install`), the same verbs answer to `hf rad`.
Verbs import what they need when they run: `hf-rad --help` must not wait for PyTorch.
"""

import argparse
import os
import sys

from trainers.completion import SHELLS, completion_script


HEAD_MAP = "head map file, folder with one, name of a shipped map, or Hub id"
DISTILL_EXAMPLE = """Examples:
  hf-rad distill --config recipes/distill.yaml
  hf-rad distill --model_name_or_path student --teacher_model_name_or_path smollm2 --stage distillation \\
      --text corpus.jsonl --num_tokens 1000000 --max_length 1024 --num_train_epochs 1 --output_dir distilled

Every field of RadDistillationConfig (TRL's SFTConfig and transformers' TrainingArguments among them) and of
trainers.distill.DistillArguments is an option; `hf-rad distill --help-all` lists them with their meaning.
On several GPUs: accelerate launch -m trainers.distill --config recipes/distill.yaml"""


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
    _add_heads(verbs)
    _add_completion(verbs)
    return parser


def _verb(verbs, name: str, summary: str, *examples: str) -> argparse.ArgumentParser:
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
    _add_conventions(parser)
    return parser


def _add_conventions(parser: argparse.ArgumentParser) -> None:
    """Options that every verb has, as those of `hf` do."""
    parser.add_argument("--format", choices=("human", "json"), default="human", help="how to print the outcome")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bars, no tables")
    parser.add_argument("--token", help="access token of the Hub (default: the one of `hf auth login`)")


def _add_teacher(parser: argparse.ArgumentParser, required: bool = True) -> None:
    where = "Hub id, folder, .gguf file, or `smollm2` for the default teacher"
    parser.add_argument("teacher", nargs=None if required else "?", help=where)
    parser.add_argument("--revision", help="branch, tag or commit of the teacher's Hub repo")


SCORE_TEXT = """Score every attention head of a teacher: what does retrieval lose without it?

The teacher is asked questions whose answer stands in the prompt (by default the values of a JSON dictionary's keys),
once as it is and once without each head. A head's score is the drop in the part of the questions answered, and beside
it the drop in the log-probability of the right answer. scores.json holds both for every head, scores.png shows them.

A teacher that cannot answer the questions gets no scores: try more --shots, another --probe-format, fewer --pairs.
A run that was killed goes on where it stopped when the same command is given again."""

SELECT_TEXT = """Choose the heads that stay attention and write them as a head map.

The budget is a number of heads, a fraction of all, or bytes of the student's cache. Methods: top-k (the best heads),
top-groups (the best KV groups, whole: query heads that share a kept KV group cost no cache), and the ones to compare
with: random, uniform-layers, every-nth-layer (with --n, whole layers)."""


def _add_score(verbs) -> None:
    parser = _verb(
        verbs,
        "score",
        SCORE_TEXT,
        "smollm2 --out runs/smollm2",
        "smollm2 --out runs/quick --num-examples 20 --screen damped",
        "meta-llama/Llama-3.2-1B-Instruct --out runs/llama --probe-format paper --pairs 20 --shots 0",
        """smollm2 --out runs/mean --probe kv --probe '{"name": "copy", "length": 16}'""",
    )
    parser.epilog += "\nOn several GPUs: torchrun --nproc-per-node 4 -m trainers.cli score TEACHER --out FOLDER"
    _add_teacher(parser)
    parser.add_argument("--out", required=True, help="folder for scores.json and scores.png")
    asked = parser.add_argument_group("what is asked")
    asked.add_argument(
        "--probe",
        action="append",
        metavar="PROBE",
        help="kind of question: kv (default), phone_book, mqar, copy, ngram, needle, choice, variables, or its settings as "
        "JSON; more than once for the mean over several",
    )
    asked.add_argument("--probe-format", choices=("json", "paper", "lines"), default="json", help="text of the probe")
    asked.add_argument("--pairs", type=int, default=20, help="entries of each dictionary (default: 20)")
    asked.add_argument("--shots", type=int, default=2, help="queries answered in the prompt (default: 2)")
    asked.add_argument("--values", choices=("numbers", "words"), default="numbers", help="what the keys map to")
    asked.add_argument("--queries", type=int, default=10, help="questions on one dictionary, which share its cost")
    asked.add_argument("--num-examples", type=int, default=40, help="questions asked for each head (default: 40)")
    asked.add_argument("--min-accuracy", type=float, default=0.6, help="what the teacher must reach (default: 0.6)")
    asked.add_argument("--seed", type=int, default=0)
    how = parser.add_argument_group("how heads are ablated")
    how.add_argument(
        "--screen",
        choices=("attribution", "damped", "sample"),
        help="ablate only heads that a cheap estimate does not spare: a gradient (attribution), one of damped models "
        "(damped), or few examples (sample)",
    )
    how.add_argument("--survivors", type=int, help="heads that the screen lets through (default: a quarter)")
    how.add_argument("--ablation", choices=("zero", "mean"), default="zero", help="what an ablated head gives")
    how.add_argument(
        "--answers",
        choices=("generated", "candidates"),
        default="generated",
        help="an answer counts when it would be generated, or when it beats the other candidates of the prompt",
    )
    how.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")
    parser.add_argument("--show", type=int, default=10, help="heads to print (default: 10)")


def _add_select(verbs) -> None:
    parser = _verb(
        verbs,
        "select",
        SELECT_TEXT,
        "runs/smollm2/scores.json --heads 8 --out runs/smollm2/head_map.json",
        "runs/smollm2/scores.json --fraction 0.03 --out head_map.json",
        "runs/smollm2/scores.json --cache-bytes 20_000_000 --tokens 8192 --method top-groups --out head_map.json",
        "runs/smollm2/scores.json --heads 8 --random --out control.json",
    )
    parser.add_argument("scores", help="scores.json of `hf-rad score`")
    parser.add_argument("--out", required=True, help="head map to write")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--heads", type=int, help="number of kept heads")
    budget.add_argument("--fraction", type=float, help="kept heads as a share of all")
    budget.add_argument("--cache-bytes", type=int, help="most bytes of the student's cache, in bfloat16")
    budget.add_argument("--threshold", type=float, help="keep every head that costs at least so much accuracy")
    budget.add_argument("--n", type=int, help="with --method every-nth-layer: keep one layer in n")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens in the cache of --cache-bytes")
    parser.add_argument("--state-size", type=int, default=8, help="state size in the cache of --cache-bytes")
    parser.add_argument(
        "--method",
        choices=("top-k", "top-groups", "random", "uniform-layers", "every-nth-layer"),
        default="top-k",
        help="default: top-k",
    )
    others = parser.add_mutually_exclusive_group()
    others.add_argument("--random", action="store_const", const="random", dest="method", help="as --method random")
    others.add_argument(
        "--fill-groups", action="store_true", help="add useful heads of KV groups that are kept anyway"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random heads")


def _add_steps(verbs) -> None:
    _add_score(verbs)
    _add_select(verbs)
    parser = _verb(
        verbs,
        "convert",
        "Turn teacher and head map into a hybrid student, its recurrent heads fitted in closed form.",
        "smollm2 runs/smollm2/head_map.json --out runs/smollm2/student",
        "meta-llama/Llama-3.2-1B meta-llama/Llama-3.2-1B-Instruct --out student --tokens 0",
        "smollm2 --head-map me/head-maps --head-map-revision v1 --out student",
    )
    _add_teacher(parser)
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
    parser = _verb(
        verbs,
        "pack",
        "Tokenise a weighted mixture of texts, chats and probes once, into a folder that training reads.",
        "smollm2 --out packed --length 1024 --tokens 50_000_000 --source corpus.jsonl.zst 0.8 --probe json 0.2",
        "smollm2 --out packed --tokens 1_000_000 --config recipes/demo.yaml",
    )
    _add_teacher(parser)
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
    parser = _verb(
        verbs,
        "teach",
        "Store a teacher's likeliest next tokens beside packed rows, so that students train without the teacher.",
        "smollm2 --packed packed --out taught --top-k 32",
    )
    _add_teacher(parser)
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
    _add_conventions(parser)
    parser.add_argument("--help-all", action="store_true", help="list every option (takes some seconds)")


def _add_eval(verbs) -> None:
    parser = _verb(
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
    parser = _verb(
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

    parser = _verb(
        verbs,
        "verify",
        "Check a student, somebody else's too, before its code may run: weights, code, head map, card.",
        "somebody/student --revision v1",
        "runs/demo/published",
    )
    parser.add_argument("student", help="Hub id, or folder that was staged")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repo")


def _add_walks(verbs) -> None:
    parser = _verb(
        verbs,
        "run",
        "Walk all the way of a recipe, skipping what is there and still matches.",
        "--config recipes/demo.yaml",
        "--config recipe.yaml --dry-run",
    )
    parser.add_argument("--config", required=True, metavar="RECIPE", help="YAML file, see recipes/")
    parser.add_argument("--out", help="folder of the run, instead of the recipe's")
    _add_walk_options(parser)

    parser = _verb(
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


def _add_heads(verbs) -> None:
    heads = verbs.add_parser(
        "heads", help="Show, compare, push and pull head maps.", description="Show, compare, push and pull head maps."
    )
    heads = heads.add_subparsers(title="verbs", metavar="VERB", required=True)
    parser = _verb(
        heads,
        "show",
        "Show which heads a head map keeps and where it comes from.",
        "runs/demo/head_map.json",
        "meta-llama/Llama-3.2-1B-Instruct",
        "me/head-maps --teacher acme/teacher --revision v1",
    )
    parser.add_argument("head_map", help=HEAD_MAP)
    _add_map_choice(parser)

    parser = _verb(
        heads,
        "compare",
        "Compare two head maps: heads that both keep, overlap of the best, rank correlation.",
        "runs/a/head_map.json runs/b/head_map.json",
        "runs/smollm2/head_map.json HuggingFaceTB/SmolLM2-135M-Instruct",
    )
    parser.add_argument("first", help=HEAD_MAP)
    parser.add_argument("second", help=HEAD_MAP)

    parser = _verb(
        heads,
        "curves",
        "Measure a teacher with only its best heads kept, and with them removed; draw both curves.",
        "runs/smollm2/scores.json --teacher smollm2 --out runs/smollm2",
    )
    parser.add_argument("scores", help="scores.json of `hf-rad score`")
    parser.add_argument("--teacher", required=True, help="Hub id, folder, .gguf file, or `smollm2`")
    parser.add_argument("--revision", help="branch, tag or commit of the teacher's Hub repo")
    parser.add_argument("--out", required=True, help="folder for curves.json and curves.png")
    parser.add_argument("--num-examples", type=int, help="questions (default: as many as the scores come from)")
    parser.add_argument("--counts", type=int, nargs="+", help="numbers of heads (default: 0, 1, 2, 4, ... all)")
    parser.add_argument("--ablation", choices=("zero", "mean"), default="mean", help="what an ablated head gives")
    parser.add_argument("--seed", type=int, default=0, help="seed of the questions and of the random heads")

    parser = _verb(
        heads,
        "kinds",
        "Say what kind of head each kept one is, gather or aggregate, and draw what it attends to.",
        "runs/smollm2/head_map.json --teacher smollm2 --out runs/smollm2/kinds",
    )
    parser.add_argument("head_map", help=HEAD_MAP)
    parser.add_argument("--teacher", required=True, help="Hub id, folder, .gguf file, or `smollm2`")
    parser.add_argument("--revision", help="branch, tag or commit of the teacher's Hub repo")
    parser.add_argument("--out", required=True, help="folder for kinds.json and one picture a head")
    parser.add_argument("--num-examples", type=int, default=20, help="questions (default: 20)")
    parser.add_argument("--seed", type=int, default=0)

    parser = _verb(
        heads,
        "locate",
        "Ablate the attention and the recurrent heads of a student: where does its retrieval sit?",
        "runs/demo/distillation --out runs/demo/located.json",
    )
    parser.add_argument("student", help="folder or Hub id of the student")
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--num-examples", type=int, default=100, help="questions (default: 100)")
    parser.add_argument("--random-heads", type=int, default=20, help="recurrent heads to ablate alone (default: 20)")
    parser.add_argument("--seed", type=int, default=0)

    parser = _verb(
        heads,
        "push",
        "Add head maps to a data set repository of head maps, in one commit.",
        "runs/demo/head_map.json --scores runs/demo/scores.json --repo-id me/head-maps",
        "--repo-id me/head-maps --private",
    )
    parser.add_argument("head_map", nargs="*", help=f"{HEAD_MAP} (default: every map that ships with hf-rad)")
    parser.add_argument("--repo-id", required=True, help="data set repository, made if it is not there")
    parser.add_argument("--scores", action="append", default=[], help="scores.json behind a map, to go with it")
    parser.add_argument("--revision", help="branch to push to (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--commit-message", help="message of the commit")
    parser.add_argument("--dry-run", action="store_true", help="only say what would change")

    parser = _verb(
        heads,
        "pull",
        "Fetch a head map from a data set repository, or from a published student.",
        "me/head-maps --teacher HuggingFaceTB/SmolLM2-135M-Instruct --out head_map.json",
        "me/smollm2-135m-rad8 --revision v1 --out head_map.json",
    )
    parser.add_argument("repo_id", help="Hub id of the repository")
    _add_map_choice(parser)
    parser.add_argument("--out", required=True, help="head map to write")


def _add_map_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", metavar="ID", help="Hub id of the teacher, where a repository has several maps")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repo")


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
