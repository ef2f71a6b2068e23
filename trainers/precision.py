"""Which floating-point type the machine at hand is quick in. Only a machine with matrix units gains from bfloat16."""

import torch


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fast_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """
    Returns `torch.bfloat16` where matrix products are faster in it, `torch.float32` elsewhere.

    On a CPU with AMX bfloat16 products are some 6 times faster than float32; on one with AVX2 alone they are emulated
    and some 100 times slower.

    Args:
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
            Device the model will run on.
    """
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def resolve_dtype(name: str, device: str | torch.device = "cpu") -> torch.dtype:
    """
    Turns `"auto"`, `"float32"`, `"bfloat16"` or `"float16"` into a torch type; `"auto"` asks [`fast_dtype`].

    Raises:
        `ValueError`: for any other name.
    """
    if name == "auto":
        return fast_dtype(device)
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; choose one of auto, {', '.join(DTYPES)}.")
    return DTYPES[name]
