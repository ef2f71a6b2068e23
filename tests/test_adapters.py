"""
Cheaper training: the recurrent heads alone, or whole beside LoRA on the teacher's own weights. What is saved comes back,
and merged it is an ordinary student.
"""

import pytest
import torch
from peft import PeftModel
from test_packing import corpus, one_thread  # noqa: F401
from test_stopped_runs import TRAIN, folders  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_rad_hybrid import RadHybridForCausalLM
from trainers.cli import main
from trainers.distillation.checkpoints import last_checkpoint


RATES = "--learning_rate 1e-2 --mixer_learning_rate 1e-2 "


def load(name: str) -> RadHybridForCausalLM:
    return RadHybridForCausalLM.from_pretrained(name)


def moved(trained: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, weight in trained.items() if not torch.equal(weight, before[name])}


@pytest.mark.parametrize("stage", ["alignment", "distillation"])
def test_an_adapter_is_saved_reloaded_and_merged(folders, stage):  # noqa: F811
    words = TRAIN.replace("--stage distillation", f"--stage {stage}") + RATES
    assert main((words + "--packed packed --output_dir run --use_peft --lora_r 2").split()) == 0
    before = load("student").state_dict()
    merged, adapted = load("run"), PeftModel.from_pretrained(load("student"), "run/adapter").eval()
    ids = torch.arange(4, 44).view(2, 20)
    with torch.no_grad():
        expected = merged(ids).logits
        torch.testing.assert_close(adapted(ids).logits, expected, atol=1e-4, rtol=1e-4)
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(ids).logits, load("student")(ids).logits)
        plain = AutoModelForCausalLM.from_pretrained("run", trust_remote_code=True)
        torch.testing.assert_close(plain(ids).logits, expected)
    names = moved(merged.state_dict(), before)
    recurrent = {name for name in before if ".mixer.ssm." in name}
    assert recurrent <= names and not any("embed" in name or "norm" in name for name in names - recurrent)
    # A layer's MLP does not run in the alignment stage.
    assert any(".mlp." in name for name in names) == (stage == "distillation")
    assert AutoTokenizer.from_pretrained("run").vocab_size == 99
    # Checkpoints hold what trained, not the student.
    sizes = [sum(f.stat().st_size for f in (folders / name).glob("*.safetensors")) for name in ("run", "run/adapter")]
    assert sizes[1] < sizes[0] and last_checkpoint("run") == "run/checkpoint-4"
    again = (
        words + "--packed packed --output_dir run --use_peft --lora_r 2 --max_steps 6 --resume_from_checkpoint last"
    )
    assert main(again.split()) == 0


def test_the_recurrent_heads_can_train_alone(folders):  # noqa: F811
    words = TRAIN + RATES + "--packed packed --output_dir run --frozen_parts .mixer.attention. .mlp. norm"
    assert main(words.split()) == 0
    before = load("student").state_dict()
    assert moved(load("run").state_dict(), before) == {name for name in before if ".mixer.ssm." in name}
