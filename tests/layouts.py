"""Tiny students of every layout and both mixings, and what their caches hold."""

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from modeling_rad_hybrid import RadHybridConfig, RadHybridForCausalLM
from trainers.families import backbone_fields


ALL = [0, 1, 2, 3]
HEAD_MAPS = {
    "mixed": [[0, 1], [], [1, 2, 3]],
    "first layer without attention": [[], [2], [0]],
    "no attention at all": [[], [], []],
    "whole layers": [ALL, [], ALL],
}
LAYOUTS = [(name, mixing) for name in HEAD_MAPS for mixing in ("replace", "parallel")]


def random_student(teacher: PreTrainedModel, kept_heads: list[list[int]], seed: int = 0, **options):
    """A student of random weights, away from the start values, so that convolution, gate and skip all matter."""
    torch.manual_seed(seed)
    model = RadHybridForCausalLM(RadHybridConfig(**backbone_fields(teacher.config), kept_heads=kept_heads, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = None
    return model.eval()


def prompt(model: PreTrainedModel, tokens: int = 29, batch: int = 2) -> torch.Tensor:
    """Always the same random tokens, none of them a special one."""
    torch.manual_seed(1)
    return torch.randint(5, model.config.vocab_size, (batch, tokens))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal but for roundings, which layers of random weights make larger; what is wrong differs by far more."""
    torch.testing.assert_close(a, b, atol=1e-4 * max(1.0, b.abs().max().item()), rtol=1e-3)


def states(cache: Cache, tokens: int) -> list[torch.Tensor]:
    """Windows, recurrent states and the first `tokens` columns of keys and values, layer by layer."""
    held = []
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            held += [layer.conv_states[0], layer.recurrent_states[0]]
        if isinstance(layer, CacheLayerMixin):
            held += [layer.keys[:, :, :tokens], layer.values[:, :, :tokens]]
    return held


def same_states(cache: Cache, other: Cache, tokens: int) -> None:
    """Asserts that two caches hold the same after so many tokens."""
    pairs = list(zip(states(cache, tokens), states(other, tokens), strict=True))
    assert pairs
    for mine, expected in pairs:
        close(mine, expected)
