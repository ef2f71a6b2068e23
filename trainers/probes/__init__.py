"""
Retrieval probes: synthetic questions whose answer stands in the prompt. A probe ablates nothing itself; it asks.

    probe = KVRetrieval(format="json", pairs=20, shots=2)
    examples = probe.examples(100, seed=0)
    accuracy = sum(generated_accuracy(model, tokenizer, examples)) / len(examples)

| name | asks | room |
|---|---|---|
| `kv` | the value of a key | `lookup_probes.py` |
| `phone_book` | a number in a phone book | `lookup_probes.py` |
| `mqar` | several keys of a bare stream | `lookup_probes.py` |
| `copy` | a copy of a random string | `copy_probes.py` |
| `ngram` | what follows an n-gram | `copy_probes.py` |
| `needle` | a sentence hidden in real text | `text_probes.py` |
| `choice` | the letter of the option that matches | `text_probes.py` |
| `variables` | a variable's value, over two hops | `text_probes.py` |
| `mean` | what several probes ask, in equal parts | here |

What they share is in `questions.py`, the ways to score a model on them in `asking.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

from trainers.probes.asking import (
    EncodedAnswer,
    common_prefix,
    generated_accuracy,
    is_correct,
    left_padded,
    ranked_accuracy,
    token_accuracy,
    token_ids,
)
from trainers.probes.copy_probes import Copying, NGramLookup
from trainers.probes.lookup_probes import KVRetrieval, MultiQueryRecall, PhoneBook
from trainers.probes.questions import DOCUMENT_QUERIES, Example, Probe, common_words
from trainers.probes.text_probes import LetterChoice, Needle, VariableTracking


__all__ = [
    "Copying",
    "EncodedAnswer",
    "Example",
    "KVRetrieval",
    "LetterChoice",
    "MeanOf",
    "MultiQueryRecall",
    "NGramLookup",
    "Needle",
    "PhoneBook",
    "Probe",
    "VariableTracking",
    "common_prefix",
    "common_words",
    "generated_accuracy",
    "is_correct",
    "left_padded",
    "probe_from_settings",
    "ranked_accuracy",
    "token_accuracy",
    "token_ids",
]


@dataclass(frozen=True)
class MeanOf(Probe):
    """
    Several probes in equal parts: the mean over its examples is the mean over its probes.

    Args:
        probes (`tuple[Probe, ...]`):
            Two probes or more; settings of probes are taken as well.

    Raises:
        `ValueError`: for fewer than two probes, or two of the same name.
    """

    kind: ClassVar[str] = "mean"
    probes: tuple[Probe, ...]

    def __post_init__(self):
        made = (one if isinstance(one, Probe) else probe_from_settings(one) for one in self.probes)
        object.__setattr__(self, "probes", tuple(made))
        names = [probe.name for probe in self.probes]
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(f"A mean needs two different probes or more, not {', '.join(names) or 'none'}.")

    @property
    def name(self) -> str:
        """Short name for tables and files, such as `kv-json-20x2-numbers+copy-words-16-2x0`."""
        return "+".join(probe.name for probe in self.probes)

    @property
    def easier(self) -> str:
        """What to try where a model fails it."""
        return "; ".join(f"for {probe.name}: {probe.easier}" for probe in self.probes)

    def settings(self) -> dict:
        """Everything needed to make the probe again with [`probe_from_settings`]."""
        return {"name": self.kind, "probes": [probe.settings() for probe in self.probes]}

    def formats(self) -> set[tuple]:
        """The formats of all its probes."""
        return set().union(*(probe.formats() for probe in self.probes))

    def examples(self, n: int, seed: int = 0) -> list[Example]:
        """
        Draws `n` questions, as many of each probe, probe after probe (see [`MeanOf.parts`]).

        Raises:
            `ValueError`: when `n` cannot be divided equally.
        """
        each = self._each(n)
        return [example for probe in self.probes for example in probe.examples(each, seed)]

    def documents(self, n: int, seed: int = 0, queries: int = DOCUMENT_QUERIES) -> list[str]:
        """Draws `n` training texts, of each probe in turn."""
        most = -(-n // len(self.probes))
        columns = (probe.documents(most, seed, queries) for probe in self.probes)
        return [document for row in zip(*columns, strict=True) for document in row][:n]

    def parts(self, values: Sequence) -> dict[str, Sequence]:
        """Splits what was found for each example by the name of its probe."""
        each = self._each(len(values))
        return {probe.name: values[i * each : (i + 1) * each] for i, probe in enumerate(self.probes)}

    def _each(self, n: int) -> int:
        if n % len(self.probes):
            raise ValueError(
                f"{n} examples cannot be divided equally among {len(self.probes)} probes. Take a multiple of "
                f"{len(self.probes)}."
            )
        return n // len(self.probes)


PROBES = {
    probe.kind: probe
    for probe in (
        *(KVRetrieval, PhoneBook, MultiQueryRecall, Copying, NGramLookup),
        *(Needle, LetterChoice, VariableTracking, MeanOf),
    )
}


def probe_from_settings(settings: dict) -> Probe:
    """
    Makes a probe from what its `settings()` gave.

    Raises:
        `ValueError`: when the name or a field is unknown; the message lists the known ones.
    """
    settings = dict(settings)
    name = settings.pop("name", None)
    if name not in PROBES:
        raise ValueError(f"There is no probe named {name!r}; take one of {', '.join(PROBES)}.")
    try:
        return PROBES[name](**settings)
    except TypeError as error:
        known = ", ".join(item.name for item in fields(PROBES[name]))
        raise ValueError(f"The probe {name} cannot take these settings: {error}. It knows {known}.") from error
