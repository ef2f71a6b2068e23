"""
Orientation on tiny models: the matrices are those of the scan and of the teacher's attention, any number of rows at a
time gives the same loss and gradients, and only B, C and the decays learn.
"""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from test_distill_trainer import batch_of, make_rows, make_student, make_trainer, weights_of  # noqa: F401
from transformers import MistralConfig, MistralForCausalLM

from modeling_rad_hybrid.ssd import ssd_sequential
from trainers import actions
from trainers.cli import main
from trainers.conversion import converted_heads
from trainers.distillation import orientation
from trainers.distillation.distill_trainer import LAYER_ERRORS
from trainers.distillation.orientation import mixing_rows, mixing_terms, orientation_loss, recorded_attention
from trainers.distillation.stage_losses import recorded_mixers
from trainers.files import read_json
from trainers.heads.head_map import HeadMap, TeacherShape
from trainers.recipe import Recipe
from trainers.workshop import Workshop


B, T = 2, 20


@pytest.fixture
def sliding_teacher():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=6,
    )
    return MistralForCausalLM(config).eval()


def causal(seq_idx=None):
    below = torch.ones(T, T, dtype=torch.bool).tril()
    return below if seq_idx is None else below & (seq_idx[:, None, :, None] == seq_idx[:, None, None, :])


@pytest.mark.parametrize("packed", [False, True])
def test_the_mixing_matrix_applied_to_the_inputs_is_the_scan(tiny_llama, packed):
    ssm = make_student(tiny_llama).model.layers[1].mixer.ssm
    hidden = torch.randn(B, T, tiny_llama.config.hidden_size)
    seq_idx = torch.tensor([[0] * 7 + [1] * 13, [0] * 12 + [1] * 8]) if packed else None
    with torch.no_grad():
        log_decay, b, c = mixing_terms(ssm, hidden, seq_idx=seq_idx)
        matrix = mixing_rows(log_decay, log_decay, b, c, causal(seq_idx))  # [B, H, T, T]
        x = torch.randn(B, T, ssm.num_heads, ssm.head_dim)
        log_a = log_decay.transpose(1, 2).diff(dim=1, prepend=torch.zeros(B, 1, ssm.num_heads))
        expected, _ = ssd_sequential(x, log_a, b.transpose(1, 2), c.transpose(1, 2), seq_idx=seq_idx)
        torch.testing.assert_close((matrix @ x.transpose(1, 2)).transpose(1, 2), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "sliding"])
@pytest.mark.parametrize("entries", [1, 3 * T * B, 2**22])
def test_any_number_of_rows_gives_the_naive_loss_and_gradients(
    tiny_llama, sliding_teacher, kind, entries, monkeypatch
):
    monkeypatch.setattr(orientation, "ENTRIES_AT_ONCE", entries)
    teacher = tiny_llama if kind == "llama" else sliding_teacher
    layer = 1
    student = make_student(teacher, [[], [1], [0, 1, 2, 3]][: teacher.config.num_hidden_layers])
    ssm, heads = student.model.layers[layer].mixer.ssm, converted_heads(student.config, layer)
    assert heads == [0, 2, 3]
    ids = torch.randint(4, 90, (B, T), generator=torch.Generator().manual_seed(0))
    counted = torch.ones(B, T)
    counted[0, 15:], counted[1, 3] = 0, 0
    with torch.no_grad(), recorded_mixers(teacher.model.layers) as records, recorded_attention(teacher) as attended:
        teacher.model(ids, use_cache=False)
    assert len(records) == len(attended) == teacher.config.num_hidden_layers
    hidden = records[layer][0]
    teacher.set_attn_implementation("eager")
    with torch.no_grad():
        weights = teacher(ids, output_attentions=True).attentions[layer][:, heads]

    loss, sums = orientation_loss(ssm, hidden, attended[layer], heads, counted)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in ssm.named_parameters() if p.grad is not None}
    ssm.zero_grad()
    log_decay, b, c = mixing_terms(ssm, hidden)
    rows = counted[:, None, :, None]
    difference = (mixing_rows(log_decay, log_decay, b, c, causal()) - weights) * rows
    naive = (torch.linalg.matrix_norm(difference).sum(1) * counted.sum(1)).sum()
    naive.backward()
    torch.testing.assert_close(loss, naive)
    torch.testing.assert_close(
        sums, torch.stack([difference.square().sum(), (weights * rows).square().sum()]).detach()
    )
    assert set(gradients) == {"in_proj.weight", "in_proj.bias", "conv1d.weight"}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, dict(ssm.named_parameters())[name].grad, atol=1e-4, rtol=1e-3)


def test_recording_leaves_the_teacher_as_it_was(tiny_llama):
    tiny_llama.set_attn_implementation("eager")
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        before = tiny_llama(ids).logits
        with recorded_attention(tiny_llama) as attended:
            torch.testing.assert_close(tiny_llama(ids).logits, before)
        assert tiny_llama.config._attn_implementation == "eager"
        assert torch.equal(tiny_llama(ids).logits, before)
        tiny_llama.set_attn_implementation("sdpa")
        tiny_llama(ids)
    assert len(attended) == tiny_llama.config.num_hidden_layers


@pytest.mark.parametrize("mixing", ["replace", "parallel"])
def test_the_matrices_come_nearer_and_nothing_but_b_c_and_decays_moves(tiny_llama, make_trainer, mixing):  # noqa: F811
    student = make_student(tiny_llama, mixing=mixing)
    before = weights_of(student)
    settings = {"mixer_learning_rate": 3e-2, "max_steps": 8, "weight_decay": 0.5}
    trainer = make_trainer(student, rows=make_rows(4), stage="orientation", **settings)
    trainer.train()
    lines = [json.loads(line) for line in (Path(trainer.args.output_dir) / LAYER_ERRORS).read_text().splitlines()]
    errors = [line["relative_error"] for line in lines if line["mode"] == "train"]
    oriented = range(2 if mixing == "replace" else 3)
    assert all(errors[-1][layer] < 0.7 * errors[0][layer] for layer in oriented)
    for name, weight in weights_of(student).items():
        moves = ".ssm.in_proj." in name or ".ssm.conv1d." in name
        assert torch.equal(weight, before[name]) != moves, name
    ssm = student.model.layers[0].mixer.ssm
    x_and_z = 2 * ssm.num_heads * ssm.head_dim
    name = "model.layers.0.mixer.ssm.in_proj.weight"
    moved = (ssm.in_proj.weight != before[name]).any(1)
    assert not moved[:x_and_z].any() and moved[x_and_z:].all()


def test_any_batch_split_gives_the_same_orientation(tiny_llama, make_trainer):  # noqa: F811
    student, results = make_student(tiny_llama), []
    for batch, accumulated in [(4, 1), (1, 4)]:
        model = copy.deepcopy(student)
        split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        make_trainer(model, stage="orientation", optim="sgd", mixer_learning_rate=0.003, **split).train()
        results.append(weights_of(model))
    name = "model.layers.0.mixer.ssm.in_proj.weight"
    assert (results[0][name] - weights_of(student)[name]).abs().max() > 3e-4
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, atol=1e-6, rtol=0)


@pytest.fixture
def workshop(tiny_llama, tiny_tokenizer, tmp_path):
    """A recipe with an orientation before the fit, and its converted student."""
    tiny_llama.save_pretrained(tmp_path / "teacher")
    tiny_tokenizer.save_pretrained(tmp_path / "teacher")
    arguments = {"use_cpu": True, "bf16": False, "per_device_train_batch_size": 2}
    recipe = {
        "teacher": str(tmp_path / "teacher"),
        "data": {"length": 64},
        "calibrate": {"tokens": 512},
        "orient": {"tokens": 256, "batch_tokens": 128, "arguments": arguments},
    }
    made = Workshop(Recipe.from_dict(recipe), progress=False)
    head_map = HeadMap(TeacherShape.from_config(tiny_llama.config, "test/teacher"), [[], [1], [0, 1, 2, 3]])
    assert actions.convert_student(made, head_map, tmp_path / "student")["residuals"] == []
    return made


def readout_error(workshop, folder) -> float:
    """How far the recurrent heads are from what a fit on the recipe's tokens would make of them."""
    student = actions.load_student(folder)
    before, after = zip(*(pair for pair in actions.fit_readout(workshop, student) if pair), strict=True)
    return max(math.log(one / other) for one, other in zip(before, after, strict=True))


def test_a_recipe_fits_the_readout_after_the_orientation(workshop, tmp_path):
    assert [name for name, settings in workshop.recipe.stages() if settings.tokens] == ["orientation"]
    student, oriented = tmp_path / "student", tmp_path / "orientation"
    assert readout_error(workshop, student) > 1
    actions.train(workshop, student, oriented, "orientation", workshop.recipe.orient)
    assert readout_error(workshop, oriented) < 1e-4
    training = read_json(oriented / actions.TRAINING)
    assert training["tokens_trained"] == 256 + 512
    assert [stage["stage"] for stage in training["stages"]] == ["orientation"]


def test_the_command_line_fits_it_too(workshop, tmp_path, capsys):
    student, oriented = tmp_path / "student", tmp_path / "orientation"
    words = (
        f"distill --model_name_or_path {student} --teacher_model_name_or_path {tmp_path / 'teacher'} --num_tokens 512"
    )
    words += (
        f" --stage orientation --max_steps 2 --max_length 64 --bf16 false --output_dir {oriented} --report_to none"
    )
    assert main(words.split()) == 0
    names = ("in_proj.bias", "out_proj.weight")
    before, after = (actions.load_student(folder).model.layers[0].mixer.ssm for folder in (student, oriented))
    for name in names:
        assert not torch.equal(before.get_parameter(name), after.get_parameter(name)), name
    # Two steps of eight rows, and the fit on all eight that there are.
    assert read_json(oriented / actions.TRAINING)["tokens_trained"] == 2 * 8 * 64 + 8 * 64
