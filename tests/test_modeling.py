"""The student as a transformers model: equality with its teacher, saving, gradient checkpointing, configuration."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
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


BAD = [
    ({"kept_heads": [[0], [4], []]}, "0 to 3"),
    ({"kept_heads": [[-1], [], []]}, "0 to 3"),
    ({"kept_heads": [[1, 0], [], []]}, "sorted"),
    ({"kept_heads": [[1, 1], [], []]}, "distinct"),
    ({"kept_heads": [[0]]}, "3 layers"),
    ({"kept_heads": [[0], [], [], []]}, "3 layers"),
    ({"kept_heads": [["0"], [], []]}, "integers"),
    ({"kept_heads": [[True], [], []]}, "integers"),
    ({"kept_heads": [0, 1, 2]}, "integers"),
    ({"kept_heads": "all"}, "kept_heads"),
    ({"ssm_state_size": 0}, "ssm_state_size"),
    ({"ssm_state_size": 8.0}, "ssm_state_size"),
    ({"ssm_conv_kernel": 0}, "ssm_conv_kernel"),
    ({"ssm_chunk_size": -1}, "ssm_chunk_size"),
    ({"mixing": "both"}, "mixing"),
    ({"ssm_backend": "cuda"}, "ssm_backend"),
    ({"num_key_value_heads": 3}, "multiple"),
    ({"num_key_value_heads": 0}, "num_key_value_heads"),
    ({"head_dim": 15}, "even"),
    ({"hidden_size": 0}, "hidden_size"),
]


@pytest.mark.parametrize("fields, words", BAD, ids=[str(fields) for fields, _ in BAD])
def test_bad_configurations_are_refused(fields, words):
    good = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    with pytest.raises((StrictDataclassError, ValueError, ZeroDivisionError), match=words):
        RadHybridConfig(**{**good, **fields})
