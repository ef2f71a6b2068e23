"""Documents are read from every kind of file, split the same way each time, and packed to exact lengths and shares."""

import gzip
import json
import lzma

import pytest

from trainers.data import (
    ProbeDocuments,
    Source,
    held_out_batches,
    mixed_rows,
    packed_dataset,
    token_batches,
)
from trainers.documents import held_out, text_documents
from trainers.probes import KVRetrieval


LONG, SHORT = "house river", "lamp chair"


def _documents(words: str, count: int, repeats: int) -> list[str]:
    return [" ".join([words] * (repeats + i % 3)) for i in range(count)]


def _share(rows, tokenizer, words: str) -> float:
    marks = set(tokenizer(words).input_ids)
    tokens = [token for row in rows["input_ids"] for token in row if token != tokenizer.eos_token_id]
    return sum(token in marks for token in tokens) / len(tokens)


@pytest.mark.parametrize("suffix, opener", [("", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_reads_json_lines_and_text_in_any_packing(tmp_path, suffix, opener):
    lines = [json.dumps({"text": f" document {i} "}) for i in range(3)]
    with opener(tmp_path / f"a.jsonl{suffix}", "wt") as file:
        file.write("\n".join([*lines, "", json.dumps({"text": " "})]))
    with opener(tmp_path / f"b.txt{suffix}", "wt") as file:
        file.write("one\n\ntext\n")
    assert text_documents(str(tmp_path / f"a.jsonl{suffix}")) == ["document 0", "document 1", "document 2"]
    assert text_documents(str(tmp_path)) == ["document 0", "document 1", "document 2", "one\n\ntext"]
    shuffled = text_documents(str(tmp_path), seed=1)
    assert shuffled == text_documents(str(tmp_path), seed=1) and sorted(shuffled) == sorted(
        text_documents(str(tmp_path))
    )
    assert text_documents(str(tmp_path), seed=1, limit=2) == shuffled[:2]


def test_says_what_is_wrong_with_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        text_documents(str(tmp_path / "missing.jsonl"))
    for name, content, message in [
        ("a.csv", "a,b", "neither .jsonl nor .txt"),
        ("a.jsonl", '{"text": "x"}\n{"body": "x"}', "Line 2 .* under 'text'"),
        ("b.jsonl", "not json", "Line 1"),
        ("c.jsonl", "[1]", "Line 1"),
        ("d.jsonl", '{"text": 3}', "Line 1"),
        ("e.txt", " \n", "no documents"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            text_documents(str(tmp_path / name))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no .jsonl"):
        text_documents(str(tmp_path / "empty"))


def test_a_text_is_held_out_whatever_stands_around_it():
    documents = [f"document {i}" for i in range(2000)]
    training, held = held_out(documents, share=0.1)
    assert sorted(training + held) == sorted(documents) and 150 < len(held) < 250
    again = held_out([*reversed(documents), "another"], share=0.1)
    assert set(again[1]) - {"another"} == set(held)
    assert not set(training) & set(held)
    with pytest.raises(ValueError, match="one side stays empty"):
        held_out(["one"])


def test_rows_have_one_length_and_keep_every_token_in_order(tiny_tokenizer):
    documents = [" ".join(words) for words in (["house"] * 5, ["river"] * 11, ["stone"] * 3, ["garden"] * 7)]
    rows = packed_dataset(tiny_tokenizer, [Source(documents, 1.0)], length=12, num_tokens=24, progress=False)
    assert rows.num_rows == 2 and all(len(row) == 12 for row in rows["input_ids"])
    assert rows["labels"][:] == rows["input_ids"][:]
    expected = [token for d in documents for token in [*tiny_tokenizer(d).input_ids, tiny_tokenizer.eos_token_id]]
    assert rows["input_ids"][:] == [expected[:12], expected[12:24]]


def test_a_long_document_gives_one_window_and_not_always_the_first(tiny_tokenizer):
    document = " ".join(str(i) for i in range(100, 400))  # three digits a number, one token a digit
    ids = tiny_tokenizer(document).input_ids
    starts = set()
    for seed in range(8):
        row = packed_dataset(tiny_tokenizer, [Source([document], 1.0)], 30, 30, seed, progress=False)["input_ids"][0]
        start = next(i for i in range(len(ids)) if [*ids, tiny_tokenizer.eos_token_id][i : i + 30] == row)
        starts.add(start)
    assert len(starts) > 4


def test_shares_hold_in_the_whole_and_in_every_stretch(tiny_tokenizer):
    sources = [Source(_documents(LONG, 40, 30), 3.0), Source(_documents(SHORT, 40, 20), 1.0)]
    rows = packed_dataset(tiny_tokenizer, sources, length=64, num_tokens=64 * 200, progress=False)
    assert _share(rows, tiny_tokenizer, SHORT) == pytest.approx(0.25, abs=0.01)
    assert _share(rows.select(range(100, 116)), tiny_tokenizer, SHORT) == pytest.approx(0.25, abs=0.05)


def test_a_probe_that_may_outgrow_a_row_is_refused_before_the_first_row(tiny_tokenizer):
    class Growing:
        """One document in fifty is long."""

        def documents(self, n, seed):
            return [LONG] * (n - 1) + [f"{LONG} " * 20]

    sources = [Source(_documents(LONG, 9, 9), 1.0), Source(ProbeDocuments(Growing()), 1.0, whole=True, name="growing")]
    with pytest.raises(ValueError, match="'growing' has .* cannot stand whole"):
        next(mixed_rows(tiny_tokenizer, sources, 16, 160))


def test_a_whole_document_is_never_cut(tiny_tokenizer):
    probe = KVRetrieval(format="json", pairs=4, shots=1)
    probes = Source(ProbeDocuments(probe), 1.0, whole=True, name="probe")
    rows = packed_dataset(tiny_tokenizer, [Source(_documents(LONG, 9, 9), 1.0), probes], 192, 192 * 20, progress=False)
    written = set()
    for document, _ in zip(ProbeDocuments(probe), range(200), strict=False):
        written.add(tuple(tiny_tokenizer(document).input_ids))
    found = 0
    text = set(tiny_tokenizer(LONG).input_ids)
    for row in rows["input_ids"]:
        pieces, piece = [], []
        for token in row:
            if token == tiny_tokenizer.eos_token_id:
                pieces.append(tuple(piece))
                piece = []
            else:
                piece.append(token)
        # What stands after the last EOS of a row must be text: a probe would have been cut there.
        assert set(piece) <= text
        found += sum(piece in written for piece in pieces)
        assert all(piece in written or set(piece) <= text for piece in pieces)
    assert found > 10
    with pytest.raises(ValueError, match="'probe' has .* tokens and cannot stand whole in a row of 20"):
        packed_dataset(tiny_tokenizer, [Source(_documents(LONG, 9, 9), 1.0), probes], 20, 100, progress=False)


def test_a_seed_gives_the_same_rows_and_another_one_others(tiny_tokenizer):
    def rows(seed):
        sources = [
            Source(_documents(LONG, 40, 30), 0.75),
            Source(ProbeDocuments(KVRetrieval(pairs=4), seed), 0.25, whole=True),
        ]
        return packed_dataset(tiny_tokenizer, sources, 128, 128 * 30, seed, progress=False)["input_ids"][:]

    assert rows(0) == rows(0)
    assert rows(0) != rows(1)


def test_documents_are_read_again_but_an_iterator_runs_dry(tiny_tokenizer):
    assert packed_dataset(tiny_tokenizer, [Source(["house"], 1.0)], 8, 64, progress=False).num_rows == 8
    with pytest.raises(ValueError, match="'stream' ran dry after 2 tokens"):
        packed_dataset(tiny_tokenizer, [Source(iter(["house"]), 1.0, name="stream")], 8, 64, progress=False)


def test_refuses_mixtures_that_cannot_be(tiny_tokenizer):
    text = Source(["house"], 1.0)
    for sources, length, tokens, message in [
        ([], 8, 8, "at least one source"),
        ([Source(["house"], 0.0)], 8, 8, "weights above 0"),
        ([text], 1, 8, "length is 1"),
        ([Source(["house"], 1.0, whole=True), Source(["river"], 1.0, whole=True)], 8, 8, "nothing can fill"),
    ]:
        with pytest.raises(ValueError, match=message):
            packed_dataset(tiny_tokenizer, sources, length, tokens, progress=False)
    tiny_tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        packed_dataset(tiny_tokenizer, [text], 8, 8, progress=False)


def test_batches_hold_all_rows_in_order(tiny_tokenizer):
    rows = packed_dataset(tiny_tokenizer, [Source(_documents(LONG, 40, 30), 1.0)], 16, 16 * 7, progress=False)
    batches = token_batches(rows, 3)
    assert [batch.shape for batch in batches] == [(3, 16), (3, 16), (1, 16)]
    assert [row for batch in batches for row in batch.tolist()] == rows["input_ids"][:]
    first, again = (held_out_batches(tiny_tokenizer, _documents(LONG, 9, 9), 16, 64, 2) for _ in range(2))
    assert len(first) == 2 and all((a == b).all() for a, b in zip(first, again, strict=True))
