"""
Configuration of a RAD hybrid: a Llama-like backbone plus the list of attention heads that stay attention.

Paper: Retrieval-Aware Distillation for Transformer-SSM Hybrids, https://huggingface.co/papers/2602.11374, section 4.2.
"""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


MIXINGS = ("replace", "parallel")
SSM_BACKENDS = ("auto", "torch", "compiled", "triton", "mamba_ssm")


@strict
class RadHybridConfig(PreTrainedConfig):
    r"""
    Configuration of [`RadHybridForCausalLM`]. Backbone fields are those of `LlamaConfig`; the others are:

    Args:
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
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.kept_heads is None:
            self.kept_heads = [list(range(self.num_attention_heads)) for _ in range(self.num_hidden_layers)]
        # Derived, whatever was passed: a stale list would give a layer the wrong cache.
        self.layer_types = [self._layer_type(heads) for heads in self.kept_heads]
        super().__post_init__(**kwargs)

    def _layer_type(self, kept: list[int]) -> str:
        # A layer without attention must not be `hybrid`: the cache would take its length from an empty KV buffer.
        # What is no list at all is left to the validation below, which says so.
        if not isinstance(kept, (list, tuple)) or not kept:
            return "linear_attention"
        if self.mixing == "replace" and len(kept) == self.num_attention_heads:
            return "full_attention"
        return "hybrid"

    def validate_backbone(self):
        """Part of the strict validation: shapes that an attention layer cannot have."""
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} query heads cannot be shared out over {self.num_key_value_heads} KV heads; "
                "num_attention_heads must be a multiple of num_key_value_heads."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embeddings need an even number of at least 2.")

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
