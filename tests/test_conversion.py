"""Conversion, calibration and the cache's bytes."""

import io

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_rad_hybrid import CACHE_NAME, RadHybridConfig
from trainers.calibration import NormalEquations, calibrate
from trainers.conversion import convert, summary
from trainers.families import backbone_fields
from trainers.heads.head_map import HeadMap, TeacherShape, shipped_head_map
from trainers.memory import cache_bytes, kv_heads
from trainers.pipeline import conversion_tables


def head_map(teacher, kept=None):
    layers = teacher.config.num_hidden_layers
    kept = [[0, 3], [], [1]] if kept is None else kept
    return HeadMap(TeacherShape.from_config(teacher.config, "test/teacher"), (kept * layers)[:layers])


def batches(teacher, count=4, rows=4, tokens=64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, teacher.config.vocab_size, (rows, tokens), generator=generator) for _ in range(count)]


def test_with_every_head_kept_the_student_is_the_teacher(tiny_llama):
    student = convert(tiny_llama, head_map(tiny_llama, [[0, 1, 2, 3]]))
    ids = batches(tiny_llama, 1)[0]
    assert torch.equal(student(ids).logits, tiny_llama(ids).logits)


@pytest.mark.parametrize("mixing", ["replace", "parallel"])
def test_calibration_lowers_every_residual_and_the_loss_of_the_logits(tiny_llama, mixing):
    student = convert(tiny_llama, head_map(tiny_llama), mixing=mixing)
    ids = batches(tiny_llama, 1)[0]
    target = tiny_llama(ids).logits
    before = (student(ids).logits - target).pow(2).mean()
    residuals = calibrate(tiny_llama, student, batches(tiny_llama), progress=False)
    assert all(after < first for first, after in residuals)
    assert (student(ids).logits - target).pow(2).mean() < before


def test_calibration_is_exact_where_attention_is_reproducible(tiny_llama):
    """On one-token documents every head attends to its own token only; constant B and C reproduce that."""
    student = convert(tiny_llama, head_map(tiny_llama, [[]]))
    for layer in student.model.layers:
        ssm = layer.mixer.ssm
        start = 2 * ssm.sections[0]
        with torch.no_grad():
            ssm.in_proj.weight[start : start + 2 * ssm.num_heads * ssm.state_size] = 0.0
            ssm.in_proj.bias[start : start + 2 * ssm.num_heads * ssm.state_size] = 0.5
            ssm.out_proj.weight.normal_()
    tokens = torch.arange(4, tiny_llama.config.vocab_size)[:, None]
    residuals = calibrate(tiny_llama, student, [tokens], ridge=0.0, progress=False)
    assert all(first > 0.5 and after < 1e-3 for first, after in residuals)
    torch.testing.assert_close(student(tokens).logits, tiny_llama(tokens).logits, atol=1e-4, rtol=1e-4)


def test_the_fit_is_that_of_least_squares_with_a_ridge():
    """The same problem as rows: the penalty is a row of zeros as targets for every feature, none for the bias."""
    generator = torch.Generator().manual_seed(0)
    features = 3 + torch.randn(40, 5, generator=generator)
    features[:, 2] = 0.0  # a head that gives nothing
    targets = torch.randn(40, 3, generator=generator)
    sums = NormalEquations()
    for rows in (slice(0, 16), slice(16, 40)):
        sums.add(features[rows], targets[rows])
    for ridge in (0.0, 0.1):
        fit = sums.solve(ridge)
        strength = (ridge * features.square().sum(0).mean()).sqrt()
        known = torch.cat([torch.cat([features, torch.ones(40, 1)], dim=1), strength * torch.eye(5, 6)]).double()
        wanted = torch.linalg.lstsq(known, torch.cat([targets, torch.zeros(5, 3)]).double(), driver="gelsd").solution
        torch.testing.assert_close(fit, wanted, atol=1e-5, rtol=1e-5)
        error = (known[:40] @ fit - targets).norm() / targets.norm()
        assert sums.residual(fit) == pytest.approx(error.item(), rel=1e-4)


def test_calibration_without_tokens_says_so(tiny_llama):
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(tiny_llama, convert(tiny_llama, head_map(tiny_llama)), [])


def test_broken_weights_are_named(tiny_llama):
    student = convert(tiny_llama, head_map(tiny_llama))
    student.model.layers[1].mixer.ssm.in_proj.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="layer 1"):
        calibrate(tiny_llama, student, batches(tiny_llama, 1), progress=False)


def test_conversion_is_seeded(tiny_llama):
    first, again, other = (convert(tiny_llama, head_map(tiny_llama), seed=seed) for seed in (0, 0, 1))
    weights = [model.model.layers[1].mixer.ssm.in_proj.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_map_of_another_teacher_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="layers"):
        convert(tiny_llama, shipped_head_map("meta-llama/Llama-3.2-1B-Instruct"))


def test_published_memory_comes_out_of_the_published_heads():
    """Table 2 of the paper, in MB: 0.8, 5.7 and 11.0 at 128, 2048 and 4096 tokens."""
    published = shipped_head_map("meta-llama/Llama-3.2-1B-Instruct")
    teacher = LlamaConfig(
        hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64
    )
    student = RadHybridConfig(**backbone_fields(teacher), kept_heads=published.kept_heads, ssm_state_size=8)
    table2 = {"private_kv": True, "conv": False, "state_dtype_bytes": 2}
    # The paper's state covers all heads of every layer, the kept ones too: that is its code's parallel mixing.
    parallel = RadHybridConfig(**backbone_fields(teacher), kept_heads=published.kept_heads, mixing="parallel")
    counted = [round(cache_bytes(parallel, tokens, **table2) / 1e6, 2) for tokens in (128, 2048, 4096)]
    assert counted == [0.85, 5.77, 11.01]
    assert kv_heads(student) == 9 and kv_heads(student, private_kv=True) == 10 and kv_heads(teacher) == 128
    shared = {"conv": False, "state_dtype_bytes": 2}
    ours = [cache_bytes(student, tokens, **shared) for tokens in (128, 2048, 4096)]
    assert all(a < b * 1e6 for a, b in zip(ours, counted, strict=True))


def test_counted_bytes_are_those_of_a_real_cache(tiny_llama):
    student = convert(tiny_llama, head_map(tiny_llama))
    cache = student(batches(tiny_llama, 1, rows=1)[0], use_cache=True)[CACHE_NAME]
    held = 0
    for layer in cache.layers:
        tensors = [layer.conv_states[0], layer.recurrent_states[0]]
        if student.config.layer_types[cache.layers.index(layer)] == "hybrid":
            tensors += [layer.keys, layer.values]
        held += sum(tensor.nbytes for tensor in tensors)
    assert held == cache_bytes(student.config, 64, dtype_bytes=4)


def test_the_summary_compares_both_models(tiny_llama):
    rows = {
        name: (before, after) for name, before, after in summary(convert(tiny_llama, head_map(tiny_llama)), tiny_llama)
    }
    assert rows["attention heads"][0] == str(4 * tiny_llama.config.num_hidden_layers)
    assert "cache at 32k tokens" in rows


def test_a_random_llama_1b_converts_by_its_published_map():
    """The attention of Llama-3.2-1B in full size; vocabulary and MLP, which no cache depends on, are small."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=2048, intermediate_size=64, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    teacher = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    student = convert(teacher, shipped_head_map("meta-llama/Llama-3.2-1B-Instruct"))
    assert torch.isfinite(student(torch.arange(8)[None]).logits).all()
    outcome = {"summary": summary(student, teacher), "residuals": []}
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(*conversion_tables(outcome))
    printed = " ".join(console.export_text().split())
    assert "KV bytes per token │ 32,768 │ 2,304" in printed and "10 (2.0%)" in printed
    state = 502 * (64 * 8 * 4 + (64 + 2 * 8) * 4 * 2)
    for tokens in (2048, 32768, 131072):
        ours = (tokens * 2304 + state) / 1e6
        assert f"{tokens * 32768 / 1e6:.2f} MB │ {ours:.2f} MB" in printed
