"""What others do with a published student: a pipeline, an adapter of PEFT's that is saved and loaded again."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from student import stage_student
from transformers import AutoModelForCausalLM, pipeline

from trainers.files import read_json


@pytest.fixture
def staged(tmp_path, tiny_llama, tiny_tokenizer):
    return stage_student(tmp_path / "published", tiny_llama, tiny_tokenizer)


def test_pipeline_continues_a_chat(staged):
    """Model, tokenizer and chat template come out of one folder."""
    generate = pipeline("text-generation", model=str(staged), trust_remote_code=True)
    assert type(generate.model).__name__ == "RadHybridForCausalLM"
    (answer,) = generate([{"role": "user", "content": "tell me"}], max_new_tokens=3, do_sample=False)
    assert answer["generated_text"][0]["content"] == "tell me"
    assert len(answer["generated_text"][1]["content"].split()) == 3


def test_adapter_is_saved_and_loaded_again(staged, tmp_path):
    """LoRA on what attends and on what recurs; the adapter names the student, and finds it again."""
    student = AutoModelForCausalLM.from_pretrained(staged, trust_remote_code=True)
    before = student(torch.tensor([[5, 6, 7]])).logits
    targets = {name.split(".")[-1] for name, module in student.named_modules() if isinstance(module, torch.nn.Linear)}
    tuned = get_peft_model(
        student, LoraConfig(r=2, target_modules=sorted(targets - {"lm_head"}), task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    expected = tuned.eval()(torch.tensor([[5, 6, 7]])).logits
    assert not torch.allclose(expected, before, atol=1e-3)
    tuned.save_pretrained(tmp_path / "adapter")
    assert read_json(tmp_path / "adapter" / "adapter_config.json")["base_model_name_or_path"] == str(staged)
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=True).eval()
    torch.testing.assert_close(again(torch.tensor([[5, 6, 7]])).logits, expected)
