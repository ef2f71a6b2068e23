"""A distilled student is an ordinary model to TRL: its trainers take it as it is, on-policy distillation too."""

import pytest
import torch
from datasets import Dataset
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.scripts import distillation as on_policy

from modeling_rad_hybrid import RadHybridForCausalLM
from trainers.conversion import convert
from trainers.heads.head_map import HeadMap, TeacherShape
from trainers.recipe import ROOT


PROMPTS = ["house river", "the key is", "stone garden", "salt iron"]
COMMON = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "bf16": False, "use_cpu": True}
COMMON |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
GENERATION = {"max_completion_length": 4, "num_generations": 2}


def rows(**columns) -> Dataset:
    return Dataset.from_dict({name: [column + prompt for prompt in PROMPTS] for name, column in columns.items()})


def length_reward(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def trainers(folder, student, teacher, tokenizer):
    """Each of TRL's trainers on the student, by name."""
    preferences = rows(prompt="", chosen="bread ", rejected="glass ")
    on_policy = DistillationConfig(folder, max_completion_length=4, temperature=1.0, beta=0.5, **COMMON)
    made = {
        "sft": lambda: SFTTrainer(student, SFTConfig(folder, **COMMON), train_dataset=rows(text="")),
        "dpo": lambda: DPOTrainer(student, args=DPOConfig(folder, **COMMON), train_dataset=preferences),
        "grpo": lambda: GRPOTrainer(
            student, length_reward, GRPOConfig(folder, **GENERATION, **COMMON), train_dataset=rows(prompt="")
        ),
        "on-policy": lambda: DistillationTrainer(student, teacher, args=on_policy, train_dataset=rows(prompt="")),
    }
    return made


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo", "on-policy"])
def test_trl_trains_a_student(tmp_path, tiny_llama, tiny_tokenizer, name):
    shape = TeacherShape.from_config(tiny_llama.config, "test/teacher")
    student = convert(tiny_llama, HeadMap(shape, [[], [1], [0, 2]]))
    tiny_tokenizer.save_pretrained(tmp_path / "student")
    student.save_pretrained(tmp_path / "student")
    student.config._name_or_path = str(tmp_path / "student")
    before = {key: p.detach().clone() for key, p in student.named_parameters()}
    trainer = trainers(str(tmp_path / "run"), student, tiny_llama, tiny_tokenizer)[name]()
    trainer.train()
    assert trainer.state.global_step == 2
    moved = {key for key, p in student.named_parameters() if not torch.equal(p, before[key])}
    assert any(".mixer.ssm." in key for key in moved) and any(".mixer.attention." in key for key in moved)


def test_the_recipe_of_on_policy_distillation_runs(tmp_path, monkeypatch, tiny_llama, tiny_tokenizer):
    """`trl distillation --config recipes/trl/on-policy.yaml`, with a small student, fewer steps and no accelerator."""
    monkeypatch.chdir(tmp_path)
    shape = TeacherShape.from_config(tiny_llama.config, "test/teacher")
    for name, model in (("teacher", tiny_llama), ("student", convert(tiny_llama, HeadMap(shape, [[], [1], [0, 2]])))):
        model.save_pretrained(name)
        tiny_tokenizer.save_pretrained(name)
    rows(prompt="").to_json("prompts/train.jsonl")
    words = "--model_name_or_path student --teacher_model_name_or_path teacher --dataset_name prompts --output_dir out"
    words += " --max_steps 2 --max_completion_length 4 --learning_rate 1e-2 --per_device_train_batch_size 2"
    words += " --gradient_accumulation_steps 1 --bf16 false --use_cpu true --report_to none --save_strategy no"
    parsed = on_policy.make_parser().parse_args_and_config(
        ["--config", str(ROOT / "recipes" / "trl" / "on-policy.yaml"), *words.split()]
    )
    on_policy.main(*parsed)
    before, after = (RadHybridForCausalLM.from_pretrained(name).state_dict() for name in ("student", "out"))
    assert any(not torch.equal(after[name], weight) for name, weight in before.items() if ".mixer.ssm." in name)
    assert (tmp_path / "out" / "modeling_rad_hybrid.py").is_file()
