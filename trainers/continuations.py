"""
What a model writes after prompts, where those that begin alike are read once, and how likely it finds continuations.

    texts = generate_greedy(model, tokenizer, prompts, max_new_tokens=8, group=4)
    scores = continuation_log_likelihoods(model, tokenizer, [("The sky is", " blue")], batch_size=8)
"""

import copy
from collections.abc import Iterator

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from modeling_rad_hybrid import CACHE_NAME
from trainers.probes.asking import common_prefix, left_padded, token_ids


@torch.no_grad()
def generate_greedy(
    model,
    tokenizer,
    prompts: list[str],
    max_new_tokens: int,
    batch_size: int = 25,
    group: int = 1,
    progress: bool = True,
    description: str = "asking",
) -> list[str]:
    """
    Continues prompts greedily.

    Prompts of one group begin alike, as the questions on one dictionary do. What they share is run once, and its cache
    copied for each of them: the same answers for a fraction of the work.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, in eval mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompts (`list[str]`):
            Texts to continue.
        max_new_tokens (`int`):
            Most tokens to generate for each.
        batch_size (`int`, *optional*, defaults to `25`):
            Prompts run at once.
        group (`int`, *optional*, defaults to `1`):
            Consecutive prompts that begin alike.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.
        description (`str`, *optional*, defaults to `"asking"`):
            What the bar says.

    Returns:
        `list[str]`: the continuations, without the prompts, in the prompts' order.
    """
    ids = [token_ids(tokenizer, prompt) for prompt in prompts]
    groups = [list(range(start, min(start + group, len(ids)))) for start in range(0, len(ids), group)]
    # Neighbours of like length waste little on padding; the longest first, so that what is too large fails at once.
    groups.sort(key=lambda members: -len(ids[members[0]]))
    texts = [""] * len(ids)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=model.generation_config.eos_token_id,
    )
    at_once = max(1, batch_size // group)
    with tqdm(total=len(ids), desc=description, unit="prompt", disable=not progress, leave=False) as bar:
        for start in range(0, len(groups), at_once):
            for members, continuations in _continue_groups(model, ids, groups[start : start + at_once], config):
                for member, text in zip(
                    members, tokenizer.batch_decode(continuations, skip_special_tokens=True), strict=True
                ):
                    texts[member] = text
                bar.update(len(members))
    return texts


def _continue_groups(
    model, ids: list[list[int]], groups: list[list[int]], config: GenerationConfig
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yields members of the groups and the tokens [members, new tokens] that continue them."""
    shared = [_shared_length([ids[member] for member in members]) for members in groups]
    prefixes = [ids[members[0]][:length] for members, length in zip(groups, shared, strict=True)]
    prefix_ids, prefix_mask = left_padded(prefixes, config.pad_token_id, model.device)  # [groups, T]
    cache = model(
        input_ids=prefix_ids,
        attention_mask=prefix_mask,
        position_ids=(prefix_mask.cumsum(-1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )[CACHE_NAME]
    by_length: dict[int, list[tuple[int, int]]] = {}
    for row, members in enumerate(groups):
        for member in members:
            by_length.setdefault(len(ids[member]) - shared[row], []).append((row, member))
    # Suffixes of one length need no padding between the prefix and themselves.
    for chosen in by_length.values():
        rows = torch.tensor([row for row, _ in chosen], device=model.device)
        suffix = torch.tensor([ids[member][shared[row] :] for row, member in chosen], device=model.device)
        copied = copy.deepcopy(cache)
        # reorder_cache is the one way to multiply a batch that recurrent layers' caches know too.
        copied.reorder_cache(rows)
        input_ids = torch.cat([prefix_ids[rows], suffix], dim=1)
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.cat([prefix_mask[rows], torch.ones_like(suffix)], dim=1),
            generation_config=config,
            **{CACHE_NAME: copied},
        )
        yield [member for _, member in chosen], output[:, input_ids.shape[1] :]


def _shared_length(prompts: list[list[int]]) -> int:
    # At least one token of each prompt must be left to run.
    shortest = min(map(len, prompts)) - 1
    return min([shortest, *(common_prefix(prompts[0], other) for other in prompts[1:])])


@torch.no_grad()
def continuation_log_likelihoods(model, tokenizer, pairs: list[tuple[str, str]], batch_size: int) -> list[float]:
    """
    Log-likelihood (natural logarithm) of each continuation after its context, summed over its tokens.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        pairs (`list[tuple[str, str]]`):
            (context, continuation); the two are tokenised together.
        batch_size (`int`):
            Pairs run at once.
    """
    whole = tokenizer([context + continuation for context, continuation in pairs])["input_ids"]
    contexts = tokenizer([context for context, _ in pairs])["input_ids"]
    scores = []
    for start in range(0, len(pairs), batch_size):
        rows = whole[start : start + batch_size]
        # Right padding: nothing after a token changes what a causal model says of it.
        batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt").to(model.device)
        # Tokens may merge across the seam; the continuation begins at the first token that differs, never at token 0.
        first = [
            max(1, min(common_prefix(row, context), len(row) - 1))
            for row, context in zip(rows, contexts[start:], strict=False)
        ]
        logits = model(**batch, logits_to_keep=batch["input_ids"].shape[1] - min(first) + 1).logits.float()
        for row, begin, row_logits in zip(rows, first, logits, strict=True):
            row_logits = row_logits[begin - min(first) :][: len(row) - begin]  # [continuation, V]
            targets = torch.tensor(row[begin:], device=logits.device)
            scores.append(row_logits.log_softmax(-1).gather(-1, targets[:, None]).sum().item())
    return scores
