"""Losses equal their naive forms, values and gradients; drawn positions are unbiased and belong to their row alone."""

import pytest
import torch
from torch import nn

from trainers.distillation import losses
from trainers.distillation.losses import agreement, alignment_loss, divergence, head_loss, row_seeds, sample_positions
from trainers.distillation.trl_compat import tiled_divergence, tiled_log_probs


N, D, D_TEACHER, V = 21, 16, 12, 50
BETAS = (0.0, 0.5, 1.0)


@pytest.fixture
def hidden():
    """Hidden states and heads of a student and a wider-apart teacher, targets, and weights with zeros among them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    weights = torch.rand(N, generator=generator) * (torch.rand(N, generator=generator) > 0.3)
    targets = torch.randint(V, (N,), generator=generator)
    student = normal(N, D).requires_grad_(), normal(V, D).requires_grad_()
    return *student, normal(N, D_TEACHER), normal(V, D_TEACHER), targets, weights


def naive(hidden, beta, temperature, kd_weight, ce_weight):
    """The definition, with every logit in memory and probabilities instead of log-probabilities where that is safe."""
    student, head, teacher, teacher_head, targets, weights = hidden
    logits = student @ head.T
    p = (logits / temperature).softmax(-1)
    q = (teacher @ teacher_head.T / temperature).softmax(-1)
    mixture = beta * q + (1 - beta) * p
    if beta == 0:
        kd = (q * (q / p).log()).sum(-1)
    elif beta == 1:
        kd = (p * (p / q).log()).sum(-1)
    else:
        kd = beta * (q * (q / mixture).log()).sum(-1) + (1 - beta) * (p * (p / mixture).log()).sum(-1)
    ce = nn.functional.cross_entropy(logits, targets, reduction="none")
    return ((kd_weight * kd + ce_weight * ce) * weights).sum(), (kd * weights).sum(), (ce * weights).sum()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergence_is_the_naive_one(hidden, beta, temperature):
    student, head, teacher, teacher_head, _, weights = hidden
    per_position = divergence(student @ head.T, teacher @ teacher_head.T, beta, temperature)
    expected = naive(hidden, beta, temperature, 1.0, 0.0)[1]
    torch.testing.assert_close((per_position * weights).sum(), expected)
    assert (per_position >= 0).all()


@pytest.mark.parametrize("kernels", ["0", "1"], ids=["PyTorch", "kernels where there is a compiler"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_head_loss_has_the_naive_value_and_gradients(hidden, beta, ce_weight, kernels, monkeypatch):
    monkeypatch.setenv("HF_RAD_CPU_KERNELS", kernels)
    # Several parts, the last one shorter.
    monkeypatch.setattr(losses, "POSITIONS_AT_ONCE", 8)
    student, head = hidden[:2]
    expected, kd, ce = naive(hidden, beta, 2.0, 0.7, ce_weight)
    expected_grads = torch.autograd.grad(3 * expected, (student, head))
    loss, sums = head_loss(*hidden, beta=beta, temperature=2.0, kd_weight=0.7, ce_weight=ce_weight)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(sums, torch.stack([kd, ce if ce_weight else torch.zeros(())]))
    for grad, expected_grad in zip(torch.autograd.grad(3 * loss, (student, head)), expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("beta", BETAS)
def test_trl_kernel_is_the_same_divergence(hidden, beta):
    student, head, teacher, teacher_head, targets, weights = hidden
    expected, _, _ = naive(hidden, beta, 2.0, 1.0, 0.0)
    expected_grads = torch.autograd.grad(expected, (student, head))
    loss = (tiled_divergence(student, head, teacher, teacher_head, beta, 2.0) * weights).sum()
    torch.testing.assert_close(loss, expected)
    for grad, expected_grad in zip(torch.autograd.grad(loss, (student, head)), expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)
    ce = -(tiled_log_probs(student, head, targets) * weights).sum()
    torch.testing.assert_close(ce, naive(hidden, beta, 1.0, 0.0, 1.0)[0])


def test_a_frozen_head_gets_no_gradient_and_evaluation_none_at_all(hidden):
    student, head, *rest = hidden
    loss, _ = head_loss(student, head.detach(), *rest)
    loss.backward()
    assert student.grad.abs().sum() > 0 and head.grad is None
    with torch.no_grad():
        assert not head_loss(student, head, *rest)[0].requires_grad


def test_nothing_that_counts_gives_a_loss_of_zero(hidden):
    student, head, teacher, teacher_head, targets, weights = hidden
    for kept in (slice(0, 0), slice(0, N)):
        loss, _ = head_loss(
            student[kept], head, teacher[kept], teacher_head, targets[kept], torch.zeros_like(weights[kept])
        )
        assert loss.item() == 0
        assert not torch.autograd.grad(loss, head)[0].any()


def test_equal_models_do_not_diverge_and_agree(hidden):
    student, head, teacher, teacher_head, targets, weights = hidden
    loss, _ = head_loss(student, head, student.detach(), head.detach(), targets, weights)
    assert loss.abs() < 1e-5
    assert agreement(student, head, student, head).tolist() == [N, N]
    expected = ((student @ head.T).argmax(-1) == (teacher @ teacher_head.T).argmax(-1)).sum()
    assert agreement(student, head, teacher, teacher_head).tolist() == [expected, N]
    assert agreement(student, head, teacher, teacher_head, most=5)[1] == 5


@pytest.mark.parametrize("loss_type", losses.ALIGNMENT_LOSSES)
def test_alignment_losses_are_their_definitions_at_counted_positions(loss_type):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 8)
    counted = torch.rand(2, 5) > 0.4
    loss, sums = alignment_loss(student, teacher, counted, loss_type)
    expected = 0.0
    for s, t in zip(student[counted], teacher[counted], strict=True):
        difference = (s - t).norm()
        expected += {"l2": difference, "mse": difference**2 / 8, "relative": (difference / t.norm()) ** 2}[loss_type]
    torch.testing.assert_close(loss, expected)
    error = (student - teacher)[counted].square().sum(), teacher[counted].square().sum()
    torch.testing.assert_close(sums, torch.stack(error).detach())
    grad = torch.autograd.grad(loss, student)[0]
    assert grad[counted].abs().min() > 0 and not grad[~counted].any()


@pytest.mark.parametrize("loss_type", losses.ALIGNMENT_LOSSES)
def test_a_perfect_match_and_a_zero_target_have_finite_gradients(loss_type):
    student = torch.ones(1, 2, 4, requires_grad=True)
    for teacher in (torch.ones(1, 2, 4), torch.zeros(1, 2, 4)):
        loss, _ = alignment_loss(student, teacher, torch.ones(1, 2), loss_type)
        assert torch.autograd.grad(loss, student)[0].isfinite().all()


def test_an_unknown_alignment_loss_is_named():
    with pytest.raises(ValueError, match="alignment_loss_type is 'cosine'; choose one of l2, mse, relative"):
        alignment_loss(torch.ones(1, 1, 1), torch.ones(1, 1, 1), torch.ones(1, 1), "cosine")


def test_drawn_positions_estimate_the_sum_without_bias():
    torch.manual_seed(0)
    values, counted = torch.rand(3, 40), torch.rand(3, 40) > 0.3
    counted[1, 5:] = False  # fewer positions than are drawn
    estimates = []
    for seed in range(4000):
        rows, columns, weights = sample_positions(counted, 6, [seed, seed + 1, seed + 2])
        assert counted[rows, columns].all() and len({*zip(rows.tolist(), columns.tolist(), strict=True)}) == len(rows)
        assert len(rows) == 6 + min(6, counted[1].sum()) + 6
        estimates.append((values[rows, columns] * weights).sum())
    estimates = torch.stack(estimates)
    error = estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - values[counted].sum()) < 4 * error


def test_without_a_limit_every_counted_position_is_taken_once():
    counted = torch.tensor([[True, False, True], [False, False, True]])
    rows, columns, weights = sample_positions(counted, None, [0, 0])
    assert [*zip(rows.tolist(), columns.tolist(), strict=True)] == [(0, 0), (0, 2), (1, 2)]
    assert weights.tolist() == [1, 1, 1]


def test_a_row_draws_the_same_positions_in_any_batch_and_others_at_another_step():
    tokens = torch.randint(50, (4, 64), generator=torch.Generator().manual_seed(0))
    seeds = row_seeds(tokens, 7)
    assert seeds == [row_seeds(row[None], 7)[0] for row in tokens]
    assert len({*seeds, *row_seeds(tokens, 8)}) == 8
    assert row_seeds(tokens.flip(1), 7) != seeds
    assert row_seeds(nn.functional.pad(tokens, (0, 9), value=-100), 7) == seeds
    counted = torch.ones(4, 64, dtype=torch.bool)
    rows, columns, _ = sample_positions(counted, 5, seeds)
    for row in range(4):
        assert columns[rows == row].tolist() == sample_positions(counted[:1], 5, seeds[row : row + 1])[1].tolist()
