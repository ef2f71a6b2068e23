"""
Exact ablation of attention heads: what a teacher answers when one head's slice of the `o_proj` input is zeroed.

The same numbers as ablating one head at a time over whole forward passes of whole prompts, at a fraction of the cost:

- Prompts that begin alike share their beginning. Each becomes a branch of one packed row, sees the shared prefix and
  itself through a 4-D attention mask, and keeps its own position ids.
- The hidden states that enter each layer are computed once; an ablation in layer l runs layers l, l+1, ... only.
- Several heads of one layer are ablated in one batch, one copy of the packed rows for each.
- Only positions that predict the answer pass the final norm and the LM head.

Decoder layers are called as the model itself calls them, with the keyword arguments recorded in its own forward pass,
so this works for any Llama-like teacher whose layers have `self_attn.o_proj`.

Shapes: L layers, H query heads, P head dim, D model, V vocabulary, B packed rows, T their tokens, E examples, n heads
ablated at once, S scored positions (those whose logits count).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainers.probes import EncodedAnswer, Example, common_prefix, is_correct


# Logits held at once, in numbers: 2**26 of them are 256 MB in float32.
MAX_LOGITS = 2**26
# Two prompts share a row when at least this part of the first one's tokens begins both.
SHARED_PART = 0.5


@dataclass(frozen=True)
class PackedExamples:
    """
    Examples as packed rows of tokens.

    Args:
        input_ids, position_ids (`torch.Tensor`):
            [B, T]; rows are padded on the right.
        visible (`torch.Tensor`):
            Boolean [B, 1, T, T]: which key positions (last axis) a query position sees.
        row, column, target (`torch.Tensor`):
            [S]: where each scored position stands and the token it should predict, -1 where any will do.
        spans (`list[tuple[int, int]]`):
            For each example its scored positions, first and one past the last.
        encoded (`list[EncodedAnswer]`), answers (`list[str]`):
            The examples in tokens, and their answers.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    visible: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    target: torch.Tensor
    spans: list[tuple[int, int]]
    encoded: list[EncodedAnswer]
    answers: list[str]


@dataclass(frozen=True)
class Outcome:
    """Answers of n models (whole, or with one head ablated): `correct` [n, E] of bool, `log_prob` [n, E] in nats."""

    correct: torch.Tensor
    log_prob: torch.Tensor


def pack(
    tokenizer: PreTrainedTokenizerBase, examples: list[Example], rows: int, device: torch.device, share: bool = True
) -> list[PackedExamples]:
    """
    Packs examples into batches of rows; consecutive examples with a common beginning share a row.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The teacher's tokenizer.
        examples (`list[Example]`):
            Questions.
        rows (`int`):
            Rows of a batch (its examples are several times as many when they share beginnings).
        device (`torch.device`):
            Where the tensors go.
        share (`bool`, *optional*, defaults to `True`):
            Whether examples may share a row at all.
    """
    groups: list[list[tuple[EncodedAnswer, str]]] = []
    for example in examples:
        encoded = EncodedAnswer.of(tokenizer, example)
        first = groups[-1][0][0].context if groups else []
        if share and groups and common_prefix(first, encoded.context) >= SHARED_PART * len(first):
            groups[-1].append((encoded, example.answer))
        else:
            groups.append([(encoded, example.answer)])
    return [_pack_rows(groups[first : first + rows], device) for first in range(0, len(groups), rows)]


def _pack_rows(groups: list[list[tuple[EncodedAnswer, str]]], device: torch.device) -> PackedExamples:
    ids, positions, branches, scored, spans, encoded, answers = [], [], [], [], [], [], []
    for row, group in enumerate(groups):
        contexts = [one.context for one, _ in group]
        # A branch keeps at least its last context token, the one that predicts the first token of the answer.
        shared = min(min(common_prefix(contexts[0], context), len(context) - 1) for context in contexts)
        row_ids, row_positions, row_branches = contexts[0][:shared], list(range(shared)), [0] * shared
        for branch, (one, answer) in enumerate(group, start=1):
            # The position after the answer's last token says whether the answer goes on.
            fed = one.context[shared:] + one.target[: max(one.num_answer, len(one.target) - 1)]
            first_scored = len(row_ids) + len(one.context) - shared - 1
            last_scored = len(row_ids) + len(fed)
            spans.append((len(scored), len(scored) + last_scored - first_scored))
            targets = one.target + [-1] * (last_scored - first_scored - len(one.target))
            scored += [(row, first_scored + i, target) for i, target in enumerate(targets)]
            row_ids = row_ids + fed
            row_positions = row_positions + list(range(shared, shared + len(fed)))
            row_branches = row_branches + [branch] * len(fed)
            encoded.append(one)
            answers.append(answer)
        ids.append(row_ids)
        positions.append(row_positions)
        branches.append(row_branches)
    longest = max(map(len, ids))

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows], device=device)

    branch = padded(branches, -1)  # [B, T]; 0 is the shared prefix, -1 padding
    same = branch[:, :, None] == branch[:, None, :]
    prefix = (branch[:, None, :] == 0) & (branch[:, :, None] >= 0)
    causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    row, column, target = torch.tensor(scored, device=device).unbind(-1)
    visible = (same | prefix) & causal  # [B, T, T]
    return PackedExamples(
        padded(ids, 0), padded(positions, 0), visible[:, None], row, column, target, spans, encoded, answers
    )


class HeadAblation:
    """
    One batch of packed examples, read once by the whole teacher and then again with heads ablated.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A Llama-like teacher in eval mode, with eager or SDPA attention.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        packed ([`PackedExamples`]):
            Questions.
        keep_inputs (`bool`, *optional*, defaults to `True`):
            Whether to keep what enters each layer (L x B x T x D numbers), which `ablate` needs.

    Raises:
        `ValueError`: when the model's layers have no `self_attn.o_proj`.

    The whole teacher's answers are in `.base`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        packed: PackedExamples,
        keep_inputs: bool = True,
    ):
        self.model, self.tokenizer, self.packed = model, tokenizer, packed
        self.layers, self.num_heads = attention_layers(model), model.config.num_attention_heads
        self._judged: dict[tuple[int, int], bool] = {}
        self._inputs: list[torch.Tensor] = []
        self._kwargs: list[dict] = []
        hidden_states = self._read(keep_inputs)
        self.base = self._answers(hidden_states[None])

    def _read(self, keep_inputs: bool) -> torch.Tensor:
        def record(layer, args, kwargs):
            kwargs = dict(kwargs)
            self._inputs.append(args[0] if args else kwargs.pop("hidden_states"))
            self._kwargs.append(kwargs)

        last = []
        with contextlib.ExitStack() as hooks:
            for layer in self.layers if keep_inputs else []:
                hooks.callback(layer.register_forward_pre_hook(record, with_kwargs=True).remove)
            hooks.callback(self.layers[-1].register_forward_hook(lambda *call: last.append(_tensor(call[-1]))).remove)
            mask = torch.zeros(self.packed.visible.shape, dtype=self.model.dtype, device=self.packed.visible.device)
            mask.masked_fill_(~self.packed.visible, torch.finfo(mask.dtype).min)
            ids, positions = self.packed.input_ids, self.packed.position_ids
            self.model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        return last[0]  # [B, T, D], before the final norm

    def ablate(self, layer: int, heads: list[int]) -> Outcome:
        """
        Answers with each of `heads` of `layer` ablated in turn.

        Returns:
            [`Outcome`]: one row for each head.
        """
        n, batch = len(heads), self._inputs[layer].shape[0]

        def repeated(value):
            if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == batch > 1:
                return value.repeat(n, *[1] * (value.ndim - 1))
            return tuple(map(repeated, value)) if isinstance(value, tuple) else value

        kept = torch.ones(n, self.num_heads, device=self._inputs[layer].device)
        kept[range(n), heads] = 0

        def zero_heads(o_proj, args):
            mixed = args[0].unflatten(-1, (kept.shape[1], -1)).unflatten(0, (n, batch))  # [n, B, T, H, P]
            return ((mixed * kept.to(mixed.dtype)[:, None, None, :, None]).flatten(0, 1).flatten(-2),)

        hidden_states = self._inputs[layer].repeat(n, 1, 1)  # [n * B, T, D]
        handle = self.layers[layer].self_attn.o_proj.register_forward_pre_hook(zero_heads)
        try:
            hidden_states = _tensor(self.layers[layer](hidden_states, **_mapped(repeated, self._kwargs[layer])))
        finally:
            handle.remove()
        for i in range(layer + 1, len(self.layers)):
            hidden_states = _tensor(self.layers[i](hidden_states, **_mapped(repeated, self._kwargs[i])))
        return self._answers(hidden_states.unflatten(0, (n, batch)))

    def _answers(self, hidden_states: torch.Tensor) -> Outcome:
        """Scores final hidden states [n, B, T, D] at the answer's positions."""
        packed, head = self.packed, self.model.get_output_embeddings()
        scored = self.model.base_model.norm(hidden_states[:, packed.row, packed.column])  # [n, S, D]
        step = max(1, MAX_LOGITS // (len(scored) * head.weight.shape[0]))
        best, log_probs = [], []
        for first in range(0, scored.shape[1], step):
            logits = head(scored[:, first : first + step]).float()  # [n, step, V]
            target = packed.target[first : first + step].clamp(min=0).expand(len(scored), -1)
            best.append(logits.argmax(-1))
            log_probs.append(logits.gather(-1, target[:, :, None])[:, :, 0] - logits.logsumexp(-1))
        best = torch.cat(best, 1).tolist()
        log_prob = torch.where(packed.target >= 0, torch.cat(log_probs, 1), 0.0)  # [n, S]
        sums = torch.stack([log_prob[:, first:last].double().sum(-1) for first, last in packed.spans], 1)  # [n, E]
        correct = [[self._is_right(i, tokens[slice(*span)]) for i, span in enumerate(packed.spans)] for tokens in best]
        return Outcome(torch.tensor(correct), sums.cpu())

    def _is_right(self, example: int, tokens: list[int]) -> bool:
        """Whether greedy generation would give the answer, from its most likely token at each scored position."""
        one = self.packed.encoded[example]
        answer, after = one.target[: one.num_answer], tokens[one.num_answer]
        if tokens[: one.num_answer] != answer:
            return False
        if (example, after) not in self._judged:
            text = self.tokenizer.decode([*answer, after], skip_special_tokens=True)
            self._judged[example, after] = is_correct(text, self.packed.answers[example])
        return self._judged[example, after]


def attention_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """
    Returns the decoder layers of a Llama-like model.

    Raises:
        `ValueError`: when there are none with `self_attn.o_proj`, or no final norm to follow them.
    """
    try:
        layers = model.base_model.layers
        _ = model.base_model.norm, [layer.self_attn.o_proj for layer in layers]
    except AttributeError as error:
        raise ValueError(
            f"The heads of {type(model).__name__} cannot be scored: {error}. A Llama-like decoder is needed, "
            "with `layers`, `norm` and an `o_proj` in each layer's `self_attn`."
        ) from error
    return layers


@contextlib.contextmanager
def inference(model: PreTrainedModel, dtype: torch.dtype | None) -> Iterator[None]:
    """Eval mode without gradients; matrix products in `dtype` where that is not the model's own."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, dtype, enabled=dtype not in (None, model.dtype)):
            yield
    finally:
        model.train(training)


def _mapped(change, kwargs: dict) -> dict:
    return {name: change(value) for name, value in kwargs.items()}


def _tensor(output) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
