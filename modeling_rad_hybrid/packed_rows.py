"""
Packed rows: several documents in one row, kept apart in attention, convolution and recurrence.

Whoever packs says so in one of three ways: `seq_idx` `[B, T]` (document of each token), `cu_seq_lens_q` (cumulative
lengths over the flattened rows, as FlashAttention takes them) or `position_ids` that start anew. All become `seq_idx`.

Shape letters: B batch, T tokens.
"""

import torch
from torch import nn
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids


def document_index(
    batch: int,
    tokens: int,
    seq_idx: torch.Tensor | None = None,
    cu_seq_lens: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """
    Document of each token, from the first of the three signs that is given.

    Args:
        batch (`int`): number of rows B.
        tokens (`int`): length of a row T.
        seq_idx (`torch.Tensor`, *optional*): `[B, T]` or `[1, T]`, integers that change where a document starts.
        cu_seq_lens (`torch.Tensor`, *optional*): where documents start in the flattened rows, and `B T` at the end.
        position_ids (`torch.Tensor`, *optional*): `[B, T]` or `[1, T]`; a document starts where they do not go up by one.

    Returns:
        `torch.Tensor`: `[B, T]`, or `None` where no sign is given.
    """
    if seq_idx is not None:
        return seq_idx.expand(batch, tokens)
    if cu_seq_lens is not None:
        place = torch.arange(batch * tokens, device=cu_seq_lens.device)
        return (place[:, None] >= cu_seq_lens[None, 1:-1]).sum(-1, dtype=torch.int32).view(batch, tokens)
    if position_ids is None or tokens == 1:
        return None
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return nn.functional.pad(starts.cumsum(-1, dtype=torch.int32), (1, 0)).expand(batch, tokens)


def positions_in_documents(seq_idx: torch.Tensor) -> torch.Tensor:
    """Positions `[B, T]` that count from 0 in each document of `seq_idx` `[B, T]`."""
    place = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand_as(seq_idx)
    starts = nn.functional.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    return place - torch.where(starts, place, 0).cummax(-1).values


def flash_attention_lengths(positions: torch.Tensor) -> dict:
    """
    What FlashAttention needs to keep the documents of `positions` `[B, T]` apart. Left to itself transformers reads
    positions in a single row only, and lets the documents of several rows attend to one another.
    """
    (queries, keys), (longest_query, longest_key) = prepare_fa_kwargs_from_position_ids(positions)
    return {
        "cu_seq_lens_q": queries,
        "cu_seq_lens_k": keys,
        "max_length_q": longest_query,
        "max_length_k": longest_key,
    }
