"""
Triton kernels for what surrounds the scan in a layer's recurrent heads: the causal convolution and the output gate.

In PyTorch each is a chain of passes over [B, T, channels]; here each is one, forward and backward. Only
`mixer_triton.py` launches them. A program works on BT tokens and BC channels of one sequence.

Shape letters: B batch, T tokens, H heads, P head dim, K convolution width.
"""

from __future__ import annotations


try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # no GPU build of torch: the heads stay with PyTorch
    triton = None


def jit(function):
    return function if triton is None else triton.jit(function)


@jit
def convolve_kernel(
    x, weight, window, idx, y, tokens, channels, x_batch, x_token, K: constexpr, BT: constexpr, BC: constexpr,
    HAS_WINDOW: constexpr, HAS_IDX: constexpr,
):  # fmt: skip
    """y_t = sum_k w_{K - 1 - k} x_{t - k}; taps before the row come from `window` `[B, channels, K]`, if there is one."""
    channel, batch = tl.program_id(0) * BC + tl.arange(0, BC), tl.program_id(2).to(tl.int64)
    token = tl.program_id(1) * BT + tl.arange(0, BT)
    inside = (token[:, None] < tokens) & (channel[None, :] < channels)
    x += batch * x_batch
    total = tl.zeros([BT, BC], tl.float32)
    for back in tl.static_range(K):
        past = token - back
        mask = inside & (past[:, None] >= 0)
        tap = tl.load(x + past[:, None].to(tl.int64) * x_token + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_WINDOW:
            places = window + (batch * channels + channel[None, :]) * K + K + past[:, None]
            tap += tl.load(places, mask=inside & (past[:, None] < 0), other=0.0).to(tl.float32)
        if HAS_IDX:
            here = idx + batch * tokens + token
            same = tl.load(here, mask=token < tokens, other=0) == tl.load(
                here - back, mask=(past >= 0) & (token < tokens), other=-1
            )
            tap = tl.where(same[:, None], tap, 0.0)
        total += tap * tl.load(weight + channel * K + K - 1 - back, mask=channel < channels, other=0.0)[None, :]
    places = y + (batch * tokens + token[:, None]) * channels + channel[None, :]
    tl.store(places, total.to(y.dtype.element_ty), mask=inside)


@jit
def convolve_gradient_kernel(
    x, weight, idx, dy, dx, dweight, tokens, channels, x_batch, x_token, K: constexpr, BK: constexpr, BT: constexpr,
    BC: constexpr, HAS_IDX: constexpr,
):  # fmt: skip
    """
    dx_t = sum_k w_{K - 1 - k} dy_{t + k}, and this program's share of dw_{K - 1 - k} = sum_t dy_t x_{t - k} into its row
    of `dweight` `[B, blocks of tokens, channels, K]`. `dy` and `dx` are contiguous.
    """
    channel, batch = tl.program_id(0) * BC + tl.arange(0, BC), tl.program_id(2).to(tl.int64)
    token = tl.program_id(1) * BT + tl.arange(0, BT)
    inside = (token[:, None] < tokens) & (channel[None, :] < channels)
    x += batch * x_batch
    row = (batch * tokens + token[:, None]) * channels + channel[None, :]
    grad = tl.load(dy + row, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BT, BC], tl.float32)
    share = tl.zeros([BC, BK], tl.float32)
    for back in tl.static_range(K):
        past, later = token - back, token + back
        mask = inside & (past[:, None] >= 0)
        tap = tl.load(x + past[:, None].to(tl.int64) * x_token + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        ahead = tl.load(dy + row + back * channels, mask=inside & (later[:, None] < tokens), other=0.0).to(tl.float32)
        if HAS_IDX:
            here = idx + batch * tokens + token
            document = tl.load(here, mask=token < tokens, other=0)
            same = document == tl.load(here - back, mask=(past >= 0) & (token < tokens), other=-1)
            tap = tl.where(same[:, None], tap, 0.0)
            same = document == tl.load(here + back, mask=later < tokens, other=-1)
            ahead = tl.where(same[:, None], ahead, 0.0)
        total += ahead * tl.load(weight + channel * K + K - 1 - back, mask=channel < channels, other=0.0)[None, :]
        share += tl.where(tl.arange(0, BK)[None, :] == K - 1 - back, tl.sum(grad * tap, 0)[:, None], 0.0)
    tl.store(dx + row, total.to(dx.dtype.element_ty), mask=inside)
    block = batch * tl.num_programs(1) + tl.program_id(1)
    places = dweight + (block * channels + channel[:, None]) * K + tl.arange(0, BK)[None, :]
    tl.store(places, share, mask=(channel[:, None] < channels) & (tl.arange(0, BK)[None, :] < K))


@jit
def gate_kernel(
    y, x, z, skip, out, tokens, inner, x_batch, x_token, z_batch, z_token, P, BT: constexpr, BC: constexpr
):
    """(y + D x) silu(z); `y` and `out` are contiguous `[B, T, H P]`, x and z have strides."""
    channel, batch = tl.program_id(0) * BC + tl.arange(0, BC), tl.program_id(2).to(tl.int64)
    token = (tl.program_id(1) * BT + tl.arange(0, BT)).to(tl.int64)
    inside = (token[:, None] < tokens) & (channel[None, :] < inner)
    row = (batch * tokens + token[:, None]) * inner + channel[None, :]
    x_row = batch * x_batch + token[:, None] * x_token + channel[None, :]
    z_row = batch * z_batch + token[:, None] * z_token + channel[None, :]
    D = tl.load(skip + channel // P, mask=channel < inner, other=0.0).to(tl.float32)
    value = tl.load(y + row, mask=inside, other=0.0).to(tl.float32)
    value += D[None, :] * tl.load(x + x_row, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(z + z_row, mask=inside, other=0.0).to(tl.float32)
    value *= gate / (1.0 + tl.exp(-gate))
    tl.store(out + row, value.to(out.dtype.element_ty), mask=inside)


@jit
def gate_gradient_kernel(
    y, x, z, skip, dout, dy, dx, dz, dskip, tokens, inner, x_batch, x_token, z_batch, z_token, P, BT: constexpr,
    BC: constexpr,
):  # fmt: skip
    """Gradients of `gate_kernel`, all contiguous; `dskip` `[B, blocks of tokens, H P]` gets this program's share of D's."""
    channel, batch = tl.program_id(0) * BC + tl.arange(0, BC), tl.program_id(2).to(tl.int64)
    token = (tl.program_id(1) * BT + tl.arange(0, BT)).to(tl.int64)
    inside = (token[:, None] < tokens) & (channel[None, :] < inner)
    row = (batch * tokens + token[:, None]) * inner + channel[None, :]
    x_row = batch * x_batch + token[:, None] * x_token + channel[None, :]
    z_row = batch * z_batch + token[:, None] * z_token + channel[None, :]
    D = tl.load(skip + channel // P, mask=channel < inner, other=0.0).to(tl.float32)
    inputs = tl.load(x + x_row, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(y + row, mask=inside, other=0.0).to(tl.float32) + D[None, :] * inputs
    gate = tl.load(z + z_row, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dout + row, mask=inside, other=0.0).to(tl.float32)
    open_share = 1.0 / (1.0 + tl.exp(-gate))
    dvalue = grad * gate * open_share
    dgate = grad * value * open_share * (1.0 + gate * (1.0 - open_share))
    tl.store(dy + row, dvalue.to(dy.dtype.element_ty), mask=inside)
    tl.store(dx + row, (D[None, :] * dvalue).to(dx.dtype.element_ty), mask=inside)
    tl.store(dz + row, dgate.to(dz.dtype.element_ty), mask=inside)
    block = batch * tl.num_programs(1) + tl.program_id(1)
    tl.store(dskip + block * inner + channel, tl.sum(dvalue * inputs, 0), mask=channel < inner)
