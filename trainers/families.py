"""
Teacher families: what of a teacher's configuration and tensors a student takes over. One entry for each architecture.

A student has one backbone ([`RadHybridConfig`]), so a family is fit when its layers can be written in it without loss:
with every head kept, the student's logits are the teacher's (`tests/test_families.py`).

    fields, tensors = backbone_fields(teacher.config), backbone_tensors(teacher)
"""

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig, PreTrainedModel


BACKBONE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
)


@dataclass(frozen=True)
class Family:
    """
    One architecture, by what it has beyond Llama's backbone.

    Args:
        models (`str`):
            Models of this family, for whoever reads the list.
        fields (`tuple[str]`, *optional*):
            Further fields that teacher and student share.
        fixed (`dict`, *optional*):
            Fields of the student that follow from the architecture.
        slides (`bool`, *optional*, defaults to `False`):
            Whether its layers may have a sliding window.
        fused (`dict[str, tuple[str]]`, *optional*):
            Projections that are stacked in one, by the name of that one.
    """

    models: str
    fields: tuple[str, ...] = ()
    fixed: dict = field(default_factory=dict)
    slides: bool = False
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)


FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
MULTIPLIERS = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")
FAMILIES = {
    "granite": Family("Granite 3", fields=("attention_bias", "mlp_bias", *MULTIPLIERS)),
    "llama": Family("Llama 2 and 3, SmolLM2", fields=("attention_bias", "mlp_bias")),
    "mistral": Family("Mistral", slides=True),
    "olmo2": Family("OLMo-2", fields=("attention_bias",), fixed={"qk_norm": "full", "norm_position": "post"}),
    "phi3": Family("Phi-3, Phi-4", slides=True, fused=FUSED),
    "qwen2": Family("Qwen2, Qwen2.5", fixed={"attention_bias": True, "attention_output_bias": False}, slides=True),
    "qwen3": Family("Qwen3", fields=("attention_bias",), fixed={"qk_norm": "head"}, slides=True),
    "smollm3": Family("SmolLM3", fields=("attention_bias", "mlp_bias", "no_rope_layers"), slides=True),
}
# Why a teacher of another type cannot be written in the backbone, by a field that gives it away.
OBSTACLES = {
    "kept_heads": "it is a student already; convert its teacher",
    "is_encoder_decoder": "it has an encoder beside the decoder",
    "text_config": "it reads more than text",
    "num_experts": "its MLPs are mixtures of experts",
    "num_local_experts": "its MLPs are mixtures of experts",
    "n_routed_experts": "its MLPs are mixtures of experts",
    "kv_lora_rank": "its heads share latent keys and values",
    "final_logit_softcapping": "it caps its logits",
    "ssm_state_size": "it has recurrent layers",
    "mamba_d_state": "it has recurrent layers",
    "linear_num_value_heads": "it has recurrent layers",
    "n_positions": "it has learned positions instead of rotary ones",
}


def check_supported(config: PreTrainedConfig) -> None:
    """
    Raises:
        `ValueError`: when no student can be made of such a teacher; the message says why and lists what is supported.
    """
    if config.model_type in FAMILIES:
        return
    values = config.to_dict()
    reasons = [reason for name, reason in OBSTACLES.items() if values.get(name)]
    supported = ", ".join(f"{name} ({family.models})" for name, family in FAMILIES.items())
    raise ValueError(
        f"A teacher of type {config.model_type!r} cannot be converted: "
        f"{reasons[0] if reasons else 'nobody has compared its layers with those of a student'}. "
        f"Supported: {supported}."
    )


def sliding_layers(config: PreTrainedConfig) -> list[int]:
    """Layers of a teacher or student whose attention, and with it the cache, has a sliding window."""
    values = config.to_dict()
    types = values.get("layer_types")
    if types is None:
        types = ["sliding_attention" if values.get("sliding_window") else "full_attention"] * config.num_hidden_layers
    return [layer for layer, name in enumerate(types) if "sliding" in name]


def logits_scale(config: PreTrainedConfig) -> float:
    """
    What a model multiplies its head's output by: Cohere has a `logit_scale`, Granite divides by `logits_scaling`.
    """
    values = config.to_dict()
    return (values.get("logit_scale") or 1.0) / (values.get("logits_scaling") or 1.0)


def backbone_fields(config: PreTrainedConfig) -> dict:
    """The fields of a student's configuration that come from its teacher's; raises as [`check_supported`]."""
    check_supported(config)
    family, values = FAMILIES[config.model_type], config.to_dict()
    fields = {name: values[name] for name in (*BACKBONE_FIELDS, *family.fields) if name in values}
    if family.slides and (layers := sliding_layers(config)):
        fields |= {"sliding_window": values["sliding_window"], "sliding_layers": layers}
    return fields | family.fixed


def backbone_tensors(teacher: PreTrainedModel) -> dict[str, torch.Tensor]:
    """
    A teacher's tensors under Llama's names: fused projections are split, all others have these names already.

    Args:
        teacher (`PreTrainedModel`):
            A causal language model of a supported family.
    """
    fields = backbone_fields(teacher.config)
    heads, width = fields["num_attention_heads"], fields["intermediate_size"]
    head_dim = fields.get("head_dim") or fields["hidden_size"] // heads
    keys = (fields.get("num_key_value_heads") or heads) * head_dim
    rows = {"q_proj": heads * head_dim, "k_proj": keys, "v_proj": keys, "gate_proj": width, "up_proj": width}
    tensors = {}
    for name, tensor in teacher.state_dict().items():
        path, _, kind = name.rpartition(".")
        path, _, module = path.rpartition(".")
        parts = FAMILIES[teacher.config.model_type].fused.get(module)
        if parts is None:
            tensors[name] = tensor
            continue
        pieces = tensor.split([rows[part] for part in parts])
        tensors |= {f"{path}.{part}.{kind}": piece for part, piece in zip(parts, pieces, strict=True)}
    return tensors
