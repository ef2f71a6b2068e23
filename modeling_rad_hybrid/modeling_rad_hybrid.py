"""
A Transformer-SSM hybrid at the level of heads: a few softmax attention heads, discrete Mamba-2 for all the others.

Paper: Retrieval-Aware Distillation for Transformer-SSM Hybrids, https://huggingface.co/papers/2602.11374, section 4.2.

    model = AutoModelForCausalLM.from_pretrained("org/student", trust_remote_code=True)

With every head kept the student is its teacher: bit for bit for a Llama, and a Mistral, Qwen, SmolLM3, Phi, Granite or
OLMo-2 by the configuration's further fields. Caches are transformers' own, by `config.layer_types`, or
[`RadHybridCache`], which `generate` and `forward` make, and which can take tokens back.

Shape letters: B batch, T tokens, D model width, H query heads, K KV heads, P head dim.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_recurrent_attention_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .backbone import RadHybridMLP, RadHybridRMSNorm, RadHybridRotaryEmbedding, rotate
from .configuration_rad_hybrid import RadHybridConfig
from .discrete_mamba2 import DiscreteMamba2
from .generation import RadHybridGenerationMixin
from .masks import MASK_KINDS, attention_masks
from .packed_rows import document_index, flash_attention_lengths, positions_in_documents
from .rollback_cache import CACHE_NAME, RadHybridCache


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

    A norm over the whole width (`qk_norm="full"`) divides the queries of every head by a number that depends on all
    heads, so that kept heads alone could only guess it. `q_rest_proj` and `k_rest_proj` are the teacher's projections of
    the heads that are not kept, computed for that number only: kept heads stay exactly what they were, at the price of
    these two products (no cache) in layers that keep some heads and not all.
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
        self.scaling = self.head_dim**-0.5 if config.attention_multiplier is None else config.attention_multiplier
        self.sliding_window = config.sliding_window if "sliding" in config.layer_types[layer_idx] else None
        self.rotary = config.no_rope_layers is None or bool(config.no_rope_layers[layer_idx])
        self.qk_norm = config.qk_norm
        self.is_causal = True
        # Kept heads of each group; plain integers, so that a meta load has nothing to rebuild and a CUDA graph nothing to
        # copy from the host.
        self.counts = [len(group) for group in members]
        self.even = len(set(self.counts)) == 1
        queries, keys = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        bias, output_bias = config.attention_bias, config.attention_output_bias
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=bias if output_bias is None else output_bias)
        self.q_norm = self.k_norm = self.q_rest_proj = self.k_rest_proj = None
        if self.qk_norm == "head":
            self.q_norm = RadHybridRMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RadHybridRMSNorm(self.head_dim, config.rms_norm_eps)
        if self.qk_norm == "full":
            self.q_norm = RadHybridRMSNorm(queries, config.rms_norm_eps)
            self.k_norm = RadHybridRMSNorm(keys, config.rms_norm_eps)
            if rest := config.num_attention_heads - self.num_heads:
                self.q_rest_proj = nn.Linear(config.hidden_size, rest * self.head_dim, bias=bias)
            if rest := config.num_key_value_heads - self.num_key_value_heads:
                self.k_rest_proj = nn.Linear(config.hidden_size, rest * self.head_dim, bias=bias)

    def project(self, hidden_states, position_embeddings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries `[B, H, T, P]`, keys and values `[B, K, T, P]`, normalised and rotated as the configuration says."""
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if self.qk_norm == "full":
            query = self.q_norm(query, None if self.q_rest_proj is None else self.q_rest_proj(hidden_states))
            key = self.k_norm(key, None if self.k_rest_proj is None else self.k_rest_proj(hidden_states))
        query, key, value = (t.unflatten(-1, (-1, self.head_dim)) for t in (query, key, value))
        if self.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        if self.rotary:
            query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        return query, key, value

    def forward(self, hidden_states, position_embeddings, attention_mask=None, cache=None, **kwargs):
        """Maps `[B, T, D]` to `[B, T, D]` and the attention weights of the kept heads, where the back end has them."""
        output, weights = self.features(hidden_states, position_embeddings, attention_mask, cache, **kwargs)
        return self.o_proj(output), weights

    def features(self, hidden_states, position_embeddings, attention_mask=None, cache=None, **kwargs):
        """What the output projection reads: the kept heads' outputs side by side, `[B, T, H P]`, and the weights."""
        query, key, value = self.project(hidden_states, position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if not self.even:
            groups = query.split(self.counts, dim=1)
            missing = (self.num_key_value_groups - count for count in self.counts)
            filled = (
                nn.functional.pad(group, (0, 0, 0, 0, 0, more)) for group, more in zip(groups, missing, strict=True)
            )
            query = torch.cat(list(filled), dim=1)
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
            sliding_window=self.sliding_window,
            **kwargs,
        )  # [B, T, H, P]
        if not self.even:
            output = self.drop_filled(output, 2)
            weights = None if weights is None else self.drop_filled(weights, 1)
        return output.flatten(2), weights

    def drop_filled(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Leaves of the filled-up heads along a dimension those that are kept."""
        groups = tensor.split(self.num_key_value_groups, dim=dim)
        return torch.cat([t.narrow(dim, 0, count) for t, count in zip(groups, self.counts, strict=True)], dim=dim)


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
        self.mask_kind = MASK_KINDS[config.layer_types[layer_idx]]
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


class RadHybridDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: RadHybridConfig, layer_idx: int):
        super().__init__()
        self.mixer = RadHybridMixer(config, layer_idx)
        self.mlp = RadHybridMLP(config)
        self.post_norm, self.residual_multiplier = config.norm_position == "post", config.residual_multiplier
        # The names of the families that have them: in one order `post_attention_layernorm` is the MLP's, in the other
        # the mixer's.
        if self.post_norm:
            self.post_attention_layernorm = RadHybridRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.post_feedforward_layernorm = RadHybridRMSNorm(config.hidden_size, config.rms_norm_eps)
        else:
            self.input_layernorm = RadHybridRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.post_attention_layernorm = RadHybridRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, cache=None, past_key_values=None, **kwargs) -> torch.Tensor:
        cache = past_key_values if cache is None else cache
        if self.post_norm:
            mixed = self.post_attention_layernorm(self.mixer(hidden_states, cache=cache, **kwargs)[0])
        else:
            mixed, _ = self.mixer(self.input_layernorm(hidden_states), cache=cache, **kwargs)
        hidden_states = torch.add(hidden_states, mixed, alpha=self.residual_multiplier)
        if self.post_norm:
            mixed = self.post_feedforward_layernorm(self.mlp(hidden_states))
        else:
            mixed = self.mlp(self.post_attention_layernorm(hidden_states))
        return torch.add(hidden_states, mixed, alpha=self.residual_multiplier)


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
    _can_record_outputs = {"hidden_states": RadHybridDecoderLayer, "attentions": RadHybridAttention}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, DiscreteMamba2):
            module.init_identity()


class RadHybridModel(RadHybridPreTrainedModel):
    def __init__(self, config: RadHybridConfig):
        super().__init__(config)
        self.attends = any(config.kept_heads)
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
        As in transformers' decoders, the cache under its new name or its old one. Packed documents are kept apart when
        `seq_idx` `[B, T]`, `cu_seq_lens_q` or, without mask and cache, restarting `position_ids` say where they start;
        then no cache comes back, as a row of several documents has no one state to go on from.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = past_key_values if cache is None else cache
        batch, tokens = inputs_embeds.shape[:2]
        documents = {"seq_idx": seq_idx, "cu_seq_lens": kwargs.get("cu_seq_lens_q")}
        if cache is not None and any(sign is not None for sign in documents.values()):
            raise ValueError(
                "seq_idx and cu_seq_lens_q say that rows are packed, and packed rows cannot fill a cache."
            )
        if cache is None and attention_mask is None:
            documents["position_ids"] = position_ids
        seq_idx = document_index(batch, tokens, **documents)
        if use_cache and cache is None and (seq_idx is None or (seq_idx == seq_idx[:, :1]).all()):
            cache, seq_idx = RadHybridCache(self.config), None
        if position_ids is None:
            if seq_idx is not None:
                position_ids = positions_in_documents(seq_idx)
            else:
                # A student without any attention head has no use for positions, and its cache may not know them.
                seen = cache.get_seq_length() if cache is not None and self.attends else 0
                position_ids = torch.arange(seen, seen + tokens, device=inputs_embeds.device)[None]
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        if not isinstance(attention_mask, dict):
            arguments = {"config": self.config, "inputs_embeds": inputs_embeds, CACHE_NAME: cache}
            recurrent = create_recurrent_attention_mask(attention_mask=attention_mask, **arguments)
            if seq_idx is not None:
                if attention_mask is not None and attention_mask.ndim == 2:
                    # Padding becomes a document of its own.
                    seq_idx, attention_mask = seq_idx.masked_fill(attention_mask == 0, -1), None
                # Transformers reads packed documents from positions that start anew, whatever those of the angles are.
                position_ids = positions_in_documents(seq_idx)
                if is_flash_attention_requested(self.config):
                    kwargs |= flash_attention_lengths(position_ids)
            masks = attention_masks(attention_mask=attention_mask, position_ids=position_ids, **arguments)
            attention_mask = {**masks, "linear_attention": recurrent}
        hidden_states = inputs_embeds
        if self.config.embedding_multiplier != 1:
            hidden_states = hidden_states * self.config.embedding_multiplier
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=attention_mask.get(layer.mixer.mask_kind),
                recurrent_mask=attention_mask.get("linear_attention"),
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=use_cache,
                seq_idx=seq_idx,
                **{CACHE_NAME: cache},
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: cache})


class RadHybridForCausalLM(RadHybridPreTrainedModel, RadHybridGenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: RadHybridConfig):
        super().__init__(config)
        self.model = RadHybridModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
        """
        As in transformers' causal language models; `logits_to_keep` limits the logits to so many last positions, to
        positions `[n]`, or to positions `[B, n]` of each row.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if isinstance(logits_to_keep, int):
            hidden_states = hidden_states[:, -logits_to_keep:]
        elif logits_to_keep.ndim == 2:
            hidden_states = hidden_states.take_along_dim(logits_to_keep[..., None], dim=1)
        else:
            hidden_states = hidden_states[:, logits_to_keep]
        logits = self.lm_head(hidden_states)
        if self.config.logits_scaling != 1:
            logits = logits / self.config.logits_scaling
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


__all__ = ["CACHE_NAME", "attention_masks", "RadHybridForCausalLM", "RadHybridModel", "RadHybridPreTrainedModel"]
