"""
A linear layer of any width that a GPU multiplies by its fast kernels.

The recurrent heads' input projection is 2 P + 2 N + 1 numbers wide for each head, odd in many layers. In half precision
tensor cores want multiples of 8, and cuBLAS falls back to kernels several times slower. Here rows of zeros are added to
the weight for the product alone; parameters, and so checkpoints, stay as they are.

Shape letters: D inputs, O outputs.
"""

import torch
from torch import nn


# Numbers of 16 bytes in half precision.
ALIGNMENT = 8
# Rows of the input from which the faster product is worth the copy of the weight.
FEWEST_ROWS = 4096


class AlignedLinear(nn.Linear):
    """
    [`torch.nn.Linear`] with a bias; a long prefill multiplies by a weight filled up to a width that tensor cores work on.

    Training stays with the plain product: no step of it was seen to gain (benchmarks/results.md, "Training").
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        few = hidden_states.numel() < FEWEST_ROWS * self.in_features
        if few or torch.is_grad_enabled() or not hidden_states.is_cuda or self.out_features % ALIGNMENT == 0:
            return super().forward(hidden_states)
        return self.aligned(hidden_states)

    def aligned(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps `[..., D]` to `[..., O]`, a view of rows of a multiple of 8 numbers."""
        gap = -self.out_features % ALIGNMENT
        weight, bias = nn.functional.pad(self.weight, (0, 0, 0, gap)), nn.functional.pad(self.bias, (0, gap))
        return nn.functional.linear(hidden_states, weight, bias)[..., : self.out_features]
