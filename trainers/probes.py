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

What they share is in `questions.py`, the ways to score a model on them in `asking.py`.
"""

from dataclasses import fields

from trainers.asking import (
    EncodedAnswer,
    common_prefix,
    generated_accuracy,
    is_correct,
    left_padded,
    ranked_accuracy,
    token_accuracy,
    token_ids,
)
from trainers.copy_probes import Copying, NGramLookup
from trainers.lookup_probes import KVRetrieval, MultiQueryRecall, PhoneBook
from trainers.questions import Example, Probe, common_words


__all__ = [
    "Copying",
    "EncodedAnswer",
    "Example",
    "KVRetrieval",
    "MultiQueryRecall",
    "NGramLookup",
    "PhoneBook",
    "Probe",
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

PROBES = {probe.kind: probe for probe in (KVRetrieval, PhoneBook, MultiQueryRecall, Copying, NGramLookup)}


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
