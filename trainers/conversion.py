"""
Teacher and head map to student: kept heads are copied, the others become recurrent heads started from the teacher.

    student = convert(teacher, HeadMap.load("head_map.json"), state_size=8)

Paper: https://huggingface.co/papers/2602.11374, section 4.2. A recurrent head starts with its input from W_V, an open
gate (silu(z) = 1), an identity convolution, no skip, a fixed decay, and its columns of the output projection;
[`trainers.calibration`] then fits those.

Shape letters: D model width, H heads, P head dim, N state.
"""

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from modeling_rad_hybrid import AUTO_MAP, RadHybridConfig, RadHybridForCausalLM
from trainers.families import backbone_fields
from trainers.head_map import HeadMap
from trainers.memory import cache_bytes, kv_bytes_per_token, state_bytes


# silu(OPEN_GATE) = 1.
OPEN_GATE = 1.2784645427610738
# Decays a of a layer's recurrent heads, spread evenly in log(-log a): slowest and fastest.
SLOWEST, FASTEST = 0.95, 0.1


@torch.no_grad()
def convert(
    teacher: PreTrainedModel, head_map: HeadMap, mixing: str = "replace", state_size: int = 8, seed: int = 0
) -> RadHybridForCausalLM:
    """
    Makes a student of a teacher.

    Args:
        teacher (`PreTrainedModel`):
            A causal language model of a supported family, see [`trainers.families`].
        head_map ([`~trainers.head_map.HeadMap`]):
            Heads that stay attention.
        mixing (`str`, *optional*, defaults to `"replace"`):
            `"replace"` or `"parallel"`, see [`RadHybridConfig`].
        state_size (`int`, *optional*, defaults to 8):
            State size N of the recurrent heads.
        seed (`int`, *optional*, defaults to 0):
            Seed of the random B and C projections.

    Returns:
        [`RadHybridForCausalLM`]: in eval mode, with tensors of its own, in the teacher's dtype and on its device.

    Raises:
        `ValueError`: for a teacher of another family or a head map of another shape.
    """
    fields = backbone_fields(teacher.config)
    head_map.check_teacher(teacher.config)
    config = RadHybridConfig(
        **fields, kept_heads=head_map.kept_heads, mixing=mixing, ssm_state_size=state_size, dtype=teacher.dtype
    )
    config.auto_map = dict(AUTO_MAP)
    # What trainers and cards name as the base model.
    config._name_or_path = head_map.teacher.id
    student = RadHybridForCausalLM(config).to(device=teacher.device, dtype=teacher.dtype).eval()
    names = {name for name, _ in student.named_parameters()}
    shared = {name: tensor for name, tensor in teacher.state_dict().items() if name in names}
    student.load_state_dict(shared, strict=False)
    generator = torch.Generator().manual_seed(seed)
    for layer, source in zip(student.model.layers, teacher.model.layers, strict=True):
        _convert_layer(layer.mixer, source.self_attn, config, generator)
    student.tie_weights()
    if teacher.generation_config is not None:
        student.generation_config = teacher.generation_config
    return student


def _convert_layer(mixer: nn.Module, source: nn.Module, config: RadHybridConfig, generator: torch.Generator) -> None:
    """Copies one attention layer of the teacher into a mixer."""
    kept = config.kept_heads[source.layer_idx]
    per_group = config.num_attention_heads // config.num_key_value_heads
    if mixer.attention is not None:
        groups = sorted({head // per_group for head in kept})
        _copy_rows(mixer.attention.q_proj, source.q_proj, kept, config.head_dim)
        _copy_rows(mixer.attention.k_proj, source.k_proj, groups, config.head_dim)
        _copy_rows(mixer.attention.v_proj, source.v_proj, groups, config.head_dim)
        mixer.attention.o_proj.weight.copy_(_columns(source.o_proj, kept, config.head_dim))
        if source.o_proj.bias is not None:
            mixer.attention.o_proj.bias.copy_(source.o_proj.bias)
    if mixer.ssm is not None:
        converted = list(range(config.num_attention_heads))
        if config.mixing == "replace":
            converted = [head for head in converted if head not in kept]
        _start_recurrent(mixer.ssm, source, converted, per_group, generator)
        if mixer.attention is None and source.o_proj.bias is not None:
            mixer.ssm.out_proj.bias.copy_(source.o_proj.bias)
    if mixer.adapter is not None:
        nn.init.eye_(mixer.adapter.proj.weight)
        nn.init.zeros_(mixer.adapter.proj.bias)


def _start_recurrent(ssm: nn.Module, source: nn.Module, heads: list[int], per_group: int, generator) -> None:
    """Starts the recurrent heads of one layer from the teacher's heads with these indices."""
    weight, bias = ssm.in_proj.weight, ssm.in_proj.bias
    inner, state, number = ssm.sections[0], len(heads) * ssm.state_size, len(heads)
    z, x, BC, A_log = weight.split([inner, inner, 2 * state, number])
    z_bias, x_bias, BC_bias, A_log_bias = bias.split([inner, inner, 2 * state, number])
    z.zero_(), A_log.zero_(), BC_bias.zero_(), x_bias.zero_()
    z_bias.fill_(OPEN_GATE)
    groups = [head // per_group for head in heads]
    x.copy_(_rows(source.v_proj.weight, groups, ssm.head_dim))
    if source.v_proj.bias is not None:
        x_bias.copy_(_rows(source.v_proj.bias, groups, ssm.head_dim))
    BC.copy_(torch.randn(BC.shape, generator=generator) / math.sqrt(BC.shape[1]))
    slow, fast = math.log(-math.log(SLOWEST)), math.log(-math.log(FASTEST))
    rates = torch.linspace(slow, fast, number).exp()  # -log a
    A_log_bias.copy_(rates.expm1().log())
    ssm.out_proj.weight.copy_(_columns(source.o_proj, heads, ssm.head_dim))
    ssm.out_proj.bias.zero_()
    ssm.D.zero_()
    ssm.conv1d.weight.zero_()
    ssm.conv1d.weight[..., -1] = 1.0


def _rows(tensor: torch.Tensor, heads: list[int], head_dim: int) -> torch.Tensor:
    return tensor.unflatten(0, (-1, head_dim))[heads].flatten(0, 1)


def _columns(projection: nn.Linear, heads: list[int], head_dim: int) -> torch.Tensor:
    return projection.weight.unflatten(1, (-1, head_dim))[:, heads].flatten(1)


def _copy_rows(target: nn.Linear, source: nn.Linear, heads: list[int], head_dim: int) -> None:
    target.weight.copy_(_rows(source.weight, heads, head_dim))
    if source.bias is not None:
        target.bias.copy_(_rows(source.bias, heads, head_dim))


def summary(student: RadHybridForCausalLM, teacher: PreTrainedModel) -> list[tuple[str, str, str]]:
    """
    What a conversion changed, as rows of (quantity, teacher, student): heads, parameters and bytes of the cache.
    """
    config, before = student.config, teacher.config
    heads = before.num_hidden_layers * before.num_attention_heads
    kept = {layer: list(heads) for layer, heads in enumerate(config.kept_heads) if heads}
    rows = [
        (
            "attention heads",
            str(heads),
            f"{sum(map(len, kept.values()))} ({sum(map(len, kept.values())) / heads:.1%})",
        ),
        ("kept heads by layer", "all", ", ".join(f"{layer}: {value}" for layer, value in kept.items()) or "none"),
        ("parameters", f"{teacher.num_parameters():,}", f"{student.num_parameters():,}"),
        ("KV bytes per token", f"{kv_bytes_per_token(before):,}", f"{kv_bytes_per_token(config):,}"),
        ("state bytes", f"{state_bytes(before):,}", f"{state_bytes(config):,}"),
    ]
    for tokens in (2048, 32768, 131072):
        old, new = cache_bytes(before, tokens), cache_bytes(config, tokens)
        rows.append(
            (f"cache at {tokens // 1024}k tokens", f"{old / 1e6:.2f} MB", f"{new / 1e6:.2f} MB ({new / old:.1%})")
        )
    return rows
