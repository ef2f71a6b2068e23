"""
Trains and measures every student of the paper's tables on the GPUs of one machine, in a given number of seconds.

    python -m benchmarks.paper.run --out runs/paper --seconds 900
    python -m benchmarks.paper.run --out runs/rehearsal --recipe small.yaml --seconds 3000 --workers 1

The good student trains on the first GPU until the time is nearly up. The cells, a fixed number of tokens each, follow
one another beside it and on the other GPUs, two or three students a GPU, since one alone waits for its CPU. A cell that
cannot end any more is not begun. Whatever is trained is measured at once, beside the training.

Every step is a process of its own with a log in `logs/`; killed and started again, the same command goes on where it
was. `status.json` says what runs. Results are small files: `--collect FILE` packs them into one archive.
"""

import argparse
import json
import tarfile
import time
from pathlib import Path

import torch

from benchmarks.paper.cell import CELLS, GOOD, RECIPE
from benchmarks.paper.floor import Floor, Job, say
from trainers.actions import TRAINING
from trainers.files import atomic_path, read_json, write_json


# Slots of a GPU, and what the good student and a cell take of them; an alignment takes one.
SLOTS, GOOD_SLOTS, CELL_SLOTS = 5, 3, 2
# Cells that are aligned at once in the beginning; the others follow when so many train.
FIRST_WAVE = 4
# What a training that failed is started again with: the scan in PyTorch, slower but without kernels of our own.
CAREFUL = ("--backend", "torch")
# Results that are worth more than their bytes: everything but weights and optimizer states.
COLLECTED = (".json", ".jsonl", ".log", ".png", ".yaml")


class Run:
    """
    The whole run.

    Args:
        args (`argparse.Namespace`):
            Options of the command line.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.out = args, Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.gpus = args.workers or max(1, torch.cuda.device_count())
        # A lone GPU has room for the good student, a cell and an alignment.
        self.floor = Floor(self.out, self.gpus, SLOTS if self.gpus > 1 else SLOTS + 1, opens=args.opens)
        plan = self.out / "plan.json"
        if not plan.exists():
            began = time.time()
            options = {**vars(args), "opens": args.opens and str(args.opens)}
            write_json(plan, {"began": began, "until": began + args.seconds, "gpus": self.gpus, **options})
        self.until = read_json(plan)["until"]

    @property
    def left(self) -> float:
        """Seconds until everything ends."""
        return self.until - time.time()

    def cell(self, name: str, align_tokens: int, distill_tokens: int, *options: str) -> list[str]:
        words = ["-m", "benchmarks.paper.cell", name, "--recipe", self.args.recipe, "--out", str(self.out)]
        words += ["--backend", self.args.backend, "--align-tokens", str(align_tokens)]
        return [*words, "--distill-tokens", str(distill_tokens), *options]

    def measure(self, name: str, model: str, done: str, *options: str) -> Job:
        words = ["-m", "benchmarks.paper.measure", model, "--recipe", self.args.recipe]
        words += ["--out", str(self.out / done)]
        return Job(f"measure-{name}", [*words, *options], self.out / done)

    def walk(self) -> None:
        """Does everything."""
        args = self.args
        until = str(self.until - args.reserve)
        command = self.cell(GOOD.name, args.align_tokens, args.most_tokens, "--until", until)
        self.floor.add(
            "training", Job(GOOD.name, command, self.file(GOOD.name), slots=GOOD_SLOTS, wants=0, again=CAREFUL)
        )
        self.floor.add("measurement", self.measure("teacher", "teacher", "teacher.json"))
        self.floor.add("measurement", self.measure("teacher-curve", "teacher", "teacher-curve.json", "--curve"))
        for cell in CELLS:
            aligned = self.out / cell.name / "alignment" / TRAINING
            options = ("--watch", "3", "--no-checkpoints")
            command = self.cell(cell.name, args.cell_align_tokens, args.cell_tokens, *options)
            job = Job(cell.name, command, self.file(cell.name), aligned, slots=CELL_SLOTS, again=CAREFUL)
            self.floor.add("training", job)
        for number, cell in enumerate(CELLS):
            # Conversion and alignment wait for their CPU most of the time: one of them fits beside two cells.
            aligned = self.out / cell.name / "alignment" / TRAINING
            command = self.cell(cell.name, args.cell_align_tokens, 0)
            beside = None if args.opens else self.gpus - 1
            job = Job(f"{cell.name}-start", command, aligned, wants=beside, again=CAREFUL)
            if number >= FIRST_WAVE:
                # By then the cells before have taken their places.
                job.waits_for = self.out / CELLS[0 if self.gpus == 1 else FIRST_WAVE - 2].name / "watch.jsonl"
            self.floor.add("training", job)
        for cell in (GOOD, *CELLS):
            job = self.measure(cell.name, str(self.out / cell.name / "distillation"), f"{cell.name}/measured.json")
            job.waits_for = self.file(cell.name)
            self.floor.add("measurement", job)
        while self.floor.busy and self.left > 0:
            self.measure_good()
            if self.floor.turn():
                self.write_status()
            if GOOD.name in self.floor.failed:
                # Time costs by the second: whoever watches must see it at once.
                raise SystemExit(f"The good student failed twice; see {self.out / 'logs' / 'good.log'}.")
            if self.left < args.last_start:
                self.give_up_late()
            time.sleep(0.3)
        self.write_status()

    def file(self, name: str) -> Path:
        """The file that is there once a cell is trained."""
        return self.out / name / "cell.json"

    def write_status(self) -> None:
        states = {kind: [job.name for job in jobs] for kind, jobs in self.floor.running.items()}
        states |= {f"waiting {kind}": [job.name for job in jobs] for kind, jobs in self.floor.waiting.items()}
        write_json(self.out / "status.json", {**states, "failed": self.floor.failed, "seconds left": round(self.left)})

    def measure_good(self) -> None:
        """Queues the curve's points as the good student leaves them, and its heads' ablation in the end."""
        good, floor = self.out / GOOD.name, self.floor
        known = {job.name for kind in floor.waiting for job in (*floor.waiting[kind], *floor.running[kind])}
        jobs = []
        for folder in (good / "alignment", *sorted(good.glob("snapshots/step-*"))):
            if (folder / TRAINING).exists():
                jobs.append(self.measure(folder.name, str(folder), f"good/curve/{folder.name}.json", "--curve"))
        if self.file(GOOD.name).exists():
            final = str(good / "distillation")
            jobs.append(self.measure("good-curve", final, "good/curve/final.json", "--curve"))
            jobs.append(self.measure("good-ablated", final, "good/ablated.json", "--ablate"))
        for job in jobs:
            if job.name not in known and job.name not in floor.failed:
                floor.add("measurement", job)

    def give_up_late(self) -> None:
        """Takes back the cells that cannot end any more."""
        given_up = {job.name.removesuffix("-start") for job in self.floor.waiting["training"]}
        for name in sorted(given_up):
            say(f"no time left for {name}")
        self.floor.waiting["training"] = []
        waiting = self.floor.waiting["measurement"]
        self.floor.waiting["measurement"] = [
            job for job in waiting if job.name.removeprefix("measure-") not in given_up
        ]


def collect(out: Path, archive: Path) -> None:
    """Packs a run's small files into one archive."""
    with atomic_path(archive) as temporary, tarfile.open(temporary, "w:gz") as tar:
        for path in sorted(out.rglob("*")):
            weights = {"student", "alignment", "distillation", "snapshots"} & set(path.relative_to(out).parts[:-1])
            if path.is_file() and path.suffix in COLLECTED and (not weights or path.parent.name == "rad"):
                tar.add(path, path.relative_to(out.parent))
            elif path.is_file() and path.name in ("layer_errors.jsonl", "trainer_state.json", "config.json"):
                tar.add(path, path.relative_to(out.parent))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.run")
    parser.add_argument("--out", default="runs/paper", help="folder of the run")
    parser.add_argument("--recipe", default=str(RECIPE))
    parser.add_argument("--seconds", type=float, default=900, help="seconds from now until everything has ended")
    parser.add_argument("--reserve", type=float, default=85, help="seconds of them for the last measurements")
    parser.add_argument("--last-start", type=float, default=185, help="seconds before the end when no cell begins")
    parser.add_argument("--align-tokens", type=int, default=2_097_152, help="alignment of the good student")
    parser.add_argument("--most-tokens", type=int, default=163_840_000, help="most that the good student can see")
    parser.add_argument("--cell-align-tokens", type=int, default=1_048_576, help="alignment of each cell")
    parser.add_argument("--cell-tokens", type=int, default=8_388_608, help="distillation of each cell")
    parser.add_argument(
        "--opens", type=Path, metavar="FILE", help="the last GPU takes no job before this file is there"
    )
    parser.add_argument("--workers", type=int, help="GPUs (default: all)")
    parser.add_argument("--backend", default="auto", help="back end of the scan (auto, torch, triton)")
    parser.add_argument("--collect", metavar="FILE", help="only pack the small files of the run into this archive")
    args = parser.parse_args(arguments)
    if args.collect:
        collect(Path(args.out), Path(args.collect))
        return
    run = Run(args)
    try:
        run.walk()
    finally:
        run.floor.stop()
    say("done: " + json.dumps(read_json(run.out / "status.json")))


if __name__ == "__main__":
    main()
