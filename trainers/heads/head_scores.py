"""
Head scores as an artefact: what a teacher loses without each of its heads, and how that was measured.

    scores = HeadScores.load("scores.json")
    scores.ranking()[:8]

`scores.json` holds `schema_version` (1) and the fields of [`HeadScores`]; those that have a default are left out where
they are at it.
"""

import hashlib
import os
from dataclasses import MISSING, asdict, dataclass, fields

from trainers.files import atomic_path, json_text, read_json
from trainers.heads.head_map import TeacherShape


SCHEMA_VERSION = 1
MAX_BYTES = 64 * 2**20
# What an ablated head gives: nothing, or what it gives on average.
ABLATIONS = ("zero", "mean")
# When an answer is right: when greedy generation gives it, or when it comes first among the candidates.
ANSWERS = ("generated", "candidates")
TABLES = ("accuracy_drop", "logprob_drop", "screened", "text_kl")

Table = list[list[float | None]]


@dataclass(frozen=True)
class HeadScores:
    """
    Scores of all heads of a teacher.

    Args:
        teacher ([`TeacherShape`]):
            Teacher that was scored.
        probe (`dict`):
            Settings of the probe.
        num_examples (`int`), seed (`int`):
            Questions asked and the seed that drew them.
        base_accuracy (`float`), base_logprob (`float`):
            The whole teacher: part of the questions answered, mean log-probability of an answer in nats.
        accuracy_drop, logprob_drop (`list[list[float]]`):
            [L][H]: what the teacher loses without the head; above zero where the head helps. `None` for a head that a
            screen spared.
        dtype (`str`), date (`str`), versions (`dict`):
            Precision, day and software of the run.
        ablation (`str`, *optional*, defaults to `"zero"`):
            `"zero"` or `"mean"`: what an ablated head gave.
        answers (`str`, *optional*, defaults to `"generated"`):
            `"generated"` or `"candidates"`: when an answer counts.
        screen (`str`, *optional*), screened (`list[list[float]]`, *optional*):
            Name of the screen that chose the heads to ablate, and what it gave for each (see `screens.py`).
        text_kl (`list[list[float]]`, *optional*):
            [L][H]: divergence, in nats a token, that the head's ablation causes in the next-token distributions on
            text.
    """

    teacher: TeacherShape
    probe: dict
    num_examples: int
    seed: int
    base_accuracy: float
    base_logprob: float
    accuracy_drop: Table
    logprob_drop: Table
    dtype: str
    date: str
    versions: dict
    ablation: str = "zero"
    answers: str = "generated"
    screen: str | None = None
    screened: Table | None = None
    text_kl: Table | None = None

    def __post_init__(self):
        layers, heads = self.teacher.num_hidden_layers, self.teacher.num_attention_heads
        tables = {name: value for name, value in asdict(self).items() if name in TABLES and value is not None}
        for name, table in tables.items():
            if len(table) != layers or any(len(row) != heads for row in table):
                raise ValueError(
                    f"{name} must be a table of {layers} layers x {heads} heads, as {self.teacher.id} has."
                )
        if self.ablation not in ABLATIONS or self.answers not in ANSWERS:
            raise ValueError(
                f"ablation is {self.ablation!r}, one of {', '.join(ABLATIONS)}; answers is {self.answers!r}, one of "
                f"{', '.join(ANSWERS)}."
            )
        spared = any(value is None for row in self.accuracy_drop for value in row)
        if spared and self.screened is None:
            raise ValueError("accuracy_drop leaves heads out, but no screen says why.")

    def ranking(self, by: str = "accuracy_drop") -> list[tuple[int, int]]:
        """
        Returns (layer, head) of every head, most needed first.

        Args:
            by (`str`, *optional*, defaults to `"accuracy_drop"`):
                `"accuracy_drop"`, which the drop in log-probability tells apart where it is the same; `"logprob_drop"`;
                or `"text_kl"`. Heads that a screen spared come after those that were ablated, by what it gave.

        Raises:
            `ValueError`: when there is no such score, or it was not measured.
        """
        table = {"accuracy_drop": self.accuracy_drop, "logprob_drop": self.logprob_drop, "text_kl": self.text_kl}.get(
            by
        )
        if table is None:
            raise ValueError(f"These scores of {self.teacher.id} hold no {by}; score again with --text-tokens 8192.")

        def value(pair: tuple[int, int]) -> tuple:
            layer, head = pair
            if table[layer][head] is None:
                return False, self.screened[layer][head], 0.0
            return True, table[layer][head], 0.0 if by == "text_kl" else self.logprob_drop[layer][head]

        return sorted(self._pairs(), key=value, reverse=True)

    def _pairs(self) -> list[tuple[int, int]]:
        layers, heads = range(self.teacher.num_hidden_layers), range(self.teacher.num_attention_heads)
        return [(layer, head) for layer in layers for head in heads]

    @property
    def num_ablated(self) -> int:
        """Heads that were ablated, not only screened."""
        return sum(value is not None for row in self.accuracy_drop for value in row)

    @property
    def text(self) -> str:
        """The content of `scores.json`, one line for each layer."""
        values = asdict(self)
        at_default = {
            item.name for item in fields(self) if item.default is not MISSING and values[item.name] == item.default
        }
        kept = {name: value for name, value in values.items() if name not in at_default}
        return json_text({"schema_version": SCHEMA_VERSION, **kept})

    @property
    def sha256(self) -> str:
        """Digest of `scores.json`, by which a head map names the scores behind it."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def save(self, path: str | os.PathLike) -> None:
        """Writes the scores as JSON, atomically."""
        with atomic_path(path) as temporary:
            temporary.write_bytes(self.text.encode())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "HeadScores":
        """
        Loads scores.

        Raises:
            `FileNotFoundError`: when there is no such file.
            `ValueError`: when it does not hold head scores; the message names the file.
        """
        content = read_json(path, max_bytes=MAX_BYTES)
        known = {item.name for item in fields(cls)} | {"schema_version"}
        required = {item.name for item in fields(cls) if item.default is MISSING} | {"schema_version"}
        if not isinstance(content, dict) or not required <= set(content) <= known:
            raise ValueError(f"{path} does not hold head scores. `hf-rad score` writes them.")
        if content.pop("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"{path} has another schema version than the {SCHEMA_VERSION} this hf-rad reads.")
        try:
            return cls(**{**content, "teacher": TeacherShape(**content["teacher"])})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} does not hold head scores: {error}") from error
