"""
Draws what the paper's tables are measured on: some hundred questions of each evaluation set, and held-out text.

    python -m benchmarks.paper.data --eval SETS --corpus corpus --out runs/paper-data
    hf-rad pack smollm2 --config recipes/smollm2-gpu-data.yaml --tokens 28_000_000 --out runs/paper-data/packed

`SETS` is a folder of JSON Lines files (also `.xz`) as `hf-rad eval --reading` and `--choices` take them; `corpus` holds
one folder of text files a group, those that the recipe of the data names. Of each group the documents that `hf-rad pack`
holds out are taken here. The same files and seed give the same draw.
"""

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path

from trainers.documents import is_held_out, text_documents
from trainers.files import atomic_path
from trainers.recipe import Recipe
from trainers.tasks import read_rows
from trainers.workshop import ROOT


SETS = (
    "squad_v1.1_dev factbook_kv arc_easy arc_challenge hellaswag_val piqa_val openbookqa_test winogrande_val"
).split()
DATA_RECIPE = ROOT / "recipes" / "smollm2-gpu-data.yaml"
# Longer prompts than this would not fit into the rows that students are trained on.
MAX_CONTEXT = 3600


def draw_rows(rows: Iterable[dict], number: int, seed: str) -> list[dict]:
    """Draws `number` rows, of those that share a `context` one each."""
    generator, by_context = random.Random(seed), {}
    for place, row in enumerate(rows):
        context = row.get("context", place) if "choices" not in row else place
        if len(str(context)) <= MAX_CONTEXT:
            by_context.setdefault(context, []).append(row)
    if len(by_context) < number:
        raise ValueError(f"There are {len(by_context)} different contexts; {number} rows were asked for ({seed}).")
    return [generator.choice(by_context[key]) for key in generator.sample(list(by_context), number)]


def held_out_texts(folders: list[Path], characters: int, seed: int) -> list[dict]:
    """Held-out documents, about `characters` of each folder's, mixed; of a long one its beginning."""
    texts = []
    for folder in folders:
        documents = [text for text in text_documents(str(folder), seed=seed) if is_held_out(text)]
        taken = 0
        for text in documents:
            if taken >= characters:
                break
            texts.append({"text": text[:6000], "source": folder.name})
            taken += len(texts[-1]["text"])
    random.Random(seed).shuffle(texts)
    return texts


def write_rows(path: Path, rows: list[dict]) -> None:
    with atomic_path(path) as temporary:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(rows)} rows", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.data")
    parser.add_argument("--eval", required=True, help="folder of evaluation sets")
    parser.add_argument("--corpus", required=True, help="folder of the recipe's groups of text")
    parser.add_argument("--out", default="runs/paper-data")
    parser.add_argument("--rows", type=int, default=300, help="questions of each set")
    parser.add_argument("--characters", type=int, default=60_000, help="held-out characters of each group")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    out = Path(args.out)
    for name in SETS:
        path = next(Path(args.eval).glob(f"{name}.jsonl*"))
        write_rows(out / "eval" / f"{name}.jsonl", draw_rows(read_rows(path), args.rows, f"{name} {args.seed}"))
    sources = [source["text"] for source in Recipe.load(DATA_RECIPE).data.sources if "text" in source]
    folders = [Path(args.corpus) / Path(source).name for source in sources]
    write_rows(out / "held_out.jsonl", held_out_texts(folders, args.characters, args.seed))


if __name__ == "__main__":
    main()
