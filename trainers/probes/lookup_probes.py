"""
Look-up probes: a table of keys and values stands in the prompt, and one key is asked for.

Key-value retrieval in the published form (paper, section 4.1, and the code of the Gather-and-Aggregate paper,
https://huggingface.co/papers/2504.18574):

    Memorize the following dictionary:
    lamp:12
    river:7
    The value of the key 'lamp' is

and as one JSON object or as plain lines, which small teachers answer far better. `shots` queries are answered already
in the prompt, over the same dictionary. `PhoneBook` asks the same of another text, kept out of all training data, and
`MultiQueryRecall` of a bare stream of keys and values.
"""

import random
import uuid
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from trainers.probes.questions import Query, SceneProbe, common_words


KV_VALUES = ("numbers", "words", "uuids")
FIRST_NAMES = (
    "Ada Alice Anna Ben Carl Clara Daniel Diana Edgar Ella Emma Felix Grace Hannah Helen Henry Hugo Ida Irene Ivan "
    "Jack James Jane Julia Karl Kate Laura Leo Lucy Maria Mark Martin Mary Max Nina Nora Oliver Oscar Paul Peter Rita "
    "Robert Rosa Ruth Samuel Sara Simon Sofia Thomas Tina Victor Walter"
).split()
SURNAMES = (
    "Adams Allen Baker Bell Bennett Brooks Brown Carter Clark Collins Cook Cooper Cox Davis Edwards Ellis Evans "
    "Fisher Foster Gray Green Hall Harris Hill Howard Hughes Jenkins Kelly King Lewis Marshall Mason Miller "
    "Mitchell Morgan Morris Murphy Palmer Parker Perry Price Reed Ross Russell Scott Shaw Simmons Stewart "
    "Sullivan Turner Walker Ward Watson Webb Wells West White Wood Young"
).split()


@dataclass(frozen=True)
class _Lookup(SceneProbe):
    """What every look-up probe shares: `_table` draws the entries, `_head` writes them, `_query` asks for one."""

    pairs: int = 20
    shots: int = 2
    queries: int = 1

    def __post_init__(self):
        if self.pairs < 1 or self.shots < 0 or self.queries < 1:
            raise ValueError(
                f"A probe needs pairs >= 1, shots >= 0, queries >= 1, not {self.pairs}, {self.shots}, {self.queries}."
            )
        if self.shots + self.queries > self.pairs:
            raise ValueError(
                f"{self.shots} shots and {self.queries} queries ask for more keys than the {self.pairs} pairs have. "
                "Take more pairs or fewer shots: a query that was answered before needs no retrieval."
            )

    @property
    def most_queries(self) -> int:
        """One query for each pair."""
        return self.pairs

    @abstractmethod
    def _table(self, generator: random.Random) -> tuple[list[str], list[str]]:
        """Draws different keys and different values."""

    @abstractmethod
    def _head(self, keys: list[str], values: list[str]) -> str:
        """Writes the table."""

    @abstractmethod
    def _query(self, key: str, value: str) -> tuple[str, str, str]:
        """Returns question, answer and what follows the answer."""

    def _scene(self, generator: random.Random, asked: int) -> tuple[str, list[Query]]:
        keys, values = self._table(generator)
        chosen = generator.sample(range(self.pairs), asked)
        written = [self._query(key, value) for key, value in zip(keys, values, strict=True)]
        candidates = tuple(answer for _, answer, _ in written)
        return self._head(keys, values), [
            Query(question, answer, candidates, end) for question, answer, end in (written[i] for i in chosen)
        ]


@dataclass(frozen=True)
class KVRetrieval(_Lookup):
    """
    Key-value retrieval: a dictionary of `pairs` entries and a question for one of them.

    Args:
        pairs (`int`, *optional*, defaults to `20`):
            Entries of the dictionary.
        shots (`int`, *optional*, defaults to `2`):
            Queries answered in the prompt, of other keys of the same dictionary.
        queries (`int`, *optional*, defaults to `1`):
            Examples that share one dictionary and its shots. The scorer runs what they share once.
        format (`str`, *optional*, defaults to `"json"`):
            `"paper"`, `"json"` or `"lines"`.
        values (`str` or `tuple[str, ...]`, *optional*, defaults to `"numbers"`):
            `"numbers"` (0 to 99, as published; 0 to 999 for more than 100 pairs), `"words"`, `"uuids"` (the keys are
            UUIDs then, too), or the values to draw from.
        words (`tuple[str, ...]`, *optional*):
            Keys (and word values) to draw from instead of `words.txt`.

    Raises:
        `ValueError`: for settings that cannot make a dictionary of different keys and values.
    """

    kind: ClassVar[str] = "kv"
    easier: ClassVar[str] = "more shots (2), another format (json or lines), numbers as values, or fewer pairs"
    known_formats: ClassVar[tuple[str, ...]] = ("paper", "json", "lines")
    format: str = "json"
    values: str | tuple[str, ...] = "numbers"
    words: tuple[str, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.format not in self.known_formats:
            raise ValueError(f"There is no probe format {self.format!r}; take one of {', '.join(self.known_formats)}.")
        if isinstance(self.values, str) and self.values not in KV_VALUES:
            raise ValueError(f"values must be one of {', '.join(KV_VALUES)} or a list of values, not {self.values!r}.")
        # Settings read from JSON hold lists; a frozen probe holds tuples.
        if not isinstance(self.values, str):
            object.__setattr__(self, "values", tuple(self.values))
        if self.words is not None:
            object.__setattr__(self, "words", tuple(self.words))
        if self.values == "uuids":
            return
        available = len(set(self._keys)), len(set(self._values))
        needed = self.pairs * (2 if self.values == "words" else 1), self.pairs
        if available[0] < needed[0] or available[1] < needed[1]:
            raise ValueError(
                f"{self.pairs} pairs need {needed[0]} different words and {needed[1]} different values, but there are "
                f"{available[0]} and {available[1]}. Take fewer pairs, or pass more words or values."
            )

    @property
    def name(self) -> str:
        """Short name for tables and files, such as `kv-json-20x2-numbers`."""
        values = self.values if isinstance(self.values, str) else "custom"
        return f"{self.kind}-{self.format}-{self.pairs}x{self.shots}-{values}"

    @property
    def _keys(self) -> tuple[str, ...]:
        return common_words() if self.words is None else self.words

    @property
    def _values(self) -> tuple[str, ...]:
        if self.values == "numbers":
            return tuple(str(number) for number in range(100 if self.pairs <= 100 else 1000))
        return self._keys if self.values == "words" else self.values

    def _table(self, generator: random.Random) -> tuple[list[str], list[str]]:
        if self.values == "uuids":
            drawn = [str(uuid.UUID(int=generator.getrandbits(128), version=4)) for _ in range(2 * self.pairs)]
            return drawn[: self.pairs], drawn[self.pairs :]
        if self.values == "words":
            drawn = generator.sample(self._keys, 2 * self.pairs)
            return drawn[: self.pairs], drawn[self.pairs :]
        return generator.sample(self._keys, self.pairs), generator.sample(self._values, self.pairs)

    def _head(self, keys: list[str], values: list[str]) -> str:
        pairs = zip(keys, values, strict=True)
        if self.format == "json":
            return "{" + ", ".join(f'"{key}": {value}' for key, value in pairs) + "}\n"
        if self.format == "lines":
            return "".join(f"{key}: {value}\n" for key, value in pairs) + "\n"
        return "Memorize the following dictionary:\n" + "".join(f"{key}:{value}\n" for key, value in pairs)

    def _query(self, key: str, value: str) -> tuple[str, str, str]:
        question = {"json": f'"{key}":', "lines": f"{key}:", "paper": f"The value of the key '{key}' is"}[self.format]
        return question, f" {value}", "\n"


@dataclass(frozen=True)
class MultiQueryRecall(KVRetrieval):
    """
    Multi-query associative recall (MQAR; "Zoology", https://huggingface.co/papers/2312.04927): keys and values in one
    stream without any mark between them, then further keys of it, each followed by its value.

        lamp 12 river 7 stone 41 river 7 lamp

    The arguments are those of [`KVRetrieval`]; `"stream"` is the only format.
    """

    kind: ClassVar[str] = "mqar"
    easier: ClassVar[str] = "more shots (4), numbers as values, or fewer pairs"
    known_formats: ClassVar[tuple[str, ...]] = ("stream",)
    format: str = "stream"

    def _head(self, keys: list[str], values: list[str]) -> str:
        return "".join(f"{key} {value} " for key, value in zip(keys, values, strict=True))

    def _query(self, key: str, value: str) -> tuple[str, str, str]:
        return key, f" {value}", " "


@dataclass(frozen=True)
class PhoneBook(_Lookup):
    """
    A phone book, in the manner of "Repeat After Me" (https://huggingface.co/papers/2402.01032): names and numbers that
    no training data of this project contains, so that a student's score on it is not a trained one.

    Args:
        pairs (`int`, *optional*, defaults to `20`):
            Entries of the book.
        shots (`int`, *optional*, defaults to `2`):
            Numbers already looked up in the prompt.
        queries (`int`, *optional*, defaults to `1`):
            Examples that share one book and its shots.
    """

    kind: ClassVar[str] = "phone_book"
    easier: ClassVar[str] = "more shots (2) or fewer pairs"

    def __post_init__(self):
        super().__post_init__()
        if self.pairs > len(FIRST_NAMES) * len(SURNAMES):
            raise ValueError(f"A phone book has at most {len(FIRST_NAMES) * len(SURNAMES)} entries, not {self.pairs}.")

    @property
    def name(self) -> str:
        """Short name for tables and files, such as `phone-book-20x2`."""
        return f"phone-book-{self.pairs}x{self.shots}"

    def _table(self, generator: random.Random) -> tuple[list[str], list[str]]:
        people = generator.sample(range(len(FIRST_NAMES) * len(SURNAMES)), self.pairs)
        names = [f"{FIRST_NAMES[i % len(FIRST_NAMES)]} {SURNAMES[i // len(FIRST_NAMES)]}" for i in people]
        return names, [f"555-{number:04d}" for number in generator.sample(range(10_000), self.pairs)]

    def _head(self, keys: list[str], values: list[str]) -> str:
        entries = "".join(f"{key}: {value}\n" for key, value in zip(keys, values, strict=True))
        return f"Phone book\n{entries}\nNumbers looked up\n"

    def _query(self, key: str, value: str) -> tuple[str, str, str]:
        return f"{key}:", f" {value}", "\n"
