"""
The only place that imports TRL names which TRL does not promise to keep (TRL 1.16).

A new TRL version is tried by running `tests/test_losses.py` and `tests/test_distill_trainer.py`.
"""

import torch
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import maybe_gather_lm_head_ctx


# Calls a function in place of a wrapped model's forward, so that DDP and FSDP see one forward of their module. It
# takes (wrapped, unwrapped, function, *args) and loses accelerate's autocast, which the caller enters again.
redirect_forward = _ForwardRedirection()

# Makes parameters that ZeRO-3 partitions whole while its block runs.
gathered = maybe_gather_lm_head_ctx

VOCABULARY_TILE = 32768


def tiled_divergence(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    beta: float,
    temperature: float,
) -> torch.Tensor:
    """
    TRL's tiled divergence, with Triton on CUDA: neither model's logits exist in full.

    Args:
        student_hidden (`torch.Tensor`): hidden states before the head, `[N, D]`.
        student_head (`torch.Tensor`): weight of the student's head, `[V, D]`.
        teacher_hidden (`torch.Tensor`): as `student_hidden`; the width may differ.
        teacher_head (`torch.Tensor`): as `student_head`, over the same vocabulary.
        beta (`float`): 0 forward KL, 1 reverse KL, between them the generalized Jensen-Shannon divergence.
        temperature (`float`): divides both models' logits.

    Returns:
        `torch.Tensor`: divergence of each position in nats, `[N]`, float32.
    """
    return ChunkedDivergenceFunction.apply(
        student_hidden, student_head, None, teacher_hidden, teacher_head, None, beta, temperature
    )[0]


def tiled_log_probs(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probability of each target `[N]` under `hidden @ head.T`, tiled as above; `[N]`, float32."""
    return ChunkedLogProbFunction.apply(hidden, head, None, targets, 1.0, VOCABULARY_TILE, None, 1.0, ())[0]
