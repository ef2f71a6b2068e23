"""
A Transformer-SSM hybrid at the level of heads: a few softmax attention heads, discrete Mamba-2 for all the others.

Paper: Retrieval-Aware Distillation for Transformer-SSM Hybrids, https://huggingface.co/papers/2602.11374, section 4.2.

    model = AutoModelForCausalLM.from_pretrained("org/student", trust_remote_code=True)

The backbone is Llama's and reproduces it bit for bit when every head is kept. Caches are transformers' own, chosen by
`config.layer_types`. Shape letters: B batch, T tokens, D model width, H query heads, K KV heads, P head dim.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_rad_hybrid import RadHybridConfig
from .discrete_mamba2 import DiscreteMamba2


# The argument and output that transformers keeps the cache under: `cache` from 5.24 on, `past_key_values` before.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class RadHybridRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = hidden_states.dtype
        hidden_states = hidden_states.float()
        hidden_states = hidden_states * torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * hidden_states.to(dtype)


class RadHybridRotaryEmbedding(nn.Module):
    """Rotary angles; the attributes' names are those by which transformers rebuilds the buffers after a meta load."""

    def __init__(self, config: RadHybridConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float, device=device) / config.head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = torch.cat((angles, angles), dim=-1)  # [B, T, P]
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Applies rotary angles `[B, T, P]` to `[B, H, T, P]`."""
    first, second = states.chunk(2, dim=-1)
    return states * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Plain attention for `attn_implementation="eager"`, with the weights as second result."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    weights = query @ key.transpose(2, 3) * scaling  # [B, H, T, S]
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class RadHybridAttention(nn.Module):
    """
    The kept heads of one layer. K and V of a KV group are stored once, however many of its query heads are kept.

    Attention back ends want the same number of query heads for each KV head, so groups with fewer kept heads are
    filled up with zero queries, whose outputs are dropped: cheaper than copies of K and V.
    """

    def __init__(self, config: RadHybridConfig, layer_idx: int):
        super().__init__()
        kept = config.kept_heads[layer_idx]
        per_group = config.num_attention_heads // config.num_key_value_heads
        groups = sorted({head // per_group for head in kept})
        members = [[i for i, head in enumerate(kept) if head // per_group == group] for group in groups]
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_heads, self.num_key_value_heads = len(kept), len(groups)
        self.num_key_value_groups = max(len(group) for group in members)
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        # Slot of each kept head among the filled-up queries; plain integers, so that a meta load has nothing to rebuild.
        self.slots = [g * self.num_key_value_groups + i for g, group in enumerate(members) for i in range(len(group))]
        self.even = len(self.slots) == self.num_key_value_heads * self.num_key_value_groups
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(
            config.hidden_size, self.num_key_value_heads * self.head_dim, bias=config.attention_bias
        )
        self.v_proj = nn.Linear(
            config.hidden_size, self.num_key_value_heads * self.head_dim, bias=config.attention_bias
        )
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=config.attention_bias)

    def forward(self, hidden_states, position_embeddings, attention_mask=None, cache=None, **kwargs):
        """Maps `[B, T, D]` to `[B, T, D]` and the attention weights of the kept heads, where the back end has them."""
        output, weights = self.features(hidden_states, position_embeddings, attention_mask, cache, **kwargs)
        return self.o_proj(output), weights

    def features(self, hidden_states, position_embeddings, attention_mask=None, cache=None, **kwargs):
        """What the output projection reads: the kept heads' outputs side by side, `[B, T, H P]`, and the weights."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = rotate(self.q_proj(hidden_states).view(shape).transpose(1, 2), *position_embeddings)  # [B, H, T, P]
        key = rotate(self.k_proj(hidden_states).view(shape).transpose(1, 2), *position_embeddings)  # [B, K, T, P]
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)  # [B, K, T, P]
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if not self.even:
            filled = query.new_zeros(
                query.shape[0], self.num_key_value_heads * self.num_key_value_groups, *query.shape[2:]
            )
            query = filled.index_copy(1, torch.tensor(self.slots, device=query.device), query)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )  # [B, T, H, P]
        if not self.even:
            output = output[:, :, self.slots]
            weights = None if weights is None else weights[:, self.slots]
        return output.flatten(2), weights


class ParallelAdapter(nn.Module):
    """
    Joins kept heads to recurrent heads in `mixing="parallel"`, as the authors' code does (block `DoubleBlockAdapter`):
    the attention output takes on the recurrent output's mean and deviation of each token, passes a D x D adapter, and
    the two are averaged.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.proj = nn.Linear(hidden_size, hidden_size, bias=True)

    def normalize(self, attention: torch.Tensor, recurrent: torch.Tensor) -> torch.Tensor:
        attention, recurrent = attention.float(), recurrent.float()
        centred = attention - attention.mean(-1, keepdim=True)
        centred = centred / (centred.std(-1, keepdim=True) + 1e-6)
        return centred * recurrent.std(-1, keepdim=True) + recurrent.mean(-1, keepdim=True)

    def forward(self, attention: torch.Tensor, recurrent: torch.Tensor) -> torch.Tensor:
        adapted = self.proj(self.normalize(attention, recurrent).to(self.proj.weight.dtype))
        return 0.5 * (recurrent + adapted.to(recurrent.dtype))


class RadHybridMixer(nn.Module):
    """
    The token mixer of one layer: kept heads, recurrent heads, or both.

    In `mixing="replace"` the teacher's output projection is split by columns between `attention.o_proj` and
    `ssm.out_proj`, so their sum is one projection over all heads.
    """

    def __init__(self, config: RadHybridConfig, layer_idx: int):
        super().__init__()
        kept = len(config.kept_heads[layer_idx])
        parallel = config.mixing == "parallel"
        recurrent = config.num_attention_heads if parallel else config.num_attention_heads - kept
        self.attention = RadHybridAttention(config, layer_idx) if kept else None
        self.ssm = DiscreteMamba2(config, layer_idx, recurrent) if recurrent else None
        self.adapter = ParallelAdapter(config.hidden_size) if parallel and kept else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        recurrent_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        seq_idx: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Maps the normalised layer input `[B, T, D]` to `[B, T, D]` and the kept heads' attention weights, if any."""
        attended = weights = recurrent = None
        if self.attention is not None:
            attended, weights = self.attention(hidden_states, position_embeddings, attention_mask, cache, **kwargs)
        if self.ssm is not None:
            recurrent = self.ssm(hidden_states, recurrent_mask, cache, seq_idx)
        if attended is None:
            return recurrent, None
        if recurrent is None:
            return attended, weights
        if self.adapter is None:
            return attended + recurrent, weights
        return self.adapter(attended, recurrent), weights


class RadHybridMLP(nn.Module):
    def __init__(self, config: RadHybridConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class RadHybridDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: RadHybridConfig, layer_idx: int):
        super().__init__()
        self.mixer = RadHybridMixer(config, layer_idx)
        self.mlp = RadHybridMLP(config)
        self.input_layernorm = RadHybridRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RadHybridRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, cache=None, past_key_values=None, **kwargs) -> torch.Tensor:
        cache = past_key_values if cache is None else cache
        mixed, _ = self.mixer(self.input_layernorm(hidden_states), cache=cache, **kwargs)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class RadHybridPreTrainedModel(PreTrainedModel):
    config: RadHybridConfig
    config_class = RadHybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RadHybridDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Assisted decoding must be able to take tokens back; the stock cache cannot do that with a recurrent state.
    _is_stateful = True
    _can_record_outputs = {"hidden_states": RadHybridDecoderLayer, "attentions": RadHybridAttention}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, DiscreteMamba2):
            module.init_identity()


class StateOnlyCache(DynamicCache):
    """Cache of a student without any attention head: the stock one cannot say how many tokens it has seen."""

    def __init__(self, config):
        super().__init__(config=config)
        self.seen_tokens = 0

    def update_conv_state(self, conv_states, layer_idx, **kwargs):
        if layer_idx == 0:
            self.seen_tokens += conv_states.shape[-1]
        return super().update_conv_state(conv_states, layer_idx, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen_tokens

    def reset(self):
        super().reset()
        self.seen_tokens = 0


def new_cache(config: RadHybridConfig) -> Cache:
    """An empty cache for a student of this configuration."""
    return DynamicCache(config=config) if any(config.kept_heads) else StateOnlyCache(config)


def document_index(
    position_ids: torch.Tensor | None, cu_seq_lens: torch.Tensor | None, tokens: int
) -> torch.Tensor | None:
    """
    Document of each token of a packed row, `[B, T]`, from cumulative lengths or from positions that start anew.
    """
    if cu_seq_lens is not None:
        starts = torch.arange(tokens, device=cu_seq_lens.device)[:, None] >= cu_seq_lens[None, 1:-1]
        return starts.sum(-1, dtype=torch.int32)[None]
    if position_ids is None or tokens == 1:
        return None
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return nn.functional.pad(starts.cumsum(-1, dtype=torch.int32), (1, 0))


class RadHybridModel(RadHybridPreTrainedModel):
    def __init__(self, config: RadHybridConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(RadHybridDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RadHybridRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RadHybridRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        seq_idx: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        As in transformers' decoders, the cache under its new name or its old one. Packed documents are kept apart when `seq_idx` `[B, T]`, `cu_seq_lens_q` or, without
        mask and cache, restarting `position_ids` say where they start.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = new_cache(self.config)
        tokens = inputs_embeds.shape[1]
        if seq_idx is None and attention_mask is None and cache is None:
            seq_idx = document_index(position_ids, kwargs.get("cu_seq_lens_q"), tokens)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(seen, seen + tokens, device=inputs_embeds.device)[None]
        if not isinstance(attention_mask, dict):
            mask_arguments = {
                "config": self.config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                CACHE_NAME: cache,
                "position_ids": position_ids,
            }
            attention_mask = {"linear_attention": create_recurrent_attention_mask(**mask_arguments)}
            if any(self.config.kept_heads):
                attention_mask["full_attention"] = create_causal_mask(**mask_arguments)
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=attention_mask.get("full_attention"),
                recurrent_mask=attention_mask.get("linear_attention"),
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=use_cache,
                seq_idx=seq_idx,
                **{CACHE_NAME: cache},
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: cache})


class RadHybridForCausalLM(RadHybridPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: RadHybridConfig):
        super().__init__(config)
        self.model = RadHybridModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        wants_cache = generation_config.use_cache is not False and model_kwargs.get(CACHE_NAME) is None
        if wants_cache and not any(self.config.kept_heads):
            model_kwargs[CACHE_NAME] = new_cache(self.config)
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As in transformers' causal language models; `logits_to_keep` limits the logits to the last positions."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )


__all__ = ["CACHE_NAME", "RadHybridForCausalLM", "RadHybridModel", "RadHybridPreTrainedModel"]
