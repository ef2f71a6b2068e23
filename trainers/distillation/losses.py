"""
The losses of the stages.

Alignment (paper, section 4.3; the layer-wise stage of https://huggingface.co/papers/2408.10189): the distance between
a student mixer's output and the teacher's, both given the teacher's input of that layer. Distillation: a divergence
between the two models' next-token distributions, from hidden states and head weights, so that no `[tokens,
vocabulary]` logits of the whole batch are ever in memory.

Every loss comes as a weighted sum over positions; the trainer divides it by the count of the whole accumulated batch.

Shape letters: B batch, T tokens, D model width, V vocabulary, N positions that a loss is taken at.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainers.distillation.cpu_kernels import NAMES, available, forward_kl
from trainers.distillation.trl_compat import tiled_divergence, tiled_log_probs


ALIGNMENT_LOSSES = ("l2", "mse", "relative")
# Positions whose logits exist at once in the plain PyTorch form: enough for the products, few for a CPU's caches. 128 of
# a vocabulary of 50 thousand are 25 MB a copy.
POSITIONS_AT_ONCE = 128


def alignment_loss(
    student: torch.Tensor, teacher: torch.Tensor, counted: torch.Tensor, loss_type: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Distance between two mixers' outputs.

    Args:
        student (`torch.Tensor`): output of the student's mixer, `[B, T, D]`.
        teacher (`torch.Tensor`): output of the teacher's attention, `[B, T, D]`.
        counted (`torch.Tensor`): 1 at the positions that count, `[B, T]`.
        loss_type (`str`):
            `"l2"`: the norm of each position's difference; `"mse"`: the mean of its squares; `"relative"`: the squared
            norm over the squared norm of the teacher's output at that position.

    Returns:
        `tuple`: the sum over the counted positions, and the two sums `[2]` whose quotient is the relative error
        `||student - teacher||^2 / ||teacher||^2`, without gradient.
    """
    counted = counted.to(torch.float32)
    distances = torch.linalg.vector_norm(student.float() - teacher.float(), dim=-1)  # [B, T]
    norms = torch.linalg.vector_norm(teacher, dim=-1, dtype=torch.float32).square()  # [B, T]
    squares = distances.square()
    if loss_type == "l2":
        per_position = distances
    elif loss_type == "mse":
        per_position = squares / teacher.shape[-1]
    elif loss_type == "relative":
        per_position = squares / norms.clamp(min=1e-6)
    else:
        raise ValueError(f"alignment_loss_type is {loss_type!r}; choose one of {', '.join(ALIGNMENT_LOSSES)}.")
    measured = torch.stack([(squares.detach() * counted).sum(), (norms * counted).sum()])
    return (per_position * counted).sum(), measured


def divergence(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, beta: float = 0.0, temperature: float = 1.0
) -> torch.Tensor:
    """
    Generalized Jensen-Shannon divergence of each position, in nats, in its plain form.

    Args:
        student_logits (`torch.Tensor`): `[..., V]`.
        teacher_logits (`torch.Tensor`): `[..., V]`.
        beta (`float`, *optional*, defaults to 0.0):
            0 is the forward KL(teacher || student), 1 the reverse KL(student || teacher). Between them, with the
            mixture m = beta * teacher + (1 - beta) * student, beta * KL(teacher || m) + (1 - beta) * KL(student || m)
            (https://huggingface.co/papers/2306.13649, equation 1).
        temperature (`float`, *optional*, defaults to 1.0): divides both logits; the result is not scaled back.

    Returns:
        `torch.Tensor`: `[...]`, float32.
    """
    if temperature != 1:
        student_logits, teacher_logits = student_logits.float() / temperature, teacher_logits.float() / temperature
    student, teacher = (t.log_softmax(-1, dtype=torch.float32) for t in (student_logits, teacher_logits))
    if beta == 0:
        return _kl(teacher, student)
    if beta == 1:
        return _kl(student, teacher)
    weights = torch.tensor([beta, 1 - beta], device=student.device).log()
    mixture = torch.logaddexp(teacher + weights[0], student + weights[1])
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def head_loss(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    beta: float = 0.0,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `kd_weight` times the divergence from the teacher plus `ce_weight` times the cross-entropy of the data.

    On CUDA TRL's tiled kernels do the work. Elsewhere logits exist for some positions at a time and their gradient is
    taken in the forward pass, so that no product is done twice.

    Args:
        student_hidden (`torch.Tensor`): last hidden states at the N positions, `[N, D]`.
        student_head (`torch.Tensor`): weight of the student's head, `[V, D]`.
        teacher_hidden (`torch.Tensor`): `[N, D of the teacher]`.
        teacher_head (`torch.Tensor`): `[V, D of the teacher]`.
        targets (`torch.Tensor`): next tokens `[N]`, read for the cross-entropy only.
        weights (`torch.Tensor`): weight of each position in the sums, `[N]`.
        beta (`float`, *optional*, defaults to 0.0): as in [`divergence`].
        temperature (`float`, *optional*, defaults to 1.0): as in [`divergence`].
        kd_weight (`float`, *optional*, defaults to 1.0): factor of the divergence.
        ce_weight (`float`, *optional*, defaults to 0.0): factor of the cross-entropy; at 0 it is not computed.

    Returns:
        `tuple`: the loss summed over positions, and the sums `[divergence, cross-entropy]` `[2]` without gradient.
    """
    if student_hidden.device.type != "cuda":
        return _ChunkedHeadLoss.apply(
            student_hidden,
            student_head,
            teacher_hidden,
            teacher_head,
            targets,
            weights,
            (beta, temperature, kd_weight, ce_weight),
            torch.is_grad_enabled(),
        )
    kd = (
        tiled_divergence(student_hidden, student_head, teacher_hidden, teacher_head, beta, temperature) * weights
    ).sum()
    ce = torch.zeros_like(kd)
    if ce_weight:
        ce = -(tiled_log_probs(student_hidden, student_head, targets) * weights).sum()
    return kd_weight * kd + ce_weight * ce, torch.stack([kd, ce]).detach()


def _part(hidden, head, teacher_logits, targets, weights, settings):
    """Loss, its two sums `[2]` and, where they are wanted, the gradients of hidden states and head."""
    beta, temperature, kd_weight, ce_weight = settings
    logits = nn.functional.linear(hidden, head)  # [n, V]
    kd = (divergence(logits, teacher_logits, beta, temperature) * weights).sum()
    ce = torch.zeros_like(kd)
    if ce_weight:
        per_position = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        ce = (per_position * weights).sum()
    loss = kd_weight * kd + ce_weight * ce
    wanted = [tensor for tensor in (hidden, head) if tensor.requires_grad]
    grads = torch.autograd.grad(loss, wanted) if wanted else ()
    return loss.detach(), torch.stack([kd, ce]).detach(), grads


@torch.no_grad()
def _part_by_kernel(hidden, head, teacher_logits, targets, weights, settings):
    """As [`_part`], for the forward KL alone."""
    _, temperature, kd_weight, _ = settings
    logits = nn.functional.linear(hidden, head)  # [n, V], then their gradient
    kd = (forward_kl(logits, teacher_logits, kd_weight * weights, temperature) * weights).sum()
    grads = logits @ head if hidden.requires_grad else None, logits.t() @ hidden if head.requires_grad else None
    return kd_weight * kd, torch.stack([kd, torch.zeros_like(kd)]), grads


class _ChunkedHeadLoss(torch.autograd.Function):
    """[`head_loss`] in plain PyTorch; the gradient, linear in the incoming scalar, is stored ready-made."""

    @staticmethod
    def forward(
        ctx, student_hidden, student_head, teacher_hidden, teacher_head, targets, weights, settings, with_grad
    ):
        beta, _, _, ce_weight = settings
        device = student_hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student_hidden.dtype
        wants_head = with_grad and ctx.needs_input_grad[1]
        head = student_head.detach().to(dtype).requires_grad_(wants_head)  # [V, D]
        teacher_head = teacher_head.to(dtype)
        hidden_grad = torch.zeros_like(student_hidden) if with_grad else None  # [N, D]
        head_grad = torch.zeros_like(student_head, dtype=torch.float32) if wants_head else None
        loss = torch.zeros((), device=student_hidden.device)
        sums = torch.zeros(2, device=student_hidden.device)
        by_kernel = device == "cpu" and beta == 0 and not ce_weight and dtype in NAMES and available()
        take = _part_by_kernel if by_kernel else _part
        for start in range(0, len(student_hidden), POSITIONS_AT_ONCE):
            part = slice(start, start + POSITIONS_AT_ONCE)
            with torch.set_grad_enabled(with_grad), torch.autocast(device, enabled=False):
                hidden = student_hidden[part].detach().to(dtype).requires_grad_(with_grad)
                teacher_logits = nn.functional.linear(teacher_hidden[part].to(dtype), teacher_head)
                part_loss, part_sums, grads = take(
                    hidden, head, teacher_logits, targets[part], weights[part], settings
                )
            if with_grad:
                hidden_grad[part] = grads[0]
            if wants_head:
                head_grad += grads[1]
            loss += part_loss
            sums += part_sums
        ctx.save_for_backward(hidden_grad, head_grad)
        ctx.head_dtype = student_head.dtype
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx, grad_loss, _):
        hidden_grad, head_grad = ctx.saved_tensors
        head_grad = None if head_grad is None else (head_grad * grad_loss).to(ctx.head_dtype)
        return hidden_grad * grad_loss, head_grad, None, None, None, None, None, None


def stored_divergence(
    hidden: torch.Tensor,
    head: torch.Tensor,
    teacher_ids: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """
    Forward KL(teacher || student) from a teacher's stored likeliest tokens; all others are one event, the tail.

    The divergence of these k + 1 events is at most that of the whole distributions.

    Args:
        hidden (`torch.Tensor`): the student's last hidden states at the N positions, `[N, D]`.
        head (`torch.Tensor`): weight of its head, `[V, D]`.
        teacher_ids (`torch.Tensor`): likeliest tokens, `[N, k]`.
        teacher_log_probs (`torch.Tensor`): their log-probabilities, `[N, k]`.
        weights (`torch.Tensor`): weight of each position in the sum, `[N]`.

    Returns:
        `torch.Tensor`: the sum over positions.
    """
    parts = zip(*(t.split(POSITIONS_AT_ONCE) for t in (hidden, teacher_ids, teacher_log_probs, weights)), strict=True)
    # Recomputed in the backward pass, so that logits exist for some positions at a time.
    losses = [checkpoint(_stored_part, part[0], head, *part[1:], use_reentrant=False) for part in parts]
    return torch.stack(losses).sum() if losses else hidden.sum() * 0


def _stored_part(hidden, head, ids, log_probs, weights):
    student = nn.functional.linear(hidden, head.to(hidden.dtype)).float().log_softmax(-1).gather(1, ids)  # [n, k]
    teacher = log_probs.float()
    listed = (teacher.exp() * (teacher - student)).sum(-1)
    # float16 may round the listed probabilities to a sum above 1; the tail is then as good as empty.
    theirs, ours = (1 - t.exp().sum(-1).clamp(max=1 - 1e-6) for t in (teacher, student))
    return ((listed + theirs * (theirs.log() - ours.log())) * weights).sum()


@torch.no_grad()
def agreement(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    most: int = 64,
) -> torch.Tensor:
    """
    Counts how often the two models' likeliest next tokens are the same, at some of the positions only: a measurement
    should not cost as much as the loss. Arguments as in [`head_loss`].

    Returns:
        `torch.Tensor`: agreeing positions and positions looked at, `[2]`, float32.
    """
    total = len(student_hidden)
    places = torch.linspace(0, total - 1, min(most, total), device=student_hidden.device).long()
    student, teacher = (
        nn.functional.linear(hidden[places], head.to(hidden.dtype)).argmax(-1)
        for hidden, head in ((student_hidden, student_head), (teacher_hidden, teacher_head))
    )
    return torch.tensor([(student == teacher).sum(), len(places)], dtype=torch.float32, device=student.device)


def sample_positions(
    counted: torch.Tensor, most: int | None, seeds: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Draws the positions of each row that a loss is taken at, so that the weighted sum over them is an unbiased estimate
    of the sum over all.

    Args:
        counted (`torch.Tensor`): whether a position counts, `[B, T]`.
        most (`int` or `None`): greatest number of positions in a row; `None` takes all.
        seeds (`list[int]`): one seed for each row, so that a row's draw does not depend on its batch.

    Returns:
        `tuple`: row and column of each position `[N]`, and its weight `[N]`: the row's counted positions over the
        drawn.
    """
    if most is None:
        rows, columns = counted.nonzero(as_tuple=True)
        return rows, columns, torch.ones(len(rows), device=counted.device)
    rows, columns, weights = [], [], []
    for row, seed in enumerate(seeds):
        candidates = counted[row].nonzero().flatten().cpu()
        order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))[:most]
        drawn = candidates[order].sort().values
        rows.append(torch.full_like(drawn, row))
        columns.append(drawn)
        weights.append(torch.full(drawn.shape, len(candidates) / max(1, len(drawn))))
    return tuple(torch.cat(parts).to(counted.device) for parts in (rows, columns, weights))


def row_seeds(labels: torch.Tensor, seed: int) -> list[int]:
    """
    A seed for each row, from `seed` and the row's own labels `[B, T]` alone: any batch split, with any padding (-100 at
    the right), gives the same.
    """
    places = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    # Odd multipliers keep every token's share; integers wrap around alike on every device.
    mixed = labels * (2 * places + 1) * 0x9E3779B1 + places * 0x85EBCA77
    sums = mixed.masked_fill(labels == -100, 0).sum(-1)  # [B]
    return [(value + seed * 0x27D4EB2F) % 2**63 for value in sums.tolist()]
