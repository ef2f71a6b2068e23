"""
Head scores: how much a teacher's retrieval loses when one attention head is ablated (paper, section 4.1,
https://huggingface.co/papers/2602.11374; the authors publish rankings of three teachers but no code).

A head's score is the drop in accuracy on a probe, and beside it the drop in the log-probability of the answer, when
the head's slice of the `o_proj` input is zeroed. Every head of every layer is ablated exactly (see `ablation.py` for
what is shared between the ablations). Accuracy is teacher-forced: an answer counts when each of its tokens is the most
likely one after the tokens before it, and what follows does not go on with the word or number. That is the exact match
of greedy generation.

    scores = score_heads(model, tokenizer, KVRetrieval(format="json", queries=10), num_examples=100)
    scores.save("scores.json")
    scores.ranking()[:8]
"""

import datetime
import hashlib
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainers.ablation import HeadAblation, attention_layers, inference
from trainers.files import atomic_path, json_text, read_json
from trainers.head_map import TeacherShape
from trainers.probe_rows import PackedExamples, pack
from trainers.probes import Probe


SCHEMA_VERSION = 1
MAX_BYTES = 64 * 2**20
# The self-check lets log-probabilities differ by this much, in nats: rounding, not another computation.
TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-2}
LOW_PRECISION_TOLERANCE = 1.0


class ProbeFailedError(ValueError):
    """The teacher does not solve the probe, so its heads cannot be ranked by it. `.accuracy` is what it reached."""

    def __init__(self, message: str, accuracy: float):
        super().__init__(message)
        self.accuracy = accuracy


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
            [L][H]: what the teacher loses without the head; above zero where the head helps.
        dtype (`str`), date (`str`), versions (`dict`):
            Precision, day and software of the run.
    """

    teacher: TeacherShape
    probe: dict
    num_examples: int
    seed: int
    base_accuracy: float
    base_logprob: float
    accuracy_drop: list[list[float]]
    logprob_drop: list[list[float]]
    dtype: str
    date: str
    versions: dict

    def __post_init__(self):
        layers, heads = self.teacher.num_hidden_layers, self.teacher.num_attention_heads
        for name, table in (("accuracy_drop", self.accuracy_drop), ("logprob_drop", self.logprob_drop)):
            if len(table) != layers or any(len(row) != heads for row in table):
                raise ValueError(
                    f"{name} must be a table of {layers} layers x {heads} heads, as {self.teacher.id} has."
                )

    def ranking(self) -> list[tuple[int, int]]:
        """Returns (layer, head) of every head, most needed first: by drop in accuracy, then in log-probability."""
        scores = {
            (layer, head): (self.accuracy_drop[layer][head], self.logprob_drop[layer][head])
            for layer in range(self.teacher.num_hidden_layers)
            for head in range(self.teacher.num_attention_heads)
        }
        return sorted(scores, key=lambda pair: scores[pair], reverse=True)

    @property
    def text(self) -> str:
        """The content of `scores.json`, one line for each layer."""
        return json_text({"schema_version": SCHEMA_VERSION, **asdict(self)})

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
        known = {item.name for item in fields(cls)}
        if not isinstance(content, dict) or set(content) != known | {"schema_version"}:
            raise ValueError(f"{path} does not hold head scores. `hf-rad score` writes them.")
        if content.pop("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"{path} has another schema version than the {SCHEMA_VERSION} this hf-rad reads.")
        try:
            return cls(**{**content, "teacher": TeacherShape(**content["teacher"])})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} does not hold head scores: {error}") from error


def score_heads(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probe: Probe,
    num_examples: int = 100,
    seed: int = 0,
    teacher: TeacherShape | None = None,
    dtype: torch.dtype | None = None,
    min_accuracy: float = 0.6,
    rows: int = 1,
    batch_tokens: int = 4096,
    partial_path: str | os.PathLike | None = None,
    progress: bool = True,
) -> HeadScores:
    """
    Ablates every head of `model` in turn and measures what the probe loses.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Llama-like teacher with eager or SDPA attention.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        probe ([`~trainers.probes.KVRetrieval`] or [`~trainers.probes.PhoneBook`]):
            What is asked. With `queries` above 1 the examples of one dictionary share its cost.
        num_examples (`int`, *optional*, defaults to `100`):
            Questions.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the questions.
        teacher ([`TeacherShape`], *optional*):
            Identity of the teacher; by default the name its configuration carries.
        dtype (`torch.dtype`, *optional*):
            Precision of the matrix products; by default the model's own.
        min_accuracy (`float`, *optional*, defaults to `0.6`):
            Accuracy the whole teacher must reach.
        rows (`int`, *optional*, defaults to `1`):
            Packed rows (dictionaries) of a batch. The inputs of all layers are kept for one batch at a time.
        batch_tokens (`int`, *optional*, defaults to `4096`):
            Tokens of one forward call, copies for several heads included.
        partial_path (`str` or `os.PathLike`, *optional*):
            File that collects what is done, line by line. A run that was killed goes on from it; it is deleted when
            the scores are complete.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar with the time left.

    Returns:
        [`HeadScores`]

    Raises:
        [`ProbeFailedError`]: when the whole teacher answers fewer than `min_accuracy` of the questions.
        `ValueError`: when the model is no Llama-like decoder, or the partial file is of another run.
    """
    if num_examples < 1:
        raise ValueError(f"Heads cannot be scored on {num_examples} examples; take at least 1.")
    layers = len(attention_layers(model))
    teacher = teacher or TeacherShape.from_config(model.config, model.config.name_or_path or type(model).__name__)
    batches = pack(tokenizer, probe.examples(num_examples, seed), rows, model.device)
    with inference(model, dtype):
        base = _base(model, tokenizer, batches, dtype)
        accuracy, log_prob = base["correct"] / num_examples, base["log_prob"] / num_examples
        if accuracy < min_accuracy:
            raise ProbeFailedError(_failure(teacher.id, probe, accuracy, min_accuracy), accuracy)
        run = {
            "teacher": asdict(teacher),
            "probe": probe.settings(),
            "num_examples": num_examples,
            "seed": seed,
            "dtype": str(dtype or model.dtype).removeprefix("torch."),
            "versions": _versions(),
        }
        partial = _Partial(partial_path, {**run, "rows": rows, "base_log_prob": round(log_prob, 3)})
        units = {(unit["batch"], unit["layer"]): unit for unit in partial.units}
        # A unit is one layer of one batch; its cost is the layers that have to run again for each of its heads.
        cost = len(batches) * layers * (layers + 1) // 2 * teacher.num_attention_heads
        with tqdm(total=cost, desc="ablating heads", unit="layer", unit_scale=True, disable=not progress) as bar:
            for number, batch in enumerate(batches):
                todo = [layer for layer in range(layers) if (number, layer) not in units]
                bar.update((layers * (layers + 1) // 2 - sum(layers - i for i in todo)) * teacher.num_attention_heads)
                ablation = HeadAblation(model, tokenizer, batch) if todo else None
                for layer in todo:
                    unit = {"batch": number, "layer": layer, **_ablate_layer(ablation, layer, batch_tokens)}
                    units[number, layer] = unit
                    partial.append(unit)
                    bar.update((layers - layer) * teacher.num_attention_heads)
    scores = HeadScores(
        teacher=teacher,
        probe=run["probe"],
        num_examples=num_examples,
        seed=seed,
        base_accuracy=round(accuracy, 6),
        base_logprob=round(log_prob, 6),
        accuracy_drop=_drops(units, "correct", accuracy, len(batches), layers, num_examples),
        logprob_drop=_drops(units, "log_prob", log_prob, len(batches), layers, num_examples),
        dtype=run["dtype"],
        date=partial.date,
        versions=run["versions"],
    )
    partial.remove()
    return scores


def _base(model, tokenizer, batches: list[PackedExamples], dtype: torch.dtype | None) -> dict:
    """Sums over all examples for the whole teacher, after a check that packing changes nothing."""
    total = {"correct": 0.0, "log_prob": 0.0}
    for number, batch in enumerate(batches):
        ablation = HeadAblation(model, tokenizer, batch, keep_inputs=False)
        if number == 0:
            _check_packing(model, ablation, TOLERANCE.get(dtype or model.dtype, LOW_PRECISION_TOLERANCE))
        total["correct"] += ablation.base.correct.sum().item()
        total["log_prob"] += ablation.base.log_prob.sum().item()
    return total


def _check_packing(model: PreTrainedModel, ablation: HeadAblation, tolerance: float) -> None:
    """Compares the last example of the first row, the farthest branch of it, with a plain forward pass of its text."""
    last = (ablation.packed.row[[first for first, _ in ablation.packed.spans]] == 0).sum().item() - 1
    one = ablation.packed.encoded[last]
    ids = torch.tensor([one.context + one.target], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(one.context) - 1 : -1].float()
    log_probs = logits.log_softmax(-1).gather(-1, ids[0, len(one.context) :, None])
    plain, packed = log_probs.sum().item(), ablation.base.log_prob[0, last].item()
    if abs(plain - packed) > tolerance:
        raise ValueError(
            f"The heads of {type(model).__name__} cannot be scored: its own forward pass gives an answer the "
            f"log-probability {plain:.4f}, the packed one {packed:.4f}. It does more between layers and logits than a "
            "Llama-like model, or its attention implementation ignores 4-D masks: load it with "
            'attn_implementation="sdpa".'
        )


def _ablate_layer(ablation: HeadAblation, layer: int, batch_tokens: int) -> dict:
    """Sums over the batch's examples for each head of the layer."""
    heads = list(range(ablation.num_heads))
    step = max(1, batch_tokens // ablation.packed.input_ids.numel())
    outcomes = [ablation.ablate(layer, heads[first : first + step]) for first in range(0, len(heads), step)]
    return {
        "correct": torch.cat([one.correct for one in outcomes]).sum(-1).tolist(),
        "log_prob": torch.cat([one.log_prob for one in outcomes]).sum(-1).tolist(),
    }


def _drops(units: dict, name: str, base: float, batches: int, layers: int, num_examples: int) -> list[list[float]]:
    rows = ([units[batch, layer][name] for batch in range(batches)] for layer in range(layers))
    return [[round(base - sum(head) / num_examples, 6) for head in zip(*row, strict=True)] for row in rows]


def _failure(id: str, probe: Probe, accuracy: float, min_accuracy: float) -> str:
    return (
        f"{id} answers {accuracy:.0%} of {probe.name} and would need {min_accuracy:.0%}: a probe that the whole "
        "teacher fails cannot rank its heads, the scores would be noise. Try more shots (--shots 2), another format "
        "(--format json or lines), numbers as values, or fewer pairs."
    )


def _versions() -> dict:
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


class _Partial:
    """What is done of a run, one JSON line for each unit below a first line that says which run it is."""

    def __init__(self, path: str | os.PathLike | None, run: dict):
        self.path = None if path is None else Path(path)
        self.date = datetime.date.today().isoformat()
        self.units = []
        run = json.loads(json.dumps(run))
        if self.path is None:
            return
        lines = list(self._lines())
        if lines:
            self.date = lines[0].pop("date")
            if lines[0] != run:
                changed = sorted(name for name in run if lines[0].get(name) != run[name])
                raise ValueError(
                    f"{self.path} is of another run ({', '.join(changed)} differ). Delete it to begin anew."
                )
            self.units = lines[1:]
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        # Rewriting what was read drops a last line that the kill cut in two.
        with atomic_path(self.path) as temporary:
            temporary.write_text(
                "".join(json.dumps(line) + "\n" for line in [{**run, "date": self.date}, *self.units])
            )

    def _lines(self) -> Iterator[dict]:
        if not self.path.is_file():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return

    def append(self, unit: dict) -> None:
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(unit) + "\n")

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
