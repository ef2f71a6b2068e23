"""
Calibration in closed form: fits what the recurrent heads of each layer write, so that it is what the teacher's heads
wrote there. No gradient, one pass over some fifty thousand tokens.

A recurrence has no softmax, so converted heads start far too loud. For each layer, with F the features that
`ssm.out_proj` reads when the layer gets the TEACHER's input, and Y what the converted heads gave there, the projection
and its bias solve the ridge regression min |F W + b - Y|^2 + ridge |W|^2 by normal equations in float64.
"""

from collections.abc import Iterable

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from modeling_rad_hybrid import RadHybridForCausalLM
from trainers.precision import fast_dtype


# Ridge strength as a share of the mean squared feature.
RIDGE = 1e-5


class NormalEquations:
    """Sums of F^T F, F^T Y and Y^T Y over batches, with a column of ones in F for the bias."""

    def __init__(self):
        self.gram = self.cross = self.energy = 0.0

    def add(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        """Takes in `features` `[..., n]` and `targets` `[..., m]`."""
        features, targets = features.flatten(0, -2).float(), targets.flatten(0, -2).float()
        features = nn.functional.pad(features, (0, 1), value=1.0)
        # Products of one batch in float32 (in bfloat16 under autocast), sums over batches in float64.
        self.gram = self.gram + (features.T @ features).double()
        self.cross = self.cross + (features.T @ targets).double()
        self.energy = self.energy + targets.double().pow(2).sum()

    def solve(self, ridge: float) -> torch.Tensor:
        """The fit, `[n + 1, m]`, its last row the bias (which is not drawn to zero)."""
        penalty = torch.full_like(self.gram[0], ridge * self.gram.diagonal()[:-1].mean().item())
        penalty[-1] = 0.0
        gram = self.gram + penalty.diag()
        # A feature that is zero everywhere has a zero row without ridge: least squares by pseudo-inverse copes.
        return torch.linalg.lstsq(gram.cpu(), self.cross.cpu(), driver="gelsd").solution.to(gram.device)

    def residual(self, fit: torch.Tensor) -> float:
        """|F fit - Y|^2 / |Y|^2 over all that was taken in."""
        error = self.energy - 2 * (fit * self.cross).sum() + (fit * (self.gram @ fit)).sum()
        return (error.clamp(min=0) / self.energy.clamp(min=torch.finfo(torch.float64).tiny)).sqrt().item()


@torch.no_grad()
def calibrate(
    teacher: PreTrainedModel,
    student: RadHybridForCausalLM,
    batches: Iterable[torch.Tensor],
    ridge: float = RIDGE,
    progress: bool = True,
) -> list[tuple[float, float] | None]:
    """
    Fits the output projection and bias of every layer's recurrent heads and, in `parallel` mixing, then the adapters.

    Args:
        teacher (`PreTrainedModel`):
            The teacher the student was converted from.
        student ([`RadHybridForCausalLM`]):
            Changed in place.
        batches (`Iterable[torch.Tensor]`):
            Token ids, each batch `[B, T]`, without padding.
        ridge (`float`, *optional*, defaults to 1e-5):
            Strength of the penalty, as a share of the mean squared feature.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `list`: for each layer the relative error |fit - target| / |target| before and after, `None` where every head is
        kept.

    Raises:
        `ValueError`: when there is no batch, or the features are not finite.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("Calibration was given no tokens; give at least one batch of token ids.")
    mixers = [layer.mixer for layer in student.model.layers]
    residuals: list[tuple[float, float] | None] = [None] * len(mixers)
    equations = _collect(teacher, mixers, batches, _recurrent_terms, "calibrating", progress)
    for index, sums in equations.items():
        residuals[index] = _fit(mixers[index].ssm.out_proj, sums, ridge, index)
    if student.config.mixing == "parallel":
        for index, sums in _collect(teacher, mixers, batches, _adapter_terms, "fitting adapters", progress).items():
            _fit(mixers[index].adapter.proj, sums, ridge, index)
    return residuals


def _recurrent_terms(mixer: nn.Module, hidden_states, attended, target):
    """Features of the recurrent heads and what they have to give, `None` in a layer without any."""
    if mixer.ssm is None:
        return None
    # In parallel mixing the recurrent heads stand for all heads.
    rest = target if attended is None or mixer.adapter is not None else target - attended
    return mixer.ssm.features(hidden_states), rest


def _adapter_terms(mixer: nn.Module, hidden_states, attended, target):
    """Features of a parallel layer's adapter and what it has to give, `None` in a layer without adapter."""
    if mixer.adapter is None:
        return None
    recurrent = mixer.ssm(hidden_states)
    return mixer.adapter.normalize(attended, recurrent), 2 * target.float() - recurrent.float()


def _collect(teacher, mixers, batches, terms, what: str, progress: bool) -> dict[int, NormalEquations]:
    """Runs the teacher over the batches and sums up, for each layer, the terms of its fit."""
    equations: dict[int, NormalEquations] = {}

    def take_in(module, args, kwargs, output):
        mixer = mixers[module.layer_idx]
        hidden_states = args[0] if args else kwargs["hidden_states"]
        attended = None
        if mixer.attention is not None:
            attended, _ = mixer.attention(
                hidden_states, kwargs["position_embeddings"], attention_mask=kwargs.get("attention_mask")
            )
        pair = terms(mixer, hidden_states, attended, output[0])
        if pair is not None:
            equations.setdefault(module.layer_idx, NormalEquations()).add(*pair)

    hooks = [layer.self_attn.register_forward_hook(take_in, with_kwargs=True) for layer in teacher.model.layers]
    dtype = fast_dtype(teacher.device) if len(batches) * batches[0].numel() > 2**13 else torch.float32
    try:
        with torch.autocast(
            teacher.device.type, dtype=torch.bfloat16, enabled=torch.bfloat16 in (dtype, teacher.dtype)
        ):
            for batch in tqdm(batches, desc=what, unit="batch", disable=not progress):
                teacher.model(input_ids=batch.to(teacher.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return equations


def _fit(projection: nn.Linear, sums: NormalEquations, ridge: float, layer: int) -> tuple[float, float]:
    """Solves one layer's fit, writes it, and returns the relative error before and after."""
    if not torch.isfinite(sums.gram).all():
        raise ValueError(
            f"The features of layer {layer} are not finite; the student or its teacher holds NaN or infinite weights."
        )
    before = torch.cat([projection.weight.T, projection.bias[None]]).double()
    fit = sums.solve(ridge)
    projection.weight.copy_(fit[:-1].T)
    projection.bias.copy_(fit[-1])
    return sums.residual(before), sums.residual(fit)
