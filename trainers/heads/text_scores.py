"""
What ablation does to text: the divergence of the next-token distributions, for heads and for whole layers; and layers
ranked by it, for the layer-wise selections people compare with.

    kl = text_kl(model, token_batches(rows, 4))                              # [L][H], nats a token
    layers = layers_by_text(model, token_batches(rows, 4))                   # KL-guided
    layers = layers_by_probe(model, tokenizer, batches)                      # leave one layer out
    head_map = best_layers(shape, layers, "kl-guided", heads=18)

The published selectors train a student for each layer first (KL-guided, https://huggingface.co/papers/2512.20569) or
replace a layer's mixer by a trained one (Apriel-H1). Here a layer's attention is left out, without any training.

Shapes: L layers, H query heads, B rows, T tokens, S scored positions, V vocabulary, n ablations at once.
"""

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainers.families import logits_scale
from trainers.heads.ablation import MAX_LOGITS, Ablator, Heads, inference, tokens_at_once
from trainers.heads.head_curves import answers_without
from trainers.heads.head_layout import attention_layers
from trainers.probes.probe_rows import PackedExamples


def text_kl(
    model: PreTrainedModel,
    batches: list[torch.Tensor],
    every: int = 4,
    dtype: torch.dtype | None = None,
    batch_tokens: int | None = None,
    progress: bool = True,
) -> list[list[float]]:
    """
    Ablates every head in turn and measures the divergence KL(whole || ablated) of the next-token distributions.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Llama-like teacher with eager or SDPA attention.
        batches (`list[torch.Tensor]`):
            Token ids of text, each [B, T], without padding.
        every (`int`, *optional*, defaults to `4`):
            One position in so many is measured.
        dtype (`torch.dtype`, *optional*):
            Precision of the matrix products; by default the model's own.
        batch_tokens (`int`, *optional*):
            Tokens of one forward call, copies for several heads included; by default as many as suit the device.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `list[list[float]]`: [L][H], in nats a token.
    """
    layers, heads = len(attention_layers(model)), model.config.num_attention_heads
    ablations = [[(layer, head)] for layer in range(layers) for head in range(heads)]
    values = _divergences(model, batches, ablations, every, dtype, batch_tokens, progress)
    return [values[layer * heads : (layer + 1) * heads] for layer in range(layers)]


def layers_by_text(
    model: PreTrainedModel,
    batches: list[torch.Tensor],
    every: int = 4,
    dtype: torch.dtype | None = None,
    batch_tokens: int | None = None,
    progress: bool = True,
) -> list[float]:
    """As [`text_kl`], with all heads of a layer ablated together: one number for each layer."""
    return _divergences(model, batches, _whole_layers(model), every, dtype, batch_tokens, progress)


def layers_by_probe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: list[PackedExamples],
    batch_tokens: int | None = None,
    progress: bool = True,
) -> list[float]:
    """
    Leaves one layer's attention out at a time: the drop in the answers' log-probability, one number for each layer.
    Arguments as in [`~trainers.heads.head_curves.answers_without`].
    """
    ablations = [[], *_whole_layers(model)]
    (_, whole), *without = answers_without(model, tokenizer, batches, ablations, "zero", batch_tokens, progress)
    return [whole - log_prob for _, log_prob in without]


def _whole_layers(model: PreTrainedModel) -> list[Heads]:
    heads = range(model.config.num_attention_heads)
    return [[(layer, head) for head in heads] for layer in range(len(attention_layers(model)))]


@torch.no_grad()
def _divergences(model, batches, ablations: list[Heads], every: int, dtype, batch_tokens, progress) -> list[float]:
    """KL(whole || ablated) in nats a token, for each ablation; they begin in ascending layers."""
    total, tokens = torch.zeros(len(ablations), dtype=torch.float64), 0
    with (
        inference(model, dtype),
        tqdm(total=len(batches) * len(ablations), desc="ablating heads on text", disable=not progress) as bar,
    ):
        for ids in batches:
            ablator = Ablator(model, _text_rows(ids.to(model.device), every))
            step = max(1, tokens_at_once(model, batch_tokens) // ids.numel())
            for first in range(0, len(ablations), step):
                part = ablations[first : first + step]
                total[first : first + step] += _kl_sums(model, ablator.scored, ablator.run(part)).cpu()
                bar.update(len(part))
            tokens += ablator.scored.shape[1]
    return (total / tokens).tolist()


def _kl_sums(model: PreTrainedModel, whole: torch.Tensor, ablated: torch.Tensor) -> torch.Tensor:
    """Sums over S of KL(whole [1, S, D] || ablated [n, S, D]): [n] in float64."""
    head, scale, sums = model.get_output_embeddings(), logits_scale(model.config), 0.0
    step = max(1, MAX_LOGITS // (len(ablated) * head.weight.shape[0]))
    for first in range(0, whole.shape[1], step):
        right = (head(whole[:, first : first + step]).float() * scale).log_softmax(-1)  # [1, step, V]
        wrong = (head(ablated[:, first : first + step]).float() * scale).log_softmax(-1)  # [n, step, V]
        sums = sums + (right.exp() * (right - wrong)).sum((1, 2), dtype=torch.float64)
    return sums


def _text_rows(ids: torch.Tensor, every: int) -> PackedExamples:
    """Rows of text, one position in `every` scored."""
    positions = torch.arange(ids.shape[1], device=ids.device)
    column = positions[every - 1 :: every].repeat(len(ids))
    row = torch.arange(len(ids), device=ids.device).repeat_interleave(len(column) // len(ids))
    target = torch.full_like(row, -1)
    return PackedExamples(ids, positions.expand(len(ids), -1), None, row, column, target, [], [], [])
