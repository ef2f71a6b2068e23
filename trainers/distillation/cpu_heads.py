"""
Training of the recurrent heads on a CPU: one pass of C++ instead of many passes of PyTorch.

Between the projections of a layer PyTorch goes over its tensors some hundred times, forward and backward; on a CPU with
matrix units that takes longer than all matrix products. `cpu_heads.cpp` goes over them once each way. It is compiled on
first use by the machine's own C++ compiler (a few seconds, kept in the cache of hf-rad); without one, training stays
with PyTorch.

Shape letters: B batch, T tokens, H recurrent heads, P head dim, N state, K convolution width.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch

from modeling_rad_hybrid import RadHybridForCausalLM
from trainers.files import atomic_path


SOURCE = Path(__file__).with_suffix(".cpp")
COMPILERS = ("g++", "c++", "clang++")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++17")
# Sums may be taken in another order; infinities and NaN stay what they are.
FLAGS += ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or `None` on a machine that cannot compile or load them."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None or platform.system() != "Linux":
        return None
    flags = FLAGS + (("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ())
    # Another processor may not know this one's instructions.
    built_for = f"{platform.node()} {platform.processor()} {_cpu_flags()} {flags}".encode() + SOURCE.read_bytes()
    folder = Path(os.environ.get("HF_RAD_CACHE") or Path.home() / ".cache" / "hf-rad")
    path = folder / f"cpu_heads-{hashlib.sha256(built_for).hexdigest()[:16]}.so"
    try:
        if not path.exists():
            with atomic_path(path) as temporary:
                subprocess.run([compiler, *flags, "-o", str(temporary), str(SOURCE)], check=True, capture_output=True)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


class _Mix(torch.autograd.Function):
    """Convolution, recurrence, skip and gate of one layer: `[B, T, W]` to `[B, T, H P]`."""

    @staticmethod
    def forward(ctx, projected, weight, skip, seq_idx, sizes):
        projected = projected.contiguous()
        floats = weight.float().contiguous(), skip.float().contiguous()
        batch, tokens, _ = projected.shape
        out = projected.new_empty(batch, tokens, sizes[0] * sizes[1])
        ctx.sizes = (ctypes.c_int64 * 6)(batch, tokens, *sizes, weight.shape[2])
        ctx.save_for_backward(projected, *floats, seq_idx)
        ctx.dtypes = weight.dtype, skip.dtype
        _call("forward", ctx.sizes, projected, *floats, seq_idx, out)
        return out

    @staticmethod
    def backward(ctx, dout):
        projected, weight, skip, seq_idx = ctx.saved_tensors
        gradient = torch.empty_like(projected)
        dweight, dskip = (t.new_empty(len(projected), *t.shape) for t in (weight, skip))
        dout = dout.to(projected.dtype).contiguous()
        _call("backward", ctx.sizes, projected, weight, skip, seq_idx, dout, gradient, dweight, dskip)
        return gradient, dweight.sum(0).to(ctx.dtypes[0]), dskip.sum(0).to(ctx.dtypes[1]), None, None


def _call(function: str, sizes, projected: torch.Tensor, *tensors: torch.Tensor | None) -> None:
    places = (None if t is None else ctypes.c_void_p(t.data_ptr()) for t in (projected, *tensors))
    getattr(library(), f"{function}_{NAMES[projected.dtype]}")(ctypes.byref(sizes), *places)


def mix(ssm, projected: torch.Tensor, seq_idx: torch.Tensor | None) -> torch.Tensor:
    """
    What [`~modeling_rad_hybrid.discrete_mamba2.DiscreteMamba2.features`] does after the input projection, without a cache.

    Args:
        ssm (`DiscreteMamba2`): the recurrent heads of a layer.
        projected (`torch.Tensor`): what their input projection gave, `[B, T, 2 H P + 2 H N + H]`.
        seq_idx (`torch.Tensor`, *optional*): document of each token, `[B, T]`.

    Returns:
        `torch.Tensor`: `[B, T, H P]`.
    """
    seq_idx = None if seq_idx is None else seq_idx.to(torch.int32).contiguous()
    sizes = ssm.num_heads, ssm.head_dim, ssm.state_size
    return _Mix.apply(projected, ssm.conv1d.weight, ssm.D, seq_idx, sizes)


@contextmanager
def fast_heads(student: RadHybridForCausalLM) -> Iterator[None]:
    """Lets the recurrent heads of a student on a CPU work by the compiled kernels while the block runs."""
    layers = [layer.mixer.ssm for layer in student.model.layers if layer.mixer.ssm is not None]
    fits = student.device.type == "cpu" and os.environ.get("HF_RAD_CPU_KERNELS", "1") != "0" and library() is not None
    for ssm in layers:
        ssm.training_kernel = partial(mix, ssm) if fits and ssm.backend == "auto" else None
    try:
        yield
    finally:
        for ssm in layers:
            ssm.training_kernel = None
