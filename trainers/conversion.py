"""
Teacher and head map to student: kept heads are copied, the others become recurrent heads started from the teacher.

    student = convert(teacher, HeadMap.load("head_map.json"), state_size=8)

Paper: https://huggingface.co/papers/2602.11374, section 4.2. A recurrent head starts with its input from W_V, an open
gate (silu(z) = 1), an identity convolution, no skip, a fixed decay, and its columns of the output projection;
[`trainers.calibration`] then fits those.

Shape letters: D model width, H heads, P head dim, N state.
"""

import copy
import math

import torch
from torch import nn
from transformers import PreTrainedModel

from modeling_rad_hybrid import AUTO_MAP, RadHybridConfig, RadHybridForCausalLM
from trainers.families import backbone_fields, backbone_tensors
from trainers.heads.head_map import HeadMap
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
        head_map ([`~trainers.heads.head_map.HeadMap`]):
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
    tensors = backbone_tensors(teacher)
    student.load_state_dict({name: tensor for name, tensor in tensors.items() if name in names}, strict=False)
    generator = torch.Generator().manual_seed(seed)
    for index, layer in enumerate(student.model.layers):
        prefix = f"model.layers.{index}.self_attn."
        source = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        _convert_layer(layer.mixer, source, config, config.kept_heads[index], generator)
    student.tie_weights()
    if teacher.generation_config is not None:
        student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def converted_heads(config: RadHybridConfig, layer: int) -> list[int]:
    """The teacher's query heads that the recurrent heads of a layer stand for, in their order."""
    kept = [] if config.mixing == "parallel" else config.kept_heads[layer]
    return [head for head in range(config.num_attention_heads) if head not in kept]


def _convert_layer(
    mixer: nn.Module,
    source: dict[str, torch.Tensor],
    config: RadHybridConfig,
    kept: list[int],
    generator: torch.Generator,
) -> None:
    """Copies one attention layer of the teacher, `source` by the names of its tensors, into a mixer."""
    per_group = config.num_attention_heads // config.num_key_value_heads
    output_bias = source.get("o_proj.bias")
    if mixer.attention is not None:
        _copy_attention(mixer.attention, source, config, kept)
        if output_bias is not None:
            mixer.attention.o_proj.bias.copy_(output_bias)
    if mixer.ssm is not None:
        _start_recurrent(mixer.ssm, source, converted_heads(config, mixer.ssm.layer_idx), per_group, generator)
        if mixer.attention is None and output_bias is not None:
            mixer.ssm.out_proj.bias.copy_(output_bias)
    if mixer.adapter is not None:
        nn.init.eye_(mixer.adapter.proj.weight)
        nn.init.zeros_(mixer.adapter.proj.bias)


def _copy_attention(attention: nn.Module, source: dict[str, torch.Tensor], config: RadHybridConfig, kept) -> None:
    """Copies the kept heads: their rows of the projections and norms, and their columns of the output projection."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    kept_groups = sorted({head // (heads // groups) for head in kept})
    rest = [head for head in range(heads) if head not in kept]
    rest_groups = [group for group in range(groups) if group not in kept_groups]
    chosen = [(attention.q_proj, "q_proj", kept), (attention.k_proj, "k_proj", kept_groups)]
    chosen += [(attention.v_proj, "v_proj", kept_groups)]
    chosen += [(attention.q_rest_proj, "q_proj", rest), (attention.k_rest_proj, "k_proj", rest_groups)]
    if config.qk_norm == "full":
        chosen += [(attention.q_norm, "q_norm", kept), (attention.k_norm, "k_norm", kept_groups)]
    if config.qk_norm == "head":
        chosen += [(attention.q_norm, "q_norm", [0]), (attention.k_norm, "k_norm", [0])]
    for target, name, rows in chosen:
        for kind, tensor in [] if target is None else target.named_parameters():
            tensor.copy_(_rows(source[f"{name}.{kind}"], rows, config.head_dim))
    attention.o_proj.weight.copy_(_columns(source["o_proj.weight"], kept, config.head_dim))


def _start_recurrent(
    ssm: nn.Module, source: dict[str, torch.Tensor], heads: list[int], per_group: int, generator: torch.Generator
) -> None:
    """Starts the recurrent heads of one layer from the teacher's heads with these indices."""
    weight, bias = ssm.in_proj.weight, ssm.in_proj.bias
    inner, state, number = ssm.sections[0], len(heads) * ssm.state_size, len(heads)
    z, x, BC, A_log = weight.split([inner, inner, 2 * state, number])
    z_bias, x_bias, BC_bias, A_log_bias = bias.split([inner, inner, 2 * state, number])
    z.zero_(), A_log.zero_(), BC_bias.zero_(), x_bias.zero_()
    z_bias.fill_(OPEN_GATE)
    groups = [head // per_group for head in heads]
    x.copy_(_rows(source["v_proj.weight"], groups, ssm.head_dim))
    if "v_proj.bias" in source:
        x_bias.copy_(_rows(source["v_proj.bias"], groups, ssm.head_dim))
    BC.copy_(torch.randn(BC.shape, generator=generator) / math.sqrt(BC.shape[1]))
    slow, fast = math.log(-math.log(SLOWEST)), math.log(-math.log(FASTEST))
    rates = torch.linspace(slow, fast, number).exp()  # -log a
    A_log_bias.copy_(rates.expm1().log())
    ssm.out_proj.weight.copy_(_columns(source["o_proj.weight"], heads, ssm.head_dim))
    ssm.out_proj.bias.zero_()
    ssm.D.zero_()
    ssm.conv1d.weight.zero_()
    ssm.conv1d.weight[..., -1] = 1.0


def _rows(tensor: torch.Tensor, heads: list[int], head_dim: int) -> torch.Tensor:
    return tensor.unflatten(0, (-1, head_dim))[heads].flatten(0, 1)


def _columns(weight: torch.Tensor, heads: list[int], head_dim: int) -> torch.Tensor:
    return weight.unflatten(1, (-1, head_dim))[:, heads].flatten(1)


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
