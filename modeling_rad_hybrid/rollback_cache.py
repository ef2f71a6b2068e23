"""
The student's cache: transformers' own layers, with a recurrence that can be taken back.

Assisted decoding feeds drafted tokens and takes the refused ones back. A KV cache drops its last columns; a recurrent
state has forgotten what it was, and transformers' own layers leave it as it is (its issue #49036). Here a layer that is
told to record the past keeps what it was fed since the last `crop` and the state before it, and `crop` scans the
tokens that stay once more, with the same function. The log costs about what a KV cache of the same tokens would cost,
and is dropped by every `crop`; nothing is kept while nothing is recorded.

    cache = RadHybridCache(model.config)

Shape letters: B batch, T tokens, H recurrent heads, P head dim, N state, K convolution width.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from .ssd import ssd


# The argument and output that transformers keeps the cache under: `cache` from 5.24 on, `past_key_values` before.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class Fed(NamedTuple):
    """What one forward feeds to the recurrence of one layer: enough to say where its first tokens alone would lead."""

    columns: torch.Tensor  # [B, T, channels] before the convolution, 0 at padding
    mask: torch.Tensor | None  # [B, T], 0 at padding
    x: torch.Tensor  # [B, T, H, P]
    log_a: torch.Tensor  # [B, T, H]
    B: torch.Tensor  # [B, T, H, N]
    conv_kernel: int
    chunk_size: int
    backend: str

    def window_after(self, window: torch.Tensor | None, tokens: int) -> torch.Tensor:
        """The last K columns `[B, channels, K]` after the first `tokens` tokens; right padding is no column."""
        columns = self.columns[:, :tokens].transpose(1, 2)  # [B, channels, tokens]
        if window is None:
            full = nn.functional.pad(columns, (self.conv_kernel, 0))
        else:
            full = torch.cat([window.to(columns.dtype), columns], dim=-1)  # [B, channels, K + tokens]
        if self.mask is None:
            return full[..., -self.conv_kernel :]
        mask = self.mask[:, :tokens]
        # With right padding the last K columns are not the last K tokens of a row (transformers' issue #48256).
        trailing = mask.flip(1).bool().int().argmax(1)  # [B] padding after the last token
        trailing = torch.where(mask.any(1), trailing, tokens)
        index = torch.arange(tokens, tokens + self.conv_kernel, device=full.device) - trailing[:, None]  # [B, K]
        return full.gather(2, index[:, None].expand(-1, full.shape[1], -1))

    def state_after(self, state: torch.Tensor | None, tokens: int) -> torch.Tensor:
        """The state `[B, H, P, N]` after the first `tokens` tokens."""
        x, log_a, B = self.x[:, :tokens], self.log_a[:, :tokens], self.B[:, :tokens]
        return ssd(x, log_a, B, B, state, chunk_size=self.chunk_size, backend=self.backend)[1]


class RollbackLayer(LinearAttentionLayer):
    """Convolution window and state of a layer without attention."""

    # What was fed can be scanned again, so that `crop` leaves no trace.
    is_croppable = True

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen_tokens = 0
        self.forget()

    def forget(self) -> None:
        """Drops the log."""
        self.fed: list[Fed] = []
        self.window_before = self.state_before = None

    def update_conv_state(self, conv_states, state_idx=0, conv_kernel_size=None, fed=None, **kwargs):
        """
        Stores the new window `[B, channels, K]`.

        Args:
            conv_states (`torch.Tensor`): the window after this forward.
            fed ([`Fed`]): what the forward feeds to the recurrence; kept while the past is recorded.
        """
        if self.record_past:
            if not self.fed and self.has_previous_state[state_idx]:
                self.window_before = self.conv_states[state_idx].clone()
                self.state_before = self.recurrent_states[state_idx].clone()
            self.fed.append(fed)
        self.seen_tokens += fed.x.shape[1]
        if not self.is_conv_states_initialized[state_idx]:
            self.lazy_initialization(conv_states=conv_states, state_idx=state_idx)
        self.conv_states[state_idx].copy_(conv_states)
        self.has_previous_state[state_idx] = True
        return self.conv_states[state_idx]

    def crop(self, tokens_to_remove: int) -> None:
        """
        Takes tokens back, and forgets what was fed before.

        Args:
            tokens_to_remove (`int`): number of tokens, negated as in transformers; 0 only drops the log.

        Raises:
            `RuntimeError`: for a positive number, or for more tokens than were recorded since the last `crop`.
        """
        kept = sum(fed.x.shape[1] for fed in self.fed) + tokens_to_remove
        if tokens_to_remove > 0 or (tokens_to_remove and kept < 0):
            raise RuntimeError(
                f"crop({tokens_to_remove}) cannot be done: {kept - tokens_to_remove} tokens were recorded since the last "
                "crop, and their number comes negated. Call `activate_past_recording` before the tokens to take back."
            )
        if tokens_to_remove:
            window, state = self.window_before, self.state_before
            for fed in self.fed:
                tokens = min(kept, fed.x.shape[1])
                if tokens:
                    window, state = fed.window_after(window, tokens), fed.state_after(state, tokens)
                kept -= tokens
            if window is None:
                LinearAttentionLayer.reset(self)
            else:
                self.conv_states[0].copy_(window)
                self.recurrent_states[0].copy_(state)
        self.seen_tokens += tokens_to_remove
        self.forget()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        # The log is of the old rows.
        self.forget()


class RollbackAttentionLayer(RollbackLayer, LinearAttentionAndFullAttentionLayer):
    """Window, state and KV cache of a layer with kept and converted heads."""

    def crop(self, tokens_to_remove: int) -> None:
        RollbackLayer.crop(self, tokens_to_remove)
        DynamicLayer.crop(self, tokens_to_remove)


class RollbackSlidingWindowLayer(RollbackLayer, LinearAttentionAndSlidingWindowAttentionLayer):
    """The same with a KV cache of the last tokens alone."""

    def crop(self, tokens_to_remove: int) -> None:
        RollbackLayer.crop(self, tokens_to_remove)
        DynamicSlidingWindowLayer.crop(self, tokens_to_remove)


class RadHybridCache(DynamicCache):
    """
    Cache of a student.

    Args:
        config ([`RadHybridConfig`]): configuration of the student.
        offloading (`bool`, *optional*, defaults to `False`): keep KV caches on the CPU, as in `DynamicCache`.
    """

    # Never compiled unasked, even where every layer has fixed shapes.
    is_compileable = False

    def __init__(self, config, offloading: bool = False):
        super().__init__(config=config, offloading=offloading)
        self.config = config
        for index, layer in enumerate(self.layers):
            if type(layer) is LinearAttentionLayer:
                self.layers[index] = RollbackLayer()
            elif type(layer) is LinearAttentionAndFullAttentionLayer:
                self.layers[index] = RollbackAttentionLayer()
            elif type(layer) is LinearAttentionAndSlidingWindowAttentionLayer:
                self.layers[index] = RollbackSlidingWindowLayer(sliding_window=layer.sliding_window)
        self.attends = any(isinstance(layer, CacheLayerMixin) for layer in self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far. The stock cache cannot tell where no layer has attention."""
        return super().get_seq_length(layer_idx) if self.attends else self.layers[layer_idx].seen_tokens

    def reset(self) -> None:
        """Empties the cache. (In transformers 5.17 a KV cache that grows is filled with zeros instead.)"""
        self.__init__(self.config, offloading=self.offloading)

    @property
    def is_linear(self) -> list[bool]:
        """Without attention too `generate` may ask for the length, and feed new tokens alone."""
        return [False] * len(self.layers)
