"""
The recurrent heads: discrete Mamba-2 with a causal convolution and a gate.

    z, x, B, C, A_log = in_proj(u);  x, B, C = conv(x, B, C);  log a = -softplus(A_log)
    h_t = a_t h_{t-1} + x_t B_t^T;   y_t = h_t C_t + D x_t;    out = out_proj(y * silu(z))

Paper: https://huggingface.co/papers/2602.11374, section 3.3. The convolution starts as the identity, D as zero.
`read_states` and `write_states` are the only places that touch the cache, which may be transformers' own or ours.

Shape letters: B batch, T tokens, D model width, H recurrent heads, P head dim, N state, K convolution width.
"""

import torch
from torch import nn
from transformers import initialization as init

from .aligned_linear import AlignedLinear
from .mixer_triton import convolve, gate
from .rollback_cache import Fed, RollbackLayer
from .ssd import ssd, ssd_step
from .ssd_triton import decode_step, kernels_fit


class CausalConv1d(nn.Conv1d):
    """
    Causal depthwise convolution, without bias.

    A sum of K shifted products: on short kernels it is as quick as a convolution call, keeps the layout and lets a
    document's start mask single taps; on a GPU it is one kernel. A module of its own, because weights may be elsewhere
    until they are called for.
    """

    def __init__(self, channels: int, width: int):
        super().__init__(channels, channels, width, groups=channels, bias=False)

    def forward(self, xBC, window=None, seq_idx=None, by_kernel: bool = False) -> torch.Tensor:
        """Of `[B, T, channels]`, with the window `[B, channels, K]` of earlier tokens before it."""
        learns_from_window = window is not None and torch.is_grad_enabled() and xBC.requires_grad
        if by_kernel and not learns_from_window:
            documents = None if seq_idx is None else seq_idx.to(torch.int32).contiguous()
            return convolve(xBC, self.weight, window, documents)
        # Taps that are contiguous: strided ones keep a CPU from multiplying in vectors, several times slower.
        taps = self.weight[:, 0].t().to(xBC.dtype).contiguous()  # [K, channels]
        width, tokens = taps.shape[0], xBC.shape[1]
        past = width - 1
        if window is None:
            padded = nn.functional.pad(xBC, (0, 0, past, 0))
        else:
            padded = torch.cat([window.transpose(1, 2)[:, width - past :].to(xBC.dtype), xBC], dim=1)
        if seq_idx is not None:
            seq_idx = nn.functional.pad(seq_idx, (past, 0), value=-1)
        out = xBC * taps[past]
        for back in range(1, width):
            tap = padded[:, past - back : past - back + tokens] * taps[past - back]
            if seq_idx is not None:
                tap = tap * (seq_idx[:, past - back : past - back + tokens] == seq_idx[:, past:])[..., None]
            out = out + tap
        return out


class DiscreteMamba2(nn.Module):
    """
    The recurrent heads of one layer.

    Args:
        config ([`RadHybridConfig`]): sizes and the scan's back end.
        layer_idx (`int`): layer in the model, for the cache.
        num_heads (`int`): number of recurrent heads H.
    """

    # Takes the place of all between the projections in passes without cache and padding, where a trainer sets one: a
    # function of the projected inputs and `seq_idx`.
    training_kernel = None

    def __init__(self, config, layer_idx: int, num_heads: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, self.head_dim, self.state_size = num_heads, config.head_dim, config.ssm_state_size
        self.conv_kernel, self.chunk_size, self.backend = (
            config.ssm_conv_kernel,
            config.ssm_chunk_size,
            config.ssm_backend,
        )
        inner, state = num_heads * self.head_dim, num_heads * self.state_size
        self.sections = [inner, inner + 2 * state, num_heads]  # z; x, B, C; A_log
        self.in_proj = AlignedLinear(config.hidden_size, sum(self.sections), bias=True)
        self.conv1d = CausalConv1d(self.sections[1], self.conv_kernel)
        self.D = nn.Parameter(torch.zeros(num_heads))
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=True)

    def init_identity(self) -> None:
        """Makes the convolution the identity and the skip D zero (tensors already loaded are left as they are)."""
        identity = torch.zeros(self.conv1d.weight.shape)
        identity[..., -1] = 1.0
        init.copy_(self.conv1d.weight, identity)
        init.zeros_(self.D)

    def forward(self, hidden_states, recurrent_mask=None, cache=None, seq_idx=None) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor`): normalised layer input `[B, T, D]`.
            recurrent_mask (`torch.Tensor`, *optional*): `[B, T]`, 0 at padding.
            cache (`Cache`, *optional*): holds the convolution's window and the state of this layer.
            seq_idx (`torch.Tensor`, *optional*): document of each token `[B, T]`; window and state are reset between.

        Returns:
            `torch.Tensor`: `[B, T, D]`.
        """
        return self.out_proj(self.features(hidden_states, recurrent_mask, cache, seq_idx))

    def features(self, hidden_states, recurrent_mask=None, cache=None, seq_idx=None) -> torch.Tensor:
        """What the output projection reads, `[B, T, H P]`; arguments as in `forward`."""
        projected = self.in_proj(hidden_states)
        if self.training_kernel is not None and recurrent_mask is None and cache is None:
            return self.training_kernel(projected, seq_idx)
        if recurrent_mask is None and self.steps_in_place(projected, cache):
            layer = cache.layers[self.layer_idx]
            if isinstance(layer, RollbackLayer):
                layer.seen_tokens += 1
            states = layer.conv_states[0], self.conv1d.weight, layer.recurrent_states[0]
            return decode_step(projected[:, 0], *states, self.D)[:, None]  # [B, 1, H P]
        z, xBC, A_log = projected.split(self.sections, dim=-1)
        log_a = -nn.functional.softplus(A_log.float())  # [B, T, H]
        if recurrent_mask is not None:
            real = recurrent_mask[..., None] != 0
            # Padding neither enters nor decays the state, on whichever side it stands.
            xBC, log_a = xBC * real, log_a * real
        window, state = self.read_states(cache)
        convolved = self.conv1d(xBC, window, seq_idx, self.has_kernels(xBC))
        if recurrent_mask is not None:
            convolved = convolved * real
        x, B, C = (
            t.unflatten(-1, (self.num_heads, -1))  # [B, T, H, P | N]
            for t in convolved.split([self.sections[0], *[self.num_heads * self.state_size] * 2], dim=-1)
        )
        if x.shape[1] == 1 and state is not None:
            y, state = ssd_step(x[:, 0], log_a[:, 0], B[:, 0], C[:, 0], state)
            y = y[:, None]  # [B, 1, H, P]
        else:
            y, state = ssd(x, log_a, B, C, state, seq_idx, self.chunk_size, self.backend)
        if cache is not None:
            fed = Fed(xBC, recurrent_mask, x, log_a, B, self.conv_kernel, self.chunk_size, self.backend)
            self.write_states(cache, fed, window, state)
        if self.has_kernels(projected):
            return gate(y, convolved[..., : self.sections[0]], z, self.D)
        y = y + self.D[:, None].to(y.dtype) * x
        return y.flatten(2) * nn.functional.silu(z)  # [B, T, H P]

    def has_kernels(self, projected: torch.Tensor) -> bool:
        """Whether Triton kernels may take what is around the scan, too."""
        return self.backend in ("auto", "triton") and kernels_fit(projected, self.head_dim, self.state_size)

    def steps_in_place(self, projected: torch.Tensor, cache) -> bool:
        """Whether this is one token of decoding that a single kernel can take, window and state in place."""
        if projected.shape[1] > 1 or cache is None or not cache.has_previous_state(self.layer_idx):
            return False
        # A cache that must be able to take tokens back keeps more than a window, and weights that are offloaded are
        # fetched for the module's own call only.
        if cache.layers[self.layer_idx].record_past or self.conv1d.weight.device != projected.device:
            return False
        return self.has_kernels(projected) and not (torch.is_grad_enabled() and projected.requires_grad)

    def read_states(self, cache) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The cached window `[B, channels, K]` and state `[B, H, P, N]`, or `None`s before the first token."""
        if cache is None or not cache.has_previous_state(self.layer_idx):
            return None, None
        layer = cache.layers[self.layer_idx]
        return layer.conv_states[0], layer.recurrent_states[0]

    def write_states(self, cache, fed, window, state) -> None:
        """Hands the new window and state to the cache layer, and what was fed, for a layer that can take it back."""
        window = fed.window_after(window, fed.x.shape[1])
        cache.update_conv_state(window, self.layer_idx, conv_kernel_size=self.conv_kernel, fed=fed)
        cache.update_recurrent_state(state, self.layer_idx)
