"""
The recurrent heads on a GPU: launches the kernels of `ssd_kernels.py` as PyTorch operators with gradients.

`ssd_triton` is [`ssd`] for CUDA tensors, `decode_step` one whole token of a layer's recurrent heads: convolution, gate,
recurrence and output in one launch that changes window and state in place. Both are custom operators, so that
`torch.compile` and CUDA graphs take them whole.

Shape letters: B batch, T tokens, H heads, P head dim, N state, K convolution width.
"""

import torch

from .ssd_kernels import (
    chunk_gradient_kernel,
    chunk_scan_kernel,
    chunk_state_kernel,
    decode_step_kernel,
    state_passing_kernel,
    triton,
)


# Tokens of a chunk, and warps of the program that works on it. With two warps more programs stand on a multiprocessor,
# which the gradients of small states gain from, and Triton leaves Hopper's warpgroup products alone: in float32, 64
# tokens and eight warps, those were seen to read outside their memory (triton 3.6), so float32 stays off them.
CHUNK, WARPS = 64, 4
FLOAT32_CHUNK = 32
SMALL_STATE, FEW_WARPS = 16, 2
# Greatest sizes that one program holds in registers.
LARGEST_STATE, LARGEST_HEAD = 64, 128
# One set of operators for each copy of this file: a student's own code may be loaded beside the package.
SPACE = "".join(character if character.isalnum() else "_" for character in __name__)


def kernels_fit(tensor: torch.Tensor, head_dim: int, state_size: int) -> bool:
    """Whether the kernels can work on tensors like this one and heads of this size."""
    if triton is None or state_size > LARGEST_STATE or head_dim > LARGEST_HEAD:
        return False
    return tensor.is_cuda and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)


def ssd_triton(x, log_a, B, C, initial_state=None, seq_idx=None) -> tuple[torch.Tensor, torch.Tensor]:
    """[`ssd`] by Triton kernels; same arguments and results, x, B and C of one dtype."""
    if seq_idx is not None:
        seq_idx = seq_idx.to(torch.int32).contiguous()
    x, B, C, log_a = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, B, C, log_a.float()))
    y, last, _, _ = _scan(x, log_a, B.to(x.dtype), C.to(x.dtype), initial_state, seq_idx)
    return y, last


def _meta(x, state_size, chunk):
    head_dim = x.shape[3]
    return {
        "Q": chunk,
        "BN": max(16, triton.next_power_of_2(state_size)),
        "BP": max(16, triton.next_power_of_2(head_dim)),
        # float32 is worth its digits; float32 intermediates of half precision are not.
        "PRECISION": "tf32x3" if x.dtype == torch.float32 else "tf32",
    }


def _chunk(tokens: int, dtype: torch.dtype) -> int:
    full = FLOAT32_CHUNK if dtype == torch.float32 else CHUNK
    return full if tokens >= full else max(16, triton.next_power_of_2(tokens))


def _warps(x: torch.Tensor, state_size: int, gradient: bool) -> int:
    small = state_size <= SMALL_STATE and x.shape[3] <= 64
    return FEW_WARPS if small and (gradient or x.dtype == torch.float32) else WARPS


def _pass_states(states, decays, edge, backward):
    """Runs the recurrence over chunks in place; returns its far end `[B, H, P, N]`."""
    batch, slots, heads, head_dim, state_size = states.shape
    result = states.new_empty(batch, heads, head_dim, state_size)
    size, block = head_dim * state_size, 128
    state_passing_kernel[(triton.cdiv(size, block), heads, batch)](
        states,
        decays,
        None if edge is None else edge.contiguous(),
        result,
        slots - 1,
        size,
        GROUP=min(16, max(2, triton.next_power_of_2(slots - 1))),
        BLOCK=block,
        HAS_EDGE=edge is not None,
        BACKWARD=backward,
        num_warps=4,
    )
    return result


@torch.library.custom_op(f"{SPACE}::scan", mutates_args=())
def _scan(
    x: torch.Tensor,
    log_a: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial_state: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs, last state, and for the backward pass the states before each chunk and each chunk's decay."""
    batch, tokens, heads, head_dim = x.shape
    state_size = B.shape[3]
    chunk = _chunk(tokens, x.dtype)
    chunks = triton.cdiv(tokens, chunk)
    states = torch.empty(batch, chunks + 1, heads, head_dim, state_size, dtype=torch.float32, device=x.device)
    decays = torch.empty(batch, heads, chunks, dtype=torch.float32, device=x.device)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid, meta = (heads, chunks, batch), _meta(x, state_size, chunk)
    strides = {name: t.stride()[:3] for name, t in (("x", x), ("b", B), ("c", C))}
    a_strides = log_a.stride()[:2]
    has_idx = seq_idx is not None
    chunk_state_kernel[grid](
        x, B, log_a, seq_idx, states, decays, tokens, chunks, *strides["x"], *strides["b"], *a_strides,
        state_size, head_dim, HAS_IDX=has_idx, BACKWARD=False, num_warps=_warps(x, state_size, gradient=False), **meta,
    )  # fmt: skip
    last = _pass_states(states, decays, initial_state, backward=False)
    chunk_scan_kernel[grid](
        x, B, C, log_a, seq_idx, states, y, tokens, chunks, *strides["x"], *strides["b"], *strides["c"], *a_strides,
        state_size, head_dim, HAS_IDX=has_idx, num_warps=_warps(x, state_size, gradient=False), **meta,
    )  # fmt: skip
    return y, last, states, decays


@_scan.register_fake
def _(x, log_a, B, C, initial_state, seq_idx):
    batch, tokens, heads, head_dim = x.shape
    chunk = _chunk(tokens, x.dtype)
    chunks = (tokens + chunk - 1) // chunk
    state = x.new_empty(batch, heads, head_dim, B.shape[3], dtype=torch.float32)
    states = x.new_empty(batch, chunks + 1, heads, head_dim, B.shape[3], dtype=torch.float32)
    decays = x.new_empty(batch, heads, chunks, dtype=torch.float32)
    return x.new_empty(x.shape), state, states, decays


@torch.library.custom_op(f"{SPACE}::scan_gradients", mutates_args=())
def _gradients(
    dy: torch.Tensor,
    dlast: torch.Tensor | None,
    x: torch.Tensor,
    log_a: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    seq_idx: torch.Tensor | None,
    states: torch.Tensor,
    decays: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, log a, B, C and the initial state."""
    batch, tokens, heads, head_dim = x.shape
    state_size, chunks = B.shape[3], decays.shape[2]
    dy = dy.to(x.dtype)
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    dx, db, dc = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, B, C))
    da = torch.empty(log_a.shape, dtype=torch.float32, device=x.device)
    dstates = torch.empty_like(states)
    grid, meta = (heads, chunks, batch), _meta(x, state_size, _chunk(tokens, x.dtype))
    strides = {name: t.stride()[:3] for name, t in (("x", x), ("b", B), ("c", C), ("y", dy))}
    a_strides = log_a.stride()[:2]
    has_idx = seq_idx is not None
    chunk_state_kernel[grid](
        dy, C, log_a, seq_idx, dstates, decays, tokens, chunks, *strides["y"], *strides["c"], *a_strides,
        state_size, head_dim, HAS_IDX=has_idx, BACKWARD=True, num_warps=_warps(x, state_size, gradient=False), **meta,
    )  # fmt: skip
    dinitial = _pass_states(dstates, decays, dlast, backward=True)
    chunk_gradient_kernel[grid](
        x, B, C, log_a, seq_idx, dy, states, dstates, decays, dx, db, dc, da, tokens, chunks,
        *strides["x"], *strides["b"], *strides["c"], *a_strides, *strides["y"],
        state_size, head_dim, HAS_IDX=has_idx, num_warps=_warps(x, state_size, gradient=True), **meta,
    )  # fmt: skip
    return dx, da, db, dc, dinitial


@_gradients.register_fake
def _(dy, dlast, x, log_a, B, C, seq_idx, states, decays):
    dx, db, dc = (t.new_empty(t.shape) for t in (x, B, C))
    return dx, log_a.new_empty(log_a.shape), db, dc, states.new_empty(states[:, 0].shape)


def _save(ctx, inputs, output):
    x, log_a, B, C, initial_state, seq_idx = inputs
    _, _, states, decays = output
    ctx.save_for_backward(x, log_a, B, C, seq_idx, states, decays)
    ctx.initial_dtype = None if initial_state is None else initial_state.dtype
    ctx.mark_non_differentiable(states, decays)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dlast, *_):
    x, log_a, B, C, seq_idx, states, decays = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, da, db, dc, dinitial = _gradients(dy, dlast, x, log_a, B, C, seq_idx, states, decays)
    return dx, da, db, dc, None if ctx.initial_dtype is None else dinitial.to(ctx.initial_dtype), None


_scan.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op(f"{SPACE}::decode_step", mutates_args=("window", "state"))
def decode_step(
    projected: torch.Tensor, window: torch.Tensor, weight: torch.Tensor, state: torch.Tensor, skip: torch.Tensor
) -> torch.Tensor:
    """
    One token of a layer's recurrent heads: convolution, gate, recurrence, skip and output gate.

    Args:
        projected (`torch.Tensor`): output of the input projection, z, x, B, C and A_log side by side, `[B, total]`.
        window (`torch.Tensor`): the last K tokens of x, B and C, `[B, channels, K]`, contiguous; moves on in place.
        weight (`torch.Tensor`): weights of the convolution, `[channels, 1, K]`, contiguous.
        state (`torch.Tensor`): recurrent state, `[B, H, P, N]`, float32, contiguous; changed in place.
        skip (`torch.Tensor`): weight D of the skip, `[H]`.

    Returns:
        `torch.Tensor`: what the output projection reads, `[B, H P]`.
    """
    batch, heads, head_dim, state_size = state.shape
    out = projected.new_empty(batch, heads * head_dim)
    kernel_size = window.shape[2]
    decode_step_kernel[(heads, batch)](
        projected, window, weight, state, skip, out, projected.stride(0), heads, window.shape[1], state_size, head_dim,
        K=kernel_size, BN=triton.next_power_of_2(state_size), BP=triton.next_power_of_2(head_dim),
        BK=triton.next_power_of_2(kernel_size), num_warps=2,
    )  # fmt: skip
    return out


@decode_step.register_fake
def _(projected, window, weight, state, skip):
    return projected.new_empty(state.shape[0], state.shape[1] * state.shape[2])
