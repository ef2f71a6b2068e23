"""The hybrid student. The other files of this folder ship to the Hub with every student; this one does not."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_rad_hybrid import RadHybridConfig
from .modeling_rad_hybrid import (
    CACHE_NAME,
    RadHybridForCausalLM,
    RadHybridModel,
    RadHybridPreTrainedModel,
    attention_masks,
)


# Saved students carry these files, so that they load where this package is not installed.
AUTO_MAP = {
    "AutoConfig": "configuration_rad_hybrid.RadHybridConfig",
    "AutoModel": "modeling_rad_hybrid.RadHybridModel",
    "AutoModelForCausalLM": "modeling_rad_hybrid.RadHybridForCausalLM",
}
RadHybridConfig.register_for_auto_class()
RadHybridModel.register_for_auto_class("AutoModel")
RadHybridForCausalLM.register_for_auto_class("AutoModelForCausalLM")

# Where the package is installed the Auto classes know the student without remote code.
AutoConfig.register("rad_hybrid", RadHybridConfig)
AutoModel.register(RadHybridConfig, RadHybridModel)
AutoModelForCausalLM.register(RadHybridConfig, RadHybridForCausalLM)

__all__ = [
    "AUTO_MAP",
    "CACHE_NAME",
    "RadHybridConfig",
    "RadHybridForCausalLM",
    "RadHybridModel",
    "RadHybridPreTrainedModel",
    "attention_masks",
]
