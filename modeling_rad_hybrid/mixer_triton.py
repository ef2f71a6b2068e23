"""
What surrounds the scan, on a GPU: launches the kernels of `mixer_kernels.py` as PyTorch operators with gradients.

`convolve` and `gate` do what [`DiscreteMamba2.convolve`] and the end of [`DiscreteMamba2.features`] do in PyTorch.

Shape letters: B batch, T tokens, H heads, P head dim, K convolution width.
"""

import torch

from .mixer_kernels import convolve_gradient_kernel, convolve_kernel, gate_gradient_kernel, gate_kernel, triton


# Tokens and channels of one program, and its warps: enough of them that four taps fit in registers.
BT, BC, WARPS = 32, 128, 8
# One set of operators for each copy of this file: a student's own code may be loaded beside the package.
SPACE = "".join(character if character.isalnum() else "_" for character in __name__)


def _grid(width: int, tokens: int, batch: int) -> tuple[int, int, int]:
    return triton.cdiv(width, BC), triton.cdiv(tokens, BT), batch


@torch.library.custom_op(f"{SPACE}::convolve", mutates_args=())
def convolve(
    x: torch.Tensor, weight: torch.Tensor, window: torch.Tensor | None, seq_idx: torch.Tensor | None
) -> torch.Tensor:
    """
    Causal depthwise convolution.

    Args:
        x (`torch.Tensor`): `[B, T, channels]`, channels side by side in memory.
        weight (`torch.Tensor`): `[channels, 1, K]`, contiguous.
        window (`torch.Tensor`, *optional*): the K tokens before, `[B, channels, K]`, contiguous; has no gradient.
        seq_idx (`torch.Tensor`, *optional*): document of each token, `[B, T]`, int32, contiguous.

    Returns:
        `torch.Tensor`: `[B, T, channels]`, contiguous.
    """
    batch, tokens, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    convolve_kernel[_grid(channels, tokens, batch)](
        x, weight, window, seq_idx, y, tokens, channels, x.stride(0), x.stride(1), K=weight.shape[2], BT=BT, BC=BC,
        HAS_WINDOW=window is not None, HAS_IDX=seq_idx is not None, num_warps=WARPS,
    )  # fmt: skip
    return y


@convolve.register_fake
def _(x, weight, window, seq_idx):
    return x.new_empty(x.shape)


@torch.library.custom_op(f"{SPACE}::convolve_gradients", mutates_args=())
def _convolve_gradients(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, seq_idx: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, tokens, channels = x.shape
    kernel_size = weight.shape[2]
    dy = dy.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid = _grid(channels, tokens, batch)
    shares = torch.empty(batch, grid[1], channels, kernel_size, dtype=torch.float32, device=x.device)
    convolve_gradient_kernel[grid](
        x, weight, seq_idx, dy, dx, shares, tokens, channels, x.stride(0), x.stride(1), K=kernel_size,
        BK=triton.next_power_of_2(kernel_size), BT=BT, BC=BC, HAS_IDX=seq_idx is not None, num_warps=WARPS,
    )  # fmt: skip
    return dx, shares.sum((0, 1)).to(weight.dtype)[:, None]


@_convolve_gradients.register_fake
def _(dy, x, weight, seq_idx):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save_convolve(ctx, inputs, output):
    x, weight, _, seq_idx = inputs
    ctx.save_for_backward(x, weight, seq_idx)


def _convolve_backward(ctx, dy):
    x, weight, seq_idx = ctx.saved_tensors
    return *_convolve_gradients(dy, x, weight, seq_idx), None, None


convolve.register_autograd(_convolve_backward, setup_context=_save_convolve)


@torch.library.custom_op(f"{SPACE}::gate", mutates_args=())
def gate(y: torch.Tensor, x: torch.Tensor, z: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    """
    Skip and output gate, (y + D x) silu(z).

    Args:
        y (`torch.Tensor`): output of the scan, `[B, T, H, P]`, contiguous.
        x (`torch.Tensor`): its input, `[B, T, H P]`, channels side by side in memory.
        z (`torch.Tensor`): gate, as x.
        skip (`torch.Tensor`): weight D, `[H]`.

    Returns:
        `torch.Tensor`: `[B, T, H P]`, contiguous.
    """
    batch, tokens, inner = x.shape
    out = torch.empty(x.shape, dtype=y.dtype, device=x.device)
    gate_kernel[_grid(inner, tokens, batch)](
        y, x, z, skip, out, tokens, inner, *x.stride()[:2], *z.stride()[:2], y.shape[3], BT=BT, BC=BC, num_warps=WARPS
    )  # fmt: skip
    return out


@gate.register_fake
def _(y, x, z, skip):
    return y.new_empty(x.shape)


@torch.library.custom_op(f"{SPACE}::gate_gradients", mutates_args=())
def _gate_gradients(
    dout: torch.Tensor, y: torch.Tensor, x: torch.Tensor, z: torch.Tensor, skip: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, tokens, inner = x.shape
    dout = dout.contiguous()
    dy, dx, dz = (torch.empty(t.shape, dtype=t.dtype, device=x.device) for t in (y, x, z))
    grid = _grid(inner, tokens, batch)
    shares = torch.empty(batch, grid[1], inner, dtype=torch.float32, device=x.device)
    gate_gradient_kernel[grid](
        y, x, z, skip, dout, dy, dx, dz, shares, tokens, inner, *x.stride()[:2], *z.stride()[:2], y.shape[3],
        BT=BT, BC=BC, num_warps=WARPS,
    )  # fmt: skip
    return dy, dx, dz, shares.sum((0, 1)).unflatten(0, skip.shape + (-1,)).sum(-1).to(skip.dtype)


@_gate_gradients.register_fake
def _(dout, y, x, z, skip):
    return y.new_empty(y.shape), x.new_empty(x.shape), z.new_empty(z.shape), skip.new_empty(skip.shape)


def _save_gate(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gate_backward(ctx, dout):
    return _gate_gradients(dout, *ctx.saved_tensors)


gate.register_autograd(_gate_backward, setup_context=_save_gate)
