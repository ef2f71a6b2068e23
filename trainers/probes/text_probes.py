"""
Probes over running text: a needle in a haystack, the letter of a multiple choice, and variables tracked over hops.

The needle follows the single and the several needles of RULER (https://huggingface.co/papers/2404.06654), over real
text; variable tracking is a task of the same suite. The multiple choice isolates what a model needs beside knowledge in
MMLU, by the analysis of the Gather-and-Aggregate paper (https://huggingface.co/papers/2504.18574): which letter stands
at the option that matches.
"""

import functools
import random
import string
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from trainers.probes.questions import DOCUMENT_QUERIES, Query, SceneProbe, common_words


EXCERPT = Path(__file__).resolve().parents[2] / "examples" / "text" / "train.jsonl.xz"


@dataclass(frozen=True)
class Needle(SceneProbe):
    """
    A needle in a haystack: sentences that give a word its secret number, hidden in real text.

    Args:
        length (`int`, *optional*, defaults to `300`):
            Words of the haystack.
        needles (`int`, *optional*, defaults to `1`):
            Hidden sentences, each about another word. With one there is only one number to be found, and no candidates
            to rank.
        depth (`float`, *optional*):
            Where a single needle stands, from 0 (first) to 1 (last); by default anywhere.
        shots (`int`, *optional*, defaults to `0`):
            Other needles that are asked for and found in the prompt.
        queries (`int`, *optional*, defaults to `1`):
            Examples that share one haystack and its shots.
        text (`str`, *optional*):
            The text: a .jsonl or .txt file, a folder of them, or a Hub data set, as
            [`~trainers.documents.text_documents`] reads it; by default the excerpt in `examples/text`.

    Raises:
        `ValueError`: for settings that ask for more needles than there are, or no place for them.
    """

    kind: ClassVar[str] = "needle"
    easier: ClassVar[str] = "a shorter text, or several needles with a shot"
    length: int = 300
    needles: int = 1
    depth: float | None = None
    shots: int = 0
    queries: int = 1
    text: str | None = None

    def __post_init__(self):
        if self.length < 1 or self.shots < 0 or self.queries < 1:
            raise ValueError(
                "A haystack needs length >= 1, shots >= 0 and queries >= 1, not "
                f"{self.length}, {self.shots}, {self.queries}."
            )
        if self.shots + self.queries > self.needles:
            raise ValueError(
                f"{self.shots} shots and {self.queries} queries ask for more than the {self.needles} needles. "
                "Take more needles or fewer shots."
            )
        if self.depth is not None and (self.needles > 1 or not 0 <= self.depth <= 1):
            raise ValueError(f"depth is the place of a single needle, from 0 to 1, not {self.depth}.")

    @property
    def name(self) -> str:
        """Short name for tables and files, such as `needle-300-1x0`."""
        place = "" if self.depth is None else f"-at-{self.depth:g}"
        text = "" if self.text is None else f"-{Path(self.text).name.split('.')[0]}"
        return f"needle-{self.length}-{self.needles}x{self.shots}{place}{text}"

    @property
    def most_queries(self) -> int:
        """One query for each needle."""
        return self.needles

    def _scene(self, generator: random.Random, asked: int) -> tuple[str, list[Query]]:
        words = self._haystack(generator)
        keys = generator.sample(common_words(), self.needles)
        numbers = [str(number) for number in generator.sample(range(1000, 10_000), self.needles)]
        # From the last place to the first, so that what was put in moves no other place.
        depths = sorted((self._depth(generator) for _ in keys), reverse=True)
        for depth, key, number in zip(depths, keys, numbers, strict=True):
            words.insert(_sentence_end(words, round(depth * len(words))), f"The secret number of {key} is {number}.")
        candidates = tuple(f" {number}" for number in numbers)
        chosen = generator.sample(range(self.needles), asked)
        queries = [Query(f"The secret number of {keys[i]} is", candidates[i], candidates, ".\n") for i in chosen]
        return " ".join(words) + "\n\n", queries

    def _depth(self, generator: random.Random) -> float:
        return generator.random() if self.depth is None else self.depth

    def _haystack(self, generator: random.Random) -> list[str]:
        documents = _documents(self.text)
        first = generator.randrange(len(documents))
        words = documents[first].split()
        start = generator.randrange(max(1, len(words) - self.length + 1))
        words = words[start : start + self.length]
        while len(words) < self.length:
            first = (first + 1) % len(documents)
            words += documents[first].split()[: self.length - len(words)]
        return words


@dataclass(frozen=True)
class LetterChoice(SceneProbe):
    """
    Multiple choice in the form of MMLU whose right option stands in the question: only its letter is to be found.

    Args:
        options (`int`, *optional*, defaults to `4`):
            Options of a question, at most 26.
        shots (`int`, *optional*, defaults to `4`):
            Questions answered in the prompt, with other options.

    Raises:
        `ValueError`: for fewer than 2 or more than 26 options.
    """

    kind: ClassVar[str] = "choice"
    easier: ClassVar[str] = "more shots (8) or fewer options"
    options: int = 4
    shots: int = 4

    def __post_init__(self):
        if not 2 <= self.options <= len(string.ascii_uppercase) or self.shots < 0:
            raise ValueError(f"A choice has 2 to 26 options and shots >= 0, not {self.options} and {self.shots}.")

    @property
    def name(self) -> str:
        """Short name for tables and files, such as `choice-4x4`."""
        return f"choice-{self.options}x{self.shots}"

    @property
    def most_queries(self) -> int:
        """Questions that one training document may hold."""
        return max(DOCUMENT_QUERIES, self.shots + 1)

    def _scene(self, generator: random.Random, asked: int) -> tuple[str, list[Query]]:
        head = "The following are multiple choice questions (with answers).\n\n"
        return head, [self._question(generator) for _ in range(asked)]

    def _question(self, generator: random.Random) -> Query:
        letters = string.ascii_uppercase[: self.options]
        words = generator.sample(common_words(), self.options)
        right = generator.randrange(self.options)
        lines = "".join(f"{letter}. {word}\n" for letter, word in zip(letters, words, strict=True))
        question = f"Which option is the word {words[right]}?\n{lines}Answer:"
        return Query(question, f" {letters[right]}", tuple(f" {letter}" for letter in letters), "\n\n")


@dataclass(frozen=True)
class VariableTracking(SceneProbe):
    """
    Variables that take their value from other variables: what is the value of the last one of a chain?

        river = 12
        stone = 40
        lamp = river

    The value of lamp is two hops away, lamp to river and river to 12.

    Args:
        chains (`int`, *optional*, defaults to `8`):
            Chains, each with a number of its own; their lines are mixed, and a variable stands before its use.
        hops (`int`, *optional*, defaults to `2`):
            Look-ups from the last variable of a chain to its number. With 1, this is key-value retrieval.
        shots (`int`, *optional*, defaults to `2`):
            Last variables of other chains answered in the prompt.
        queries (`int`, *optional*, defaults to `1`):
            Examples that share one text and its shots.

    Raises:
        `ValueError`: for settings that ask for more chains than there are.
    """

    kind: ClassVar[str] = "variables"
    easier: ClassVar[str] = "more shots with more chains, or hops: 1"
    chains: int = 8
    hops: int = 2
    shots: int = 2
    queries: int = 1

    def __post_init__(self):
        if self.hops < 1 or self.shots < 0 or self.queries < 1:
            raise ValueError(
                "Variable tracking needs hops >= 1, shots >= 0 and queries >= 1, not "
                f"{self.hops}, {self.shots}, {self.queries}."
            )
        if self.shots + self.queries > self.chains:
            raise ValueError(
                f"{self.shots} shots and {self.queries} queries ask for more than the {self.chains} chains. "
                "Take more chains or fewer shots."
            )
        if self.chains > 100 or self.chains * self.hops > len(common_words()):
            raise ValueError(
                f"{self.chains} chains of {self.hops} need more numbers than 0 to 99 or more than "
                f"{len(common_words())} words. Take fewer chains or hops."
            )

    @property
    def name(self) -> str:
        """Short name for tables and files, such as `variables-8x2-2hops`."""
        return f"variables-{self.chains}x{self.shots}-{self.hops}hops"

    @property
    def most_queries(self) -> int:
        """One query for each chain."""
        return self.chains

    def _scene(self, generator: random.Random, asked: int) -> tuple[str, list[Query]]:
        names = generator.sample(common_words(), self.chains * self.hops)
        numbers = [str(number) for number in generator.sample(range(100), self.chains)]
        chains = [names[i * self.hops : (i + 1) * self.hops] for i in range(self.chains)]
        # A shuffled list of chain numbers says whose next line comes.
        turns = [chain for chain in range(self.chains) for _ in range(self.hops)]
        generator.shuffle(turns)
        values, lines, written = list(numbers), "", [0] * self.chains
        for chain in turns:
            variable = chains[chain][written[chain]]
            lines += f"{variable} = {values[chain]}\n"
            values[chain], written[chain] = variable, written[chain] + 1
        candidates = tuple(f" {number}" for number in numbers)
        chosen = generator.sample(range(self.chains), asked)
        queries = [Query(f"The value of {chains[i][-1]} is", candidates[i], candidates, "\n") for i in chosen]
        return lines + "\n", queries


@functools.lru_cache(maxsize=4)
def _documents(text: str | None) -> tuple[str, ...]:
    # Reads Hub data sets too, which takes long to import.
    from trainers.documents import text_documents

    if text is None and not EXCERPT.is_file():
        raise FileNotFoundError(
            "The excerpt examples/text is not beside this installation. Give the needle probe a file, folder or Hub "
            "data set as `text`."
        )
    return tuple(text_documents(str(EXCERPT) if text is None else text))


def _sentence_end(words: list[str], place: int) -> int:
    """The place nearest to `place` where a sentence ends or the text does."""
    ends = [0, len(words), *(i + 1 for i, word in enumerate(words) if word[-1] in ".!?")]
    return min(ends, key=lambda end: abs(end - place))
