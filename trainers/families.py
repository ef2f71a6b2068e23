"""
Teacher families: what of a teacher's configuration and tensors a student takes over. One entry for each architecture.

A student's backbone is Llama's, so a family is fit when its layers can be written in it without loss.
"""

from transformers import PreTrainedConfig


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
)
# Further fields by model type. The tensors of all these have Llama's names.
FAMILIES = {"llama": ("attention_bias", "attention_dropout", "mlp_bias")}


def check_supported(config: PreTrainedConfig) -> None:
    """
    Raises:
        `ValueError`: when no student can be made of such a teacher.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"A teacher of type {config.model_type!r} cannot be converted: its layers are not those of a family known "
            f"here. Supported: {', '.join(sorted(FAMILIES))}."
        )


def backbone_fields(config: PreTrainedConfig) -> dict:
    """The fields of a teacher's configuration that its student has too; raises as [`check_supported`]."""
    check_supported(config)
    values = config.to_dict()
    return {name: values[name] for name in (*BACKBONE_FIELDS, *FAMILIES[config.model_type]) if name in values}
