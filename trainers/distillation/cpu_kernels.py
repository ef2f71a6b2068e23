"""
Kernels for training on a CPU: one pass of C++ where PyTorch takes many.

On a CPU with matrix units all that a stage does between its matrix products, in PyTorch, takes longer than the products.
`cpu_kernels.cpp` holds the two greatest parts of it: the recurrent heads between their projections, and the divergence
from the teacher's logits. It is compiled on first use by the machine's own C++ compiler (a few seconds, kept in the cache
of hf-rad); without one, or with `HF_RAD_CPU_KERNELS=0`, training stays with PyTorch.

Shape letters: B batch, T tokens, H recurrent heads, P head dim, N state, K convolution width, V vocabulary, R rows.
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


def available() -> bool:
    """Whether the kernels can be used on this machine."""
    return os.environ.get("HF_RAD_CPU_KERNELS") != "0" and _library() is not None


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels, or `None` on a machine that cannot compile or load them."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None or platform.system() != "Linux":
        return None
    flags = FLAGS + (("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ())
    # Another processor may not know this one's instructions.
    built_for = f"{platform.machine()} {_instructions()} {flags}".encode() + SOURCE.read_bytes()
    folder = Path(os.environ.get("HF_RAD_CACHE") or Path.home() / ".cache" / "hf-rad")
    path = folder / f"cpu_kernels-{hashlib.sha256(built_for).hexdigest()[:16]}.so"
    try:
        if not path.exists():
            with atomic_path(path) as temporary:
                subprocess.run([compiler, *flags, "-o", str(temporary), str(SOURCE)], check=True, capture_output=True)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError):
        return None


def _instructions() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _call(function: str, dtype: torch.dtype, *arguments) -> None:
    places = (ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments)
    getattr(_library(), f"{function}_{NAMES[dtype]}")(*places)


class _Heads(torch.autograd.Function):
    """Convolution, recurrence, skip and gate of one layer: `[B, T, W]` to `[B, T, H P]`."""

    @staticmethod
    def forward(ctx, projected, weight, skip, seq_idx, sizes):
        batch, tokens, _ = projected.shape
        tensors = projected.contiguous(), weight.float().contiguous(), skip.float().contiguous(), seq_idx
        ctx.sizes = (ctypes.c_int64 * 6)(batch, tokens, *sizes, weight.shape[2])
        ctx.dtypes = weight.dtype, skip.dtype
        ctx.save_for_backward(*tensors)
        out = projected.new_empty(batch, tokens, sizes[0] * sizes[1])
        _call("heads", out.dtype, ctx.sizes, *tensors, out)
        return out

    @staticmethod
    def backward(ctx, dout):
        projected, weight, skip, _ = ctx.saved_tensors
        gradient = torch.empty_like(projected)
        dweight, dskip = (t.new_empty(len(projected), *t.shape) for t in (weight, skip))
        dout = dout.to(projected.dtype).contiguous()
        _call("heads_gradients", dout.dtype, ctx.sizes, *ctx.saved_tensors, dout, gradient, dweight, dskip)
        return gradient, dweight.sum(0).to(ctx.dtypes[0]), dskip.sum(0).to(ctx.dtypes[1]), None, None


def heads(ssm, projected: torch.Tensor, seq_idx: torch.Tensor | None) -> torch.Tensor:
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
    return _Heads.apply(projected, ssm.conv1d.weight, ssm.D, seq_idx, sizes)


@contextmanager
def fast_heads(student: RadHybridForCausalLM) -> Iterator[None]:
    """Lets the recurrent heads of a student on a CPU work by the kernel while the block runs."""
    layers = [layer.mixer.ssm for layer in student.model.layers if layer.mixer.ssm is not None]
    fits = student.device.type == "cpu" and student.dtype in NAMES and available()
    for ssm in layers:
        ssm.training_kernel = partial(heads, ssm) if fits and ssm.backend == "auto" else None
    try:
        yield
    finally:
        for ssm in layers:
            ssm.training_kernel = None


def forward_kl(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, weights: torch.Tensor, temperature: float
) -> torch.Tensor:
    """
    KL(teacher || student) of each row of logits `[R, V]`, and in the place of the student's logits its gradient.

    Args:
        student_logits (`torch.Tensor`): contiguous; overwritten by the gradient of the weighted sum of the results.
        teacher_logits (`torch.Tensor`): contiguous, of the same type.
        weights (`torch.Tensor`): weight of each row, `[R]`, float32.
        temperature (`float`): divides both logits.

    Returns:
        `torch.Tensor`: `[R]`, in nats, float32.
    """
    losses, scale = weights.new_empty(len(weights)), ctypes.c_float(1 / temperature)
    rows, vocabulary = map(ctypes.c_int64, student_logits.shape)
    tensors = student_logits, teacher_logits, weights.contiguous(), losses
    _call("forward_kl", student_logits.dtype, rows, vocabulary, scale, *tensors)
    return losses
