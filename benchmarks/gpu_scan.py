"""
The scan: every back end against float64, then timed where it is right.

The oracle works in float64 by blocks of 256 tokens, whole matrices inside a block. Inputs are bfloat16 numbers, so that
one oracle serves both dtypes. A back end is right in a dtype when its errors in the typical and the long-memory regime stay
below BOUND, which for gradients leaves room for the authors' call in bfloat16; what is not right is not timed.
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch.nn.functional import softplus

from benchmarks.gpu_tools import DEVICE, first_line, milliseconds, peak_bytes, relative_error
from modeling_rad_hybrid import RadHybridConfig
from modeling_rad_hybrid.discrete_mamba2 import DiscreteMamba2
from modeling_rad_hybrid.ssd import ssd, ssd_sequential


# log a = -softplus(A_log), with A_log drawn from these.
REGIMES = {
    "typical": lambda *shape: torch.randn(*shape, device=DEVICE) * 1.5 - 3,
    "long": lambda *shape: torch.randn(*shape, device=DEVICE) - 7,
    "extreme": lambda *shape: torch.rand(*shape, device=DEVICE) * 60 - 40,
}
# Greatest error of outputs and of gradients.
BOUND = {torch.bfloat16: (2e-2, 0.2), torch.float32: (2e-3, 2e-2)}
# Heads H and their size P.
SHAPES = {"1B": (32, 64), "SmolLM2": (9, 64), "tiny": (2, 16)}


def oracle(x, log_a, B, C, block: int = 256):
    """The scan in float64; [`ssd`]'s arguments without an initial state, outputs only."""
    x, log_a, B, C = (t.double() for t in (x, log_a, B, C))
    state = torch.zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3], dtype=torch.float64, device=x.device)
    outputs = []
    for start in range(0, x.shape[1], block):
        part = [t[:, start : start + block].transpose(1, 2) for t in (x, B, C)]  # [B, H, Q, P | N]
        sums = log_a[:, start : start + block].transpose(1, 2).cumsum(-1)  # [B, H, Q]
        above = torch.ones(sums.shape[-1], sums.shape[-1], dtype=torch.bool, device=x.device).triu(1)
        decays = (sums[..., :, None] - sums[..., None, :]).masked_fill(above, -torch.inf).exp()
        y = ((part[2] @ part[1].transpose(-1, -2)) * decays) @ part[0]
        y = y + (part[2] * sums.exp()[..., None]) @ state.transpose(-1, -2)
        to_end = (sums[..., -1:] - sums).exp()[..., None]
        state = state * sums[..., -1].exp()[..., None, None] + part[0].transpose(-1, -2) @ (part[1] * to_end)
        outputs.append(y.transpose(1, 2))
    return torch.cat(outputs, 1)


def prune_autotuning(keep: int = 2) -> None:
    """
    Leaves each kernel of mamba_ssm, and fla's fused one, a few of its block shapes, those near 64 x 64, which fit heads
    and states of 64 and less: with all of them the first calls take minutes.
    """
    modules = []
    try:
        from mamba_ssm.ops.triton import ssd_bmm, ssd_chunk_scan, ssd_chunk_state, ssd_combined, ssd_state_passing

        modules += [ssd_bmm, ssd_chunk_scan, ssd_chunk_state, ssd_combined, ssd_state_passing]
    except ImportError:
        print("mamba-ssm is not installed.", flush=True)
    try:
        from fla.ops.common import fused_chunk

        modules.append(fused_chunk)
    except ImportError:
        print("flash-linear-attention is not installed.", flush=True)
    for value in [value for module in modules for value in vars(module).values()]:
        from triton.runtime import Autotuner, Heuristics

        kernel = value.fn if isinstance(value, Heuristics) else value
        if isinstance(kernel, Autotuner):
            kernel.configs = sorted(kernel.configs, key=_distance_from_64)[:keep]


def _distance_from_64(config) -> int:
    names = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BV", "BK")
    return sum(abs(config.kwargs.get(name, 64) - 64) for name in names) + abs(config.num_warps - 4)


def authors(x, A_log, B, C):
    """mamba_ssm as the paper's authors call it: x divided by the step size that the kernel multiplies with."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    A = -torch.ones(x.shape[2], device=x.device)
    return mamba_chunk_scan_combined(
        (x / softplus(A_log)[..., None]).to(x.dtype), A_log.to(x.dtype), A, B, C, 128, dt_softplus=True
    )


def fla_fused(x, A_log, B, C):
    from fla.ops.simple_gla import fused_chunk_simple_gla

    return fused_chunk_simple_gla(C, B, x, -softplus(A_log.float()), scale=1.0)[0]


def ours(backend: str, x, A_log, B, C):
    return ssd(x, -softplus(A_log.float()), B, C, backend=backend)[0]


BACKENDS: dict[str, Callable] = {
    "authors' call": authors,
    "torch": partial(ours, "torch"),
    "compiled": partial(ours, "compiled"),
    "triton": partial(ours, "triton"),
    "mamba_ssm": partial(ours, "mamba_ssm"),
    "fla fused": fla_fused,
}


def draw(batch: int, tokens: int, heads: int, head_dim: int, state: int, regime: str) -> list[torch.Tensor]:
    """x, A_log, B, C and the gradient of y as bfloat16 numbers in float32."""
    sizes = (batch, tokens, heads)
    normal = partial(torch.randn, device=DEVICE)
    drawn = normal(*sizes, head_dim), REGIMES[regime](*sizes), normal(*sizes, state) / state**0.5
    drawn = *drawn, normal(*sizes, state), normal(*sizes, head_dim)
    return [t.bfloat16().float() for t in drawn]


def gradients(function: Callable, tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """The outputs and the gradients of x, A_log, B and C."""
    x, A_log, B, C, dy = tensors
    leaves = [t.to(dtype).requires_grad_() for t in (x, A_log, B, C)]
    y = function(*leaves)
    return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def errors(function: Callable, tensors: list[torch.Tensor], exact: list[torch.Tensor], dtype) -> tuple[float, float]:
    """Relative error of the outputs, and the greatest of the gradients."""
    found = [relative_error(a, b) for a, b in zip(gradients(function, tensors, dtype), exact, strict=True)]
    return found[0], max(found[1:])


def documents(batch: int, tokens: int) -> torch.Tensor:
    """Document of each token, with borders inside and at the ends of chunks."""
    borders = [tokens * part // 16 for part in (1, 2, 7)] + [58, 64, 128, 131, 188]
    return (
        (torch.arange(tokens, device=DEVICE)[:, None] >= torch.tensor(borders, device=DEVICE))
        .sum(-1)
        .expand(batch, -1)
    )


def check(report, options) -> None:
    """The default back end against the recurrence in float64: documents, initial states, ragged lengths, every dtype."""
    wrong = check_mixer(report, options)
    columns = ["shape", "N", "tokens", "dtype", "documents", "decays"]
    columns += ["y", "last state", "x", "log a", "B", "C", "first state"]
    add = report.table("Check: relative error of outputs and gradients against the recurrence in float64", columns)
    for shape, state, tokens, packed, regime, dtype in product(
        options.shapes, options.states, (61, 600), (False, True), ("typical", "extreme"), options.dtypes
    ):
        heads, head_dim = SHAPES[shape]
        x, A_log, B, C, dy = draw(2, tokens, heads, head_dim, state, regime)
        first, dlast = torch.randn(2, 2, heads, head_dim, state, device=DEVICE)
        seq_idx = documents(2, tokens) if packed else None
        # A view of one tensor, as the model has it.
        x, B, C = (
            t.unflatten(-1, (heads, -1))
            for t in torch.cat([t.flatten(2) for t in (x, B, C)], -1).split(
                [heads * head_dim, *[heads * state] * 2], -1
            )
        )
        log_a = -softplus(A_log)
        found = []
        for scan, cast, decays in ((ssd, dtype, torch.float32), (ssd_sequential, torch.float64, torch.float64)):
            kinds = cast, decays, cast, cast, decays
            leaves = [t.to(kind).requires_grad_() for t, kind in zip((x, log_a, B, C, first), kinds, strict=True)]
            y, last = scan(*leaves, seq_idx)
            total = (y * dy).sum() + (last * dlast).sum()
            found.append([y, last, *torch.autograd.grad(total, leaves)])
        pairs = [relative_error(one, other) for one, other in zip(*found, strict=True)]
        wrong += max(pairs) > (1e-4 if dtype == torch.float32 else 2e-2)
        add(shape, state, tokens, str(dtype)[6:], "several" if packed else "one", regime, *pairs)
    if wrong:
        raise RuntimeError(f"{wrong} cases of the default back end are wrong here; set ssm_backend to 'torch'.")
    print("\nThe default back end is right here.", flush=True)


def check_mixer(report, options) -> int:
    """A layer's recurrent heads, convolution and gate too, by the default back end against PyTorch in float32."""
    columns = ["shape", "N", "dtype", "documents", "outputs", "greatest of the gradients"]
    add = report.table("Check: relative error of a layer's recurrent heads against PyTorch in float32", columns)
    wrong = 0
    for shape, state, packed, dtype in product(options.shapes, options.states, (False, True), options.dtypes):
        heads, head_dim = SHAPES[shape]
        config = RadHybridConfig(
            hidden_size=256,
            num_hidden_layers=1,
            num_attention_heads=heads,
            head_dim=head_dim,
            kept_heads=[[]],
            ssm_state_size=state,
        )
        mixer = DiscreteMamba2(config, 0, heads).to(DEVICE)
        for tensor in (mixer.conv1d.weight, mixer.D):
            torch.nn.init.normal_(tensor)
        mixer.to(dtype).to(torch.float32)
        hidden = torch.randn(2, 600, 256, device=DEVICE).to(dtype)
        weight = torch.randn(2, 600, 256, device=DEVICE)
        seq_idx = documents(2, 600) if packed else None
        found = []
        for backend, kind in (("auto", dtype), ("torch", torch.float32)):
            mixer.backend = backend
            leaf = hidden.to(kind).requires_grad_()
            output = mixer.to(kind)(leaf, seq_idx=seq_idx)
            gradients = torch.autograd.grad((output * weight).sum(), [leaf, *mixer.parameters()])
            found.append([output, *gradients])
        pairs = [relative_error(one, other.double()) for one, other in zip(*found, strict=True)]
        wrong += max(pairs) > (1e-4 if dtype == torch.float32 else 3e-2)
        add(shape, state, str(dtype)[6:], "several" if packed else "one", pairs[0], max(pairs[1:]))
    return wrong


def run(report, options) -> None:
    """Errors of every back end, then milliseconds and memory of those that are right."""
    prune_autotuning()
    for case in options.scan_cases:
        time_back_ends(report, options, case, compare_back_ends(report, options, case))


def compare_back_ends(report, options, case: tuple) -> set[tuple]:
    """Errors at one (shape, N, tokens); returns the (dtype, back end) that are right."""
    shape, state, tokens = case
    columns = [f"{name} {what}" for name in REGIMES for what in ("y", "grad")]
    columns = ["shape", "N", "tokens", "dtype", "back end", *columns]
    add = report.table("Scan: relative error against float64 (batch 1)", columns)
    drawn, right = [], set()
    for regime in REGIMES:
        tensors = draw(1, tokens, *SHAPES[shape], state, regime)
        double = [t.double() for t in tensors]
        exact = gradients(lambda x, A_log, B, C: oracle(x, -softplus(A_log), B, C), double, torch.float64)
        drawn.append((tensors, exact))
    for dtype, name in product(options.dtypes, options.backends):
        try:
            found = [errors(BACKENDS[name], *pair, dtype) for pair in drawn]
        except Exception as error:
            print(f"{shape} N {state} {tokens} {dtype} {name}: {first_line(error)}", flush=True)
            continue
        add(shape, state, tokens, str(dtype)[6:], name, *(value for pair in found for value in pair))
        if all(error < bound for pair in found[:2] for error, bound in zip(pair, BOUND[dtype], strict=True)):
            right.add((dtype, name))
    return right


def time_back_ends(report, options, case: tuple, right: set[tuple]) -> None:
    """Times at one (shape, N, tokens), of the back ends that are right."""
    shape, state, tokens = case
    columns = [
        "shape",
        "N",
        "tokens",
        "batch",
        "dtype",
        "back end",
        "fwd ms",
        "fwd+bwd ms",
        "Mtokens/s",
        "peak MB",
        "speed",
    ]
    add = report.table("Scan: time and memory (speed against the authors' call, forward and backward)", columns)
    for dtype in options.dtypes:
        batch, base = max(1, options.tokens_at_once // tokens), None
        tensors = [t.to(dtype) for t in draw(batch, tokens, *SHAPES[shape], state, "typical")]
        for name in options.backends:
            if (dtype, name) not in right:
                continue
            forward_only = partial(BACKENDS[name], *tensors[:4])
            with_gradients = partial(gradients, BACKENDS[name], tensors, dtype)
            try:
                with torch.no_grad():
                    forward = milliseconds(forward_only)
                both = milliseconds(with_gradients)
                peak = peak_bytes(with_gradients) / 1e6
            except Exception as error:
                print(f"{shape} N {state} {tokens} {dtype} {name}: {first_line(error)}", flush=True)
                continue
            base = both if name == "authors' call" else base
            speed = base / both if base else None
            add(
                shape,
                state,
                tokens,
                batch,
                str(dtype)[6:],
                name,
                forward,
                both,
                batch * tokens / both / 1e3,
                peak,
                speed,
            )
