"""
The scan of discrete Mamba-2 (state space duality) with dt = 1: h_t = a_t h_{t-1} + x_t B_t^T, y_t = h_t C_t.

`ssd` is the one entrance; `ssd_sequential` is the readable oracle, `ssd_chunked` the parallel form in plain PyTorch,
`ssd_step` one token of decoding. Decays come as log a_t <= 0 in float32 and the state stays in float32, whatever the
dtype of the rest. Source: Transformers are SSMs, https://huggingface.co/papers/2405.21060, section 6; no input is ever
divided by the step size, which would lose accuracy where a_t is near 1.

Shape letters: B batch, T tokens, H heads, P head dim, N state, Q tokens of a chunk, C chunks.
"""

from functools import cache

import torch
from torch import nn

from .ssd_mamba import ssd_mamba
from .ssd_triton import kernels_fit, ssd_triton


# Chunks that are worked on at once: bounds the memory of the [Q, Q] and [C, C] matrices on long sequences.
CHUNKS_AT_ONCE = 64


def ssd_step(
    x: torch.Tensor, log_a: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One token of the recurrence.

    Args:
        x (`torch.Tensor`): inputs of shape `[B, H, P]`.
        log_a (`torch.Tensor`): log decays of shape `[B, H]`, float32, at most 0.
        B (`torch.Tensor`): input vectors of shape `[B, H, N]`.
        C (`torch.Tensor`): output vectors of shape `[B, H, N]`.
        state (`torch.Tensor`): state before the token, shape `[B, H, P, N]`, float32.

    Returns:
        `tuple`: outputs `[B, H, P]` in the dtype of `x` and the state after the token, float32.
    """
    # The sum runs over the last dimension: other orders were seen to be compiled wrongly by torch 2.11.
    state = log_a.exp()[..., None, None] * state + x.float()[..., :, None] * B.float()[..., None, :]  # [B, H, P, N]
    return (state * C.float()[..., None, :]).sum(-1).to(x.dtype), state


def ssd_sequential(x, log_a, B, C, initial_state=None, seq_idx=None):
    """The recurrence as written in the module docstring, token by token; same arguments and results as [`ssd`]."""
    state = _zero_state(x, B) if initial_state is None else initial_state.to(log_a.dtype)
    outputs = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t > 0:
            state = torch.where((seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None], state, 0.0)
        state = log_a[:, t].exp()[..., None, None] * state + torch.einsum(
            "bhp,bhn->bhpn", x[:, t].to(log_a.dtype), B[:, t].to(log_a.dtype)
        )
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t].to(log_a.dtype)))
    return torch.stack(outputs, dim=1).to(x.dtype), state


def ssd_chunked(x, log_a, B, C, initial_state=None, seq_idx=None, chunk_size: int = 32):
    """The recurrence by chunks: products inside a chunk, a short recurrence between chunks; arguments as in [`ssd`]."""
    tokens = x.shape[1]
    padding = -tokens % chunk_size
    if padding:
        # log a = 0 and x = 0 leave the state as it is.
        x, B, C = (nn.functional.pad(t, (0, 0, 0, 0, 0, padding)) for t in (x, B, C))
        log_a = nn.functional.pad(log_a, (0, 0, 0, padding))
        if seq_idx is not None:
            seq_idx = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, padding)], dim=1)
    state = _zero_state(x, B) if initial_state is None else initial_state.float()
    outputs, previous_idx = [], None
    for start in range(0, x.shape[1], CHUNKS_AT_ONCE * chunk_size):
        span = slice(start, start + CHUNKS_AT_ONCE * chunk_size)
        idx = None if seq_idx is None else seq_idx[:, span].unflatten(1, (-1, chunk_size))  # [B, C, Q]
        y, state = _ssd_chunks(
            *(t[:, span].unflatten(1, (-1, chunk_size)).transpose(2, 3) for t in (x, B, C)),  # [B, C, H, Q, P | N]
            log_a[:, span].unflatten(1, (-1, chunk_size)).transpose(2, 3),  # [B, C, H, Q]
            state,
            idx,
            previous_idx,
        )
        outputs.append(y.transpose(2, 3).flatten(1, 2))  # [B, T, H, P]
        previous_idx = None if idx is None else idx[:, -1, -1]
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return y[:, :tokens].to(x.dtype), state


def _ssd_chunks(x, B, C, log_a, state, idx, previous_idx):
    """Some chunks at once. Shapes: x `[B, C, H, Q, P]`, B and C `[B, C, H, Q, N]`, log_a `[B, C, H, Q]`, idx `[B, C, Q]`."""
    chunk_size = x.shape[3]
    causal = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).tril()
    if idx is None:
        decay_to = log_a.cumsum(
            -1
        )  # [B, C, H, Q] from the chunk's start to each token, that token's own decay included
        carried = 1.0
    else:
        decay_to = _segmented_cumsum(log_a, idx)
        causal = causal & (idx[..., :, None] == idx[..., None, :])[:, :, None]  # [B, C, 1, Q, Q]
        before = torch.cat([idx[:, :1, 0] if previous_idx is None else previous_idx[:, None], idx[:, :-1, -1]], dim=1)
        carried = (idx == before[..., None])[:, :, None, :, None]  # [B, C, 1, Q, 1] token continues the chunk before
        kept_to_end = (idx == idx[..., -1:])[:, :, None]  # [B, C, 1, Q] token's document reaches the end
    # Inside the chunk: y_i = sum over j <= i of (C_i . B_j) exp(decay from j to i) x_j.
    decays = (
        (decay_to[..., :, None] - decay_to[..., None, :]).masked_fill(~causal, -torch.inf).exp()
    )  # [B, C, H, Q, Q]
    y = ((C @ B.transpose(-1, -2)) * decays).to(x.dtype) @ x  # [B, C, H, Q, P]
    # What each chunk alone leaves in the state at its end.
    to_end = decay_to[..., -1:] - decay_to  # [B, C, H, Q]
    if idx is not None:
        # Before the exponential, which overflows there, and infinity times 0 is no 0. Not by a clamp: that would stop the
        # gradients where a difference rounds above 0.
        to_end = to_end.masked_fill(~kept_to_end, -torch.inf)
    to_end = to_end.exp()[..., None]  # [B, C, H, Q, 1]
    local = (x.transpose(-1, -2) @ (B * to_end).to(x.dtype)).float()  # [B, C, H, P, N]
    # States at chunk starts: a lower triangular product over chunks, in float32 even under autocast.
    passing = _segment_sums(
        decay_to[..., -1].transpose(1, 2)
    )  # [B, H, C + 1, C + 1] log decay from state j to state i
    if idx is not None:
        cuts = nn.functional.pad((idx[..., -1] != before).cumsum(-1), (1, 0))[:, None]  # [B, 1, C + 1]
        passing = passing.masked_fill(cuts[..., :, None] != cuts[..., None, :], -torch.inf)
    sources = torch.cat([state[:, None], local], dim=1).transpose(1, 2).flatten(3)  # [B, H, C + 1, P N]
    with torch.autocast(x.device.type, enabled=False):
        states = (passing.exp() @ sources).unflatten(3, state.shape[2:])  # [B, H, C + 1, P, N]
    # What came from before the chunk.
    from_start = (C * (decay_to.exp()[..., None] * carried)).to(x.dtype)  # [B, C, H, Q, N]
    y = y + from_start @ states[:, :, :-1].permute(0, 2, 1, 4, 3).to(x.dtype)
    return y, states[:, :, -1]


def _segmented_cumsum(values: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """
    Cumulative sum along the last dimension of `[B, C, H, Q]` that starts anew where `idx` `[B, C, Q]` changes.

    Doubling steps add only values of the same document, so what stands in another document cannot even change a
    rounding.
    """
    shift = 1
    while shift < values.shape[-1]:
        same = (idx[..., shift:] == idx[..., :-shift])[:, :, None]  # [B, C, 1, Q - shift]
        values = torch.cat([values[..., :shift], values[..., shift:] + values[..., :-shift] * same], dim=-1)
        shift *= 2
    return values


def _segment_sums(values: torch.Tensor) -> torch.Tensor:
    """
    Sums of `values` `[..., C]` between every two borders: entry (i, j) of `[..., C + 1, C + 1]` is the sum from j to i.

    Summed anew for each j: differences of one long cumulative sum would lose digits. -inf above the diagonal.
    """
    chunks = values.shape[-1]
    below = torch.ones(chunks + 1, chunks + 1, dtype=torch.bool, device=values.device).tril()
    rows = nn.functional.pad(values, (1, 0))[..., :, None]  # [..., C + 1, 1]
    return rows.masked_fill(~below.tril(-1), 0.0).cumsum(-2).masked_fill(~below, -torch.inf)


def _zero_state(x: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return torch.zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3], dtype=torch.float32, device=x.device)


def ssd(
    x: torch.Tensor,
    log_a: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    chunk_size: int = 32,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The discrete Mamba-2 scan over a sequence.

    Args:
        x (`torch.Tensor`): inputs of shape `[B, T, H, P]`.
        log_a (`torch.Tensor`): log decays of shape `[B, T, H]`, float32, at most 0.
        B (`torch.Tensor`): input vectors of shape `[B, T, H, N]`.
        C (`torch.Tensor`): output vectors of shape `[B, T, H, N]`.
        initial_state (`torch.Tensor`, *optional*): state before the first token, shape `[B, H, P, N]`, zeros by default.
        seq_idx (`torch.Tensor`, *optional*):
            Document of each token, shape `[B, T]`, integers that change where a document starts; the state is reset there.
        chunk_size (`int`, *optional*, defaults to 32): tokens Q of a chunk.
        backend (`str`, *optional*, defaults to `"auto"`):
            `"torch"`; `"compiled"`, the same through `torch.compile`; `"triton"`, the kernels of this folder, on CUDA
            tensors; `"mamba_ssm"`, those of that package, likewise; or `"auto"`, the kernels where they fit, otherwise
            PyTorch.

    Returns:
        `tuple`: outputs `[B, T, H, P]` in the dtype of `x` and the last state `[B, H, P, N]`, float32.

    Raises:
        `ValueError`: for a back end that does not exist or cannot work on these tensors.
    """
    if backend in ("auto", "triton") and kernels_fit(x, x.shape[3], B.shape[3]):
        return ssd_triton(x, log_a, B, C, initial_state, seq_idx)
    if backend == "triton":
        raise ValueError(
            f"The Triton kernels cannot work on {x.dtype} tensors on {x.device} with heads of {x.shape[3]} and a state "
            f"of {B.shape[3]}: they need triton, CUDA tensors, heads of at most 128 and a state of at most 64. Set "
            "ssm_backend to 'auto' or 'torch'."
        )
    if backend == "mamba_ssm":
        return ssd_mamba(x, log_a, B, C, initial_state, seq_idx)
    if backend not in ("auto", "torch", "compiled"):
        raise ValueError(f"ssm_backend is {backend!r}; choose auto, torch, compiled, triton or mamba_ssm.")
    chunked = _compiled_chunked() if backend == "compiled" else ssd_chunked
    return chunked(x, log_a, B, C, initial_state, seq_idx, chunk_size)


@cache
def _compiled_chunked():
    return torch.compile(ssd_chunked, dynamic=False)
