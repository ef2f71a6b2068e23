"""
The trainer on a tiny student of a tiny teacher: the same weights however the batch is split and wherever the run is
cut, only what should train trains, layers are aligned with the right targets, and trouble is named.
"""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from trainers.conversion import convert
from trainers.distillation.checkpoints import last_checkpoint
from trainers.distillation.distill_config import RadDistillationConfig
from trainers.distillation.distill_trainer import LAYER_ERRORS, NonFiniteError, RadDistillationTrainer
from trainers.distillation.losses import divergence
from trainers.distillation.watching import DivergedError, MeasureCallback, draw_measurements, measurements
from trainers.heads.head_map import HeadMap, TeacherShape


KEPT_HEADS = [[], [1], [0, 1, 2, 3]]
STAGES = ("alignment", "distillation")
LENGTH = 24


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small are only slowed down by a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def student(tiny_llama):
    """Layers of each kind: all heads converted, one kept, all kept."""
    return make_student(tiny_llama)


def make_student(teacher, kept_heads=KEPT_HEADS, **kwargs):
    torch.manual_seed(0)
    shape = TeacherShape.from_config(teacher.config, "test/teacher")
    return convert(teacher, HeadMap(shape, kept_heads), **kwargs)


def make_rows(count: int = 12, length: int = LENGTH, vocabulary: int = 90) -> Dataset:
    """Rows of different lengths in which some labels do not count."""
    generator = torch.Generator().manual_seed(0)
    ids, labels = [], []
    for i in range(count):
        row = torch.randint(4, vocabulary, (length - 5 * (i % 3),), generator=generator)
        skipped = torch.rand(len(row), generator=generator) < 0.3
        ids.append(row.tolist())
        labels.append(row.masked_fill(skipped, -100).tolist())
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


@pytest.fixture
def make_trainer(tmp_path, tiny_llama, tiny_tokenizer):
    def make(student, callbacks=None, rows=None, teacher=tiny_llama, peft_config=None, **settings):
        defaults = {
            "stage": "alignment",
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "bf16": False,
            "use_cpu": True,
        }
        args = RadDistillationConfig(str(tmp_path / "run"), **{**defaults, **settings})
        return RadDistillationTrainer(
            student,
            teacher,
            args,
            train_dataset=make_rows() if rows is None else rows,
            eval_dataset=make_rows(4),
            processing_class=tiny_tokenizer,
            callbacks=callbacks,
            peft_config=peft_config,
        )

    return make


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def batch_of(trainer, count: int = 4) -> dict[str, torch.Tensor]:
    return trainer.data_collator([trainer.train_dataset[i] for i in range(count)])


@pytest.mark.parametrize("stage", STAGES)
def test_kernels_of_the_cpu_train_the_same_weights(tiny_llama, make_trainer, stage, monkeypatch):
    weights = {}
    for kernels in ("0", "1"):
        monkeypatch.setenv("HF_RAD_CPU_KERNELS", kernels)
        trainer = make_trainer(make_student(tiny_llama), stage=stage, learning_rate=1e-3)
        trainer.train()
        weights[kernels] = trainer.model.state_dict()
    for name, weight in weights["0"].items():
        torch.testing.assert_close(weights["1"][name], weight, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("stage, positions", [("alignment", None), ("distillation", None), ("distillation", 5)])
def test_any_batch_split_gives_the_same_weights(student, make_trainer, stage, positions):
    settings = {"stage": stage, "kl_positions": positions, "ce_weight": 0.5, "optim": "sgd"}
    settings |= dict.fromkeys(("learning_rate", "mixer_learning_rate"), 0.003 if stage == "alignment" else 0.05)
    results = []
    for batch, accumulated in [(4, 1), (2, 2), (1, 4)]:
        model = copy.deepcopy(student)
        make_trainer(
            model, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated, **settings
        ).train()
        results.append(weights_of(model))
    before = weights_of(student)
    moved = max((results[0][name] - before[name]).abs().max().item() for name in before)
    assert moved > 3e-4
    for other in results[1:]:
        for name, weight in results[0].items():
            torch.testing.assert_close(other[name], weight, atol=1e-6, rtol=0)


def test_one_backward_is_that_of_every_layer_alone(student, tiny_llama, make_trainer):
    trainer = make_trainer(student)
    batch = batch_of(trainer)
    trainer.compute_loss(student, dict(batch)).backward()
    together = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    counted = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        hidden = tiny_llama(batch["input_ids"], batch["attention_mask"], output_hidden_states=True).hidden_states
        rotary = tiny_llama.model.rotary_emb(hidden[0], torch.arange(LENGTH)[None])
    for layer, ours, stream in zip(tiny_llama.model.layers, student.model.layers, hidden, strict=False):
        with torch.no_grad():
            normed = layer.input_layernorm(stream)
            target = layer.self_attn(hidden_states=normed, position_embeddings=rotary, attention_mask=None)[0]
        # No masks: right padding cannot reach back to the tokens that count.
        distance = (ours.mixer(normed, position_embeddings=rotary)[0] - target)[:, :-1].norm(dim=-1)
        if ours.mixer.ssm is not None:
            (distance[counted].sum() / counted.sum()).backward()
    for name, parameter in student.named_parameters():
        assert (parameter.grad is not None) == (name in together), name
        if name in together:
            torch.testing.assert_close(together[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_kept_layers_match_their_targets_the_last_one_too(student, make_trainer):
    trainer = make_trainer(student)
    trainer.train()
    first = json.loads((trainer_dir(trainer) / LAYER_ERRORS).read_text().splitlines()[0])
    assert first["step"] == 1 and first["mode"] == "train"
    errors = first["relative_error"]
    # The final norm rescales every token: a target taken after it could not be met by the teacher's own heads.
    assert errors[2] < 1e-6 < min(errors[:2])


def trainer_dir(trainer):
    return Path(trainer.args.output_dir)


def test_the_distillation_loss_is_the_mean_divergence_at_counted_positions(student, tiny_llama, make_trainer):
    trainer = make_trainer(student, stage="distillation", beta=0.3, temperature=1.5)
    batch = batch_of(trainer)
    loss = trainer.compute_loss(student, dict(batch))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        per_position = divergence(student(**inputs).logits, tiny_llama(**inputs).logits, 0.3, 1.5)
    torch.testing.assert_close(loss.detach(), per_position[:, :-1][batch["labels"][:, 1:] != -100].mean())


@pytest.mark.parametrize("stage", STAGES)
def test_packed_documents_do_not_see_each_other(student, make_trainer, stage):
    rows = make_rows(4)
    apart = make_trainer(copy.deepcopy(student), rows=rows, stage=stage)
    together = make_trainer(
        student, rows=rows, stage=stage, packing=True, packing_strategy="bfd", max_length=200, eval_packing=False
    )
    assert together.train_dataset.num_rows == 1
    packed = batch_of(together, 1)
    assert packed["input_ids"].shape[0] == 1 and "attention_mask" not in packed
    loss = apart.compute_loss(apart.model, batch_of(apart))
    torch.testing.assert_close(together.compute_loss(student, packed), loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "settings, trains",
    [
        ({"stage": "alignment"}, lambda name: ".mixer.ssm." in name),
        ({"stage": "distillation"}, lambda name: "embed_tokens" not in name and "lm_head" not in name),
        ({"stage": "distillation", "train_embeddings": True}, lambda name: True),
        (
            {"stage": "distillation", "frozen_parts": [".mixer.attention.", ".mlp."]},
            lambda name: not any(part in name for part in ("embed_tokens", "lm_head", ".mixer.attention.", ".mlp.")),
        ),
    ],
)
def test_what_trains_moves_and_nothing_else(student, tiny_llama, make_trainer, settings, trains):
    before, teacher_before = weights_of(student), weights_of(tiny_llama)
    make_trainer(student, learning_rate=1e-2, mixer_learning_rate=1e-2, **settings).train()
    for name, weight in weights_of(student).items():
        assert torch.equal(weight, before[name]) != trains(name), name
    for name, weight in weights_of(tiny_llama).items():
        assert torch.equal(weight, teacher_before[name]), name


def test_the_adapter_of_parallel_mixing_is_aligned_too(tiny_llama, make_trainer):
    student = make_student(tiny_llama, mixing="parallel")
    before = weights_of(student)
    make_trainer(student).train()
    moved = {name for name, weight in weights_of(student).items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if ".mixer.ssm." in name or ".mixer.adapter." in name}
    assert any(".mixer.adapter." in name for name in moved)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("bf16", [True, False])
def test_bf16_computes_in_bfloat16_from_float32_weights(student, make_trainer, stage, bf16):
    seen = set()
    student.model.layers[0].mixer.ssm.in_proj.register_forward_hook(lambda m, args, out: seen.add(out.dtype))
    make_trainer(student, stage=stage, bf16=bf16, max_steps=1).train()
    assert seen == {torch.bfloat16 if bf16 else torch.float32}
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


def test_what_both_models_have_in_common_is_in_memory_once_while_training(student, tiny_llama, make_trainer):
    teacher = tiny_llama.to(torch.bfloat16)
    student = make_student(teacher).float()
    seen = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.update({name: p.data_ptr() for name, p in model.named_parameters()})

    before = weights_of(student)
    make_trainer(student, teacher=teacher, callbacks=[Look()]).train()
    theirs = {name: p.data_ptr() for name, p in teacher.named_parameters()}
    shared = {name for name, place in seen.items() if theirs.get(name) == place}
    assert {"model.layers.0.mlp.up_proj.weight", "model.norm.weight"} <= shared
    # In another type the embedding would change the type of everything after it.
    assert not any("embed" in name or ".mixer." in name for name in shared)
    for name, parameter in student.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.data_ptr() not in theirs.values()
        assert torch.equal(parameter, before[name]) == (".mixer.ssm." not in name), name


@pytest.mark.parametrize("stage", STAGES)
def test_a_teacher_in_another_type_is_taken_as_it_is(student, tiny_llama, make_trainer, stage):
    exact = make_trainer(copy.deepcopy(student), stage=stage)
    rounded = make_trainer(student, stage=stage, teacher=copy.deepcopy(tiny_llama).to(torch.bfloat16))
    losses = [trainer.compute_loss(trainer.model, batch_of(trainer)) for trainer in (exact, rounded)]
    assert losses[0].dtype == losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=0.1, atol=0.05)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(student, make_trainer, stage):
    settings = {"stage": stage, "kl_positions": 5, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    unbroken, cut = copy.deepcopy(student), copy.deepcopy(student)
    trainer = make_trainer(unbroken, **settings)
    trainer.train()
    shutil.rmtree(trainer_dir(trainer) / "checkpoint-6")
    resumed = make_trainer(cut, **settings)
    resumed.train(resume_from_checkpoint=last_checkpoint(resumed.args.output_dir))
    assert resumed.state.global_step == 6
    assert resumed.state.num_input_tokens_seen == trainer.state.num_input_tokens_seen > 0
    expected = weights_of(unbroken)
    for name, weight in weights_of(cut).items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("stage", STAGES)
def test_recomputed_activations_give_the_same_gradients(student, make_trainer, stage):
    grads = []
    for recomputed in (False, True):
        model = copy.deepcopy(student)
        make_trainer(model, stage=stage, gradient_checkpointing=recomputed, max_steps=1, learning_rate=1e-2).train()
        grads.append(weights_of(model))
    for name, weight in grads[0].items():
        torch.testing.assert_close(grads[1][name], weight, atol=1e-6, rtol=0, msg=name)


def test_recurrent_heads_have_a_rate_of_their_own_and_rates_rise_and_fall(student, make_trainer):
    trainer = make_trainer(
        student,
        stage="distillation",
        learning_rate=1e-4,
        mixer_learning_rate=1e-3,
        weight_decay=0.1,
        max_steps=20,
        warmup_steps=0.2,
        decay_ratio=0.25,
    )
    trainer.train()
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            assert group["initial_lr"] == (1e-3 if ".mixer.ssm." in name else 1e-4), name
            # Projections decay; norms, biases, the convolution and the skip do not.
            assert group["weight_decay"] == (0.1 if name.endswith("_proj.weight") else 0.0), name
    assert all("embed_tokens" in name or "lm_head" in name for name in names.values())
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates[4] == max(rates) == rates[15] and rates[0] < rates[1] < rates[2] < rates[3] < rates[4]
    assert rates[15] > rates[17] > rates[19] > 0 < rates[0]


def test_stages_have_defaults_of_their_own(tmp_path):
    alignment = RadDistillationConfig(str(tmp_path), stage="alignment")
    assert alignment.mixer_learning_rate == 1e-3 and alignment.max_grad_norm == 0
    distillation = RadDistillationConfig(str(tmp_path), learning_rate=2e-5)
    assert distillation.mixer_learning_rate == 2e-5 and distillation.max_grad_norm == 1
    assert distillation.beta == 0 and not distillation.gradient_checkpointing
    parsed = RadDistillationConfig(str(tmp_path), teacher_model_init_kwargs='{"dtype": "bfloat16"}')
    assert parsed.teacher_model_init_kwargs == {"dtype": "bfloat16"}


@pytest.mark.parametrize("stage", STAGES)
def test_training_lowers_the_held_out_loss_and_says_so(student, make_trainer, stage):
    trainer = make_trainer(
        student, stage=stage, max_steps=30, learning_rate=3e-3, mixer_learning_rate=3e-3, logging_steps=10
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.9 * before["eval_loss"]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    if stage == "alignment":
        assert after["eval_relative_error"] < before["eval_relative_error"]
        assert all(entry["relative_error"] <= entry["relative_error_worst_layer"] for entry in logged)
        lines = [json.loads(line) for line in (trainer_dir(trainer) / LAYER_ERRORS).read_text().splitlines()]
        assert [line["step"] for line in lines if line["mode"] == "train"] == [10, 20, 30]
        assert all(len(line["relative_error"]) == len(KEPT_HEADS) for line in lines)
    else:
        assert after["eval_kl"] == pytest.approx(after["eval_loss"], rel=0.05)
        assert all(0 <= entry["agreement"] <= 1 for entry in logged)


def test_a_run_answers_probes_and_leaves_a_picture(student, make_trainer):
    plain = copy.deepcopy(student)
    trainer = make_trainer(student, stage="distillation", max_steps=4, probe_steps=2)
    trainer.train()
    asked = {entry["step"]: v for entry in trainer.state.log_history for k, v in entry.items() if "probe" in k}
    assert set(asked) == {2, 4} and all(0 <= accuracy <= 1 for accuracy in asked.values())
    assert (trainer_dir(trainer) / "training.png").stat().st_size > 1000
    # Being asked changes nothing.
    make_trainer(plain, stage="distillation", max_steps=4).train()
    expected = weights_of(plain)
    for name, weight in weights_of(student).items():
        assert torch.equal(weight, expected[name]), name
    with pytest.raises(ValueError, match="every 0 steps"):
        make_trainer(student, probe_steps=0)


def test_a_student_is_measured_on_the_way(student, make_trainer, tmp_path):
    plain, seen = copy.deepcopy(student), []

    def measure(copied):
        seen.append(weights_of(copied))
        for weight in copied.parameters():
            weight.zero_()
        return {"results": {"kv": {"score": len(seen) / 10, "trained_on": False}}, "text_loss": 3.0 - len(seen)}

    trainer = make_trainer(student, stage="distillation", max_steps=5)
    path = tmp_path / "stage" / "measurements.jsonl"
    trainer.add_callback(MeasureCallback(trainer, measure, 2, path, tokens_before=1000, at_start=True))
    trainer.train()
    path.write_text(path.read_text() + path.read_text().splitlines()[-1].replace("-1.0", "-2.0") + "\n")
    points = measurements([tmp_path / "none", path.parent])
    assert [point["step"] for point in points] == [0, 2, 4, 5]
    # Of a step measured twice the last counts.
    assert [point["text_loss"] for point in points] == [2.0, 1.0, 0.0, -2.0]
    tokens = [point["tokens"] for point in points]
    assert tokens[0] == 1000 and tokens == sorted(set(tokens))
    assert tokens[-1] == 1000 + trainer.state.num_input_tokens_seen
    # It was the student of that step, and being measured changes nothing.
    make_trainer(plain, stage="distillation", max_steps=5).train()
    for name, weight in weights_of(plain).items():
        assert torch.equal(weights_of(student)[name], weight) and torch.equal(seen[-1][name], weight), name
    teacher = {"results": {"kv": {"score": 0.8, "trained_on": False}}, "text_loss": 0.5}
    draw_measurements(points, teacher, 0.2, tmp_path / "progress.png", "A student")
    assert (tmp_path / "progress.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="every 0 steps"):
        MeasureCallback(trainer, measure, 0, path)


class Poison(TrainerCallback):
    """Makes one parameter not finite after a step, as an overflow would."""

    def __init__(self, step: int, name: str):
        self.step, self.name = step, name

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            dict(model.named_parameters())[self.name].data.view(-1)[0] = math.nan


def test_a_loss_that_is_not_finite_names_step_layer_and_checkpoint(student, make_trainer):
    name = "model.layers.1.mixer.ssm.in_proj.weight"
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    with pytest.raises(NonFiniteError, match=r"loss is nan at step 4, in layer 1\. .*checkpoint-2\."):
        make_trainer(copy.deepcopy(student), callbacks=[Poison(3, name)], **settings).train()


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_runs_away_is_stopped_while_it_is_finite(student, make_trainer, stage):
    class Blow(TrainerCallback):
        """Weights a thousand times too large, as a rate far too high would make them."""

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 5:
                for weight in (model.model.layers[1].mixer.ssm.out_proj.weight, model.model.norm.weight):
                    weight.data.mul_(1000)

    settings = {
        "stage": stage,
        "max_steps": 9,
        "save_strategy": "steps",
        "save_steps": 2,
        "alignment_loss_type": "mse",
    }
    trainer = make_trainer(student, callbacks=[Blow()], learning_rate=1e-2, **settings)
    layer = ", most of all in layer 1" if stage == "alignment" else ""
    with pytest.raises(DivergedError, match=rf"at step 6{layer}, after .*the run diverges\. .*checkpoint-[24]\."):
        trainer.train()


def test_a_checkpoint_never_holds_a_parameter_that_is_not_finite(student, make_trainer):
    name = "model.layers.1.mlp.up_proj.weight"
    settings = {"stage": "distillation", "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(student, callbacks=[Poison(4, name)], **settings)
    with pytest.raises(NonFiniteError, match=rf"parameter {name} .* not saved.*checkpoint-2\."):
        trainer.train()
    assert last_checkpoint(trainer.args.output_dir).endswith("checkpoint-2")


def test_a_loss_that_is_not_finite_before_any_checkpoint(student, make_trainer):
    with pytest.raises(NonFiniteError, match="nan at step 2. No good checkpoint had been written"):
        make_trainer(student, stage="distillation", callbacks=[Poison(1, "model.norm.weight")]).train()


def test_the_last_whole_checkpoint_is_found(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None
    for step, state in [(2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (12, '{"global_st')]:
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-14").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_a_teacher_of_another_vocabulary_or_shape_is_refused_with_both_sizes(student, make_trainer):
    for field, value, message in [
        ("vocab_size", 123, "vocab_size 99, the teacher 123"),
        ("num_hidden_layers", 5, "num_hidden_layers 3, the teacher 5"),
        ("hidden_size", 32, "hidden_size 64, the teacher 32"),
    ]:
        shape = {"vocab_size": 99, "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 8, field: value}
        other = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **shape))
        with pytest.raises(ValueError, match=message):
            make_trainer(student, teacher=other)


def test_settings_that_cannot_work_are_named(student, tiny_llama, make_trainer, tmp_path):
    with pytest.raises(ValueError, match="There is no teacher"):
        make_trainer(student, teacher=None)
    with pytest.raises(ValueError, match="teacher is loaded already"):
        make_trainer(student, teacher_model_init_kwargs={"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="Nothing would train in the alignment stage"):
        make_trainer(make_student(tiny_llama, [[0, 1, 2, 3]] * 3))
    with pytest.raises(ValueError, match="Nothing would train in the distillation stage"):
        make_trainer(student, stage="distillation", frozen_parts=["model."])
    for settings, message in [
        ({"stage": "aligning"}, "stage is 'aligning'; choose one of orientation, alignment, distillation"),
        ({"alignment_loss_type": "cosine"}, "choose one of l2, mse, relative"),
        ({"beta": 1.5}, "beta is 1.5"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"kd_weight": 0.0}, "nor both 0"),
        ({"kl_positions": 0}, "kl_positions is 0"),
        ({"decay_ratio": 2.0}, "decay_ratio is 2.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            RadDistillationConfig(str(tmp_path), **settings)


def test_student_and_teacher_may_be_given_as_folders(student, tiny_llama, tiny_tokenizer, make_trainer, tmp_path):
    for name, model in (("student", student), ("teacher", tiny_llama)):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    given = make_trainer(student, stage="distillation")
    loaded = make_trainer(
        str(tmp_path / "student"),
        stage="distillation",
        teacher=None,
        teacher_model_name_or_path=str(tmp_path / "teacher"),
    )
    losses = [trainer.compute_loss(trainer.model, batch_of(trainer)) for trainer in (given, loaded)]
    torch.testing.assert_close(losses[0], losses[1])


def test_a_checkpoint_carries_its_code_and_an_honest_card(student, tiny_llama, make_trainer, tmp_path):
    tiny_llama.config._name_or_path = "acme/teacher"
    trainer = make_trainer(student, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    folder = trainer_dir(trainer)
    config = json.loads((folder / "checkpoint-2" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_rad_hybrid.RadHybridForCausalLM"
    assert (folder / "checkpoint-2" / "ssd.py").is_file()
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "acme/teacher" and "licence" not in card.data.to_dict()
    assert "5 of 12 attention heads are kept" in card.text and "alignment stage" in card.text
    assert "None" not in card.text
    tiny_llama.save_pretrained(tmp_path / "private" / "folder")
    tiny_llama.config._name_or_path = str(tmp_path / "private" / "folder")
    trainer.create_model_card("mine")
    text = (folder / "README.md").read_text()
    assert "private" not in text and ModelCard(text).data.base_model is None


def test_an_adapter_can_train_instead(student, make_trainer):
    before = weights_of(student)
    adapter = LoraConfig(r=2, target_modules=["in_proj", "out_proj", "q_proj"], init_lora_weights=False)
    trainer = make_trainer(student, stage="distillation", peft_config=adapter)
    trainer.train()
    after = {
        name.replace("base_model.model.", "").replace("base_layer.", ""): p
        for name, p in trainer.model.named_parameters()
    }
    for name, weight in before.items():
        assert torch.equal(after.pop(name), weight), name
    assert after and all("lora_" in name and p.requires_grad for name, p in after.items())
