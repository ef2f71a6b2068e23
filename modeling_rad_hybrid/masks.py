"""The masks of a student's layers, by transformers' own functions."""

import torch
from transformers.masking_utils import (
    create_causal_mask,
    create_recurrent_attention_mask,
    create_sliding_window_causal_mask,
)


# Which mask the kept heads of a layer want, by the layer's type.
MASK_KINDS = {
    "linear_attention": None,
    "full_attention": "full_attention",
    "hybrid": "full_attention",
    "sliding_attention": "sliding_attention",
    "hybrid_sliding": "sliding_attention",
}


def attention_masks(config, **arguments) -> dict[str, torch.Tensor | None]:
    """
    The masks that the layers of a student want: `linear_attention` for recurrent heads, and the kinds of [`MASK_KINDS`]
    that its kept heads have. Arguments are those of transformers' mask functions.

    Not transformers' `create_masks_for_generate`: that forgets the window of `hybrid_sliding` layers, and takes the
    length of the cache from a layer of another kind where both kinds are hybrid.
    """
    masks = {"linear_attention": create_recurrent_attention_mask(config=config, **arguments)}
    for kind, create in (
        ("full_attention", create_causal_mask),
        ("sliding_attention", create_sliding_window_causal_mask),
    ):
        layers = [layer for layer, name in enumerate(config.layer_types) if MASK_KINDS[name] == kind]
        if layers:
            masks[kind] = create(config=config, layer_idx=layers[0], **arguments)
    return masks
