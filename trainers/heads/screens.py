"""
Screens: cheap estimates of what each head's ablation would cost, to choose the heads that are worth ablating on all
examples.

- `attribution`: a gate of 1 multiplies what each head gives. The gradient of the answers' log-probability with respect
  to all gates is each head's first-order estimate (activation times gradient, as in attribution patching,
  https://huggingface.co/papers/2310.10348): one forward and one backward pass for all heads. Where a softmax saturates,
  as it does in retrieval, the first order misleads: a head that costs much may have hardly any gradient.
- `damped`: the same, averaged over models whose heads are all damped alike (gates below 1), where retrieval is
  on the brink and its heads have gradients; as integrated gradients do along a path.
- `sample`: every head ablated exactly, but on a tenth of the examples.

The first two take the magnitude of each row's gradient before they average, since examples disagree about its sign.

    table = screen_heads(model, tokenizer, examples, "damped")
    chosen = survivors(table, 60)

Shapes: L layers, H query heads, P head dim, B packed rows, T their tokens, S scored positions, V vocabulary.
"""

import contextlib
from collections.abc import Iterator

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainers.families import logits_scale
from trainers.heads.ablation import Ablator, HeadAblation, inference, tokens_at_once
from trainers.heads.head_layout import attention_layers
from trainers.probes.probe_rows import PackedExamples, pack
from trainers.probes.questions import Example


# Gates of the passes of the screens by gradient.
GATES = {"attribution": (1.0,), "damped": (0.9, 0.8)}
SCREENS = ("attribution", "damped", "sample")
# One row of examples in so many is enough for `sample`, and at least one.
SAMPLED = 10


def screen_heads(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    screen: str = "damped",
    dtype: torch.dtype | None = None,
    batch_tokens: int | None = None,
    progress: bool = True,
) -> list[list[float]]:
    """
    Estimates for every head what its ablation costs in log-probability.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Llama-like teacher with eager or SDPA attention.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        examples (`list[Example]`):
            Questions.
        screen (`str`, *optional*, defaults to `"damped"`):
            One of [`SCREENS`].
        dtype (`torch.dtype`, *optional*):
            Precision of the matrix products; by default the model's own.
        batch_tokens (`int`, *optional*):
            Tokens of one forward call, copies for several heads included; by default as many as suit the device.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `list[list[float]]`: [L][H], in nats an example: a drop for `sample`, a magnitude for the others.
    """
    layers, num_heads = attention_layers(model), model.config.num_attention_heads
    tokens = tokens_at_once(model, batch_tokens)
    if screen == "sample":
        rows = pack(tokenizer, examples, 1, model.device)[::SAMPLED]
        examples = [example for row in rows for example in row.examples]
    batches = pack(tokenizer, examples, None, model.device, tokens=tokens // num_heads)
    if screen == "sample":
        return _sample(model, tokenizer, batches, dtype, tokens, progress)
    total = torch.zeros(len(layers), num_heads, device=model.device)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    passes = [(batch, gate) for batch in batches for gate in GATES[screen]]
    try:
        for parameter in learned:
            parameter.requires_grad_(False)
        for batch, gate in tqdm(passes, desc="screening heads", disable=not progress):
            shape = len(layers), len(batch.input_ids), num_heads
            gates = torch.full(shape, gate, device=model.device, requires_grad=True)
            with inference(model, dtype), torch.enable_grad(), _gated(layers, gates):
                total += torch.autograd.grad(_log_prob(model, batch), gates)[0].abs().sum(1)
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
    return (total / len(GATES[screen]) / sum(len(batch.spans) for batch in batches)).tolist()


def survivors(table: list[list[float]], number: int) -> set[tuple[int, int]]:
    """The (layer, head) pairs of the `number` greatest entries of a screen's table."""
    pairs = [(layer, head) for layer, row in enumerate(table) for head in range(len(row))]
    return set(sorted(pairs, key=lambda pair: -table[pair[0]][pair[1]])[:number])


def _sample(model, tokenizer, batches, dtype, batch_tokens: int, progress: bool) -> list[list[float]]:
    layers, num_heads = len(attention_layers(model)), model.config.num_attention_heads
    total = torch.zeros(layers, num_heads, dtype=torch.float64)
    with (
        inference(model, dtype),
        tqdm(total=len(batches) * layers, desc="screening heads", disable=not progress) as bar,
    ):
        for batch in batches:
            ablation = HeadAblation(model, tokenizer, batch)
            step = max(1, batch_tokens // batch.input_ids.numel())
            for layer in range(layers):
                for first in range(0, num_heads, step):
                    heads = list(range(first, min(first + step, num_heads)))
                    lost = ablation.base.log_prob - ablation.ablate(layer, heads).log_prob  # [n, E]
                    total[layer, heads] += lost.sum(-1)
                bar.update()
    return (total / sum(len(batch.spans) for batch in batches)).tolist()


@contextlib.contextmanager
def _gated(layers: torch.nn.ModuleList, gates: torch.Tensor) -> Iterator[None]:
    """Multiplies what each head gives in each row by its gate, [L, B, H]."""

    def gated(layer: torch.Tensor):
        def multiply(o_proj, args):
            mixed = args[0].unflatten(-1, (layer.shape[-1], -1))  # [B, T, H, P]
            return ((mixed * layer[:, None, :, None].to(mixed.dtype)).flatten(-2),)

        return multiply

    with contextlib.ExitStack() as hooks:
        for layer, gate in zip(layers, gates, strict=True):
            hooks.callback(layer.self_attn.o_proj.register_forward_pre_hook(gated(gate)).remove)
        yield


def _log_prob(model: PreTrainedModel, batch: PackedExamples) -> torch.Tensor:
    """Summed log-probability of the answers' tokens."""
    wanted = batch.target >= 0
    scored = Ablator(model, batch, keep_inputs=False).scored[0, wanted]
    logits = model.get_output_embeddings()(scored).float() * logits_scale(model.config)  # [S, V]
    return (logits.gather(-1, batch.target[wanted][:, None])[:, 0] - logits.logsumexp(-1)).sum()
