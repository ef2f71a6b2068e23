"""
The Triton kernels against the recurrence in float64, by Triton's interpreter, so without a GPU.

`pip install triton` lets them run (it is no dependency of ours: hundreds of megabytes); without it the same mathematics
is tested in its PyTorch form (tests/test_ssd.py, tests/test_modeling.py) and here it is skipped.
"""

import pytest
import torch
from torch.nn.functional import softplus

from modeling_rad_hybrid import (
    CACHE_NAME,
    RadHybridConfig,
    RadHybridForCausalLM,
    aligned_linear,
    discrete_mamba2,
    mixer_triton,
    ssd_mamba,
    ssd_triton,
)
from modeling_rad_hybrid import ssd as ssd_module
from modeling_rad_hybrid.ssd import ssd, ssd_sequential


needs_triton = pytest.mark.skipif(ssd_triton.triton is None, reason="triton is not installed")
DOCUMENTS = torch.tensor([[0] * 7 + [1] * 2 + [2] * 16, [5] * 16 + [6] * 9])


def relative_error(ours, oracle):
    return ((ours.double() - oracle).norm() / oracle.norm()).item()


def scan_and_gradients(scan, tensors, seq_idx):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y, last = scan(*leaves, seq_idx)
    torch.manual_seed(1)
    ((y * torch.randn(y.shape)).sum() + (last * torch.randn(last.shape)).sum()).backward()
    return [y, last, *(leaf.grad for leaf in leaves)]


@needs_triton
@pytest.mark.parametrize(
    ("shift", "spread", "seq_idx", "dtype"),
    [
        (-3, 1.5, None, torch.float32),
        (-7, 1, None, torch.float32),
        (-10, 15, None, torch.float32),
        (-3, 1.5, DOCUMENTS, torch.float32),
        # The interpreter multiplies bfloat16 matrices as integers; float16 takes the same path.
        (-3, 1.5, DOCUMENTS, torch.float16),
    ],
)
def test_scan_and_gradients_equal_the_recurrence(monkeypatch, shift, spread, seq_idx, dtype):
    for name in ("CHUNK", "FLOAT32_CHUNK"):
        monkeypatch.setattr(ssd_triton, name, 16)
    torch.manual_seed(0)
    batch, tokens, heads, head_dim, state = 2, 25, 1, 10, 4
    # As the model has them: views of one tensor, with strides.
    together = torch.randn(batch, tokens, heads * (head_dim + 2 * state)).to(dtype)
    x, B, C = (t.unflatten(-1, (heads, -1)) for t in together.split([heads * head_dim, *[heads * state] * 2], dim=-1))
    log_a = -softplus(torch.randn(batch, tokens, heads) * spread + shift)
    tensors = [x, log_a, B, C, torch.randn(batch, heads, head_dim, state)]
    ours = scan_and_gradients(ssd_triton.ssd_triton, tensors, seq_idx)
    exact = scan_and_gradients(ssd_sequential, [t.double() for t in tensors], seq_idx)
    for one, other in zip(ours, exact, strict=True):
        assert relative_error(one, other) < (1e-5 if dtype == torch.float32 else 2e-3)
    assert ours[0].dtype == dtype and ours[1].dtype == torch.float32


@needs_triton
def test_fast_decays_before_a_late_document_stay_finite(monkeypatch):
    monkeypatch.setattr(ssd_triton, "CHUNK", 16)
    torch.manual_seed(0)
    x, B, C = torch.randn(1, 16, 1, 4), torch.randn(1, 16, 1, 2), torch.randn(1, 16, 1, 2)
    # From the first document's end to the chunk's end the decays differ by e^140.
    log_a = torch.full((1, 16, 1), -10.0)
    tensors, seq_idx = [x, log_a, B, C, torch.zeros(1, 1, 4, 2)], torch.tensor([[0] * 15 + [1]])
    ours = scan_and_gradients(ssd_triton.ssd_triton, tensors, seq_idx)
    exact = scan_and_gradients(ssd_sequential, [t.double() for t in tensors], seq_idx)
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@needs_triton
def test_a_step_in_one_kernel_equals_the_step_in_pytorch(monkeypatch):
    torch.manual_seed(0)
    config = RadHybridConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=3,
        head_dim=6,
        kept_heads=[[1]],
        ssm_state_size=4,
        initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    model = RadHybridForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mixer.ssm.conv1d.weight)
        torch.nn.init.normal_(layer.mixer.ssm.D)
    ids = torch.randint(0, 50, (2, 8))
    found = []
    for fits in (False, True):
        monkeypatch.setattr(discrete_mamba2, "kernels_fit", lambda *_, fits=fits: fits)
        with torch.no_grad():
            cache = model(ids[:, :5], use_cache=True)[CACHE_NAME]
            steps = [model(ids[:, t : t + 1], use_cache=True, **{CACHE_NAME: cache}).logits for t in (5, 6)]
        states = [tensor for layer in cache.layers for tensor in (layer.conv_states[0], layer.recurrent_states[0])]
        found.append([torch.cat(steps), *states])
    for in_pytorch, in_one_kernel in zip(*found, strict=True):
        torch.testing.assert_close(in_one_kernel, in_pytorch, atol=1e-4, rtol=1e-5)


@needs_triton
@pytest.mark.parametrize("seq_idx", [None, DOCUMENTS], ids=["one document", "documents"])
def test_the_whole_mixer_in_kernels_equals_it_in_pytorch(monkeypatch, seq_idx):
    for module, name in ((mixer_triton, "BT"), (mixer_triton, "BC"), (ssd_triton, "FLOAT32_CHUNK")):
        monkeypatch.setattr(module, name, 16)
    torch.manual_seed(0)
    config = RadHybridConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=6, kept_heads=[[]], ssm_state_size=4
    )
    mixer = discrete_mamba2.DiscreteMamba2(config, 0, 2)
    for tensor in (mixer.conv1d.weight, mixer.D, mixer.in_proj.weight):
        torch.nn.init.normal_(tensor)
    hidden_states, weight = torch.randn(2, 25, 16), torch.randn(2, 25, 16)
    found = []
    for fits in (False, True):
        for module in (discrete_mamba2, ssd_module):
            monkeypatch.setattr(module, "kernels_fit", lambda *_, fits=fits: fits)
        leaf = hidden_states.clone().requires_grad_()
        output = mixer(leaf, seq_idx=seq_idx)
        found.append([output, *torch.autograd.grad((output * weight).sum(), [leaf, *mixer.parameters()])])
    for in_pytorch, in_kernels in zip(*found, strict=True):
        assert relative_error(in_kernels, in_pytorch.double()) < 1e-5


@needs_triton
def test_the_convolution_takes_up_the_window_of_earlier_tokens():
    torch.manual_seed(0)
    convolution = discrete_mamba2.CausalConv1d(8, 4).requires_grad_(False)
    new, window = torch.randn(2, 5, 8), torch.randn(2, 8, 4)
    torch.testing.assert_close(convolution(new, window, by_kernel=True), convolution(new, window))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_a_projection_of_odd_width_in_aligned_rows_equals_a_linear_layer(dtype):
    torch.manual_seed(0)
    layer = aligned_linear.AlignedLinear(16, 13)
    hidden, weight = torch.randn(2, 5, 16), torch.randn(2, 5, 13)
    found = []
    for function in (layer.aligned, layer):  # on a CPU, calling it is nn.Linear's own product
        leaf = hidden.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            output = function(leaf)
        found.append([output, *torch.autograd.grad((output * weight).sum(), [leaf, layer.weight, layer.bias])])
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype and relative_error(one, other.double()) < (1e-2 if dtype else 1e-6)
    assert found[0][0].stride() == (80, 16, 1) and found[1][0].stride() == (65, 13, 1)


@needs_triton
def test_operators_tell_their_shapes_to_the_compiler():
    x, B = torch.randn(1, 3, 1, 4), torch.randn(1, 3, 1, 2)
    log_a = -torch.rand(1, 3, 1)
    leaves = [t.requires_grad_() for t in (x, log_a, B, B.detach().clone())]
    torch.library.opcheck(ssd_triton._scan, (*leaves, None, None), test_utils="test_faketensor")
    step = [torch.randn(1, 13), torch.randn(1, 8, 4), torch.randn(8, 1, 4), torch.randn(1, 1, 4, 2), torch.randn(1)]
    torch.library.opcheck(ssd_triton.decode_step, tuple(step), test_utils="test_faketensor")


def test_kernels_are_refused_where_they_cannot_work():
    x, B, log_a = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1)
    with pytest.raises(ValueError, match="they need triton, CUDA tensors"):
        ssd(x, log_a, B, B, backend="triton")
    with pytest.raises(ValueError, match="'auto'"):
        ssd(x, log_a, B, B, backend="mamba_ssm")
    with pytest.raises(ValueError, match="'fast'"):
        ssd(x, log_a, B, B, backend="fast")
    assert ssd_mamba.AVAILABLE or ssd_triton.kernels_fit(x, 4, 2) is False


def test_back_ends_without_a_gpu_agree():
    torch.manual_seed(0)
    x, B, C = torch.randn(1, 40, 2, 8), torch.randn(1, 40, 2, 4), torch.randn(1, 40, 2, 4)
    log_a = -softplus(torch.randn(1, 40, 2))
    y, last = ssd(x, log_a, B, C, backend="torch")
    other_y, other_last = ssd(x, log_a, B, C)
    assert torch.equal(y, other_y) and torch.equal(last, other_last)
