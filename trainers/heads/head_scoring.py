"""
Head scoring: how much a teacher's retrieval loses when one attention head is ablated (paper, section 4.1,
https://huggingface.co/papers/2602.11374; the authors publish rankings of three teachers but no code).

A head's score is the drop in accuracy on a probe, and beside it the drop in the log-probability of the answer, when
the head's slice of the `o_proj` input is zeroed (or set to its mean). Every head of every layer is ablated exactly (see
`ablation.py` for what is shared between the ablations), or, with a screen, those that it does not spare. Accuracy is
teacher-forced: an answer counts when each of its tokens is the most likely one after the tokens before it, and what
follows does not go on with the word or number. That is the exact match of greedy generation.

    scores = score_heads(model, tokenizer, KVRetrieval(format="json", queries=10), num_examples=100)
    scores.save("scores.json")
    scores.ranking()[:8]

On several GPUs, `torchrun --nproc-per-node 4 -m trainers.cli score ...` shares the heads out.
"""

import os
import platform
from dataclasses import asdict, replace

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainers.heads.ablation import HeadAblation, head_means, inference, tokens_at_once
from trainers.heads.head_layout import attention_layers
from trainers.heads.head_map import TeacherShape
from trainers.heads.head_scores import HeadScores
from trainers.heads.screens import SCREENS, screen_heads, survivors
from trainers.heads.shared_work import SharedWork, agreed, is_main_process
from trainers.probes import MeanOf, Probe
from trainers.probes.asking import check_candidates
from trainers.probes.probe_rows import PackedExamples, pack


# The self-check lets log-probabilities differ by this much, in nats: rounding, not another computation.
TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-2}
LOW_PRECISION_TOLERANCE = 1.0
# Fields of the scores that come out of a run; the others say which run it is.
RESULTS = ("base_accuracy", "accuracy_drop", "logprob_drop", "screened", "text_kl", "date")


class ProbeFailedError(ValueError):
    """The teacher does not solve the probe, so its heads cannot be ranked by it. `.accuracy` is what it reached."""

    def __init__(self, message: str, accuracy: float):
        super().__init__(message)
        self.accuracy = accuracy


def score_heads(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probe: Probe,
    num_examples: int = 100,
    seed: int = 0,
    teacher: TeacherShape | None = None,
    dtype: torch.dtype | None = None,
    min_accuracy: float = 0.6,
    rows: int | None = None,
    batch_tokens: int | None = None,
    partial_path: str | os.PathLike | None = None,
    progress: bool = True,
    ablation: str = "zero",
    answers: str = "generated",
    screen: str | None = None,
    num_survivors: int | None = None,
    offload: bool = False,
) -> HeadScores:
    """
    Ablates every head of `model` in turn and measures what the probe loses.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Llama-like teacher with eager or SDPA attention.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        probe ([`~trainers.probes.Probe`]):
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
        rows (`int`, *optional*):
            Packed rows (dictionaries) of a batch; by default so many that a forward call holds the ablations of a whole
            layer. The inputs of all layers are kept for one batch at a time.
        batch_tokens (`int`, *optional*):
            Tokens of one forward call, copies for several heads included; by default as many as suit the device.
        partial_path (`str` or `os.PathLike`, *optional*):
            File that collects what is done, line by line. A run that was killed goes on from it; it is deleted when
            the scores are complete.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar with the time left.
        ablation (`str`, *optional*, defaults to `"zero"`):
            `"zero"`, or `"mean"`: an ablated head gives its mean over all positions of the examples.
        answers (`str`, *optional*, defaults to `"generated"`):
            `"generated"`, or `"candidates"`: an answer counts when its first token is the likeliest among those of
            the candidates, which must differ there.
        screen (`str`, *optional*):
            Screen of `screens.py` that chooses the heads to ablate.
        num_survivors (`int`, *optional*):
            Heads that pass it; by default a quarter of all.
        offload (`bool`, *optional*, defaults to `False`):
            Whether what is kept of a batch lies in the memory of the CPU.

    Returns:
        [`HeadScores`]

    Raises:
        [`ProbeFailedError`]: when the whole teacher answers fewer than `min_accuracy` of the questions.
        `ValueError`: when the model is no Llama-like decoder, or the partial file is of another run.
    """
    if num_examples < 1:
        raise ValueError(f"Heads cannot be scored on {num_examples} examples; take at least 1.")
    if screen is not None and screen not in SCREENS:
        raise ValueError(f"There is no screen {screen!r}; take one of {', '.join(SCREENS)}.")
    num_layers, num_heads = len(attention_layers(model)), model.config.num_attention_heads
    teacher = teacher or TeacherShape.from_config(model.config, model.config.name_or_path or type(model).__name__)
    batch_tokens = tokens_at_once(model, batch_tokens)
    examples = probe.examples(num_examples, seed)
    if answers == "candidates":
        check_candidates(examples)
    batches = pack(tokenizer, examples, rows, model.device, tokens=batch_tokens // num_heads)
    with inference(model, dtype):
        base = _base(model, tokenizer, batches, dtype, answers)
    _check_solved(teacher.id, probe, base["answered"], min_accuracy)
    scores = HeadScores(
        teacher=teacher,
        probe=probe.settings(),
        num_examples=num_examples,
        seed=seed,
        base_accuracy=round(base["correct"] / num_examples, 6),
        base_logprob=round(base["log_prob"] / num_examples, 6),
        accuracy_drop=[[0.0] * num_heads] * num_layers,
        logprob_drop=[[0.0] * num_heads] * num_layers,
        dtype=str(dtype or model.dtype).removeprefix("torch."),
        date="",
        versions=_versions(),
        ablation=ablation,
        answers=answers,
        screen=screen,
    )
    wanted = [list(range(num_heads)) for _ in range(num_layers)]
    if screen is not None:
        shown = progress and is_main_process()
        table = screen_heads(model, tokenizer, examples, screen, dtype, batch_tokens, shown)
        chosen = agreed(survivors(table, num_survivors or (teacher.num_heads + 3) // 4))
        wanted = [[head for head in heads if (i, head) in chosen] for i, heads in enumerate(wanted)]
        scores = replace(scores, screened=[[round(value, 6) for value in row] for row in table])
    work = _begun(partial_path, scores, batches)
    with inference(model, dtype):
        _ablate_all(model, tokenizer, batches, wanted, work, scores, batch_tokens, offload, progress)
    drops = _drops(work.gather(), base, batches, wanted, num_heads, num_examples)
    scores = replace(scores, **drops, date=work.date)
    work.remove()
    return scores


def _begun(partial_path, scores: HeadScores, batches: list[PackedExamples]) -> SharedWork:
    """What is done of these scores already."""
    run = {name: value for name, value in asdict(scores).items() if name not in RESULTS}
    # Another machine's rounding is no reason to begin anew; another model is.
    run |= {"rows": len(batches[0].input_ids), "base_logprob": round(scores.base_logprob, 3)}
    return SharedWork(partial_path, run)


def _ablate_all(model, tokenizer, batches, wanted, work: SharedWork, scores, batch_tokens, offload, progress) -> None:
    """Ablates the wanted heads of each layer on each batch, as far as that is not done and falls to this process."""
    before = {(unit["batch"], unit["layer"], tuple(unit["heads"])) for unit in work.before}
    todo = [
        (number, layer)
        for number in range(len(batches))
        for layer, heads in enumerate(wanted)
        if heads and (number, layer, tuple(heads)) not in before
    ]

    def cost(unit: tuple[int, int]) -> int:
        # The layers that have to run again for each of the heads.
        return (len(wanted) - unit[1]) * len(wanted[unit[1]])

    mine = work.mine(todo, cost)
    means = head_means(model, batches) if mine and scores.ablation == "mean" else None
    ablation, current = None, None
    total = sum(map(cost, mine))
    hidden = not (progress and is_main_process())
    with tqdm(total=total, desc="ablating heads", unit="layer", unit_scale=True, disable=hidden) as bar:
        for number, layer in mine:
            if current != number:
                ablation, current = None, number  # frees what was kept of the batch before
                ranked = scores.answers == "candidates"
                ablation = HeadAblation(model, tokenizer, batches[number], offload=offload, rank_candidates=ranked)
            outcome = _ablate_layer(ablation, layer, wanted[layer], batch_tokens, means)
            work.done({"batch": number, "layer": layer, "heads": wanted[layer], **outcome})
            bar.update(cost((number, layer)))


def _base(model, tokenizer, batches: list[PackedExamples], dtype: torch.dtype | None, answers: str) -> dict:
    """Sums over all examples for the whole teacher, after a check that packing changes nothing."""
    total = {"correct": 0.0, "log_prob": 0.0, "answered": []}
    for number, batch in enumerate(batches):
        ablation = HeadAblation(model, tokenizer, batch, keep_inputs=False)
        if number == 0:
            _check_packing(model, ablation, TOLERANCE.get(dtype or model.dtype, LOW_PRECISION_TOLERANCE))
        if answers == "candidates":
            ablation = HeadAblation(model, tokenizer, batch, keep_inputs=False, rank_candidates=True)
        total["correct"] += ablation.base.correct.sum().item()
        total["log_prob"] += ablation.base.log_prob.sum().item()
        total["answered"] += ablation.base.correct[0].tolist()
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


def _ablate_layer(ablation: HeadAblation, layer: int, heads: list[int], batch_tokens: int, means) -> dict:
    """Sums over the batch's examples for each head of the layer."""
    step = max(1, batch_tokens // ablation.packed.input_ids.numel())
    outcomes = [
        ablation.without([[(layer, head)] for head in heads[first : first + step]], means)
        for first in range(0, len(heads), step)
    ]
    return {
        "correct": torch.cat([one.correct for one in outcomes]).sum(-1).tolist(),
        "log_prob": torch.cat([one.log_prob for one in outcomes]).sum(-1).tolist(),
    }


def _drops(done: list[dict], base: dict, batches, wanted, num_heads: int, num_examples: int) -> dict[str, list[list]]:
    """Both tables of what is lost, [L][H], `None` for a head that was not ablated."""
    units = {(unit["batch"], unit["layer"], tuple(unit["heads"])): unit for unit in done}

    def table(name: str) -> list[list]:
        rows = []
        for layer, heads in enumerate(wanted):
            parts = [units[number, layer, tuple(heads)][name] for number in range(len(batches))] if heads else []
            sums = dict(zip(heads, map(sum, zip(*parts, strict=True)), strict=True))
            lost = {head: round((base[name] - value) / num_examples, 6) for head, value in sums.items()}
            rows.append([lost.get(head) for head in range(num_heads)])
        return rows

    return {"accuracy_drop": table("correct"), "logprob_drop": table("log_prob")}


def _check_solved(id: str, probe: Probe, answered: list[bool], min_accuracy: float) -> None:
    """Refuses a teacher that fails the probe, or any one of those that it is the mean of."""
    parts = probe.parts(answered) if isinstance(probe, MeanOf) else {probe.name: answered}
    easier = {one.name: one.easier for one in (probe.probes if isinstance(probe, MeanOf) else [probe])}
    for name, values in parts.items():
        accuracy = sum(values) / len(values)
        if accuracy < min_accuracy:
            raise ProbeFailedError(
                f"{id} answers {accuracy:.0%} of {name} and would need {min_accuracy:.0%}: a probe that the whole "
                f"teacher fails cannot rank its heads, the scores would be noise. Try {easier[name]}.",
                accuracy,
            )


def _versions() -> dict:
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
