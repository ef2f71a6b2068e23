"""
Trains one stage of a student from the command line, in the manner of TRL's scripts: `hf-rad distill`.

    hf-rad distill --model_name_or_path student --teacher_model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --stage alignment --text corpus.jsonl --num_tokens 100000 --max_length 512 \
        --per_device_train_batch_size 8 --output_dir runs/mine/alignment

    accelerate launch -m trainers.cli distill --config distill.yaml
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import TrlParser

from trainers.actions import CALIBRATION_ROWS, record_training
from trainers.calibration import calibrate
from trainers.data import token_batches
from trainers.data.packing import Manifest, load_packed
from trainers.distillation.checkpoints import last_checkpoint
from trainers.distillation.distill_config import RadDistillationConfig
from trainers.distillation.distill_trainer import RadDistillationTrainer
from trainers.distillation.teaching import load_taught
from trainers.recipe import CalibrateSettings
from trainers.workshop import mixture_rows, resolve_teacher, text_and_held_out


# What conversion adds to a layer, and the linear layers of the teacher that stay.
NEW_MODULES = ("ssm", "adapter")
LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class DistillArguments:
    """
    What a stage starts from and learns on; the rest is [`~trainers.distillation.distill_config.RadDistillationConfig`].

    Args:
        model_name_or_path (`str`):
            Folder or Hub id of the student.
        text (`str`, *optional*):
            Text to train on: a .jsonl or .txt file, a folder of them, or a Hub data set.
        num_tokens (`int`, *optional*, defaults to `1_000_000`):
            Tokens of the packed data. How many steps are taken is for `max_steps` or `num_train_epochs` to say.
        probe_formats (`list[str]`, *optional*):
            Formats of key-value retrieval to mix in: `json`, `paper`, `lines`.
        probe_share (`float`, *optional*, defaults to `0.25`):
            Share of the tokens that comes from them.
        packed (`str`, *optional*):
            Folder that `hf-rad pack` wrote, instead of all of these.
        use_peft (`bool`, *optional*, defaults to `False`):
            Train the recurrent heads whole and the teacher's own weights by LoRA. `output_dir` gets the merged
            student, `output_dir/adapter` the adapter.
        lora_r (`int`, *optional*, defaults to 16), lora_alpha (`int`, *optional*, defaults to 32):
            Rank and scale of the adapter.
        lora_target_modules (`list[str]`, *optional*):
            Names of the linear layers with LoRA; by default those of kept heads and MLPs.

    `--resume_from_checkpoint last` goes on from the newest whole checkpoint of `output_dir`, if there is one.
    """

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of the student."})
    text: str | None = field(
        default=None, metadata={"help": "Text to train on: file, folder or Hub data set. Default: the excerpt."}
    )
    num_tokens: int = field(default=1_000_000, metadata={"help": "Tokens of the packed data."})
    probe_formats: list[str] | None = field(
        default=None, metadata={"help": "Formats of key-value retrieval to mix in: json, paper, lines."}
    )
    probe_share: float = field(default=0.25, metadata={"help": "Share of the tokens that comes from probes."})
    packed: str | None = field(default=None, metadata={"help": "Folder of `hf-rad pack`, instead of text and probes."})
    use_peft: bool = field(
        default=False, metadata={"help": "Train recurrent heads whole and the teacher's own weights by LoRA."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the LoRA adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the LoRA adapter."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Linear layers with LoRA. Default: those of kept heads and MLPs."}
    )


def main(arguments: list[str] | None = None) -> Path:
    """
    Trains and saves.

    Args:
        arguments (`list[str]`, *optional*):
            Words of the command line; by default those of the process.

    Returns:
        `Path`: folder of the trained student.
    """
    parser = TrlParser((DistillArguments, RadDistillationConfig), prog="hf-rad distill")
    script_args, training_args = parser.parse_args_and_config(arguments)
    teacher = training_args.teacher_model_name_or_path
    if teacher is None and training_args.teacher_logits is None:
        raise ValueError("There is no teacher: name it with --teacher_model_name_or_path, or give --teacher_logits.")
    source, folder = script_args.model_name_or_path, Path(training_args.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows, probes = training_rows(script_args, training_args, tokenizer)
    trainer = RadDistillationTrainer(
        source,
        teacher and resolve_teacher(teacher),
        training_args,
        rows,
        processing_class=tokenizer,
        peft_config=adapter_config(script_args),
    )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        if script_args.use_peft:
            raise ValueError("--use_peft merges the adapter in the end, which a sharded student cannot; use DDP.")
        if training_args.stage == "orientation":
            raise ValueError(
                "An orientation ends with a closed-form fit, which a sharded student cannot take; use DDP."
            )
    resume = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=last_checkpoint(folder) if resume == "last" else resume)
    tokens = trainer.state.num_input_tokens_seen
    if training_args.stage == "orientation":
        tokens += fit_readout(trainer, rows)
    trainer.save_model(str(folder / "adapter") if script_args.use_peft else None)
    if trainer.is_world_process_zero():
        if script_args.use_peft:
            trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        record_training(source, folder, training_args.stage, tokens, probes)
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return folder


def fit_readout(trainer: RadDistillationTrainer, rows: Dataset) -> int:
    """Fits the readout in closed form, since an orientation changed what it reads; returns the tokens of the fit."""
    args = trainer.args
    batches = token_batches(
        rows.take(min(len(rows), math.ceil(CalibrateSettings().tokens / args.max_length))), CALIBRATION_ROWS
    )
    calibrate(trainer.teacher_model, trainer.model, batches, progress=not args.disable_tqdm)
    return sum(batch.numel() for batch in batches)


def adapter_config(script_args: DistillArguments) -> LoraConfig | None:
    """LoRA on the teacher's own weights beside recurrent heads that train whole, where the arguments ask for it."""
    if not script_args.use_peft:
        return None
    return LoraConfig(
        r=script_args.lora_r,
        lora_alpha=script_args.lora_alpha,
        target_modules=script_args.lora_target_modules or list(LORA_MODULES),
        modules_to_save=list(NEW_MODULES),
    )


def training_rows(
    script_args: DistillArguments, training_args: RadDistillationConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, list[dict]]:
    """The rows that the arguments ask for, and the settings of the probes among them."""
    if script_args.packed is not None:
        manifest = Manifest.load(script_args.packed)
        rows = load_packed(script_args.packed, tokenizer)
        if training_args.teacher_logits is not None:
            rows = load_taught(rows, manifest.digest, training_args.teacher_logits)
        return rows, manifest.probes
    if training_args.teacher_logits is not None:
        raise ValueError("--teacher_logits belong to packed rows; name them with --packed.")
    probes = [{"name": "kv", "format": probe_format} for probe_format in script_args.probe_formats or []]
    rows = mixture_rows(
        tokenizer,
        text_and_held_out(script_args.text)[0],
        probes,
        script_args.probe_share,
        training_args.max_length,
        script_args.num_tokens,
        training_args.seed,
        not training_args.disable_tqdm,
    )
    return rows, probes


if __name__ == "__main__":
    main(sys.argv[1:])
