"""
What a probe is: the questions that it asks, the base class that all probes share, and the words they draw from.

A probe draws *scenes*: a text in which the answers stand, and queries on it. The first queries (`shots`) are answered
in the prompt; each of the others ends one prompt. A training document is a scene with all of its queries answered.

The words come from `words.txt` (source and licence in its header).
"""

import functools
import importlib.resources
import random
import string
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import ClassVar


# Queries answered in one training document: many answer tokens for each text read.
DOCUMENT_QUERIES = 8
ITEMS = ("words", "letters", "numbers")


@dataclass(frozen=True)
class Example:
    """
    One question.

    Args:
        prompt (`str`):
            Text up to the answer, without a space at its end.
        answer (`str`):
            The right answer, with the space that precedes it in the text, if any.
        candidates (`tuple[str, ...]`):
            Every answer that could be meant (the values in the prompt), the right one among them. Where nothing but
            the answer itself could be meant, as in copying, it stands alone.
        end (`str`):
            Text that follows the answer, so that an answer which begins another one cannot win by being shorter.
    """

    prompt: str
    answer: str
    candidates: tuple[str, ...]
    end: str = "\n"


@dataclass(frozen=True)
class Query:
    """One query of a scene: the question's text, and answer, candidates and end as in [`Example`]."""

    question: str
    answer: str
    candidates: tuple[str, ...]
    end: str = "\n"


class Probe(ABC):
    """
    Base of all probes, which are frozen dataclasses of plain settings.

    `queries` says how many consecutive examples begin alike, so that what reads them can run their beginning once.
    """

    # Name of the kind in settings, and what to try where a model fails the probe.
    kind: ClassVar[str]
    easier: ClassVar[str]
    queries: ClassVar[int] = 1

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name for tables and files."""

    @abstractmethod
    def settings(self) -> dict:
        """Everything needed to make the probe again with [`~trainers.probes.probe_from_settings`]."""

    @abstractmethod
    def formats(self) -> set[tuple]:
        """What a model has practised whose training data held this probe in any size: kind, format and values."""

    @abstractmethod
    def examples(self, n: int, seed: int = 0) -> list[Example]:
        """Draws `n` questions; the same seed and settings give the same ones on any machine."""

    @abstractmethod
    def documents(self, n: int, seed: int = 0, queries: int = DOCUMENT_QUERIES) -> list[str]:
        """Draws `n` training texts, of at most `queries` answered queries each."""


class SceneProbe(Probe):
    """
    A probe that draws scenes: a subclass has `_scene`, and the field `shots`, the queries answered in the prompt.

    A field `queries` above 1 lets that many examples share one scene and its shots.
    """

    shots: int

    @property
    @abstractmethod
    def most_queries(self) -> int:
        """Greatest number of queries on one scene."""

    @abstractmethod
    def _scene(self, generator: random.Random, asked: int) -> tuple[str, list[Query]]:
        """Draws the text of a scene and `asked` different queries on it."""

    def settings(self) -> dict:
        """Everything needed to make the probe again with [`~trainers.probes.probe_from_settings`]."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        # Tuples become the lists that JSON would make of them, so that settings compare equal after a file.
        return {
            "name": self.kind,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in given.items()},
        }

    def formats(self) -> set[tuple]:
        """What a model has practised whose training data held this probe in any size: kind, format and values."""
        settings = self.settings()
        return {(self.kind, settings.get("format"), str(settings.get("values")))}

    def examples(self, n: int, seed: int = 0) -> list[Example]:
        """
        Draws `n` questions.

        Args:
            n (`int`):
                Number of examples. Each group of `queries` consecutive ones shares a scene and its shots.
            seed (`int`, *optional*, defaults to `0`):
                The same seed and settings give the same examples on any machine.
        """
        generator = random.Random(f"{self.name} {seed}")
        examples = []
        while len(examples) < n:
            head, queries = self._scene(generator, self.shots + self.queries)
            head += answered(queries[: self.shots])
            examples += [
                Example(head + query.question, query.answer, query.candidates, query.end)
                for query in queries[self.shots :]
            ]
        return examples[:n]

    def documents(self, n: int, seed: int = 0, queries: int = DOCUMENT_QUERIES) -> list[str]:
        """
        Draws `n` training texts: a scene followed by answered queries, all different.

        Args:
            n (`int`):
                Number of documents.
            seed (`int`, *optional*, defaults to `0`):
                Documents never share a draw with the examples of the same seed.
            queries (`int`, *optional*, defaults to `8`):
                Answered queries of a document, shots included; at most as many as a scene has.
        """
        generator = random.Random(f"{self.name} documents {seed}")
        scenes = (self._scene(generator, min(queries, self.most_queries)) for _ in range(n))
        return [head + answered(asked) for head, asked in scenes]


def answered(queries: list[Query]) -> str:
    """Queries with their answers, as text."""
    return "".join(query.question + query.answer + query.end for query in queries)


@functools.cache
def common_words() -> tuple[str, ...]:
    """The words of `words.txt`, in alphabetical order."""
    text = importlib.resources.files("trainers.probes").joinpath("words.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line and not line.startswith("#"))


def items(kind: str) -> tuple[str, ...]:
    """
    What strings are made of: common words, the letters a to z, or the numbers 0 to 99.

    Raises:
        `ValueError`: for another kind.
    """
    if kind not in ITEMS:
        raise ValueError(f"values must be one of {', '.join(ITEMS)}, not {kind!r}.")
    if kind == "words":
        return common_words()
    return tuple(string.ascii_lowercase) if kind == "letters" else tuple(str(number) for number in range(100))
