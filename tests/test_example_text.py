"""The committed text: small, every source with its licence in the README, nothing held out that is trained on."""

import json
import lzma
from pathlib import Path

import pytest


FOLDER = Path(__file__).parents[1] / "examples" / "text"


@pytest.fixture(scope="module")
def documents():
    read = {}
    for name in ("train", "held_out"):
        with lzma.open(FOLDER / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
            read[name] = [json.loads(line) for line in lines]
    return read


def test_no_paragraph_stands_in_both_files(documents):
    train, held_out = ({p for row in rows for p in row["text"].split("\n\n")} for rows in documents.values())
    assert len(held_out) > 100 and not train & held_out


def test_every_source_is_in_the_readme_with_a_licence(documents):
    table = [
        line for line in (FOLDER / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| [")
    ]
    licences = {line.split("](")[0][3:] + "@" + line.split("`")[1]: line.split("|")[3].strip() for line in table}
    used = {row["source"].split(":")[0] for rows in documents.values() for row in rows}
    assert used == set(licences)
    assert all("CC BY 4.0" == licence or "public domain" in licence for licence in licences.values())


def test_files_stay_small(documents):
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 3_000_000
    assert [len(rows) for rows in documents.values()] == [2709, 62]
