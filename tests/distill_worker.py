"""
One process of a distributed or killed training run, for test_distributed.py.

    python -m torch.distributed.run --nproc_per_node 2 tests/distill_worker.py OUT ddp
"""

import os
import signal
import sys
from pathlib import Path

import torch
from datasets import Dataset
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from trainers.conversion import convert
from trainers.distillation.distill_config import RadDistillationConfig
from trainers.distillation.distill_trainer import RadDistillationTrainer
from trainers.distillation.placement import whole
from trainers.heads.head_map import HeadMap, TeacherShape


STEPS, ROWS, LENGTH = 4, 4, 24
RATES = {"orientation": 0.003, "alignment": 0.003, "distillation": 0.05}
VOCABULARY = 99


class Kill(TrainerCallback):
    """Ends the process as `kill -9` does, in the middle of a run."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == STEPS - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def tiny_teacher() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, head_dim=8, initializer_range=0.2, **sizes)
    return LlamaForCausalLM(config).eval()


def packed_rows() -> Dataset:
    """Rows of two documents each, as a packed folder gives them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCABULARY, (STEPS * ROWS, LENGTH), generator=generator)
    lengths = [[7 + i % 5, LENGTH - 7 - i % 5] for i in range(len(ids))]
    return Dataset.from_dict({"input_ids": ids.tolist(), "seq_lengths": lengths})


def make_trainer(out: Path, tokenizer, stage: str, batch: int, callbacks=None, **settings) -> RadDistillationTrainer:
    """A trainer whose optimizer steps take `ROWS` rows, whatever the batch and the number of processes."""
    teacher = tiny_teacher()
    student = convert(teacher, HeadMap(TeacherShape.from_config(teacher.config, "test/teacher"), [[1], []]))
    defaults = {"optim": "sgd", "learning_rate": RATES[stage], "mixer_learning_rate": RATES[stage], "max_steps": STEPS}
    defaults |= {"save_strategy": "no", "logging_steps": 1, "report_to": "none", "disable_tqdm": True}
    defaults |= {"bf16": False, "use_cpu": True, "per_device_train_batch_size": batch}
    args = RadDistillationConfig(str(out), stage=stage, **{**defaults, **settings})
    rows = packed_rows()
    return RadDistillationTrainer(student, teacher, args, rows, processing_class=tokenizer, callbacks=callbacks)


def weights_of(model) -> dict[str, torch.Tensor]:
    state = {name: p.detach() for name, p in model.named_parameters()}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in state.items()}


def shard_on_cpu() -> None:
    """accelerate shards on accelerators only; this lets its FSDP2 run on CPUs, for the mathematics."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    original, plugins = AcceleratorState.__init__, []

    def patched(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        plugins.extend([fsdp_plugin] if fsdp_plugin is not None else [])
        if plugins:
            # Every later look at the state would find the type that accelerate gives CPUs.
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugins[-1]

    AcceleratorState.__init__ = patched


def deepspeed_on_cpu() -> None:
    """
    accelerate gives CPUs no DeepSpeed; this lets the one that `accelerate launch` asked for run on them, partition the
    smallest parameter too, and compile nothing.
    """
    import deepspeed
    from accelerate.state import PartialState
    from accelerate.utils import DeepSpeedPlugin, DistributedType

    init, post_init = PartialState.__init__, DeepSpeedPlugin.__post_init__

    def partitioned(plugin):
        post_init(plugin)
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    PartialState.__init__ = lambda self, cpu=False, **kwargs: init(self, cpu=False, **kwargs)
    PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_CPU)
    DeepSpeedPlugin.__post_init__ = partitioned
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def gathered(trainer) -> dict[str, torch.Tensor]:
    """The student's weights after training; what the last forward gathered may still be whole."""
    if trainer.is_deepspeed_enabled:
        return {name: whole(p).detach().clone() for name, p in trainer.model.named_parameters()}
    for module in (*trainer.model.modules(), *trainer.teacher_model.modules()):
        if isinstance(module, FSDPModule):
            module.reshard()
    return weights_of(trainer.accelerator.unwrap_model(trainer.model))


def train_and_resume(out: Path, tokenizer, mode: str, settings: dict) -> None:
    """Trains all steps with a checkpoint in the middle, saves the student, and trains anew from that checkpoint."""
    settings = {**settings, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": STEPS // 2}
    unbroken = make_trainer(out / mode / "saved", tokenizer, "distillation", ROWS // 2, **settings)
    unbroken.train()
    unbroken.save_model()
    resumed = make_trainer(out / mode / "saved", tokenizer, "distillation", ROWS // 2, **settings)
    resumed.train(resume_from_checkpoint=str(out / mode / "saved" / f"checkpoint-{STEPS // 2}"))
    weights = {"unbroken": gathered(unbroken), "resumed": gathered(resumed)}
    if unbroken.is_world_process_zero():
        torch.save(weights, out / f"{mode}_resumed.pt")


def main(out: str, mode: str) -> None:
    out, settings = Path(out), {}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    if mode == "kill":
        settings = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}
        make_trainer(out / "killed", tokenizer, "distillation", ROWS, [Kill()], **settings).train()
    if mode == "zero3":
        deepspeed_on_cpu()
    if mode == "fsdp":
        shard_on_cpu()
        settings = {"fsdp": True, "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": False}}
        settings["fsdp_config"]["state_dict_type"] = "SHARDED_STATE_DICT"
    for stage in RATES:
        trainer = make_trainer(out / mode / stage, tokenizer, stage, ROWS // 2, **settings)
        trainer.train()
        weights = gathered(trainer)
        parameters = (*trainer.model.parameters(), *trainer.teacher_model.parameters())
        sharded = [isinstance(p, DTensor) or hasattr(p, "ds_id") and not p.ds_persist for p in parameters]
        assert all(sharded) == any(sharded) == (mode != "ddp"), mode
        if trainer.is_world_process_zero():
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            torch.save({"weights": weights, "losses": losses}, out / f"{mode}_{stage}.pt")
    train_and_resume(out, tokenizer, mode, settings)
    # Left to the interpreter's end, gloo's threads can abort the process that leaves first.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
