"""
Exact ablation of heads: what a model answers when the slices that some heads feed to an output projection are zeroed.

The same numbers as whole forward passes of whole prompts with a hook on every projection, at a fraction of the cost:

- Prompts that begin alike share their beginning (see `probe_rows.py`).
- The hidden states that enter each layer are computed once; an ablation that begins in layer l runs layers l, l+1, ...
  In layer l itself the heads' outputs are those of the whole model, so its attention is not computed again.
- Several ablations are run in one batch, one copy of the packed rows for each.
- The MLP of the last layer, the final norm and the LM head see only positions that predict an answer, and the LM head
  only the candidates' rows where candidates are ranked.

Decoder layers are called as the model itself calls them, with the keyword arguments recorded in its own forward pass,
so this works for any Llama-like teacher whose layers have `self_attn.o_proj`, and for our students.

A head is named by (layer, slot). A teacher's slots are its query heads; a student's are its kept heads and then its
recurrent ones (see `student_heads.py`).

Shapes: L layers, H heads of a layer, P head dim, D model, V vocabulary, B packed rows, T their tokens, E examples, n
ablations at once, S scored positions (those whose logits count).
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainers.families import logits_scale, sliding_layers
from trainers.heads.head_layout import decoder_layers, head_outlets
from trainers.probes import EncodedAnswer, is_correct
from trainers.probes.probe_rows import PackedExamples


# Logits held at once, in numbers: 2**26 of them are 256 MB in float32.
MAX_LOGITS = 2**26
# Tokens of one forward call, copies for several ablations included, by type of device: what a CPU's cache holds, and
# what keeps a GPU busy.
BATCH_TOKENS = {"cpu": 1024, "cuda": 65_536}
# One ablation: every (layer, slot) in it.
Heads = Collection[tuple[int, int]]


@dataclass(frozen=True)
class Outcome:
    """Answers of n models (whole, or with heads ablated): `correct` [n, E] of bool, `log_prob` [n, E] in nats."""

    correct: torch.Tensor
    log_prob: torch.Tensor


class Ablator:
    """
    One batch of rows, read once by the whole model and then again with heads ablated.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A Llama-like teacher in eval mode, with eager or SDPA attention, or a student.
        packed ([`PackedExamples`]):
            Rows and their scored positions.
        keep_inputs (`bool`, *optional*, defaults to `True`):
            Whether to keep what enters each layer and its output projection (2 x L x B x T x D numbers for a teacher),
            which `run` needs.
        offload (`bool`, *optional*, defaults to `False`):
            Whether to keep that in the memory of the CPU.

    Raises:
        `ValueError`: when the model's layers have no `self_attn.o_proj`.

    The whole model's hidden states at the scored positions, after the final norm, are in `.scored` [1, S, D].
    """

    def __init__(
        self, model: PreTrainedModel, packed: PackedExamples, keep_inputs: bool = True, offload: bool = False
    ):
        self.model, self.packed = model, packed
        self.layers, self.outlets = decoder_layers(model), head_outlets(model)
        self.is_student = model.config.model_type == "rad_hybrid"
        if self.is_student and packed.visible is not None:
            raise ValueError("A student's recurrent heads obey no 4-D mask; pack its examples with share=False.")
        self._storage = torch.device("cpu") if offload else model.device
        self._inputs: list[torch.Tensor] = []
        self._mixed: list[torch.Tensor] = []
        self._kwargs: list[dict] = []
        self.scored = self._norm(self._read(keep_inputs)[None])

    def _read(self, keep_inputs: bool) -> torch.Tensor:
        def enter(layer, args, kwargs):
            kwargs = dict(kwargs)
            self._inputs.append((args[0] if args else kwargs.pop("hidden_states")).to(self._storage))
            self._kwargs.append(kwargs)

        def project(o_proj, args):
            self._mixed.append(args[0].to(self._storage))

        last = []
        with contextlib.ExitStack() as hooks:
            for layer in self.layers if keep_inputs else []:
                hooks.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
                if not self.is_student:
                    hooks.callback(layer.self_attn.o_proj.register_forward_pre_hook(project).remove)
            hooks.callback(self.layers[-1].register_forward_hook(lambda *call: last.append(_tensor(call[-1]))).remove)
            inputs = {"input_ids": self.packed.input_ids, "use_cache": False}
            if self.packed.visible is not None:
                inputs |= {"attention_mask": self._masks(), "position_ids": self.packed.position_ids}
            self.model.base_model(**inputs)
        return last[0]  # [B, T, D], before the final norm

    def _masks(self) -> torch.Tensor | dict[str, torch.Tensor]:
        """What hides tokens from one another, [B, 1, T, T]; by kind of layer where some slide and others do not."""

        def mask(visible: torch.Tensor) -> torch.Tensor:
            zeros = torch.zeros(visible.shape, dtype=self.model.dtype, device=self.model.device)
            return zeros.masked_fill_(~visible, torch.finfo(zeros.dtype).min)

        visible, positions = self.packed.visible, self.packed.position_ids
        slides = sliding_layers(self.model.config)
        if not slides:
            return mask(visible)
        # A model takes a ready-made mask as it is, so the window must be in it.
        distance = positions[:, None, :, None] - positions[:, None, None, :]  # [B, 1, T, T]
        sliding = mask(visible & (distance < self.model.config.sliding_window))
        if len(slides) == len(self.layers):
            return sliding
        return {"full_attention": mask(visible), "sliding_attention": sliding}

    def run(self, ablations: list[Heads], means: list[torch.Tensor] | None = None) -> torch.Tensor:
        """
        Hidden states with each of `ablations` in turn.

        Args:
            ablations (`list[Heads]`):
                The (layer, slot) pairs of each.
            means (`list[torch.Tensor]`, *optional*):
                For each layer, [slots, P]: what an ablated head gives instead of zeros.

        Returns:
            `torch.Tensor`: [n, S, D], at the scored positions, after the final norm.
        """
        n, touched = len(ablations), sorted({layer for heads in ablations for layer, _ in heads})
        if not touched:
            return self.scored.expand(n, -1, -1)
        hidden_states = self._inputs[touched[0]].to(self.model.device)
        hidden_states = hidden_states.repeat(n, 1, 1)  # [n * B, T, D]
        for layer in range(touched[0], len(self.layers)):
            changes = self._changes(layer, ablations, means) if layer in touched else []
            hidden_states = self._layer(layer, hidden_states, changes, n, again=layer == touched[0])
        if self.is_student:
            return self._norm(hidden_states.unflatten(0, (n, -1)))
        # A teacher's last layer has kept the scored positions only.
        return self.model.base_model.norm(hidden_states)

    def _layer(
        self, layer: int, hidden_states: torch.Tensor, changes: list[Callable], n: int, again: bool
    ) -> torch.Tensor:
        """One layer on [n * B, T, D]; `again`: its heads give what they gave before, so that attention is known."""
        module, batch = self.layers[layer], len(self.packed.input_ids)

        def repeated(value):
            if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == batch > 1:
                return value.repeat(n, *[1] * (value.ndim - 1))
            return tuple(map(repeated, value)) if isinstance(value, tuple) else value

        kwargs = {name: repeated(value) for name, value in self._kwargs[layer].items()}
        with contextlib.ExitStack() as hooks:
            for outlet, change in zip(self.outlets[layer], changes, strict=False):
                hooks.callback(outlet.projection.register_forward_pre_hook(change).remove)
            last = layer == len(self.layers) - 1
            if self.is_student or not (again or last):
                return _tensor(module(hidden_states, **kwargs))
            if again:
                mixed = self._mixed[layer].to(self.model.device).repeat(n, 1, 1)
                attended = module.self_attn.o_proj(mixed)
            else:
                attended = _attention(module, hidden_states, kwargs)
            if last:
                hidden_states, attended = self._at_scored(hidden_states, n), self._at_scored(attended, n)
            with _replaced(module.self_attn, lambda *args, **kwargs: (attended, None)):
                return _tensor(module(hidden_states, **kwargs))

    def _changes(self, layer: int, ablations: list[Heads], means: list[torch.Tensor] | None) -> list[Callable]:
        """For each outlet of the layer a hook that takes out the heads of each ablation."""
        device, total = self.model.device, sum(outlet.num_heads for outlet in self.outlets[layer])
        kept = torch.ones(len(ablations), total)
        for row, heads in enumerate(ablations):
            slots = [slot for at, slot in heads if at == layer]
            if any(not 0 <= slot < total for slot in slots):
                raise ValueError(f"Layer {layer} has {total} heads; {slots} cannot be ablated in it.")
            kept[row, slots] = 0
        mean = None if means is None else means[layer].to(device)
        changes, start = [], 0
        for outlet in self.outlets[layer]:
            part = slice(start, start + outlet.num_heads)
            changes.append(_change(kept[:, part].to(device), None if mean is None else mean[part]))
            start += outlet.num_heads
        return changes

    def _at_scored(self, states: torch.Tensor, n: int) -> torch.Tensor:
        """[n * B, T, D] to [n, S, D]."""
        return states.unflatten(0, (n, -1))[:, self.packed.row, self.packed.column]

    def _norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Final norm of [n, B, T, D] at the scored positions: [n, S, D]."""
        return self.model.base_model.norm(hidden_states[:, self.packed.row, self.packed.column])


class HeadAblation(Ablator):
    """
    An [`Ablator`] whose rows are examples of a probe, and which says how they are answered.

    Args:
        model, packed, keep_inputs, offload:
            As in [`Ablator`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer.
        rank_candidates (`bool`, *optional*, defaults to `False`):
            Whether an answer is right when its first token is the likeliest among those of the candidates, instead of
            when greedy generation would give it. The log-probability is then the one among the candidates.

    Raises:
        `ValueError`: when the candidates of an example cannot be told apart by their first token.

    The whole model's answers are in `.base`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        packed: PackedExamples,
        keep_inputs: bool = True,
        offload: bool = False,
        rank_candidates: bool = False,
    ):
        super().__init__(model, packed, keep_inputs, offload)
        self.tokenizer = tokenizer
        self.candidates = candidate_tokens(tokenizer, packed) if rank_candidates else None
        self._judged: dict[tuple[int, int], bool] = {}
        self.base = self._answers(self.scored)

    @property
    def num_heads(self) -> int:
        """Heads of one layer of a teacher."""
        return self.outlets[0][0].num_heads

    def ablate(self, layer: int, heads: list[int]) -> Outcome:
        """Answers with each of `heads` of `layer` ablated in turn, one row of the outcome for each."""
        return self.without([[(layer, head)] for head in heads])

    def without(self, ablations: list[Heads], means: list[torch.Tensor] | None = None) -> Outcome:
        """Answers with each of `ablations` in turn, one row of the outcome for each; arguments as in `run`."""
        return self._answers(self.run(ablations, means))

    def _answers(self, scored: torch.Tensor) -> Outcome:
        return self._generated(scored) if self.candidates is None else self._ranked(scored)

    def _generated(self, scored: torch.Tensor) -> Outcome:
        """Whether greedy generation gives each answer, and the log-probability of answer and end."""
        packed, head, scale = self.packed, self.model.get_output_embeddings(), logits_scale(self.model.config)
        step = max(1, MAX_LOGITS // (len(scored) * head.weight.shape[0]))
        best, log_probs = [], []
        for first in range(0, scored.shape[1], step):
            logits = head(scored[:, first : first + step]).float() * scale  # [n, step, V]
            target = packed.target[first : first + step].clamp(min=0).expand(len(scored), -1)
            best.append(logits.argmax(-1))
            log_probs.append(logits.gather(-1, target[:, :, None])[:, :, 0] - logits.logsumexp(-1))
        best = torch.cat(best, 1).tolist()
        log_prob = torch.where(packed.target >= 0, torch.cat(log_probs, 1), 0.0).double().cpu()  # [n, S]
        sums = torch.stack([log_prob[:, first:last].sum(-1) for first, last in packed.spans], 1)  # [n, E]
        correct = [[self._is_right(i, tokens[slice(*span)]) for i, span in enumerate(packed.spans)] for tokens in best]
        return Outcome(torch.tensor(correct), sums)

    def _ranked(self, scored: torch.Tensor) -> Outcome:
        """Whether each answer's first token is the likeliest of the candidates'; only their rows of the LM head."""
        weight, bias = self.model.get_output_embeddings().weight, self.model.get_output_embeddings().bias
        scale = logits_scale(self.model.config)
        correct, log_prob = [], []
        for (first, _), tokens in zip(self.packed.spans, self.candidates, strict=True):
            logits = scored[:, first] @ weight[tokens].T  # [n, candidates], the right one first
            logits = (logits if bias is None else logits + bias[tokens]).float() * scale
            correct.append(logits.argmax(-1) == 0)
            log_prob.append(logits.double().log_softmax(-1)[:, 0])
        return Outcome(torch.stack(correct, 1).cpu(), torch.stack(log_prob, 1).cpu())

    def _is_right(self, example: int, tokens: list[int]) -> bool:
        """Whether greedy generation would give the answer, from its most likely token at each scored position."""
        one = self.packed.encoded[example]
        answer, after = one.target[: one.num_answer], tokens[one.num_answer]
        if tokens[: one.num_answer] != answer:
            return False
        if (example, after) not in self._judged:
            text = self.tokenizer.decode([*answer, after], skip_special_tokens=True)
            self._judged[example, after] = is_correct(text, self.packed.examples[example].answer)
        return self._judged[example, after]


def candidate_tokens(tokenizer: PreTrainedTokenizerBase, packed: PackedExamples) -> list[list[int]]:
    """
    First token of every candidate of each example, the right one first.

    Raises:
        `ValueError`: when two candidates begin with the same token.
    """
    tokens = []
    for example, one in zip(packed.examples, packed.encoded, strict=True):
        others = [answer for answer in example.candidates if answer != example.answer]
        encoded = [one, *(EncodedAnswer.of(tokenizer, example, answer) for answer in others)]
        firsts = [(other.context + other.target)[len(one.context)] for other in encoded]
        if len(set(firsts)) < len(firsts) or any(len(other.context) < len(one.context) for other in encoded):
            raise ValueError(
                f"The candidates of {example.prompt.splitlines()[-1]!r} ({', '.join(map(repr, example.candidates[:3]))}"
                ", ...) cannot be told apart by their first token. Score by generation instead, or take values of one "
                "token (--values words)."
            )
        tokens.append(firsts)
    return tokens


def tokens_at_once(model: PreTrainedModel, given: int | None) -> int:
    """The number given, or what suits the model's device."""
    return given or BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cuda"])


def head_means(model: PreTrainedModel, batches: list[PackedExamples]) -> list[torch.Tensor]:
    """For each layer what its heads give on average over all tokens of the batches, [slots, P] in float32."""
    outlets, sums, tokens = head_outlets(model), [], 0
    for layer in outlets:
        sums.append([0.0 for _ in layer])
    for batch in batches:
        real = batch.real[..., None]

        def add(layer, index, args, real=real):
            sums[layer][index] = sums[layer][index] + (args[0].float() * real).sum((0, 1))  # [H P]

        with contextlib.ExitStack() as hooks:
            for i, layer in enumerate(outlets):
                for j, outlet in enumerate(layer):
                    hook = functools.partial(lambda i, j, projection, args: add(i, j, args), i, j)
                    hooks.callback(outlet.projection.register_forward_pre_hook(hook).remove)
            Ablator(model, batch, keep_inputs=False)
        tokens += int(real.sum())
    return [
        torch.cat([total.unflatten(-1, (outlet.num_heads, -1)) for total, outlet in zip(*pair, strict=True)]) / tokens
        for pair in zip(sums, outlets, strict=True)
    ]


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


def _change(kept: torch.Tensor, mean: torch.Tensor | None) -> Callable:
    """A hook for a projection that reads [n * B, T, H P] or [n, S, H P]: heads not `kept` [n, H] give `mean` [H, P]."""

    def change(projection, args):
        mixed = args[0].unflatten(-1, (kept.shape[1], -1)).unflatten(0, (len(kept), -1))  # [n, B, T, H, P]
        keep = kept.to(mixed.dtype)[:, None, None, :, None]
        changed = mixed * keep
        if mean is not None:
            changed = changed + mean.to(mixed.dtype) * (1 - keep)
        return (changed.flatten(0, 1).flatten(-2),)

    return change


class _Reached(Exception):
    """Carries the arguments that a decoder layer calls its attention with."""


def _attention(layer: nn.Module, hidden_states: torch.Tensor, kwargs: dict) -> torch.Tensor:
    """What the layer's attention gives for its input, whatever the layer does before and after it."""

    def stop(*args, **kwargs):
        raise _Reached(args, kwargs)

    try:
        with _replaced(layer.self_attn, stop):
            layer(hidden_states, **kwargs)
    except _Reached as reached:
        args, kwargs = reached.args
    return _tensor(layer.self_attn(*args, **kwargs))


@contextlib.contextmanager
def _replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Lets a module compute something else for a while."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _tensor(output) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
