"""The student as a transformers model: equality with its teacher, saving, gradient checkpointing, configuration."""

import torch
from layouts import prompt
from transformers import AutoModelForCausalLM

from modeling_rad_hybrid import RadHybridConfig, RadHybridForCausalLM
from trainers.families import backbone_fields


def test_with_every_head_kept_the_student_is_the_teacher(tiny_llama):
    model = RadHybridForCausalLM(RadHybridConfig(**backbone_fields(tiny_llama.config))).eval()
    weights = {name.replace("self_attn", "mixer.attention"): t for name, t in tiny_llama.state_dict().items()}
    model.load_state_dict(weights)
    ids = prompt(model)
    assert torch.equal(model(ids).logits, tiny_llama(ids).logits)


def test_saved_student_loads_again(student, tmp_path):
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = prompt(student)
    assert torch.equal(again(ids).logits, student(ids).logits)
    half = RadHybridForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(ids).logits.dtype == torch.bfloat16 and torch.isfinite(half(ids).logits).all()


def test_gradient_checkpointing_changes_nothing(student):
    ids = prompt(student)
    gradients = []
    for checkpointing in (False, True):
        student.train()
        if checkpointing:
            student.gradient_checkpointing_enable()
        student.zero_grad()
        student(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
