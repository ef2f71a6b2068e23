"""
Copying and n-gram look-up, the tasks of "Repeat After Me" (https://huggingface.co/papers/2402.01032) on which
Transformers and fixed-size states differ most. Strings are items with spaces between them.

Copying in the form that paper gives pretrained models: the string, once more the whole string, its first item.

    lamp river stone chair

    lamp river stone chair

    lamp

The answer is ` river stone chair`. N-gram look-up asks which item follows an n-gram, which is given after the string
(`suffix`) or before it, so that a reader knows what to look for (`prefix`).
"""

import random
from dataclasses import dataclass
from typing import ClassVar

from trainers.probes.questions import Query, SceneProbe, items


NGRAM_FORMATS = ("suffix", "prefix")


@dataclass(frozen=True)
class Copying(SceneProbe):
    """
    Copying of a random string. One wrong item makes the whole copy wrong; [`~trainers.probes.asking.token_accuracy`] says how
    much of it is right.

    Args:
        length (`int`, *optional*, defaults to `16`):
            Items of the string. All are different where there are enough of them.
        values (`str`, *optional*, defaults to `"words"`):
            What the items are: `"words"`, `"letters"` or `"numbers"` (0 to 99).
        copies (`int`, *optional*, defaults to `2`):
            How often the string stands in the prompt, as published; with 1, take shots, or nothing says that a copy is
            wanted.
        shots (`int`, *optional*, defaults to `0`):
            Other strings that the prompt copies before.

    Raises:
        `ValueError`: for settings that leave nothing to copy.
    """

    kind: ClassVar[str] = "copy"
    easier: ClassVar[str] = "2 copies in the prompt, 1 or 2 shots, a shorter string, or letters as values"
    length: int = 16
    values: str = "words"
    copies: int = 2
    shots: int = 0

    def __post_init__(self):
        items(self.values)
        if self.length < 2 or self.copies < 1 or self.shots < 0:
            raise ValueError(
                "Copying needs length >= 2 (the first item is given), copies >= 1 and shots >= 0, not "
                f"{self.length}, {self.copies}, {self.shots}."
            )

    @property
    def name(self) -> str:
        """Short name for tables and files, such as `copy-words-16-2x0`."""
        return f"copy-{self.values}-{self.length}-{self.copies}x{self.shots}"

    @property
    def most_queries(self) -> int:
        """Strings of one training document, which grows by `copies + 1` strings with each."""
        return self.shots + 1

    def _scene(self, generator: random.Random, asked: int) -> tuple[str, list[Query]]:
        return "", [self._copy(generator) for _ in range(asked)]

    def _copy(self, generator: random.Random) -> Query:
        values = items(self.values)
        # All different where there are enough, so that no item says twice what follows it.
        draw = generator.sample if self.length <= len(values) else generator.choices
        string = draw(values, k=self.length)
        answer = " " + " ".join(string[1:])
        return Query((" ".join(string) + "\n\n") * self.copies + string[0], answer, (answer,), "\n\n")


@dataclass(frozen=True)
class NGramLookup(SceneProbe):
    """
    Which item follows an n-gram of the string? No n-gram stands twice in a string.

    Args:
        format (`str`, *optional*, defaults to `"suffix"`):
            `"suffix"`: the n-gram stands after the string; `"prefix"`: before it.
        length (`int`, *optional*, defaults to `20`):
            Items of the string.
        n (`int`, *optional*, defaults to `3`):
            Items of an n-gram.
        values (`str`, *optional*, defaults to `"words"`):
            What the items are: `"words"`, `"letters"` or `"numbers"` (0 to 99).
        repeats (`bool`, *optional*, defaults to `False`):
            Whether items repeat (half as many different ones as the string is long), so that only all items of the
            n-gram tell which one is meant. Without, its last item would do.
        copies (`int`, *optional*, defaults to `2`):
            How often the string stands in the prompt.
        shots (`int`, *optional*, defaults to `0`):
            Look-ups answered in the prompt: in the same string (`suffix`), or each in one of its own (`prefix`).
        queries (`int`, *optional*, defaults to `1`):
            Examples that share one string and its shots; always 1 for `prefix`, where the string follows the query.

    Raises:
        `ValueError`: for settings that leave too few n-grams, or too few different items.
    """

    kind: ClassVar[str] = "ngram"
    easier: ClassVar[str] = "2 copies of the string, n of 3, repeats: false, or a shorter string"
    format: str = "suffix"
    length: int = 20
    n: int = 3
    values: str = "words"
    repeats: bool = False
    copies: int = 2
    shots: int = 0
    queries: int = 1

    def __post_init__(self):
        if self.format not in NGRAM_FORMATS:
            raise ValueError(f"There is no probe format {self.format!r}; take one of {', '.join(NGRAM_FORMATS)}.")
        if min(self.n, self.copies, self.queries) < 1 or self.shots < 0:
            raise ValueError(
                "N-gram look-up needs n, copies and queries of at least 1 and shots of at least 0, not "
                f"{self.n}, {self.copies}, {self.queries} and {self.shots}."
            )
        available = len(items(self.values))
        if self.length <= self.n or (self.repeats and self.length < 4):
            raise ValueError(f"A string of {self.length} items has no {self.n}-gram to look up. Take a longer one.")
        # Half of all possible n-grams at most, so that a string of different ones is soon drawn.
        if self._different > available or (self.repeats and self._different**self.n < 2 * self.length):
            raise ValueError(
                f"{self.length} items with different {self.n}-grams cannot be drawn: {self._different} different "
                f"{self.values} are taken and there are {available}. Take a shorter string, other values or a larger n."
            )
        if self.shots + self.queries > self.most_queries:
            raise ValueError(
                f"{self.shots} shots and {self.queries} queries ask for more than the {self.most_queries} that one "
                "prompt has room for. Take fewer, or a longer string."
            )

    @property
    def name(self) -> str:
        """Short name for tables and files, such as `ngram-suffix-words-20-2x0-n3`."""
        repeats = "-repeats" if self.repeats else ""
        return f"ngram-{self.format}-{self.values}-{self.length}-{self.copies}x{self.shots}-n{self.n}{repeats}"

    @property
    def most_queries(self) -> int:
        """N-grams of a string that something follows; for `prefix`, the strings of one training document."""
        return self._followed if self.format == "suffix" else self.shots + 1

    @property
    def _followed(self) -> int:
        return self.length - self.n

    @property
    def _different(self) -> int:
        return self.length // 2 if self.repeats else self.length

    def _scene(self, generator: random.Random, asked: int) -> tuple[str, list[Query]]:
        if self.format == "prefix":
            strings = [self._string(generator) for _ in range(asked)]
            return "", [self._query(string, generator.randrange(self._followed)) for string in strings]
        string = self._string(generator)
        chosen = generator.sample(range(self._followed), asked)
        return self._text(string), [self._query(string, first) for first in chosen]

    def _query(self, string: list[str], first: int) -> Query:
        gram = " ".join(string[first : first + self.n])
        question = f"{gram}\n\n{self._text(string)}{gram}" if self.format == "prefix" else gram
        # Each different item once, in the order of the string.
        candidates = tuple(dict.fromkeys(f" {item}" for item in string))
        return Query(question, f" {string[first + self.n]}", candidates, "\n\n")

    def _text(self, string: list[str]) -> str:
        return (" ".join(string) + "\n\n") * self.copies

    def _string(self, generator: random.Random) -> list[str]:
        taken = generator.sample(items(self.values), self._different)
        if not self.repeats:
            return taken
        # Item by item, so that no n-gram comes back; a dead end begins anew.
        while True:
            string, seen = generator.choices(taken, k=self.n - 1), set()
            while len(string) < self.length:
                start = string[len(string) - self.n + 1 :]
                free = [item for item in taken if (*start, item) not in seen]
                if not free:
                    break
                string.append(generator.choice(free))
                seen.add(tuple(string[-self.n :]))
            else:
                return string
