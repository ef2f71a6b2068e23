"""
What surrounds the token mixers: norms, rotary angles and the gated MLP.

Bit for bit those of Llama (transformers, `models/llama/modeling_llama.py`) with the configuration's defaults.

Shape letters: B batch, T tokens, H heads, P head dim, R rotated dimensions of a head.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update


class RadHybridRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor, others: torch.Tensor | None = None) -> torch.Tensor:
        """Normalises the last dimension; `others` `[..., any]` counts in the mean square and is not returned."""
        dtype = hidden_states.dtype
        counted = hidden_states if others is None else torch.cat([hidden_states, others], dim=-1)
        hidden_states = hidden_states.float()
        hidden_states = hidden_states * torch.rsqrt(counted.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * hidden_states.to(dtype)


class RadHybridRotaryEmbedding(nn.Module):
    """Rotary angles; the attributes' names are those by which transformers rebuilds the buffers after a meta load."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        rotated = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, rotated, 2, dtype=torch.float, device=device) / rotated
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = torch.cat((angles, angles), dim=-1)  # [B, T, R]
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Applies rotary angles `[B, T, R]` to the first R dimensions of each head of `[B, H, T, P]`."""
    rotated = cos.shape[-1]
    if rotated < states.shape[-1]:
        return torch.cat([rotate(states[..., :rotated], cos, sin), states[..., rotated:]], dim=-1)
    first, second = states.chunk(2, dim=-1)
    states_90 = torch.cat((-second, first), dim=-1)
    # Angles may be float32 beside bfloat16 states: OLMo-2's are.
    return (states * cos[:, None] + states_90 * sin[:, None]).to(states.dtype)


class RadHybridMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
