"""
What DeepSpeed ZeRO-3 asks of the trainer, without DeepSpeed: outside its module's forward a parameter is empty, its
numbers lie in `ds_tensor`, and only a gathering block makes it whole. With DeepSpeed: test_distributed.py.
"""

import copy
import math
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import pytest
import torch
from test_distill_trainer import batch_of, make_trainer, one_thread, student  # noqa: F401
from torch import nn

from trainers.distillation import placement
from trainers.distillation.distill_config import RadDistillationConfig
from trainers.distillation.distill_trainer import NonFiniteError


def partition(weight: nn.Parameter) -> None:
    weight.ds_id, weight.ds_tensor = 0, weight.data
    weight.data = torch.empty(0)


@contextmanager
def gathered(weight: nn.Parameter):
    weight.data = weight.ds_tensor
    yield
    weight.data = torch.empty(0)


def test_partitioned_heads_are_gathered_for_the_loss(student, tiny_llama, make_trainer, monkeypatch):  # noqa: F811
    monkeypatch.setattr(placement, "gathered", gathered)
    losses = {}
    for sharded in (False, True):
        model, teacher = copy.deepcopy(student), copy.deepcopy(tiny_llama)
        trainer = make_trainer(model, stage="distillation", ce_weight=0.5, teacher=teacher)
        if sharded:
            partition(model.lm_head.weight)
            partition(teacher.lm_head.weight)
        loss = trainer.compute_loss(model, batch_of(trainer))
        loss.backward()
        losses[sharded] = loss.detach(), model.model.layers[0].mixer.ssm.in_proj.weight.grad
    torch.testing.assert_close(losses[True], losses[False])


def test_a_shard_that_is_not_finite_is_not_saved(student, make_trainer):  # noqa: F811
    trainer = make_trainer(student, stage="distillation")
    partition(student.model.layers[1].mlp.up_proj.weight)
    student.model.layers[1].mlp.up_proj.weight.ds_tensor[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="model.layers.1.mlp.up_proj.weight is no longer finite"):
        trainer.save_model()


def test_the_teacher_is_left_to_deepspeed(tiny_llama, monkeypatch):
    monkeypatch.setattr(placement, "prepare_deepspeed", lambda teacher, accelerator: ("sharded", teacher))
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value="DEEPSPEED"))
    assert placement.place_teacher(accelerator, tiny_llama) == ("sharded", tiny_llama)


def test_embeddings_cannot_train_under_zero3(student, make_trainer, monkeypatch):  # noqa: F811
    monkeypatch.setattr("trainers.distillation.distill_trainer.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="train_embeddings needs the head's gradient"):
        make_trainer(student, stage="distillation", train_embeddings=True)


def test_without_deepspeed_its_configuration_names_the_package(tmp_path, monkeypatch):
    """`accelerate launch --config_file recipes/accelerate/zero3.yaml` sets this environment."""
    try:
        version("deepspeed")
        pytest.skip("deepspeed is installed")
    except PackageNotFoundError:
        pass
    for name, value in (("USE_DEEPSPEED", "true"), ("DEEPSPEED_ZERO_STAGE", "3"), ("DEEPSPEED_ZERO3_INIT", "true")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(ImportError, match="deepspeed"):
        RadDistillationConfig(str(tmp_path), use_cpu=True)
