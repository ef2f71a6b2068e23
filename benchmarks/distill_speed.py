"""
Tokens a second of the training stages, and their share of the rate of plain matrix products on the same machine.

    python -m benchmarks.distill_speed                                SmolLM2-135M, 8 kept heads, a few steps a stage
    python -m benchmarks.distill_speed --stage alignment --profile    where the time goes

On a CPU each stage runs in PyTorch alone and with the kernels of `trainers.distillation.cpu_kernels`, and the last line
has the ratio.
Beside wall time stands CPU time (seconds of all threads), which other work on the machine does not stretch. The share
counts the products that a stage cannot do without: the teacher's forward, and forward and backward of what trains.
Matrix products are measured in the run itself, before and after, in the type that the stage computes in.
"""

import argparse
import os
import tempfile
import time
from contextlib import nullcontext
from itertools import product

import torch
from torch.profiler import profile

from trainers.conversion import convert
from trainers.data import ProbeDocuments, Source, packed_dataset
from trainers.distillation.cpu_kernels import available, fast_heads
from trainers.distillation.distill_config import RadDistillationConfig
from trainers.distillation.distill_trainer import RadDistillationTrainer
from trainers.documents import text_documents
from trainers.heads.head_map import HeadMap
from trainers.precision import fast_dtype
from trainers.probes import KVRetrieval
from trainers.recipe import Recipe
from trainers.workshop import EXCERPT, Workshop, default_device


def seconds() -> tuple[float, float]:
    """Wall seconds and CPU seconds, after all that was asked of an accelerator."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def product_rate(dtype: torch.dtype) -> tuple[float, float]:
    """Floating-point operations a second of plain products `[2048, 576] @ [576, 1536]`, by wall and by CPU time."""
    a, b = torch.randn(2048, 576), torch.randn(576, 1536)
    a, b = (t.to(default_device(), dtype) for t in (a, b))
    a @ b
    count, start = 40, seconds()
    for _ in range(count):
        a @ b
    flops = 2 * 2048 * 576 * 1536 * count
    return tuple(flops / (now - then) for now, then in zip(seconds(), start, strict=True))


def needed_products(trainer: RadDistillationTrainer, kl_share: float) -> float:
    """Floating-point operations of matrix products that a token costs at least."""
    teacher, student = trainer._teacher(), trainer.model
    body = sum(p.numel() for name, p in teacher.model.named_parameters() if p.ndim == 2 and "embed" not in name)
    head = teacher.get_output_embeddings().weight.numel()
    trained = sum(p.numel() for name, p in student.named_parameters() if p.ndim == 2 and p.requires_grad)
    ours = sum(p.numel() for name, p in student.named_parameters() if ".mixer." in name and p.ndim == 2)
    if trainer.args.stage == "alignment":
        # Inputs are the teacher's and need no gradient: a product forward and one for the weights.
        return 2 * body + 4 * ours
    return 2 * body + 6 * trained + kl_share * (2 + 4) * head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--head-map", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--stage", action="append", choices=("alignment", "distillation"))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--kl-positions", type=int, default=128)
    parser.add_argument("--isolate", action="append", choices=("yes", "no"), help="keep documents of a row apart")
    parser.add_argument("--kernels", action="append", choices=("no", "yes"), help="of the CPU (default: both)")
    parser.add_argument("--profile", action="store_true", help="print where the time of the steps goes")
    args = parser.parse_args()
    workshop = Workshop(Recipe(teacher=args.teacher), progress=False)
    dtype = fast_dtype(default_device())
    teacher = workshop.teacher_in(dtype)
    text = text_documents(str(EXCERPT / "train.jsonl.xz"), limit=200)
    sources = [Source(text, 0.6), Source(ProbeDocuments(KVRetrieval(pairs=20)), 0.4, whole=True)]
    tokens = args.length * args.batch * (args.steps + 1)
    rows = packed_dataset(workshop.tokenizer, sources, args.length, tokens, progress=False)
    print(f"{torch.get_num_threads()} threads, {str(dtype).removeprefix('torch.')}, rows of {args.length}")
    both = args.kernels or (("no", "yes") if default_device().type == "cpu" and available() else ("no",))
    for stage, isolate in product(args.stage or ("alignment", "distillation"), args.isolate or ("no", "yes")):
        rates = []
        for kernels in both:
            os.environ["HF_RAD_CPU_KERNELS"] = "1" if kernels == "yes" else "0"
            if len(both) == 2:
                print("with kernels: " if kernels == "yes" else "PyTorch: ", end="")
            rates.append(measure(args, workshop, teacher, rows, stage, isolate == "yes", dtype))
        if len(rates) == 2:
            print(f"with kernels {rates[1] / rates[0]:.2f} times as many tokens a CPU second", flush=True)


def measure(args, workshop, teacher, rows, stage: str, isolate: bool, dtype: torch.dtype) -> float:
    """Runs some steps of a stage and prints their speed; returns tokens a CPU second."""
    student = convert(workshop.teacher, HeadMap.load(args.head_map))
    with tempfile.TemporaryDirectory() as folder, fast_heads(student):
        settings = {"stage": stage, "isolate_documents": isolate, "per_device_train_batch_size": args.batch}
        settings |= {"kl_positions": args.kl_positions, "max_length": args.length, "max_steps": args.steps + 1}
        config = RadDistillationConfig(folder, report_to="none", disable_tqdm=True, **settings)
        trainer = RadDistillationTrainer(student, teacher, config, rows, processing_class=workshop.tokenizer)
        trainer.create_optimizer_and_scheduler(args.steps + 1)
        batches = list(trainer.get_train_dataloader())
        step(trainer, batches[0])
        before, start = product_rate(dtype), seconds()
        with profile() if args.profile else nullcontext() as seen:
            for batch in batches[1 : args.steps + 1]:
                step(trainer, batch)
        taken = [now - then for now, then in zip(seconds(), start, strict=True)]
        rates = [(a + b) / 2 for a, b in zip(before, product_rate(dtype), strict=True)]
        needed = needed_products(trainer, min(1.0, args.kl_positions / args.length))
    tokens = args.steps * args.batch * args.length
    print(
        f"{stage}, documents {'apart' if isolate else 'together'}: "
        f"{tokens / taken[0]:.0f} tokens/s ({needed * tokens / taken[0] / rates[0]:.0%} of the product rate, "
        f"{rates[0] / 1e12:.3f} TFLOP/s); {tokens / taken[1]:.0f} tokens a CPU second "
        f"({needed * tokens / taken[1] / rates[1]:.0%} of {rates[1] / 1e12:.3f})",
        flush=True,
    )
    if args.profile:
        print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))
    return tokens / taken[1]


def step(trainer: RadDistillationTrainer, batch: dict) -> None:
    """One optimizer step."""
    trainer.model.train()
    trainer.training_step(trainer.model, dict(batch), (batch["labels"][:, 1:] != -100).sum())
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


if __name__ == "__main__":
    main()
