"""
Training data: documents (`trainers.documents`) and probes, mixed by tokens and packed into rows of one length.

    text, held = held_out(text_documents("corpus.jsonl.gz"))
    rows = packed_dataset(
        tokenizer,
        [Source(text, 0.75), Source(ProbeDocuments(KVRetrieval(format="json")), 0.25, whole=True)],
        length=1024,
        num_tokens=120_000,
    )

Rows are made once, beforehand: the same seed gives the same rows, and a resumed run finds the batch where it stopped.
"""

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from trainers.documents import Document, DocumentStream
from trainers.probes import probe_from_settings


PROBE_BLOCK = 32
# About as many as in English text, so that a piece of text fills a row.
CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class Source:
    """
    One part of a mixture.

    Args:
        documents (`Iterable[Document]`):
            Texts, or conversations (lists of messages) that the tokenizer's chat template renders and of which only
            the assistant's tokens count in a loss. Read again from the start when they run out, so a one-way iterator
            must hold enough.
        weight (`float`):
            Share of the mixture's tokens, relative to the other sources' weights.
        whole (`bool`, *optional*, defaults to `False`):
            Whether a document is worth something only when it stands whole in a row, as a retrieval probe is: half a
            dictionary cannot answer. Other sources then fill the end of a row that it does not fit into.
        name (`str`, *optional*, defaults to `"text"`):
            What errors call it.
    """

    documents: Iterable[Document]
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


# Documents of a probe whose lengths are looked at before a mixture is begun.
LOOKED_AT = 100
# The keys of one source of a mixture in a recipe or on the command line.
SOURCE_KEYS = {"text", "probe", "weight", "field", "split"}


def source_from_settings(settings: dict, seed: int = 0, length: int | None = None) -> Source:
    """
    Makes a source of plain values.

    Args:
        settings (`dict`):
            `weight`, and either `text` (a file, folder or Hub data set, with `field` and `split` as in
            [`DocumentStream`]; a field that holds messages makes it chat data) or `probe` (settings as
            [`~trainers.probes.probe_from_settings`] takes them).
        seed (`int`, *optional*, defaults to 0):
            Decides the order of the documents and the probe's draws.
        length (`int`, *optional*):
            Tokens of a row; texts that are longer are cut into pieces of about a row.

    Raises:
        `ValueError`: for an unknown key, or when not exactly one of `text` and `probe` is there.
    """
    unknown = sorted(set(settings) - SOURCE_KEYS)
    if unknown or ("text" in settings) == ("probe" in settings):
        raise ValueError(
            f"A source of the mixture is {settings}; it needs `weight` and exactly one of `text` and `probe`, and may "
            "have `field` and `split`."
        )
    weight = settings.get("weight", 1.0)
    if "probe" in settings:
        probe = probe_from_settings(settings["probe"])
        return Source(ProbeDocuments(probe, seed), weight, whole=True, name=probe.name)
    options = {key: settings[key] for key in ("field", "split") if key in settings}
    most = None if length is None else CHARACTERS_PER_TOKEN * length
    stream = DocumentStream(settings["text"], seed=seed, most_characters=most, **options)
    return Source(stream, weight, name=settings["text"])


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
        [`~datasets.Dataset`]: columns `input_ids`, `labels` (equal, but -100 at what is not the assistant's in a
        conversation) and `seq_lengths` (tokens of each document in the row), every row of `length` tokens.

    Raises:
        `ValueError`: for sources or sizes that cannot be mixed, a tokenizer without EOS, or a source that runs dry.
    """
    columns = {"input_ids": [], "labels": [], "seq_lengths": []}
    for row in mixed_rows(tokenizer, sources, length, num_tokens, seed, progress):
        columns["input_ids"].append(row.tokens)
        columns["labels"].append([t if c else -100 for t, c in zip(row.tokens, row.counted, strict=True)])
        columns["seq_lengths"].append(row.lengths)
    return Dataset.from_dict(columns)


@dataclass(frozen=True)
class Row:
    """
    One row of a packed mixture.

    Args:
        tokens (`list[int]`):
            Token ids.
        counted (`list[bool]`):
            Whether each token counts in a loss.
        lengths (`list[int]`):
            Tokens of each document, in order; their sum is the row's length.
    """

    tokens: list[int]
    counted: list[bool]
    lengths: list[int]


def mixed_rows(
    tokenizer: PreTrainedTokenizerBase,
    sources: list[Source],
    length: int,
    num_tokens: int,
    seed: int = 0,
    progress: bool = True,
    tally: list[dict] | None = None,
) -> Iterator[Row]:
    """
    Yields the rows of [`packed_dataset`], whose arguments these are, one by one.

    Args:
        tally (`list[dict]`, *optional*):
            Filled in the end with the `tokens` and `documents` that each source gave.
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
    with tqdm(total=num_tokens, unit="token", unit_scale=True, desc="packing", disable=not progress) as bar:
        for _ in range(0, num_tokens, length):
            yield mixture.row(length)
            bar.update(length)
    if tally is not None:
        tally += [{"tokens": stream.given, "documents": stream.begun} for stream in mixture.streams]


class _TokenStream:
    """The tokens of one source, with one document in hand."""

    def __init__(self, tokenizer, source: Source, length: int, rng: random.Random):
        self.tokenizer, self.source, self.length, self.rng = tokenizer, source, length, rng
        self.documents = iter(source.documents)
        self.pending: list[int] = []
        self.counted: list[bool] = []
        self.given = self.begun = 0
        if source.whole and isinstance(source.documents, ProbeDocuments):
            # A probe's documents differ in length: one that is too long shall not first turn up in the middle of a run.
            for document in itertools.islice(source.documents, LOOKED_AT):
                self._window(self._encode(document), [])

    def peek(self) -> list[int]:
        """The document in hand, or what is left of it."""
        while not self.pending:
            self.pending, self.counted = self._window(*self._next_document())
            self.begun += 1
        return self.pending

    def take(self, room: int) -> tuple[list[int], list[bool]]:
        """At most `room` tokens of the document in hand; the rest stays in hand, unless it is `whole`."""
        tokens, counted = self.peek()[:room], self.counted[:room]
        self.pending = [] if self.source.whole else self.pending[room:]
        self.counted = self.counted[room:]
        self.given += len(tokens)
        return tokens, counted

    def _next_document(self) -> tuple[list[int], list[bool]]:
        document = next(self.documents, None)
        if document is None:
            self.documents = iter(self.source.documents)
            document = next(self.documents, None)
        if document is None:
            raise ValueError(
                f"The source '{self.source.name}' ran dry after {self.given} tokens and cannot be read again. "
                "Give it as a list, or ask for fewer tokens."
            )
        if not isinstance(document, str):
            return chat_tokens(self.tokenizer, document)
        # A document of more characters than this is longer than a row in any tokenizer; no need to encode all of it.
        most = 32 * self.length
        if len(document) > most and not self.source.whole:
            start = self.rng.randrange(len(document) - most + 1)
            document = document[start : start + most]
        tokens = self._encode(document)
        return tokens, [True] * len(tokens)

    def _encode(self, document: str) -> list[int]:
        tokens = self.tokenizer(document, verbose=False).input_ids
        if not tokens or tokens[-1] != self.tokenizer.eos_token_id:
            tokens = [*tokens, self.tokenizer.eos_token_id]
        return tokens

    def _window(self, tokens: list[int], counted: list[bool]) -> tuple[list[int], list[bool]]:
        if len(tokens) <= self.length:
            return tokens, counted
        if self.source.whole:
            raise ValueError(
                f"A document of the source '{self.source.name}' has {len(tokens)} tokens and cannot stand whole in a "
                f"row of {self.length}. Use longer rows or a smaller probe."
            )
        start = self.rng.randrange(len(tokens) - self.length + 1)
        return tokens[start : start + self.length], counted[start : start + self.length]


def chat_tokens(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> tuple[list[int], list[bool]]:
    """
    Tokens of a conversation in the tokenizer's chat template, and which of them the assistant wrote.

    What an assistant's message adds to the text rendered with a generation prompt before it is the assistant's, its
    end-of-turn token with it, so no template needs marks of its own.

    Raises:
        `ValueError`: for a template that renders earlier messages differently once later ones are there.
    """
    text, spans = tokenizer.apply_chat_template(messages, tokenize=False), []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
            until = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
            if not until.startswith(before) or not text.startswith(until):
                raise ValueError(
                    "The tokenizer's chat template renders earlier messages differently once later ones are there, so "
                    "the assistant's tokens cannot be told. Cut the conversations to one answer each."
                )
            spans.append((len(before), len(until)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    counted = [any(first <= start < last for first, last in spans) for start, _ in encoded.offset_mapping]
    return encoded.input_ids, counted


class _Mixture:
    """Chooses whose turn it is, by tokens given so far."""

    def __init__(self, streams: list[_TokenStream]):
        self.streams = streams

    def row(self, length: int) -> Row:
        row = Row([], [], [])
        while len(row.tokens) < length:
            room = length - len(row.tokens)
            tokens, counted = self._next(room).take(room)
            row.tokens.extend(tokens)
            row.counted.extend(counted)
            row.lengths.append(len(tokens))
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
