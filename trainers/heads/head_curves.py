"""
Curves of accuracy against the number of heads: only the best heads kept, the best heads removed, and a greedy order
that looks again after every head.

Ablating one head at a time misses backup heads, which take over when the first is gone, and heads that only work
together. Removing the best heads one after the other, and keeping only them, shows how much a ranking misses; `greedy`
makes an order that sees it, by ablating every candidate anew beside the heads that are gone (or kept) already.

    batches = pack(tokenizer, KVRetrieval(queries=10).examples(100), 1, model.device)
    kept = curve(model, tokenizer, batches, scores.ranking(), [1, 2, 4, 8], "keep", "mean")
    removed = greedy(model, tokenizer, batches, scores.ranking()[:40], 8, "remove")

Both ends are teacher-forced exact match, as in `head_scoring.py`.
"""

from dataclasses import asdict, dataclass

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainers.heads.ablation import HeadAblation, Heads, head_means, inference, tokens_at_once
from trainers.heads.head_layout import attention_layers
from trainers.probes.probe_rows import PackedExamples


Pair = tuple[int, int]
MODES = ("keep", "remove")


@dataclass(frozen=True)
class Curve:
    """
    Accuracy against a number of heads.

    Args:
        mode (`str`):
            `"keep"`: all other heads are ablated; `"remove"`: these heads are.
        ablation (`str`):
            `"zero"` or `"mean"`.
        order (`list[tuple[int, int]]`):
            (layer, head), the first kept or removed first.
        counts (`list[int]`), accuracy (`list[float]`), log_prob (`list[float]`):
            With the first `counts[i]` heads of `order`: part of the questions answered, mean log-probability of an
            answer in nats.
    """

    mode: str
    ablation: str
    order: list[Pair]
    counts: list[int]
    accuracy: list[float]
    log_prob: list[float]

    def to_dict(self) -> dict:
        """Returns plain values for a JSON file."""
        return {**asdict(self), "order": [list(pair) for pair in self.order]}


def answers_without(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: list[PackedExamples],
    ablations: list[Heads],
    ablation: str = "zero",
    batch_tokens: int | None = None,
    progress: bool = True,
) -> list[tuple[float, float]]:
    """
    Measures a model without some of its heads, in eval mode and without gradients.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Llama-like teacher, or a student (whose rows must not be shared).
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        batches (`list[PackedExamples]`):
            Questions.
        ablations (`list[Heads]`):
            The heads that each measurement goes without; none at all is the whole model.
        ablation (`str`, *optional*, defaults to `"zero"`):
            `"zero"` or `"mean"`: what an ablated head gives.
        batch_tokens (`int`, *optional*):
            Tokens of one forward call, copies for several ablations included; by default as many as suit the device.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `list[tuple[float, float]]`: for each accuracy and mean log-probability of an answer.
    """
    # Those that begin in the same layer share a batch, since what comes before it is not computed again.
    order = sorted(range(len(ablations)), key=lambda i: min((layer for layer, _ in ablations[i]), default=0))
    correct, log_prob = [0.0] * len(ablations), [0.0] * len(ablations)
    hidden = not progress
    with (
        inference(model, None),
        tqdm(total=len(batches) * len(order), desc="ablating heads", disable=hidden, leave=False) as bar,
    ):
        means = head_means(model, batches) if ablation == "mean" else None
        for batch in batches:
            one = HeadAblation(model, tokenizer, batch)
            step = max(1, tokens_at_once(model, batch_tokens) // batch.input_ids.numel())
            for first in range(0, len(order), step):
                chosen = order[first : first + step]
                outcome = one.without([ablations[i] for i in chosen], means)
                for row, i in enumerate(chosen):
                    correct[i] += outcome.correct[row].sum().item()
                    log_prob[i] += outcome.log_prob[row].sum().item()
                bar.update(len(chosen))
    total = sum(len(batch.spans) for batch in batches)
    return [(right / total, value / total) for right, value in zip(correct, log_prob, strict=True)]


def curve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: list[PackedExamples],
    order: list[Pair],
    counts: list[int],
    mode: str = "keep",
    ablation: str = "zero",
    batch_tokens: int | None = None,
    progress: bool = True,
) -> Curve:
    """
    Accuracy with only the first heads of an order kept, or with them removed.

    Args:
        model, tokenizer, batches, ablation, batch_tokens, progress:
            As in [`answers_without`].
        order (`list[tuple[int, int]]`):
            (layer, head), best first.
        counts (`list[int]`):
            Numbers of heads to measure at.
        mode (`str`, *optional*, defaults to `"keep"`):
            `"keep"` or `"remove"`.
    """
    _check(mode, counts, order)
    every = _every_head(model)
    ablations = [_gone(every, order[:count], mode) for count in counts]
    measured = answers_without(model, tokenizer, batches, ablations, ablation, batch_tokens, progress)
    accuracy, log_prob = map(list, zip(*measured, strict=True))
    return Curve(mode, ablation, order[: max(counts)], counts, accuracy, log_prob)


def greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: list[PackedExamples],
    pool: list[Pair],
    steps: int,
    mode: str = "remove",
    ablation: str = "zero",
    batch_tokens: int | None = None,
    progress: bool = True,
) -> Curve:
    """
    Orders heads by looking again after each: removes the head of the pool whose removal costs most beside those gone
    already, or, from all heads of the pool ablated, gives back the one that restores most.

    Args:
        model, tokenizer, batches, ablation, batch_tokens, progress:
            As in [`answers_without`].
        pool (`list[tuple[int, int]]`):
            (layer, head) of the candidates. Heads outside of it stay whole.
        steps (`int`):
            Heads to order.
        mode (`str`, *optional*, defaults to `"remove"`):
            `"remove"` or `"keep"`.

    Returns:
        [`Curve`]: its counts are 1 to `steps`. With `"keep"` the other heads of the pool are ablated, not all others.
    """
    _check(mode, [steps], pool)
    order, accuracy, log_prob = [], [], []
    for _ in tqdm(range(steps), desc=f"greedy, {mode}", disable=not progress):
        rest = [pair for pair in pool if pair not in order]
        ablations = [_gone(pool, [*order, pair], mode) for pair in rest]
        measured = answers_without(model, tokenizer, batches, ablations, ablation, batch_tokens, False)
        best = (max if mode == "keep" else min)(range(len(rest)), key=lambda i: measured[i])
        order.append(rest[best])
        accuracy.append(measured[best][0])
        log_prob.append(measured[best][1])
    return Curve(mode, ablation, order, list(range(1, steps + 1)), accuracy, log_prob)


def _gone(every: list[Pair], chosen: list[Pair], mode: str) -> list[Pair]:
    kept = set(chosen)
    return list(chosen) if mode == "remove" else [pair for pair in every if pair not in kept]


def _every_head(model: PreTrainedModel) -> list[Pair]:
    layers, heads = len(attention_layers(model)), model.config.num_attention_heads
    return [(layer, head) for layer in range(layers) for head in range(heads)]


def _check(mode: str, counts: list[int], order: list[Pair]) -> None:
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; take one of {', '.join(MODES)}.")
    if not counts or min(counts) < 0 or max(counts) > len(order):
        raise ValueError(f"Heads can be counted from 0 to the {len(order)} that are ordered, not {counts}.")
