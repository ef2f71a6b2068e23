"""
Peak memory of each training stage beside the naive form of the same stage, in one run.

    python -m benchmarks.distill_memory                                    SmolLM2-135M, 8 kept heads, two steps a cell
    python -m benchmarks.distill_memory --stage distillation --rows 16     one stage, other batches

Forms, each in a process of its own, on the same rows of random tokens, with AdamW:

    naive           float32 teacher; both models' logits at all positions; in the alignment stage whole layers run
    stored apart    the trainer, but no tensor of the student lies in the teacher's memory
    shared          the trainer as it is
    recomputed      that, with `gradient_checkpointing`

On a CPU memory is the greatest resident set while the trainer works, less what the process had before it loaded the
models; on a GPU it is that of torch's allocator.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTTrainer

from trainers.actions import load_student
from trainers.conversion import convert
from trainers.distillation.distill_config import RadDistillationConfig
from trainers.distillation.distill_trainer import RadDistillationTrainer
from trainers.distillation.losses import divergence
from trainers.heads.head_map import HeadMap
from trainers.precision import fast_dtype
from trainers.recipe import Recipe
from trainers.teachers import load_teacher
from trainers.workshop import Workshop, default_device


STAGES = ("alignment", "distillation", "long")
FORMS = ("naive", "stored apart", "shared", "recomputed")


class Apart(RadDistillationTrainer):
    """Student and teacher share nothing."""

    def train(self, *args, **kwargs):
        return SFTTrainer.train(self, *args, **kwargs)


class Naive(Apart):
    """The losses as one writes them down."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        teacher, ids, records = self.teacher_model, inputs["input_ids"], []
        handles = [
            layer.register_forward_hook(
                lambda m, args, kwargs, out: records.append((args[0], kwargs["position_embeddings"], out)),
                with_kwargs=True,
            )
            for layer in teacher.model.layers
        ]
        with torch.no_grad():
            theirs = teacher(ids, use_cache=False).logits
        for handle in handles:
            handle.remove()
        with self.accelerator.autocast():
            if self.args.stage == "distillation":
                losses = divergence(model(ids, use_cache=False).logits, theirs)[:, :-1]
            else:
                layers = zip(self.model.model.layers, records, strict=True)
                losses = [
                    (layer(states, position_embeddings=rotary) - target).norm(dim=-1)
                    for layer, (states, rotary, target) in layers
                ]
                losses = torch.stack(losses).sum(0)[:, :-1]
        return losses.sum() / num_items_in_batch


def resident(name: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def cell(args: argparse.Namespace, folder: Path) -> int:
    """Peak bytes of one stage in one form."""
    device, before = default_device(), resident("VmRSS")
    naive, stage, long = args.form == "naive", args.stage[-1], args.stage[-1] == "long"
    dtype = torch.float32 if naive else fast_dtype(device)
    teacher = load_teacher(str(folder / "teacher"), dtype=dtype, device=device)[0]
    student = load_student(folder / "student")
    for parameter in (*teacher.parameters(), *student.parameters()):
        parameter.data = parameter.data.clone()  # no longer pages of a mapped file, which count only once read
    rows, length = (1, args.long_length) if long else (args.rows, args.length)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(student.config.vocab_size, (args.steps * rows, length), generator=generator).tolist()
    config = RadDistillationConfig(
        str(folder / "run"),
        stage="alignment" if stage == "alignment" else "distillation",
        max_steps=args.steps,
        per_device_train_batch_size=rows,
        max_length=length,
        gradient_checkpointing=args.form == "recomputed",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    kind = {"naive": Naive, "stored apart": Apart}.get(args.form, RadDistillationTrainer)
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    trainer = kind(student, teacher, config, data, processing_class=tokenizer)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the greatest resident set so far is forgotten
    trainer.train()
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--head-map", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--stage", action="append", choices=STAGES)
    parser.add_argument("--rows", type=int, default=4, help="rows of a step")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--long-length", type=int, default=4096, help="length of the one row of the long stage")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.form:
        print(json.dumps(cell(args, args.folder)))
        return
    print(f"{args.teacher}, {default_device().type}, {args.steps} steps; MB at most, naive / ours in brackets")
    print(f"{'stage':34}" + "".join(f"{form:>18}" for form in FORMS))
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Recipe(args.teacher), progress=False)
        # Numbers of bfloat16, as checkpoints on the Hub hold: a teacher in bfloat16 then equals its student's float32.
        teacher = workshop.teacher.to(torch.bfloat16).float()
        convert(teacher, HeadMap.load(args.head_map)).save_pretrained(Path(folder, "student"))
        teacher.save_pretrained(Path(folder, "teacher"))
        workshop.tokenizer.save_pretrained(Path(folder, "teacher"))
        for stage in args.stage or STAGES:
            shape = (1, args.long_length) if stage == "long" else (args.rows, args.length)
            print(f"{f'{stage}, {shape[0]} x {shape[1]} tokens':34}", end="", flush=True)
            naive = None
            for form in FORMS:
                words = [*sys.argv[1:], "--stage", stage, "--form", form, "--folder", folder]
                peak = json.loads(child(words).splitlines()[-1])
                naive = naive or peak
                print(f"{f'{peak / 1e6:,.0f} ({naive / peak:.2f})':>18}", end="", flush=True)
            print()


def child(words: list[str]) -> str:
    """What this module prints for one cell, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.distill_memory", *words]
    # What is freed goes back to the system at once, so that the resident set is what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
