"""
Where the heads of a model are: its decoder layers, and the projections that read heads side by side.

A head is named by (layer, slot). A teacher's slots are its query heads; a student's are its kept heads and then its
recurrent ones (see `student_heads.py`).
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Outlet:
    """A projection that reads heads side by side, P numbers from each."""

    projection: nn.Module
    num_heads: int


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Returns the decoder layers of a Llama-like teacher or of a student; raises as [`attention_layers`]."""
    return model.model.layers if model.config.model_type == "rad_hybrid" else attention_layers(model)


def attention_layers(model: PreTrainedModel) -> nn.ModuleList:
    """
    Returns the decoder layers of a Llama-like model.

    Raises:
        `ValueError`: when there are none with `self_attn.o_proj`, or no final norm to follow them.
    """
    try:
        layers = model.base_model.layers
        _ = model.base_model.norm, [layer.self_attn.o_proj for layer in layers]
    except AttributeError as error:
        raise ValueError(
            f"The heads of {type(model).__name__} cannot be scored: {error}. A Llama-like decoder is needed, "
            "with `layers`, `norm` and an `o_proj` in each layer's `self_attn`."
        ) from error
    return layers


def head_outlets(model: PreTrainedModel) -> list[list[Outlet]]:
    """Returns for each layer the projections that read heads: one in a teacher, up to two in a student."""
    if model.config.model_type != "rad_hybrid":
        return [[Outlet(layer.self_attn.o_proj, model.config.num_attention_heads)] for layer in decoder_layers(model)]
    outlets = []
    for layer in decoder_layers(model):
        attention, ssm = layer.mixer.attention, layer.mixer.ssm
        kept = [] if attention is None else [Outlet(attention.o_proj, attention.num_heads)]
        outlets.append(kept + ([] if ssm is None else [Outlet(ssm.out_proj, ssm.num_heads)]))
    return outlets
