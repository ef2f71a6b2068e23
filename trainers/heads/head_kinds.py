"""
What kind of head a retrieval head is: gather, aggregate, or neither, by which half of the task its ablation hurts, and
what it attends to there (Gather-and-Aggregate, https://huggingface.co/papers/2504.18574).

Retrieval is a relay. A **gather** head works at the entries of the prompt: behind a key it looks back to the key and
stores which one the entry belongs to; ablated at the entries alone, it is missed. An **aggregate** head works at the
question: it looks at the value that was asked for and brings it; ablated at the question alone, it is missed. A head
that is missed in a half where it attends to neither does something else there, such as spelling the question out.

    kinds = head_kinds(model, tokenizer, head_map.pairs, KVRetrieval(format="json"), num_examples=20)

Shapes: n ablations, T tokens, H query heads, P head dim.
"""

import contextlib
import itertools
import re
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainers.families import logits_scale
from trainers.heads.ablation import inference
from trainers.heads.head_layout import attention_layers
from trainers.probes import EncodedAnswer, Example, KVRetrieval


# What a head must cost in log-probability (nats) in one half of the task, and attend there, to be of its kind.
LEAST_DROP, LEAST_ATTENTION = 0.02, 0.1
# An entry of the dictionary: its key and its value.
ENTRIES = {
    "json": re.compile(r'"([^"]+)": ([^,}]+)'),
    "lines": re.compile(r"([^\n:]+): ([^\n]+)"),
    "paper": re.compile(r"([^\n:]+):([^\n]+)"),
}

Pair = tuple[int, int]


@dataclass(frozen=True)
class HeadKind:
    """
    What one head does on a probe.

    Args:
        layer (`int`), head (`int`):
            The head.
        kind (`str`):
            `"gather"`, `"aggregate"`, `"both"` or `"neither"`.
        entries_drop (`float`), question_drop (`float`):
            Drop in the answer's log-probability, in nats, when the head is ablated at the entries, and at the
            question and the answer.
        gather_attention (`float`), aggregate_attention (`float`):
            Mean attention to the asked entry's key, from where it is greatest between the key and the value's end; and
            from the question to the asked value.
    """

    layer: int
    head: int
    kind: str
    entries_drop: float
    question_drop: float
    gather_attention: float
    aggregate_attention: float


@dataclass(frozen=True)
class Landmarks:
    """Positions of the asked entry's `key` and `value` in tokens, and of the first token after the `entries`."""

    key: list[int]
    value: list[int]
    entries: int


def landmarks(tokenizer: PreTrainedTokenizerBase, example: Example, probe: KVRetrieval) -> Landmarks:
    """
    Finds the asked entry of a key-value prompt.

    Raises:
        `ValueError`: when the prompt is not one of the probe's.
    """
    entries = list(itertools.islice(ENTRIES[probe.format].finditer(example.prompt), probe.pairs))
    asked = [found for found in entries if found[2].strip() == example.answer.strip()]
    if len(entries) < probe.pairs or len(asked) != 1:
        raise ValueError(f"{example.prompt[:60]!r}... is no prompt of {probe.name}.")
    offsets = tokenizer(example.prompt, return_offsets_mapping=True)["offset_mapping"]

    def positions(first: int, last: int) -> list[int]:
        return [i for i, (start, stop) in enumerate(offsets) if start < last and first < stop]

    after = positions(entries[-1].end(), len(example.prompt))
    return Landmarks(positions(*asked[0].span(1)), positions(*asked[0].span(2)), min(after))


def head_kinds(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[Pair],
    probe: KVRetrieval,
    num_examples: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> list[HeadKind]:
    """
    Labels heads of a teacher.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Llama-like teacher.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, a fast one.
        pairs (`list[tuple[int, int]]`):
            (layer, head) of the heads.
        probe ([`~trainers.probes.KVRetrieval`]):
            What is asked.
        num_examples (`int`, *optional*, defaults to `20`):
            Questions.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the questions.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.
    """
    sums = torch.zeros(len(pairs), 4, dtype=torch.float64)
    with inference(model, None):
        for example in tqdm(probe.examples(num_examples, seed), desc="labelling heads", disable=not progress):
            marks, one = landmarks(tokenizer, example, probe), EncodedAnswer.of(tokenizer, example)
            sums[:, :2] += _drops(model, one, pairs, marks.entries)
            weights = _patterns(model, one.context + one.target, pairs)  # [heads, T, T]
            asking = range(len(one.context) - 1, len(one.context) + one.num_answer - 1)
            behind = range(marks.key[-1] + 1, marks.value[-1] + 1)
            sums[:, 2] += weights[:, behind][:, :, marks.key].sum(-1).amax(-1)
            sums[:, 3] += weights[:, asking][:, :, marks.value].sum(-1).amax(-1)
    means = (sums / num_examples).tolist()
    return [HeadKind(*pair, _kind(*values), *values) for pair, values in zip(pairs, means, strict=True)]


def patterns(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: Example, pairs: list[Pair]
) -> tuple[list[str], torch.Tensor]:
    """The tokens of a prompt with its answer, as text, and what each head attends to there: [heads, T, T]."""
    one = EncodedAnswer.of(tokenizer, example)
    ids = one.context + one.target[: one.num_answer]
    with inference(model, None):
        return [tokenizer.decode([token]) for token in ids], _patterns(model, ids, pairs)


def _kind(entries_drop: float, question_drop: float, gather_attention: float, aggregate_attention: float) -> str:
    gathers = entries_drop >= LEAST_DROP and gather_attention >= LEAST_ATTENTION
    aggregates = question_drop >= LEAST_DROP and aggregate_attention >= LEAST_ATTENTION
    if gathers and aggregates:
        return "both"
    return "gather" if gathers else "aggregate" if aggregates else "neither"


def _drops(model: PreTrainedModel, one: EncodedAnswer, pairs: list[Pair], entries: int) -> torch.Tensor:
    """[heads, 2]: what the answer's log-probability loses without each head at the entries, and after them."""
    ids = torch.tensor([one.context + one.target], device=model.device)
    kept = torch.ones(1 + 2 * len(pairs), ids.shape[1], model.config.num_attention_heads, device=model.device)
    with contextlib.ExitStack() as hooks:
        for layer in {layer for layer, _ in pairs}:
            mask = kept.clone()  # [n, T, H]; the first row ablates nothing
            for i, (at, head) in enumerate(pairs):
                if at == layer:
                    mask[1 + 2 * i, :entries, head] = 0
                    mask[2 + 2 * i, entries:, head] = 0

            def change(o_proj, args, mask=mask):
                mixed = args[0].unflatten(-1, (mask.shape[-1], -1))  # [n, T, H, P]
                return ((mixed * mask[..., None].to(mixed.dtype)).flatten(-2),)

            o_proj = attention_layers(model)[layer].self_attn.o_proj
            hooks.callback(o_proj.register_forward_pre_hook(change).remove)
        states = model.base_model(input_ids=ids.expand(len(kept), -1), use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(states[:, len(one.context) - 1 : -1]).float() * logits_scale(model.config)
    target = torch.tensor(one.target, device=model.device).expand(len(kept), -1)
    log_prob = logits.log_softmax(-1).gather(-1, target[..., None]).sum((1, 2)).double().cpu()  # [n]
    return (log_prob[0] - log_prob[1:]).unflatten(0, (len(pairs), 2))


def _patterns(model: PreTrainedModel, ids: list[int], pairs: list[Pair]) -> torch.Tensor:
    """Attention weights of some heads, [heads, T, T], in float32 on the CPU."""
    found, before = {}, model.config._attn_implementation
    with contextlib.ExitStack() as undo:
        # Only the eager form hands its weights out.
        model.set_attn_implementation("eager")
        undo.callback(model.set_attn_implementation, before)
        for layer in {layer for layer, _ in pairs}:

            def keep(module, args, output, layer=layer):
                found[layer] = output[1][0].float().cpu()  # [H, T, T]

            undo.callback(attention_layers(model)[layer].self_attn.register_forward_hook(keep).remove)
        model.base_model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    return torch.stack([found[layer][head] for layer, head in pairs])
