"""
What `generate` has to be told about a student: its cache, and padding on the right.

Transformers fills a cache with right padding too, but then takes the first new token from the logits of the padding and
counts positions anew behind it. Here a row's first token comes from its last real token and its positions go on from
there, so that padding on either side gives the text of the unpadded row.
"""

import torch
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMode

from .masks import attention_masks
from .rollback_cache import CACHE_NAME, RadHybridCache


class RadHybridGenerationMixin(GenerationMixin):
    """`GenerationMixin` with the student's own cache and both sides of padding."""

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs):
        mask, given = model_kwargs.get("attention_mask"), model_kwargs.get(CACHE_NAME)
        assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
        if is_right_padded(mask) and (
            assisted or generation_config.use_cache is False or generation_config.prefill_chunk_size is not None
        ):
            raise ValueError(
                "attention_mask ends in padding, which goes with neither assisted decoding nor use_cache=False nor "
                "prefill_chunk_size; pad on the left (tokenizer.padding_side = 'left')."
            )
        if given is not None and assisted and not given.is_croppable:
            raise ValueError(
                f"Assisted decoding takes refused tokens back, which {type(given).__name__} cannot do with a recurrent "
                "state; pass no cache, or one that a forward of this model made."
            )
        if given is not None and all(given.is_linear):
            raise ValueError(
                f"{type(given).__name__} cannot count tokens where no layer has attention; pass no cache, or one that "
                "a forward of this model made."
            )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)
        made = model_kwargs.get(CACHE_NAME)
        if given is None and made is not None and (type(made) is DynamicCache or not any(self.config.kept_heads)):
            model_kwargs[CACHE_NAME] = RadHybridCache(self.config, offloading=made.offloading)
            if generation_config.is_assistant:
                model_kwargs[CACHE_NAME].activate_past_recording()

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        positions = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        mask = model_kwargs.get("attention_mask")
        # Padding on the right keeps the position of the token before it, from which new tokens count on.
        return (mask.long().cumsum(-1) - 1).clamp(min=0) if is_right_padded(mask) else positions

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, position_ids=None, **kwargs):
        """As transformers' function of this name, see [`attention_masks`]."""
        arguments = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids}
        return attention_masks(config, **arguments, **{CACHE_NAME: kwargs[CACHE_NAME]})

    # `generate` looks for `inputs_embeds` among the parameters.
    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds=None, attention_mask=None, is_first_iteration=False, **kwargs
    ):
        rope, cache = self.config.rope_parameters, kwargs.get(CACHE_NAME)
        # longrope has other frequencies beyond the length of its pretraining: what is cached belongs to the old ones.
        if rope["rope_type"] == "longrope" and cache is not None:
            if cache.get_seq_length() <= rope["original_max_position_embeddings"] < input_ids.shape[1]:
                kwargs[CACHE_NAME] = kwargs["next_sequence_length"] = None
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if is_first_iteration and is_right_padded(attention_mask):
            fed = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
            trailing = attention_mask.flip(1).bool().int().argmax(1, keepdim=True)  # [B, 1]
            inputs["logits_to_keep"] = fed.shape[1] - 1 - trailing
        return inputs


def is_right_padded(attention_mask: torch.Tensor | None) -> bool:
    """Whether a row of a 2D mask `[B, T]` ends in padding."""
    return attention_mask is not None and attention_mask.ndim == 2 and not attention_mask[:, -1].all()
