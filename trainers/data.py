"""
Training data: documents from files, the Hub and probes, mixed by tokens and packed into rows of one length.

    text, held = held_out(text_documents("corpus.jsonl.gz"))
    rows = packed_dataset(
        tokenizer,
        [Source(text, 0.75), Source(ProbeDocuments(KVRetrieval(format="json")), 0.25, whole=True)],
        length=1024,
        num_tokens=120_000,
    )

Rows are made once, beforehand: the same seed gives the same rows, and a resumed run finds the batch where it stopped.
"""

import bz2
import gzip
import hashlib
import itertools
import json
import lzma
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase


OPENERS = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
PROBE_BLOCK = 32


@dataclass(frozen=True)
class Source:
    """
    One part of a mixture.

    Args:
        documents (`Iterable[str]`):
            Texts. Read again from the start when they run out, so a one-way iterator must hold enough.
        weight (`float`):
            Share of the mixture's tokens, relative to the other sources' weights.
        whole (`bool`, *optional*, defaults to `False`):
            Whether a document is worth something only when it stands whole in a row, as a retrieval probe is: half a
            dictionary cannot answer. Other sources then fill the end of a row that it does not fit into.
        name (`str`, *optional*, defaults to `"text"`):
            What errors call it.
    """

    documents: Iterable[str]
    weight: float
    whole: bool = False
    name: str = "text"


class ProbeDocuments:
    """
    Endless training documents of a probe, as an iterable of texts.

    Args:
        probe ([`KVRetrieval`] or any probe of `trainers.probes`):
            Gives `documents(n, seed)`.
        seed (`int`, *optional*, defaults to 0):
            Start of the stream: other seeds give other documents.
    """

    def __init__(self, probe, seed: int = 0):
        self.probe, self.seed = probe, seed

    def __iter__(self) -> Iterator[str]:
        for block in itertools.count(start=self.seed * 2**32):
            yield from self.probe.documents(PROBE_BLOCK, seed=block)


def text_documents(
    source: str,
    field: str = "text",
    split: str = "train",
    limit: int | None = None,
    seed: int | None = None,
) -> list[str]:
    """
    Reads documents from a file, a folder of files or a Hub data set.

    Args:
        source (`str`):
            A `.jsonl` file (one JSON object a line) or a `.txt` file (one document), either also as `.gz`, `.xz` or
            `.bz2`; a folder of such files; otherwise a Hub data set, `org/name` or `org/name:configuration`.
        field (`str`, *optional*, defaults to `"text"`):
            Name of the field or column that holds the text.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a Hub data set.
        limit (`int`, *optional*):
            Greatest number of documents. A Hub data set is streamed, so that no more than these are fetched.
        seed (`int`, *optional*):
            Shuffles the documents, before `limit` applies (a Hub data set within a buffer of 10,000).

    Returns:
        `list[str]`: the documents, empty ones left out.

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


def _looks_like_file(path: Path) -> bool:
    return path.is_absolute() or path.suffix in {".jsonl", ".txt", *OPENERS} or str(path).startswith(".")


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {path}. Give a .jsonl or .txt file or a Hub data set.")
    if path.is_file():
        return [path]
    files = sorted(file for file in path.iterdir() if file.is_file() and _kind(file) in {".jsonl", ".txt"})
    if not files:
        raise ValueError(f"The folder {path} holds no .jsonl or .txt file (also as .gz, .xz or .bz2).")
    return files


def _kind(file: Path) -> str:
    return Path(file.stem).suffix if file.suffix in OPENERS else file.suffix


def _read_file(file: Path, field: str) -> Iterator[str]:
    if _kind(file) not in {".jsonl", ".txt"}:
        raise ValueError(f"{file} is neither .jsonl nor .txt (also as .gz, .xz or .bz2). Convert it to one of these.")
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
                text = json.loads(line)[field].strip()
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"Line {number} of {file} is no JSON object with a text under '{field}' ({error!r}). "
                    "Name the field that holds the text."
                ) from error
            if text:
                yield text


def _hub_documents(source: str, field: str, split: str, seed: int | None) -> Iterator[str]:
    name, _, configuration = source.partition(":")
    dataset = load_dataset(name, configuration or None, split=split, streaming=True)
    if dataset.column_names is not None and field not in dataset.column_names:
        raise ValueError(f"The data set {source} has no column '{field}'; it has {', '.join(dataset.column_names)}.")
    if seed is not None:
        dataset = dataset.shuffle(seed=seed, buffer_size=10_000)
    return (row[field].strip() for row in dataset if row[field] and row[field].strip())


def held_out(documents: Iterable[str], share: float = 0.05) -> tuple[list[str], list[str]]:
    """
    Splits documents into training and held-out ones by a digest of each text.

    The same text always falls on the same side, whatever the order or the rest of the corpus, so a document that
    stands twice is never on both sides.

    Args:
        documents (`Iterable[str]`):
            Texts.
        share (`float`, *optional*, defaults to 0.05):
            Share of the texts that is held out, on average.

    Returns:
        `tuple[list[str], list[str]]`: training documents and held-out documents, each in the given order.

    Raises:
        `ValueError`: when one side would be empty.
    """
    sides = ([], [])
    for document in documents:
        digest = int.from_bytes(hashlib.sha256(document.encode()).digest()[:6], "big")
        sides[digest < share * 2**48].append(document)
    if not all(sides):
        raise ValueError(
            f"{len(sides[0]) + len(sides[1])} documents cannot be split with {share:.0%} held out: "
            "one side stays empty. Give more documents or another share."
        )
    return sides


def packed_dataset(
    tokenizer: PreTrainedTokenizerBase,
    sources: list[Source],
    length: int,
    num_tokens: int,
    seed: int = 0,
    progress: bool = True,
) -> Dataset:
    """
    Tokenises a mixture of sources and packs it into rows of exactly `length` tokens.

    The next document always comes from the source that is furthest behind its share, so shares hold in every stretch
    of the data, and rows are best read in their order. Documents end with the EOS token. One that is longer than a row
    gives a window of `length` tokens at a random place; what does not fit into a row goes on in the next one, unless
    its source is `whole`.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The teacher's tokenizer.
        sources (`list[Source]`):
            What to mix. At least one must not be `whole`, unless it is the only one.
        length (`int`):
            Tokens in a row.
        num_tokens (`int`):
            Least number of tokens of the whole; the last row is completed.
        seed (`int`, *optional*, defaults to 0):
            Decides the windows. The order of the documents is their source's own.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        [`~datasets.Dataset`]: columns `input_ids` and `labels` (equal), every row of `length` tokens.

    Raises:
        `ValueError`: for sources or sizes that cannot be mixed, a tokenizer without EOS, or a source that runs dry.
    """
    if not sources or any(source.weight <= 0 for source in sources):
        raise ValueError("A mixture needs at least one source, and weights above 0.")
    if length < 2 or num_tokens < 1:
        raise ValueError(f"length is {length} and num_tokens {num_tokens}; need at least 2 and 1.")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no EOS token, which must stand between documents. Set tokenizer.eos_token."
        )
    if len(sources) > 1 and all(source.whole for source in sources):
        raise ValueError("Every source is `whole`, so nothing can fill the ends of rows. Add one that may be cut.")
    rng = random.Random(seed)
    mixture = _Mixture([_TokenStream(tokenizer, source, length, rng) for source in sources])
    rows = []
    with tqdm(total=num_tokens, unit="token", unit_scale=True, desc="packing", disable=not progress) as bar:
        while len(rows) * length < num_tokens:
            rows.append(mixture.row(length))
            bar.update(length)
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


class _TokenStream:
    """The tokens of one source, with one document in hand."""

    def __init__(self, tokenizer, source: Source, length: int, rng: random.Random):
        self.tokenizer, self.source, self.length, self.rng = tokenizer, source, length, rng
        self.documents = iter(source.documents)
        self.pending: list[int] = []
        self.given = 0

    def peek(self) -> list[int]:
        """The document in hand, or what is left of it."""
        if not self.pending:
            self.pending = self._window(self._next_document())
        return self.pending

    def take(self, room: int) -> list[int]:
        """At most `room` tokens of the document in hand; the rest stays in hand, unless it is `whole`."""
        tokens = self.peek()[:room]
        self.pending = [] if self.source.whole else self.pending[room:]
        self.given += len(tokens)
        return tokens

    def _next_document(self) -> list[int]:
        document = next(self.documents, None)
        if document is None:
            self.documents = iter(self.source.documents)
            document = next(self.documents, None)
        if document is None:
            raise ValueError(
                f"The source '{self.source.name}' ran dry after {self.given} tokens and cannot be read again. "
                "Give it as a list, or ask for fewer tokens."
            )
        # A document of more characters than this is longer than a row in any tokenizer; no need to encode all of it.
        most = 32 * self.length
        if len(document) > most and not self.source.whole:
            start = self.rng.randrange(len(document) - most + 1)
            document = document[start : start + most]
        tokens = self.tokenizer(document, verbose=False).input_ids
        if tokens and tokens[-1] == self.tokenizer.eos_token_id:
            return tokens
        return [*tokens, self.tokenizer.eos_token_id]

    def _window(self, tokens: list[int]) -> list[int]:
        if len(tokens) <= self.length:
            return tokens
        if self.source.whole:
            raise ValueError(
                f"A document of the source '{self.source.name}' has {len(tokens)} tokens and cannot stand whole in a "
                f"row of {self.length}. Use longer rows or a smaller probe."
            )
        start = self.rng.randrange(len(tokens) - self.length + 1)
        return tokens[start : start + self.length]


class _Mixture:
    """Chooses whose turn it is, by tokens given so far."""

    def __init__(self, streams: list[_TokenStream]):
        self.streams = streams

    def row(self, length: int) -> list[int]:
        row: list[int] = []
        while len(row) < length:
            room = length - len(row)
            row += self._next(room).take(room)
        return row

    def _next(self, room: int) -> _TokenStream:
        behind = sorted(self.streams, key=lambda stream: stream.given / stream.source.weight)
        fitting = (stream for stream in behind if not stream.source.whole or len(stream.peek()) <= room)
        # Where a lone whole source does not fit, its document is cut after all and the next row starts a new one.
        return next(fitting, behind[0])


def token_batches(dataset: Dataset, batch_size: int) -> list[torch.Tensor]:
    """Rows of a packed data set as a list of `[batch_size, length]` token ids; the last one may be smaller."""
    rows = torch.tensor(dataset["input_ids"][:])  # [rows, length]
    return list(rows.split(batch_size))


def held_out_batches(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], length: int, num_tokens: int, batch_size: int = 4
) -> list[torch.Tensor]:
    """
    Packs held-out text for a loss or a calibration residual: `[batch_size, length]` tensors, always the same ones.

    Arguments are those of [`packed_dataset`]; the documents are read in the given order.
    """
    dataset = packed_dataset(tokenizer, [Source(documents, 1.0)], length, num_tokens, progress=False)
    return token_batches(dataset, batch_size)
