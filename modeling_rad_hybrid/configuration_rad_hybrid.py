"""
Configuration of a RAD hybrid: a decoder's backbone plus the list of attention heads that stay attention.

By default the backbone is Llama's. Further fields, named as in the configuration of the family that has them, make it
that of Mistral, Qwen, SmolLM3, Phi, Granite or OLMo-2 (`trainers/families.py` fills them in).

Paper: Retrieval-Aware Distillation for Transformer-SSM Hybrids, https://huggingface.co/papers/2602.11374, section 4.2.
"""

import math

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, __version__
from transformers.activations import ACT2FN
from transformers.utils import logging


QK_NORMS = (None, "head", "full")
NORM_POSITIONS = ("pre", "post")
MIXINGS = ("replace", "parallel")
SSM_BACKENDS = ("auto", "torch", "compiled", "triton", "mamba_ssm")
# Oldest and newest transformers that this code was tested with. It travels with the students, so they carry it.
TRANSFORMERS_TESTED = ("5.17", "5.24")


def version_warning(version: str) -> str | None:
    """Returns a sentence when a version of transformers is outside of what this code was tested with."""
    oldest, newest = TRANSFORMERS_TESTED
    if [*map(int, oldest.split("."))] <= [*map(int, version.split(".")[:2])] <= [*map(int, newest.split("."))]:
        return None
    return (
        f"The code of this model was tested with transformers {oldest} to {newest}; this is {version}. Should it fail or "
        f"answer differently, take a tested one: pip install 'transformers=={newest}.*'"
    )


if outside := version_warning(__version__):
    logging.get_logger(__name__).warning(outside)


@strict
class RadHybridConfig(PreTrainedConfig):
    r"""
    Configuration of [`RadHybridForCausalLM`]. Backbone fields are those of `LlamaConfig`; the others are:

    Args:
        attention_output_bias (`bool`, *optional*):
            Whether `o_proj` has a bias, by default as `attention_bias` says of the others.
        qk_norm (`str`, *optional*):
            RMSNorm of queries and keys before the rotation: `"head"` over each head (Qwen3), `"full"` over all heads of
            the layer together, also those that are not kept (OLMo-2).
        norm_position (`str`, *optional*, defaults to `"pre"`):
            `"pre"`: mixer and MLP read a normalised stream. `"post"`: what they give is normalised (OLMo-2).
        no_rope_layers (`list[int]`, *optional*):
            For each layer 1 if it has rotary embeddings and 0 if not (so in SmolLM3); by default all have.
        sliding_window (`int`, *optional*):
            Tokens that a sliding layer's attention sees, its own included.
        sliding_layers (`list[int]`, *optional*):
            Layers whose attention slides; by default all, if there is a `sliding_window`.
        attention_multiplier (`float`, *optional*):
            Factor of the attention scores, by default `head_dim**-0.5`.
        embedding_multiplier (`float`, *optional*, defaults to 1.0), residual_multiplier (`float`, *optional*, defaults to 1.0):
            Factors of the embeddings, and of what mixer and MLP add to the stream (Granite).
        logits_scaling (`float`, *optional*, defaults to 1.0):
            What the logits are divided by (Granite).
        kept_heads (`list[list[int]]`, *optional*):
            For each layer the sorted indices of the query heads that stay softmax attention. By default every head of
            every layer is kept, which makes the model the teacher itself.
        mixing (`str`, *optional*, defaults to `"replace"`):
            `"replace"` (the paper's text): a head is either kept or converted. `"parallel"` (the authors' code): a
            recurrent head stands in every slot, beside the kept heads, whose output is normalised, adapted and
            averaged with the recurrent one.
        ssm_state_size (`int`, *optional*, defaults to 8):
            State size N of a recurrent head (`d_state` in the paper).
        ssm_conv_kernel (`int`, *optional*, defaults to 4):
            Width of the causal depthwise convolution before the recurrence.
        ssm_chunk_size (`int`, *optional*, defaults to 32):
            Tokens Q that the chunked scan treats as one block.
        ssm_backend (`str`, *optional*, defaults to `"auto"`):
            `"torch"`; `"compiled"`, the same through `torch.compile`; `"triton"` (kernels of this folder) and `"mamba_ssm"`
            (those of that package), both for CUDA tensors; or `"auto"`, the fastest that fits the tensors.

    Raises:
        `StrictDataclassError`: for a field that cannot work; the message says what was given and what would.
    """

    model_type = "rad_hybrid"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    # Token mixers are replicated: kept heads are too few and too irregular to split.
    base_model_tp_plan = {
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 16
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: int | float | None = 0.0
    mlp_bias: bool = False
    attention_output_bias: bool | None = None
    qk_norm: str | None = None
    norm_position: str = "pre"
    no_rope_layers: list | None = None
    sliding_window: int | None = None
    sliding_layers: list | None = None
    attention_multiplier: float | int | None = None
    embedding_multiplier: float | int = 1.0
    residual_multiplier: float | int = 1.0
    logits_scaling: float | int = 1.0
    kept_heads: list | None = None
    mixing: str = "replace"
    ssm_state_size: int = 8
    ssm_conv_kernel: int = 4
    ssm_chunk_size: int = 32
    ssm_backend: str = "auto"
    layer_types: list | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        # Sizes that make no sense are left to the validation below, which says so.
        if self.head_dim is None and self.num_attention_heads:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.kept_heads is None:
            self.kept_heads = [list(range(self.num_attention_heads)) for _ in range(self.num_hidden_layers)]
        # Derived, whatever was passed: a stale list would give a layer the wrong cache.
        self.layer_types = [self._layer_type(layer, heads) for layer, heads in enumerate(self.kept_heads)]
        super().__post_init__(**kwargs)

    def _layer_type(self, layer: int, kept: list[int]) -> str:
        # A layer without attention must not be `hybrid`: the cache would take its length from an empty KV buffer.
        # What is no list at all is left to the validation below, which says so.
        if not isinstance(kept, (list, tuple)) or not kept:
            return "linear_attention"
        slides = self.sliding_window is not None and (self.sliding_layers is None or layer in self.sliding_layers)
        if self.mixing == "replace" and len(kept) == self.num_attention_heads:
            return "sliding_attention" if slides else "full_attention"
        return "hybrid_sliding" if slides else "hybrid"

    def validate_backbone(self):
        """Part of the strict validation: shapes that an attention layer cannot have."""
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*sizes, "num_key_value_heads", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} query heads cannot be shared out over {self.num_key_value_heads} KV heads; "
                "num_attention_heads must be a multiple of num_key_value_heads."
            )
        rotary = int(self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1.0))
        if not 2 <= rotary <= self.head_dim or rotary % 2:
            raise ValueError(
                f"{rotary} of the {self.head_dim} dimensions of a head (head_dim) would be rotated; rotary embeddings "
                "need an even number of at least 2."
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act is {self.hidden_act!r}, which transformers has no activation for.")

    def validate_variant(self):
        """Part of the strict validation: what sets one family's backbone apart from another's."""
        if self.qk_norm not in QK_NORMS:
            raise ValueError(f"qk_norm is {self.qk_norm!r}; choose one of {', '.join(map(str, QK_NORMS))}.")
        if self.norm_position not in NORM_POSITIONS:
            raise ValueError(f"norm_position is {self.norm_position!r}; choose one of {', '.join(NORM_POSITIONS)}.")
        if self.no_rope_layers is not None and (
            len(self.no_rope_layers) != self.num_hidden_layers or not set(self.no_rope_layers) <= {0, 1}
        ):
            raise ValueError(
                f"no_rope_layers is {self.no_rope_layers}; give a 1 (rotated) or a 0 (not) for each of the "
                f"{self.num_hidden_layers} layers."
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window is {self.sliding_window}; it must be at least 1, or None for no window.")
        if self.sliding_layers and self.sliding_window is None:
            raise ValueError("sliding_layers names layers, but there is no sliding_window for them.")
        if not set(self.sliding_layers or []) <= set(range(self.num_hidden_layers)):
            raise ValueError(
                f"sliding_layers is {self.sliding_layers}; the model has layers 0 to {self.num_hidden_layers - 1}."
            )
        for name in ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be a positive number.")

    def validate_kept_heads(self):
        """Part of the strict validation: one sorted list of distinct head indices for each layer."""
        if len(self.kept_heads) != self.num_hidden_layers:
            raise ValueError(
                f"kept_heads has {len(self.kept_heads)} lists for {self.num_hidden_layers} layers; give one list a layer, "
                "an empty one where no head is kept."
            )
        for layer, heads in enumerate(self.kept_heads):
            if not isinstance(heads, (list, tuple)) or any(type(head) is not int for head in heads):
                raise ValueError(f"kept_heads[{layer}] is {heads!r}; it must be a list of head indices (integers).")
            if any(not 0 <= head < self.num_attention_heads for head in heads):
                raise ValueError(
                    f"kept_heads[{layer}] is {list(heads)}, but the layer has heads 0 to {self.num_attention_heads - 1}."
                )
            if list(heads) != sorted(set(heads)):
                raise ValueError(f"kept_heads[{layer}] is {list(heads)}; indices must be sorted and distinct.")

    def validate_recurrence(self):
        """Part of the strict validation: the recurrent heads' sizes and choices."""
        if self.mixing not in MIXINGS:
            raise ValueError(f"mixing is {self.mixing!r}; choose one of {', '.join(MIXINGS)}.")
        if self.ssm_backend not in SSM_BACKENDS:
            raise ValueError(f"ssm_backend is {self.ssm_backend!r}; choose one of {', '.join(SSM_BACKENDS)}.")
        for name in ("ssm_state_size", "ssm_conv_kernel", "ssm_chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")


__all__ = ["RadHybridConfig"]
