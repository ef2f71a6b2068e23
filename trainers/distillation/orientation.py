"""
Orientation: the mixing matrix of every recurrent head is drawn to the attention matrix of the head it stands for.

A recurrent head is the lower triangular matrix M[t, s] = (C_t . B_s) a_{s+1} ... a_t applied to its inputs, an attention
head softmax(q k^T) applied to its values, which conversion made those inputs. The loss of a head is the Frobenius norm
of the difference, when its layer gets the TEACHER's input. Only what makes B, C and a learns.

Source: the first stage of MOHAWK (https://huggingface.co/papers/2408.10189, section 4.1). The readout does not enter
the loss, so calibration belongs after this stage.

Shape letters: B batch, T tokens, H recurrent heads, P head dim, N state, R rows of the matrices that exist at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


# What holds B, C and the decays. The rows of x and z in `in_proj` get a gradient of zero.
ORIENTED_PARTS = (".mixer.ssm.in_proj.", ".mixer.ssm.conv1d.")
# Entries of the matrices of a layer that exist at once; 2**22 are 16 MB in float32.
ENTRIES_AT_ONCE = 2**22


@dataclass(frozen=True)
class Attention:
    """
    What the attention matrices of a layer are made of.

    Args:
        query (`torch.Tensor`): `[B, query heads, T, P]`, normalised and rotated.
        key (`torch.Tensor`): `[B, KV heads, T, P]`, likewise.
        mask (`torch.Tensor`, *optional*): whether a token is seen, `[B or 1, 1, T, T]`; `None` is the causal mask.
        scaling (`float`): factor of the scores.
    """

    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None
    scaling: float


@contextmanager
def recorded_attention(teacher: PreTrainedModel) -> Iterator[list[Attention]]:
    """
    Records what the attention matrices of every layer of a teacher are made of, while the block runs the teacher.

    Taken where transformers hands queries and keys to its attention functions, so that norms, rotations and fused
    projections of every family are done.

    Yields:
        `list[Attention]`: filled layer by layer.
    """
    records, before, attend = [], teacher.config._attn_implementation, ALL_ATTENTION_FUNCTIONS["sdpa"]

    def record(module, query, key, value, attention_mask, scaling, **kwargs):
        records.append(Attention(query, key, attention_mask, scaling))
        return attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    # SDPA's masks alone are whole and boolean.
    teacher.set_attn_implementation("sdpa")
    ALL_ATTENTION_FUNCTIONS["sdpa"] = record
    try:
        yield records
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
        teacher.set_attn_implementation(before)


def orientation_loss(
    ssm: nn.Module,
    hidden_states: torch.Tensor,
    attention: Attention,
    heads: list[int],
    counted: torch.Tensor,
    recurrent_mask: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Distance between the mixing matrices of a layer's recurrent heads and the attention matrices they stand for.

    Some rows of the matrices exist at a time, and are made again in the backward pass.

    Args:
        ssm ([`~modeling_rad_hybrid.discrete_mamba2.DiscreteMamba2`]): the recurrent heads.
        hidden_states (`torch.Tensor`): the layer's normalised input, `[B, T, D]`.
        attention ([`Attention`]): what the teacher's matrices are made of.
        heads (`list[int]`): the teacher's query head that each recurrent head stands for.
        counted (`torch.Tensor`): whether a position counts, `[B, T]`; the rows of others do not enter.
        recurrent_mask (`torch.Tensor`, *optional*): 0 at padding, `[B, T]`.
        seq_idx (`torch.Tensor`, *optional*): document of each token, `[B, T]`.

    Returns:
        `tuple`: the Frobenius norms summed over heads and, times its counted positions, over sequences; and the two
        sums `[2]` whose quotient is the relative error `|M - A|^2 / |A|^2`, without gradient.
    """
    log_decay, B, C = mixing_terms(ssm, hidden_states, recurrent_mask, seq_idx)
    group = attention.query.shape[1] // attention.key.shape[1]
    query, key = attention.query[:, heads], attention.key[:, [head // group for head in heads]]
    batch, tokens = counted.shape
    rows_at_once = max(1, ENTRIES_AT_ONCE // (batch * len(heads) * tokens))
    places = torch.arange(tokens, device=counted.device)
    sums = 0.0
    for start in range(0, tokens, rows_at_once):
        stop = min(start + rows_at_once, tokens)
        # No row of the part looks beyond its last token.
        visible = places[:stop] <= places[start:stop, None]  # [R, stop]
        if seq_idx is not None:
            visible = visible & (seq_idx[:, None, start:stop, None] == seq_idx[:, None, None, :stop])
        seen = visible if attention.mask is None else attention.mask[:, :, start:stop, :stop]
        sums = sums + checkpoint(
            _squares,
            (log_decay[..., start:stop], log_decay[..., :stop], B[:, :, :stop], C[:, :, start:stop], visible),
            (query[:, :, start:stop] * attention.scaling, key[:, :, :stop], seen),
            counted[:, None, start:stop, None],
            use_reentrant=False,
        )  # [2, B, H]
    # The gradient of a square root at zero is infinite; a perfect match must give none.
    norms = sums[0].clamp(min=1e-12).sqrt().sum(-1)  # [B]
    return (norms * counted.sum(-1)).sum(), sums.detach().sum((1, 2))


def mixing_terms(
    ssm: nn.Module,
    hidden_states: torch.Tensor,
    recurrent_mask: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    What the mixing matrices of recurrent heads are made of; arguments as in [`orientation_loss`].

    Returns:
        `tuple`: log decay from the sequence's start to each token, `[B, H, T]`, float32; B and C, `[B, H, T, N]`.
    """
    _, xBC, A_log = ssm.in_proj(hidden_states).split(ssm.sections, dim=-1)
    log_a = -nn.functional.softplus(A_log.float())  # [B, T, H]
    if recurrent_mask is not None:
        real = recurrent_mask[..., None] != 0
        xBC, log_a = xBC * real, log_a * real
    B, C = ssm.conv1d(xBC, None, seq_idx)[..., ssm.sections[0] :].chunk(2, dim=-1)  # [B, T, H N]
    B, C = (t.unflatten(-1, (ssm.num_heads, -1)).transpose(1, 2) for t in (B, C))
    return log_a.cumsum(1).transpose(1, 2), B, C


def mixing_rows(
    log_decay: torch.Tensor, log_decay_before: torch.Tensor, B: torch.Tensor, C: torch.Tensor, visible: torch.Tensor
) -> torch.Tensor:
    """
    Rows of the mixing matrices of recurrent heads, with 1 for the step size as everywhere.

    Args:
        log_decay (`torch.Tensor`): log decay from the start to the tokens of the rows, `[B, H, R]`, float32.
        log_decay_before (`torch.Tensor`): the same to the tokens of the columns, `[B, H, S]`.
        B (`torch.Tensor`): input vectors of the columns, `[B, H, S, N]`.
        C (`torch.Tensor`): output vectors of the rows, `[B, H, R, N]`.
        visible (`torch.Tensor`): whether a row's token comes after the column's in its document, `[R, S]` or with
            leading dimensions.

    Returns:
        `torch.Tensor`: `[B, H, R, S]`, float32.
    """
    decays = log_decay[..., :, None] - log_decay_before[..., None, :]
    # Before the exponential, which overflows above the diagonal.
    return (C @ B.transpose(-1, -2)).float() * decays.masked_fill(~visible, -torch.inf).exp()


def _squares(recurrent: tuple, attention: tuple, counted: torch.Tensor) -> torch.Tensor:
    """Squares of the difference and of the attention in some rows, summed: `[2, B, H]`."""
    query, key, seen = attention
    with torch.no_grad():
        scores = (query @ key.transpose(-1, -2)).float().masked_fill(~seen, torch.finfo(torch.float32).min)
        target = scores.softmax(-1) * counted  # [B, H, R, S]
    difference = mixing_rows(*recurrent) * counted - target
    return torch.stack([difference.square().sum((-1, -2)), target.square().sum((-1, -2))])
