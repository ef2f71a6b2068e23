"""
Bytes of a model's cache, counted from its configuration: KV cache of the attention heads, state of the recurrent ones.
A layer with a sliding window stores one token less than the window, as transformers' caches do.

    cache_bytes(student.config, tokens=8192) / cache_bytes(teacher.config, tokens=8192)

The paper's Table 2 (https://huggingface.co/papers/2602.11374) counts a private K and V for each kept head, a state in
the model's dtype and no convolution window: `private_kv=True, conv=False` reproduces it.
"""

from transformers import PreTrainedConfig

from trainers.families import sliding_layers


def kv_heads_by_layer(config: PreTrainedConfig, private_kv: bool = False) -> list[int]:
    """Heads with a K and V of their own in each layer; `private_kv` counts one for each kept query head."""
    if config.model_type != "rad_hybrid":
        return [config.num_key_value_heads] * config.num_hidden_layers
    if private_kv:
        return [len(heads) for heads in config.kept_heads]
    per_group = config.num_attention_heads // config.num_key_value_heads
    return [len({head // per_group for head in heads}) for heads in config.kept_heads]


def kv_heads(config: PreTrainedConfig, private_kv: bool = False) -> int:
    """As [`kv_heads_by_layer`], of all layers together."""
    return sum(kv_heads_by_layer(config, private_kv))


def recurrent_heads(config: PreTrainedConfig) -> int:
    """Recurrent heads in all layers together."""
    if config.model_type != "rad_hybrid":
        return 0
    slots = config.num_hidden_layers * config.num_attention_heads
    return slots if config.mixing == "parallel" else slots - sum(len(heads) for heads in config.kept_heads)


def kv_bytes_per_token(config: PreTrainedConfig, dtype_bytes: int = 2, private_kv: bool = False) -> int:
    """Bytes that one more token adds to the KV cache of one sequence, before it fills a sliding window."""
    return kv_heads(config, private_kv) * 2 * _head_dim(config) * dtype_bytes


def _head_dim(config: PreTrainedConfig) -> int:
    # Some families' configurations have no such field.
    return config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads


def state_bytes(config: PreTrainedConfig, dtype_bytes: int = 2, state_dtype_bytes: int = 4, conv: bool = True) -> int:
    """
    Bytes of the recurrent states and, with `conv`, of the convolution windows of one sequence.

    Args:
        config (`PreTrainedConfig`): configuration of a student, or of a teacher, which has none.
        dtype_bytes (`int`, *optional*, defaults to 2): bytes of a number in the window.
        state_dtype_bytes (`int`, *optional*, defaults to 4): bytes of a number in the state, float32 in this package.
        conv (`bool`, *optional*, defaults to `True`): whether to count the windows.
    """
    heads = recurrent_heads(config)
    if not heads:
        return 0
    state = heads * config.head_dim * config.ssm_state_size * state_dtype_bytes
    window = heads * (config.head_dim + 2 * config.ssm_state_size) * config.ssm_conv_kernel * dtype_bytes
    return state + window * conv


def cache_bytes(
    config: PreTrainedConfig,
    tokens: int,
    batch: int = 1,
    dtype_bytes: int = 2,
    state_dtype_bytes: int = 4,
    private_kv: bool = False,
    conv: bool = True,
) -> int:
    """
    Bytes of the whole cache of `batch` sequences of `tokens` tokens.

    Args:
        config (`PreTrainedConfig`): configuration of a [`RadHybridForCausalLM`] or of a teacher.
        tokens (`int`): tokens in the cache.
        batch (`int`, *optional*, defaults to 1): sequences.
        dtype_bytes (`int`, *optional*, defaults to 2): bytes of a number in the KV cache.
        state_dtype_bytes (`int`, *optional*, defaults to 4): bytes of a number in the recurrent state.
        private_kv (`bool`, *optional*, defaults to `False`): count one K and V for each kept query head.
        conv (`bool`, *optional*, defaults to `True`): count the convolution windows.
    """
    slides = set(sliding_layers(config))
    stored = min(tokens, config.sliding_window - 1) if slides else tokens
    layers = enumerate(kv_heads_by_layer(config, private_kv))
    slots = sum(heads * (stored if layer in slides else tokens) for layer, heads in layers)
    keys_and_values = slots * 2 * _head_dim(config) * dtype_bytes
    return batch * (keys_and_values + state_bytes(config, dtype_bytes, state_dtype_bytes, conv))
