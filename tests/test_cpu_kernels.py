"""The kernels that train on a CPU against PyTorch: the recurrent heads, the divergence, and where they are not used."""

import shutil
from functools import partial

import pytest
import torch

from modeling_rad_hybrid import RadHybridConfig
from modeling_rad_hybrid.discrete_mamba2 import DiscreteMamba2
from trainers.distillation import cpu_kernels


needs_compiler = pytest.mark.skipif(not cpu_kernels.available(), reason="there is no C++ compiler")
BATCH, TOKENS = 2, 37


@pytest.fixture
def no_library(monkeypatch):
    """Forgets the compiled library, before and after."""
    cpu_kernels._library.cache_clear()
    yield monkeypatch
    cpu_kernels._library.cache_clear()


def relative_error(ours, oracle):
    return ((ours.double() - oracle.double()).norm() / oracle.double().norm().clamp(min=1e-12)).item()


def outputs_and_gradients(ssm, hidden, seq_idx, kernel, dtype=None):
    ssm.training_kernel = partial(cpu_kernels.heads, ssm) if kernel else None
    leaf = hidden.clone().requires_grad_()
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        output = ssm(leaf, seq_idx=seq_idx)
    return [output, *torch.autograd.grad((output * torch.randn(output.shape)).sum(), [leaf, *ssm.parameters()])]


def make_heads(heads: int, head_dim: int, state: int, taps: int = 4, shift: float = 0.0) -> DiscreteMamba2:
    torch.manual_seed(0)
    config = RadHybridConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=heads,
        head_dim=head_dim,
        kept_heads=[[]],
        ssm_state_size=state,
        ssm_conv_kernel=taps,
    )
    ssm = DiscreteMamba2(config, 0, heads)
    for tensor in (ssm.conv1d.weight, ssm.D):
        torch.nn.init.normal_(tensor)
    with torch.no_grad():
        ssm.in_proj.bias[-heads:] += shift
    return ssm


# Odd sizes, and the size that has code of its own; slow and fast decays.
@needs_compiler
@pytest.mark.parametrize("sizes", [(2, 10, 4, 4, -4.0), (1, 6, 1, 2, 0.0), (3, 64, 8, 4, 12.0)])
@pytest.mark.parametrize("documents", [False, True])
def test_recurrent_heads_equal_pytorch(sizes, documents):
    ssm, hidden = make_heads(*sizes), torch.randn(BATCH, TOKENS, 32)
    seq_idx = (torch.rand(BATCH, TOKENS) < 0.2).cumsum(1) if documents else None
    ours, theirs = (outputs_and_gradients(ssm, hidden, seq_idx, kernel) for kernel in (True, False))
    for one, other in zip(ours[:-1], theirs[:-1], strict=True):
        assert one.dtype == other.dtype and relative_error(one, other) < 2e-6
    torch.testing.assert_close(ours[-1], theirs[-1])


@needs_compiler
def test_under_autocast_they_are_at_least_as_exact_as_pytorch():
    ssm, hidden = make_heads(3, 64, 8), torch.randn(BATCH, 128, 32)
    exact = outputs_and_gradients(ssm, hidden, None, kernel=False)
    ours, theirs = (outputs_and_gradients(ssm, hidden, None, kernel, torch.bfloat16) for kernel in (True, False))
    errors = [[relative_error(a, b) for a, b in zip(found, exact, strict=True)] for found in (ours, theirs)]
    assert ours[0].dtype == theirs[0].dtype and max(errors[0]) < 1.2 * max(errors[1]) < 0.05


@needs_compiler
def test_a_number_that_is_not_finite_is_not_hidden():
    ssm, hidden = make_heads(2, 10, 4), torch.randn(1, 5, 32)
    hidden[0, 3] = torch.nan
    ssm.training_kernel = partial(cpu_kernels.heads, ssm)
    output = ssm(hidden)
    assert output[0, :3].isfinite().all() and output[0, 3:].isnan().all()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_forward_kl_is_its_definition(dtype, temperature):
    torch.manual_seed(0)
    # Among them a teacher that is certain and a student that is certain of something else.
    student, teacher = (torch.randn(7, 301) * torch.tensor([1.0, 5, 30, 100, 1, 1, 3])[:, None] for _ in range(2))
    student, teacher, weights = student.to(dtype), teacher.to(dtype), torch.rand(7)
    leaf = student.double().requires_grad_()
    log_q, log_p = ((t / temperature).log_softmax(-1) for t in (leaf, teacher.double()))
    exact = (log_p.exp() * (log_p - log_q)).sum(-1)
    (gradient,) = torch.autograd.grad((exact * weights).sum(), leaf)
    losses = cpu_kernels.forward_kl(student, teacher, weights, temperature)
    torch.testing.assert_close(losses, exact.detach().float(), atol=1e-4, rtol=1e-5)
    assert relative_error(student, gradient) < (1e-5 if dtype == torch.float32 else 5e-3)


@needs_compiler
def test_kernels_serve_while_a_block_runs(monkeypatch):
    model = torch.nn.Module()
    model.model, model.device, model.dtype = torch.nn.Module(), torch.device("cpu"), torch.float32
    layer = torch.nn.Module()
    layer.mixer = torch.nn.Module()
    layer.mixer.ssm = make_heads(2, 10, 4)
    model.model.layers = torch.nn.ModuleList([layer])
    with pytest.raises(KeyboardInterrupt), cpu_kernels.fast_heads(model):
        assert layer.mixer.ssm.training_kernel is not None
        raise KeyboardInterrupt
    assert layer.mixer.ssm.training_kernel is None
    monkeypatch.setenv("HF_RAD_CPU_KERNELS", "0")
    with cpu_kernels.fast_heads(model):
        assert layer.mixer.ssm.training_kernel is None


def test_without_a_compiler_training_stays_with_pytorch(no_library):
    no_library.setattr(shutil, "which", lambda name: None)
    assert not cpu_kernels.available()


@needs_compiler
def test_what_does_not_compile_leaves_nothing_behind(no_library, tmp_path):
    broken = tmp_path / "broken.cpp"
    broken.write_text("int main( {")
    no_library.setattr(cpu_kernels, "SOURCE", broken)
    no_library.setenv("HF_RAD_CACHE", str(tmp_path / "cache"))
    assert not cpu_kernels.available()
    assert list((tmp_path / "cache").iterdir()) == []
