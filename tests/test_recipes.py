"""Every shipped recipe is one, and a dry run tells what its stages cost from the teacher's configuration alone."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoConfig

from trainers.cli import main
from trainers.distillation.distill_config import RadDistillationConfig
from trainers.estimates import check_data, estimate_stages, student_shapes
from trainers.heads.head_map import HeadMap
from trainers.recipe import ROOT, Recipe
from trainers.workshop import DEFAULT_TEACHER, DEFAULT_TEACHER_ID


RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_can_be_read(path, tmp_path):
    recipe = Recipe.load(path)
    for name, settings in recipe.stages():
        if settings.tokens:
            length = settings.length or recipe.data.length
            at_once = settings.arguments.get("per_device_train_batch_size", 1)
            assert settings.batch_tokens % (length * at_once) == 0, name
            RadDistillationConfig(str(tmp_path), max_steps=10, **settings.arguments)


@pytest.mark.parametrize("name, size", [("llama-3.2-1b", 1.24e9), ("qwen2.5-1.5b", 1.54e9)])
def test_a_dry_run_estimates_every_stage(name, size):
    recipe = Recipe.load(ROOT / "recipes" / f"{name}.yaml")
    teacher = ROOT / "recipes" / "shapes" / recipe.teacher.replace("/", "--")
    student = student_shapes(recipe, AutoConfig.from_pretrained(teacher))
    assert all(p.is_meta for p in student.parameters())
    total = sum(p.numel() for p in student.parameters())
    assert size < total < 1.4 * size
    align, distill, long = estimate_stages(recipe, teacher, 4e14, torch.bfloat16)
    assert (align.tokens, align.steps) == (104_857_600, 800)
    assert align.trained < distill.trained < total
    # Six operations for each trained weight and token, two for the teacher's; no stage gets by with less.
    assert distill.flops > 8 * distill.trained * distill.tokens * 0.9
    assert align.bytes < distill.bytes and long.seconds == pytest.approx(long.flops / 4e14)


@pytest.mark.parametrize("name", ["demo", "llama-3.2-1b", "qwen2.5-1.5b", "smollm2-gpu"])
def test_a_dry_run_of_a_shipped_recipe_needs_no_hub(name, capsys, monkeypatch):
    """Data that is missing is said after the estimates; the shapes that come with recipes are those of head maps."""
    recipe = Recipe.load(ROOT / "recipes" / f"{name}.yaml")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("trainers.estimates.product_rate", lambda device, dtype: 1e12)
    code = main(["run", "--config", str(ROOT / "recipes" / f"{name}.yaml"), "--dry-run"])
    out, err = capsys.readouterr()
    for stage, settings in recipe.stages():
        assert not settings.tokens or f"{settings.tokens:,}" in out, stage
    assert code == 0 or (name == "smollm2-gpu" and "runs/paper-data/packed holds no packed data" in err)
    shape = AutoConfig.from_pretrained(ROOT / "recipes" / "shapes" / recipe.teacher.replace("/", "--"))
    HeadMap.load(DEFAULT_TEACHER_ID if recipe.teacher == DEFAULT_TEACHER else recipe.teacher).check_teacher(shape)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_can_read_the_example_configurations(path):
    config = load_config_from_file(str(path))
    assert config.distributed_type.value == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}[path.stem]
    if path.stem == "fsdp2":
        keys = {key.removeprefix("fsdp_") for key in config.fsdp_config}
        known = {item.name for item in dataclasses.fields(FullyShardedDataParallelPlugin)} | {"version"}
        assert keys <= known
    if path.stem == "zero3":
        known = {item.name for item in dataclasses.fields(DeepSpeedPlugin)}
        assert set(config.deepspeed_config) <= known and config.deepspeed_config["zero_stage"] == 3


def test_a_dry_run_misses_data_that_is_gone(tmp_path, tiny_llama, tiny_tokenizer, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llama.save_pretrained("teacher")
    tiny_tokenizer.save_pretrained("teacher")
    recipe = {"teacher": "teacher", "select": {"heads": 3}, "align": {"tokens": 4096}, "data": {"text": "text.txt"}}
    Path("recipe.yaml").write_text(json.dumps(recipe))
    assert main(["run", "--config", "recipe.yaml", "--dry-run"]) == 1
    assert "There is no file or folder text.txt" in capsys.readouterr().err
    Path("text.txt").write_text("house")
    assert main(["run", "--config", "recipe.yaml", "--dry-run", "--format", "json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert [stage["stage"] for stage in planned["stages"]] == ["alignment"]
    assert planned["stages"][0]["steps"] == 1 and planned["stages"][0]["bytes"] > 0
    with pytest.raises(FileNotFoundError, match="nowhere holds no packed data"):
        check_data(Recipe.from_dict({"teacher": "t", "data": {"packed": "nowhere"}}))
