"""
Documents for training: read from files, folders of files and Hub data sets, and split into training and held-out ones.

    train, held = held_out(text_documents("corpus.jsonl.gz"))
    for document in DocumentStream("org/name", field="messages"): ...
"""

import bz2
import gzip
import hashlib
import io
import itertools
import json
import lzma
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow
from datasets import load_dataset


def _open_zstd(file: Path, mode: str, encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(pyarrow.CompressedInputStream(str(file), "zstd"), encoding=encoding)


OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _open_zstd}
# Documents that a stream mixes among one another.
SHUFFLE_BUFFER = 10_000
# Share of the documents that no student is trained on, unless a caller says otherwise.
HELD_OUT_SHARE = 0.05
# A text, or the messages of a conversation, `{"role": ..., "content": ...}` each.
Document = str | list[dict]


class DocumentStream:
    """
    Documents of a file, a folder of files or a Hub data set, read while they are asked for, in a mixed order: files are
    shuffled, and documents within a buffer of 10,000. Each pass has an order of its own.

    Args:
        source (`str`):
            As in [`text_documents`].
        field (`str`, *optional*, defaults to `"text"`):
            Name of the field or column that holds the text, or the messages of a conversation.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a Hub data set.
        seed (`int`, *optional*, defaults to 0):
            Decides the orders.
        most_characters (`int`, *optional*):
            Cuts longer texts into pieces of about this length, at blanks, and mixes the pieces: of a book that only
            gave windows nearly all would be read and thrown away.

    Documents that [`held_out`] holds out are left out.
    """

    def __init__(
        self,
        source: str,
        field: str = "text",
        split: str = "train",
        seed: int = 0,
        most_characters: int | None = None,
    ):
        self.source, self.field, self.split, self.seed = source, field, split, seed
        self.most_characters = most_characters
        self.passes = 0

    def __iter__(self) -> Iterator[Document]:
        rng = random.Random(f"{self.seed} {self.passes}")
        self.passes += 1
        path = Path(self.source)
        if path.exists() or _looks_like_file(path):
            files = _files(path)
            rng.shuffle(files)
            documents = itertools.chain.from_iterable(_read_file(file, self.field) for file in files)
        else:
            documents = _hub_documents(self.source, self.field, self.split, None)
        documents = (document for document in documents if not is_held_out(document))
        if self.most_characters is not None:
            documents = itertools.chain.from_iterable(_pieces(d, self.most_characters) for d in documents)
        return _shuffled(documents, rng)


def _pieces(document: Document, most: int) -> Iterator[Document]:
    if not isinstance(document, str):
        yield document
        return
    start = 0
    while len(document) - start > most:
        blank = max(document.rfind(" ", start, start + most), document.rfind("\n", start, start + most))
        end = blank if blank > start else start + most
        if document[start:end].strip():
            yield document[start:end].strip()
        start = end
    if document[start:].strip():
        yield document[start:].strip()


def _shuffled(documents: Iterator[Document], rng: random.Random) -> Iterator[Document]:
    buffer = list(itertools.islice(documents, SHUFFLE_BUFFER))
    rng.shuffle(buffer)
    for document in documents:
        place = rng.randrange(len(buffer))
        yield buffer[place]
        buffer[place] = document
    yield from buffer


def text_documents(
    source: str,
    field: str = "text",
    split: str = "train",
    limit: int | None = None,
    seed: int | None = None,
) -> list[Document]:
    """
    Reads documents from a file, a folder of files or a Hub data set.

    Args:
        source (`str`):
            A `.jsonl` file (one JSON object a line) or a `.txt` file (one document), either also as `.gz`, `.xz`,
            `.bz2` or `.zst`; a folder of such files; otherwise a Hub data set, `org/name` or `org/name:configuration`.
        field (`str`, *optional*, defaults to `"text"`):
            Name of the field or column that holds the text, or the messages of a conversation.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a Hub data set.
        limit (`int`, *optional*):
            Greatest number of documents. A Hub data set is streamed, so that no more than these are fetched.
        seed (`int`, *optional*):
            Shuffles the documents, before `limit` applies (a Hub data set within a buffer of 10,000).

    Returns:
        `list[Document]`: the documents, empty ones left out.

    Raises:
        `FileNotFoundError`: for a path that does not exist.
        `ValueError`: for a file of another kind, a line that is not JSON, a missing field, or when nothing was found.
    """
    path = Path(source)
    if path.exists() or _looks_like_file(path):
        documents = list(itertools.chain.from_iterable(_read_file(file, field) for file in _files(path)))
        if seed is not None:
            random.Random(seed).shuffle(documents)
        documents = documents[:limit]
    else:
        documents = list(itertools.islice(_hub_documents(source, field, split, seed), limit))
    if not documents:
        raise ValueError(f"{source} holds no documents: every '{field}' is empty. Give other text.")
    return documents


def check_source(source: str) -> None:
    """
    Looks whether the files of a source are there; a Hub data set is not asked for.

    Raises:
        `FileNotFoundError`: for a path that does not exist.
        `ValueError`: for a folder without files that can be read.
    """
    path = Path(source)
    if path.exists() or _looks_like_file(path):
        _files(path)


def _looks_like_file(path: Path) -> bool:
    return path.is_absolute() or path.suffix in {".jsonl", ".txt", *OPENERS} or str(path).startswith(".")


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {path}. Give a .jsonl or .txt file or a Hub data set.")
    if path.is_file():
        return [path]
    files = sorted(file for file in path.iterdir() if file.is_file() and _kind(file) in {".jsonl", ".txt"})
    if not files:
        raise ValueError(f"The folder {path} holds no .jsonl or .txt file (also as .gz, .xz, .bz2 or .zst).")
    return files


def _kind(file: Path) -> str:
    return Path(file.stem).suffix if file.suffix in OPENERS else file.suffix


def _read_file(file: Path, field: str) -> Iterator[Document]:
    if _kind(file) not in {".jsonl", ".txt"}:
        raise ValueError(
            f"{file} is neither .jsonl nor .txt (also as .gz, .xz, .bz2 or .zst). Convert it to one of these."
        )
    with OPENERS.get(file.suffix, open)(file, "rt", encoding="utf-8") as lines:
        if _kind(file) == ".txt":
            text = lines.read().strip()
            if text:
                yield text
            return
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                document = _document(json.loads(line)[field])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"Line {number} of {file} is no JSON object with a text under '{field}' ({error!r}). "
                    "Name the field that holds the text."
                ) from error
            if document:
                yield document


def _document(value: object) -> Document:
    """A text without blanks around it, or a conversation as it is."""
    if isinstance(value, list) and all(isinstance(item, dict) and {"role", "content"} <= set(item) for item in value):
        return value
    if not isinstance(value, str):
        raise TypeError("neither a text nor a list of messages with `role` and `content`")
    return value.strip()


def _hub_documents(source: str, field: str, split: str, seed: int | None) -> Iterator[Document]:
    name, _, configuration = source.partition(":")
    dataset = load_dataset(name, configuration or None, split=split, streaming=True)
    if dataset.column_names is not None and field not in dataset.column_names:
        raise ValueError(f"The data set {source} has no column '{field}'; it has {', '.join(dataset.column_names)}.")
    if seed is not None:
        dataset = dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return (document for row in dataset if row[field] and (document := _document(row[field])))


def is_held_out(document: Document, share: float = HELD_OUT_SHARE) -> bool:
    """Whether [`held_out`] puts a document on the side that no student is trained on."""
    content = document if isinstance(document, str) else json.dumps(document, sort_keys=True)
    digest = int.from_bytes(hashlib.sha256(content.encode()).digest()[:6], "big")
    return digest < share * 2**48


def held_out(documents: Iterable[Document], share: float = HELD_OUT_SHARE) -> tuple[list[Document], list[Document]]:
    """
    Splits documents into training and held-out ones by a digest of each text.

    The same text always falls on the same side, whatever the order or the rest of the corpus, so a document that
    stands twice is never on both sides.

    Args:
        documents (`Iterable[Document]`):
            Texts or conversations.
        share (`float`, *optional*, defaults to 0.05):
            Share of the texts that is held out, on average.

    Returns:
        `tuple`: training documents and held-out documents, each in the given order.

    Raises:
        `ValueError`: when one side would be empty.
    """
    sides = ([], [])
    for document in documents:
        sides[is_held_out(document, share)].append(document)
    if not all(sides):
        raise ValueError(
            f"{len(sides[0]) + len(sides[1])} documents cannot be split with {share:.0%} held out: "
            "one side stays empty. Give more documents or another share."
        )
    return sides
