"""The words of the verbs that score, select and look at heads."""

import argparse

from trainers.cli_options import HEAD_MAP, add_teacher, add_verb


SCORE_TEXT = """Score every attention head of a teacher: what does retrieval lose without it?

The teacher is asked questions whose answer stands in the prompt (by default the values of a JSON dictionary's keys),
once as it is and once without each head. A head's score is the drop in the part of the questions answered, and beside
it the drop in the log-probability of the right answer. scores.json holds both for every head, scores.png shows them.

A teacher that cannot answer the questions gets no scores: try more --shots, another --probe-format, fewer --pairs.
A run that was killed goes on where it stopped when the same command is given again.
What comes next: hf-rad select OUT/scores.json --heads 8 --out OUT/head_map.json"""


SELECT_TEXT = """Choose the heads that stay attention and write them as a head map.

The budget is a number of heads, a fraction of all, or bytes of the student's cache. Methods: top-k (the best heads),
top-groups (the best KV groups, whole: query heads that share a kept KV group cost no cache), and the ones to compare
with: random heads, and whole layers: uniform-layers, every-nth-layer (with --n), leave-one-layer-out and kl-guided
(with --layers, what `hf-rad heads layers` measures)."""


def add_score(verbs) -> None:
    parser = add_verb(
        verbs,
        "score",
        SCORE_TEXT,
        "smollm2 --out runs/smollm2",
        "smollm2 --out runs/quick --num-examples 20 --screen damped",
        "meta-llama/Llama-3.2-1B-Instruct --out runs/llama --probe-format paper --pairs 20 --shots 0",
        """smollm2 --out runs/mean --probe kv --probe '{"name": "copy", "length": 16}'""",
    )
    parser.epilog += "\nOn several GPUs: torchrun --nproc-per-node 4 -m trainers.cli score TEACHER --out FOLDER"
    add_teacher(parser)
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
    how.add_argument(
        "--text-tokens", type=int, default=0, help="ablate every head on so many tokens of text too: KL a token"
    )
    how.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")
    parser.add_argument("--show", type=int, default=10, help="heads to print (default: 10)")


def add_select(verbs) -> None:
    parser = add_verb(
        verbs,
        "select",
        SELECT_TEXT,
        "runs/smollm2/scores.json --heads 8 --out runs/smollm2/head_map.json",
        "runs/smollm2/scores.json --fraction 0.03 --out head_map.json",
        "runs/smollm2/scores.json --cache-bytes 20_000_000 --tokens 8192 --method top-groups --out head_map.json",
        "runs/smollm2/scores.json --heads 8 --random --out control.json",
        "runs/smollm2/scores.json --heads 18 --method kl-guided --layers runs/smollm2/layers.json --out layers_map.json",
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
        choices=(
            *("top-k", "top-groups", "random", "uniform-layers", "every-nth-layer"),
            *("leave-one-layer-out", "kl-guided"),
        ),
        default="top-k",
        help="default: top-k",
    )
    parser.add_argument("--layers", help="layers.json of `hf-rad heads layers`")
    parser.add_argument(
        "--by",
        choices=("accuracy_drop", "logprob_drop", "text_kl"),
        default="accuracy_drop",
        help="score that orders the heads of --method top-k (default: accuracy_drop)",
    )
    others = parser.add_mutually_exclusive_group()
    others.add_argument("--random", action="store_const", const="random", dest="method", help="as --method random")
    others.add_argument(
        "--fill-groups", action="store_true", help="add useful heads of KV groups that are kept anyway"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random heads")


def add_heads(verbs) -> None:
    heads = verbs.add_parser(
        "heads", help="Look at heads and head maps.", description="Show, compare, measure, push and pull head maps."
    )
    heads = heads.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_maps(heads)
    _add_measurements(heads)
    _add_sharing(heads)


def _add_maps(heads) -> None:
    parser = add_verb(
        heads,
        "show",
        "Show which heads a head map keeps and where it comes from.",
        "runs/demo/head_map.json",
        "meta-llama/Llama-3.2-1B-Instruct",
        "me/head-maps --teacher acme/teacher --revision v1",
    )
    parser.add_argument("head_map", help=HEAD_MAP)
    _add_map_choice(parser)

    parser = add_verb(
        heads,
        "compare",
        "Compare two head maps: heads that both keep, overlap of the best, rank correlation.",
        "runs/a/head_map.json runs/b/head_map.json",
        "runs/smollm2/head_map.json HuggingFaceTB/SmolLM2-135M-Instruct",
    )
    parser.add_argument("first", help=HEAD_MAP)
    parser.add_argument("second", help=HEAD_MAP)


def _add_measurements(heads) -> None:
    parser = add_verb(
        heads,
        "curves",
        "Measure a teacher with only its best heads kept, and with them removed; draw both curves.",
        "runs/smollm2/scores.json --teacher smollm2 --out runs/smollm2",
    )
    parser.add_argument("scores", help="scores.json of `hf-rad score`")
    _add_teacher_option(parser)
    parser.add_argument("--out", required=True, help="folder for curves.json and curves.png")
    parser.add_argument("--num-examples", type=int, help="questions (default: as many as the scores come from)")
    parser.add_argument("--counts", type=int, nargs="+", help="numbers of heads (default: 0, 1, 2, 4, ... all)")
    parser.add_argument("--ablation", choices=("zero", "mean"), default="mean", help="what an ablated head gives")
    parser.add_argument("--seed", type=int, default=0, help="seed of the questions and of the random heads")

    parser = add_verb(
        heads,
        "kinds",
        "Say what kind of head each kept one is, gather or aggregate, and draw what it attends to.",
        "runs/smollm2/head_map.json --teacher smollm2 --out runs/smollm2/kinds",
    )
    parser.add_argument("head_map", help=HEAD_MAP)
    _add_teacher_option(parser)
    parser.add_argument("--out", required=True, help="folder for kinds.json and one picture a head")
    parser.add_argument("--num-examples", type=int, default=20, help="questions (default: 20)")
    parser.add_argument("--seed", type=int, default=0)

    parser = add_verb(
        heads,
        "layers",
        "Measure what a teacher loses without each layer's attention, for the selections of whole layers.",
        "smollm2 --out runs/smollm2/layers.json",
    )
    add_teacher(parser)
    parser.add_argument("--out", required=True, help="JSON file to write, for `hf-rad select --layers`")
    parser.add_argument("--num-examples", type=int, default=40, help="questions (default: 40)")
    parser.add_argument("--text-tokens", type=int, default=8192, help="tokens of text (default: 8192)")
    parser.add_argument("--text", help="text: file, folder or Hub data set (default: the excerpt)")
    parser.add_argument("--seed", type=int, default=0)

    parser = add_verb(
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


def _add_sharing(heads) -> None:
    parser = add_verb(
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

    parser = add_verb(
        heads,
        "pull",
        "Fetch a head map from a data set repository, or from a published student.",
        "me/head-maps --teacher HuggingFaceTB/SmolLM2-135M-Instruct --out head_map.json",
        "me/smollm2-135m-rad8 --revision v1 --out head_map.json",
    )
    parser.add_argument("repo_id", help="Hub id of the repository")
    _add_map_choice(parser)
    parser.add_argument("--out", required=True, help="head map to write")


def _add_teacher_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", required=True, help="Hub id, folder, .gguf file, or `smollm2`")
    parser.add_argument("--revision", help="branch, tag or commit of the teacher's Hub repo")


def _add_map_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", metavar="ID", help="Hub id of the teacher, where a repository has several maps")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repo")
