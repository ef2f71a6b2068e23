"""
Two processes train the same weights as one, with DDP, with FSDP2 and (where DeepSpeed is installed) with ZeRO-3, and a
run that was killed goes on to the weights of an unbroken one. Processes talk through gloo on the CPU; FSDP2 and ZeRO-3
on the CPU are for their mathematics alone.
"""

import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from distill_worker import RATES, ROWS, make_trainer, weights_of

from modeling_rad_hybrid import RadHybridForCausalLM
from trainers.distillation.checkpoints import last_checkpoint


ROOT = Path(__file__).resolve().parent.parent
WORKER = str(Path(__file__).with_name("distill_worker.py"))


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small are only slowed down by a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(out: Path, mode: str, processes: int = 2) -> int:
    """Starts workers; returns the exit code."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    if mode == "zero3":
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes/accelerate/zero3.yaml")]
        launcher += ["--num_processes", str(processes), "--mixed_precision", "no", "--main_process_port", "0"]
        environment["DS_ACCELERATOR"] = "cpu"
    else:
        environment["ACCELERATE_USE_CPU"] = "1"
    command = [sys.executable, *(launcher if processes > 1 else []), WORKER, str(out), mode]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    if done.returncode not in (0, -signal.SIGKILL):
        raise AssertionError(done.stderr[-3000:])
    return done.returncode


@pytest.mark.parametrize(
    "mode",
    [
        "ddp",
        "fsdp",
        pytest.param("zero3", marks=pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")),
    ],
)
def test_two_processes_train_the_weights_of_one(tmp_path, tiny_tokenizer, mode):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    run(tmp_path, mode)
    for stage in RATES:
        alone = make_trainer(tmp_path / "alone" / stage, tiny_tokenizer, stage, ROWS)
        before = weights_of(alone.model)
        alone.train()
        expected = weights_of(alone.model)
        there = torch.load(tmp_path / f"{mode}_{stage}.pt")
        losses = [entry["loss"] for entry in alone.state.log_history if "loss" in entry]
        assert there["losses"] == pytest.approx(losses, rel=1e-3)
        assert max((expected[name] - before[name]).abs().max() for name in before) > 3e-4
        for name, weight in expected.items():
            torch.testing.assert_close(there["weights"][name], weight, atol=1e-6, rtol=0, msg=f"{stage} {name}")
            if not dict(alone.model.named_parameters())[name].requires_grad:
                assert torch.equal(there["weights"][name], before[name]), name
    check_resumed(tmp_path, mode, before)


def check_resumed(folder: Path, mode: str, before: dict[str, torch.Tensor]) -> None:
    """A run that went on from its checkpoint has the weights of the unbroken one, and those were saved as a student."""
    runs = torch.load(folder / f"{mode}_resumed.pt")
    saved = RadHybridForCausalLM.from_pretrained(folder / mode / "saved")
    assert (folder / mode / "saved" / "ssd.py").is_file() and not (folder / mode / "saved" / "_fsdp_api.py").exists()
    assert saved.config.auto_map["AutoModelForCausalLM"] == "modeling_rad_hybrid.RadHybridForCausalLM"
    for name, weight in weights_of(saved).items():
        torch.testing.assert_close(runs["resumed"][name], runs["unbroken"][name], atol=1e-6, rtol=0, msg=name)
        assert torch.equal(weight, runs["unbroken"][name]), name
        assert torch.equal(weight, before[name]) == ("embed" in name or "lm_head" in name), name


def test_a_killed_run_goes_on_to_the_weights_of_an_unbroken_one(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert run(tmp_path, "kill", processes=1) == -signal.SIGKILL
    checkpoint = last_checkpoint(tmp_path / "killed")
    assert checkpoint.endswith("checkpoint-2")
    settings = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}
    resumed = make_trainer(tmp_path / "killed", tiny_tokenizer, "distillation", ROWS, **settings)
    resumed.train(resume_from_checkpoint=checkpoint)
    unbroken = make_trainer(tmp_path / "unbroken", tiny_tokenizer, "distillation", ROWS, **settings)
    unbroken.train()
    expected = weights_of(unbroken.model)
    for name, weight in weights_of(resumed.model).items():
        assert torch.equal(weight, expected[name]), name
    assert resumed.state.num_input_tokens_seen == unbroken.state.num_input_tokens_seen
