"""
A linear layer of any width whose results stand in rows that a GPU's fast products can write.

The recurrent heads' input projection is 2 P + 2 N + 1 numbers wide for each head, odd in many layers. Rows of odd width
begin at any byte; tensor cores want multiples of 16, and cuBLAS falls back to a kernel several times slower. Here the
rows are stored with a gap behind each; weights, and so checkpoints, stay as they are.

Shape letters: R rows, D inputs, O outputs.
"""

import torch
from torch import nn


# Numbers of 16 bytes in half precision.
ALIGNMENT = 8
# One set of operators for each copy of this file: a student's own code may be loaded beside the package.
SPACE = "".join(character if character.isalnum() else "_" for character in __name__)


def _gap(width: int) -> int:
    return -width % ALIGNMENT


@torch.library.custom_op(f"{SPACE}::aligned_product", mutates_args=())
def aligned_product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """
    Product of rows `[R, D]` with a weight `[O, D]`, plus a bias `[O]`.

    Returns:
        `torch.Tensor`: `[R, O + gap]`; what stands in the gap is left undefined.
    """
    width = weight.shape[0]
    out = rows.new_empty(rows.shape[0], width + _gap(width))
    torch.addmm(bias, rows, weight.t(), out=out[:, :width])
    return out


@aligned_product.register_fake
def _(rows, weight, bias):
    return rows.new_empty(rows.shape[0], weight.shape[0] + _gap(weight.shape[0]))


def _save(ctx, inputs, output):
    rows, weight, _ = inputs
    ctx.save_for_backward(rows, weight)


def _backward(ctx, gradient):
    rows, weight = ctx.saved_tensors
    gradient = gradient[:, : weight.shape[0]]
    of_rows, of_weight, of_bias = ctx.needs_input_grad
    return (
        gradient @ weight if of_rows else None,
        gradient.t() @ rows if of_weight else None,
        gradient.sum(0) if of_bias else None,
    )


aligned_product.register_autograd(_backward, setup_context=_save)


class AlignedLinear(nn.Linear):
    """[`torch.nn.Linear`] with a bias; on a GPU its results `[..., O]` lie in memory in rows of a multiple of 8 numbers."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not hidden_states.is_cuda or not _gap(self.out_features):
            return super().forward(hidden_states)
        return self.aligned(hidden_states)

    def aligned(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tensors = hidden_states.flatten(0, -2), self.weight, self.bias
        kind = hidden_states.device.type
        if torch.is_autocast_enabled(kind):
            tensors = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)
        return aligned_product(*tensors)[:, : self.out_features].unflatten(0, hidden_states.shape[:-1])
