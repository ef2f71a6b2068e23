"""The scan: chunked form and one-token step against the sequential recurrence in float64, in three decay regimes."""

import pytest
import torch
from torch.nn.functional import softplus

from modeling_rad_hybrid.ssd import ssd, ssd_sequential, ssd_step


REGIMES = {
    "typical": lambda shape: torch.randn(shape) * 1.5 - 3,
    "long memory": lambda shape: torch.randn(shape) - 7,
    "extreme": lambda shape: torch.rand(shape) * 60 - 40,
}
HEADS, HEAD_DIM = 3, 16


def inputs(tokens, state_size, regime="typical", batch=2):
    torch.manual_seed(tokens * 100 + state_size)
    x = torch.randn(batch, tokens, HEADS, HEAD_DIM)
    B = torch.randn(batch, tokens, HEADS, state_size) / state_size**0.5
    C = torch.randn(batch, tokens, HEADS, state_size)
    log_a = -softplus(REGIMES[regime]((batch, tokens, HEADS)))
    return x, log_a, B, C, torch.randn(batch, HEADS, HEAD_DIM, state_size)


def relative_error(ours, oracle):
    return ((ours.double() - oracle).norm() / oracle.norm()).item()


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("state_size", [4, 8, 16, 64])
@pytest.mark.parametrize("tokens", [1, 31, 32, 75, 203])
def test_chunked_equals_sequential(tokens, state_size, regime):
    x, log_a, B, C, state = inputs(tokens, state_size, regime)
    y, last = ssd(x, log_a, B, C, state)
    oracle_y, oracle_last = ssd_sequential(*(t.double() for t in (x, log_a, B, C, state)))
    assert relative_error(y, oracle_y) < 1e-5
    assert relative_error(last, oracle_last) < 1e-5


@pytest.mark.parametrize("state_size", [4, 8, 16, 64])
def test_step_equals_sequential(state_size):
    x, log_a, B, C, state = inputs(33, state_size)
    oracle_y, oracle_last = ssd_sequential(*(t.double() for t in (x, log_a, B, C, state)))
    outputs = []
    for t in range(x.shape[1]):
        y, state = ssd_step(x[:, t], log_a[:, t], B[:, t], C[:, t], state)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1).double(), oracle_y, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.double(), oracle_last, atol=1e-5, rtol=1e-5)


def test_long_sequences_pass_the_state_between_spans():
    x, log_a, B, C, state = inputs(64 * 8 + 5, 8, "long memory", batch=1)
    y, last = ssd(x, log_a, B, C, state, chunk_size=4)
    oracle_y, oracle_last = ssd_sequential(*(t.double() for t in (x, log_a, B, C, state)))
    assert relative_error(y, oracle_y) < 1e-5 and relative_error(last, oracle_last) < 1e-5


def test_gradients_equal_those_of_the_sequential_form():
    *tensors, state = inputs(45, 8)
    leaves = [t.clone().requires_grad_() for t in tensors]
    doubles = [t.double().requires_grad_() for t in tensors]
    weight = torch.randn_like(tensors[0])
    (ssd(*leaves, state)[0] * weight).sum().backward()
    (ssd_sequential(*doubles, state.double())[0] * weight).sum().backward()
    for ours, oracle in zip(leaves, doubles, strict=True):
        assert relative_error(ours.grad, oracle.grad) < 1e-5


def test_documents_do_not_touch_each_other():
    x, log_a, B, C, state = inputs(100, 8, batch=1)
    idx = torch.tensor([0] * 41 + [1] * 20 + [2] * 39)[None]
    y, last = ssd(x, log_a, B, C, None, idx)
    alone, alone_last = ssd_sequential(*(t[:, 61:].double() for t in (x, log_a, B, C)))
    assert relative_error(y[:, 61:], alone) < 1e-5 and relative_error(last, alone_last) < 1e-5
    other = [t.clone() for t in (x, log_a, B, C)]
    for tensor in other:
        tensor[:, :41] = -tensor[:, :41].abs() * 3
    changed, changed_last = ssd(*other, None, idx)
    assert torch.equal(changed[:, 41:], y[:, 41:]) and torch.equal(changed_last, last)
    assert not torch.equal(changed[:, :41], y[:, :41])


def test_fast_decays_before_a_late_document_stay_finite():
    x, _, B, C = inputs(32, 8)[:4]
    # From the first document's end to the chunk's end the decays differ by e^240, more than a float32 can hold.
    log_a = torch.full(x.shape[:3], -8.0, requires_grad=True)
    seq_idx = torch.tensor([0] * 31 + [1]).expand(2, -1)
    y, state = ssd(x, log_a, B, C, seq_idx=seq_idx)
    torch.testing.assert_close((y, state), ssd_sequential(x, log_a, B, C, seq_idx=seq_idx))
    (y.sum() + state.sum()).backward()
    assert log_a.grad.isfinite().all()


def test_state_stays_float32_under_bfloat16():
    x, log_a, B, C, state = inputs(40, 8)
    y, last = ssd(x.bfloat16(), log_a, B.bfloat16(), C.bfloat16(), state)
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32


def test_gradients_of_packed_rows_are_exact_under_fast_decays():
    x, log_a, B, C, _ = inputs(200, 8, "extreme")
    idx = torch.tensor([[0] * 66 + [1] * 134] * 2)
    leaves = [t.clone().requires_grad_() for t in (x, log_a, B, C)]
    doubles = [t.double().requires_grad_() for t in (x, log_a, B, C)]
    weight = torch.randn_like(x)
    (ssd(*leaves, None, idx)[0] * weight).sum().backward()
    (ssd_sequential(*doubles, None, idx)[0] * weight).sum().backward()
    for ours, oracle in zip(leaves, doubles, strict=True):
        assert relative_error(ours.grad, oracle.grad) < 1e-4
