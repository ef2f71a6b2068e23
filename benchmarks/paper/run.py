"""
Trains and measures every student of the paper's tables on the GPUs of one machine, in a given number of seconds.

    python -m benchmarks.paper.run --out runs/paper --seconds 900
    python -m benchmarks.paper.run --out runs/rehearsal --seconds 3000 --workers 1 --trial-tokens 8192 --rate 100

1. The good student is converted and aligned; meanwhile the teacher is measured and the first cells are aligned.
2. Short trials of several learning rates from there; the best by [`best_rates`] goes to everyone (`rates.json`).
3. Budgets from the speed of the trials and the time that is left ([`plan`], `plan.json`).
4. The good student on the first GPU, the cells in their order on the others, two at a time (one alone waits for its
   CPU), and on the first once it is free. Whatever is trained is measured at once, beside the training.

Every step is a process of its own with a log in `logs/`; killed and started again, the same command goes on where it
was. `status.json` says what runs. Results are small files: `--collect FILE` packs them into one archive.
"""

import argparse
import json
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.paper.cell import CELLS, GOOD, RECIPE, WATCHED
from benchmarks.paper.floor import Floor, Job, say
from trainers.actions import TRAINING
from trainers.files import atomic_path, read_json, write_json


# Rates of the recurrent heads and of the rest, from careful to bold.
TRIALS = ((1e-4, 3e-5), (3e-4, 1e-4), (1e-3, 3e-4), (2e-3, 6e-4))
# Tokens of a cell, as a part of the good student's.
CELL_SHARE = 0.2
# What a cell and a measurement take of a GPU, in seconds, beside the tokens of distillation; most of their own time goes
# by on the CPU, while other processes use the GPU.
CELL_SECONDS, MEASURE_SECONDS = 15, 9
# The good student has a GPU's slots for trainings to itself; two cells and one alignment fill them too.
GOOD_SLOTS, CELL_SLOTS = 5, 2
# Results that are worth more than their bytes: everything but weights and optimizer states.
COLLECTED = (".json", ".jsonl", ".log", ".png", ".yaml")


def last_watch(folder: Path) -> dict | None:
    """The newest line of a cell's `watch.jsonl`."""
    path = folder / "watch.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return json.loads(lines[-1]) if lines else None


def best_rates(trials: list[tuple[tuple[float, float], dict | None]]) -> tuple[float, float]:
    """
    Chooses learning rates by how short trials ended.

    Retrieval that a bold rate destroys comes back only with many tokens, so those trials are passed over that keep less
    than three fifths of the best one's retrieval (mean over what is watched); of the others the lowest loss on text
    wins.

    Args:
        trials (`list`):
            (rates, last line of `watch.jsonl`) of each, from careful to bold; a trial that failed has no line.

    Returns:
        `tuple[float, float]`: rates of the recurrent heads and of the rest; the most careful ones where all failed.
    """
    ended = [(rates, line) for rates, line in trials if line is not None]
    if not ended:
        return trials[0][0]
    retrieval = {rates: sum(line[task.name] for task in WATCHED) / len(WATCHED) for rates, line in ended}
    enough = 0.6 * max(retrieval.values())
    return min((line["text_loss"], rates) for rates, line in ended if retrieval[rates] >= enough)[1]


def speed(lines: list[dict]) -> float:
    """Distilled tokens a second, from the last lines of `watch.jsonl` of trials that shared a GPU."""
    return sum(line["tokens"] / line["train_seconds"] for line in lines if line["train_seconds"])


def plan(rate: float, gpus: int, seconds: float, step_tokens: int, cells: int = len(CELLS)) -> dict[str, int]:
    """
    Divides the time that is left.

    The good student and `cells` cells of a fifth of its tokens shall together fill the GPUs, and the good student one of
    them at most. One twelfth is left for what nobody foresaw.

    Args:
        rate (`float`):
            Distilled tokens a second of one GPU.
        gpus (`int`):
            GPUs.
        seconds (`float`):
            Seconds that are left for training.
        step_tokens (`int`):
            Tokens of an optimizer step, to which budgets are rounded.
        cells (`int`, *optional*):
            Cells that shall fit; with one GPU the first half of them.

    Returns:
        `dict`: `good` and `cell`, tokens of distillation of each.
    """
    cells = cells if gpus > 1 else (cells + 1) // 2
    free = 0.92 * gpus * seconds - cells * CELL_SECONDS - (cells + 11) * MEASURE_SECONDS
    good = max(0.0, min(free / (1 + CELL_SHARE * cells), 0.9 * seconds - 30)) * rate
    steps = max(50, int(good / step_tokens))
    return {"good": steps * step_tokens, "cell": max(10, int(CELL_SHARE * steps)) * step_tokens}


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
        self.floor = Floor(self.out, self.gpus, GOOD_SLOTS)
        self.until = time.monotonic() + args.seconds

    def cell(self, name: str, **options) -> list[str]:
        words = ["-m", "benchmarks.paper.cell", name, "--recipe", self.args.recipe, "--out", str(self.out)]
        words += ["--backend", self.args.backend]
        for option, value in options.items():
            values = value if isinstance(value, (list, tuple)) else [value]
            words += [f"--{option.replace('_', '-')}", *(str(item) for item in values if item is not True)]
        return words

    def measure(self, name: str, model: str, done: str, *options: str) -> Job:
        command = [
            "-m",
            "benchmarks.paper.measure",
            model,
            "--recipe",
            self.args.recipe,
            "--out",
            str(self.out / done),
        ]
        return Job(f"measure-{name}", [*command, *options], self.out / done)

    def walk(self) -> Iterator[None]:
        """Lets the jobs run until none is left or the time is up; yields after every turn."""
        while self.floor.busy and time.monotonic() < self.until:
            if self.floor.turn():
                self.write_status()
            yield
            time.sleep(0.3)

    def write_status(self) -> None:
        states = {kind: [job.name for job in jobs] for kind, jobs in self.floor.running.items()}
        states |= {f"waiting {kind}": [job.name for job in jobs] for kind, jobs in self.floor.waiting.items()}
        states |= {"failed": self.floor.failed, "seconds left": round(self.until - time.monotonic())}
        write_json(self.out / "status.json", states)

    def aligned(self) -> None:
        """Converts and aligns the good student; meanwhile the teacher is measured and the cells are aligned."""
        done = self.out / GOOD.name / "alignment" / TRAINING
        start = self.cell(GOOD.name, align_tokens=self.args.align_tokens)
        self.floor.add("training", Job("good-start", start, done, slots=GOOD_SLOTS, wants=0))
        self.floor.add("measurement", self.measure("teacher", "teacher", "teacher.json"))
        self.floor.add("measurement", self.measure("teacher-curve", "teacher", "teacher-curve.json", "--curve"))
        for cell in CELLS:
            options = {"align_tokens": self.args.cell_align_tokens, "micro_batch": self.args.micro_batch}
            start = self.cell(cell.name, **options)
            aligned = self.out / cell.name / "alignment" / TRAINING
            self.floor.add("training", Job(f"{cell.name}-start", start, aligned, wants=self.gpus - 1))
        for _ in self.walk():
            if done.exists():
                return
        if not done.exists():
            raise SystemExit(f"The good student was not made; see {self.out / 'logs'}.")

    def rates(self) -> tuple[float, float]:
        """Tries learning rates, all trials at once."""
        path = self.out / "rates.json"
        if not path.exists():
            folders = [self.out / "trials" / str(number) for number in range(len(TRIALS))]
            for number, rates in reversed(list(enumerate(TRIALS))):
                options = {"folder": f"trials/{number}", "distill_tokens": self.args.trial_tokens, "rates": rates}
                options |= {"start": self.out / GOOD.name / "alignment", "watch": 1}
                options["micro_batch"] = self.args.micro_batch
                command, done = self.cell(GOOD.name, **options), folders[number] / "cell.json"
                job = Job(f"trial-{number}", command, done, most_tries=1, slots=CELL_SLOTS)
                self.floor.add("training", job, first=True)
            for _ in self.walk():
                jobs = (*self.floor.running["training"], *self.floor.waiting["training"])
                if not any(job.name.startswith("trial-") for job in jobs):
                    break
            ended = [last_watch(folder) if (folder / "cell.json").exists() else None for folder in folders]
            rate = speed([line for line in ended if line]) / self.gpus
            trials = list(zip(TRIALS, ended, strict=True))
            write_json(path, {"rates": best_rates(trials), "trials": trials, "tokens_a_second": round(rate)})
            say(f"rates {best_rates(trials)}, {rate:,.0f} tokens a second on each GPU")
        return tuple(read_json(path)["rates"])

    def budgets(self) -> dict[str, int]:
        """Divides the rest of the time, once."""
        path = self.out / "plan.json"
        if not path.exists():
            rate = self.args.rate or read_json(self.out / "rates.json")["tokens_a_second"] or 50_000
            left = self.until - time.monotonic() - self.args.reserve
            budgets = plan(rate, self.gpus, left, self.args.step_tokens)
            write_json(path, {**budgets, "rate": rate, "gpus": self.gpus, "seconds": round(left)})
        say(f"plan {read_json(path)}")
        return read_json(path)

    def tables(self, rates: tuple[float, float], budgets: dict[str, int]) -> None:
        """Trains the good student and the cells, and measures whatever is trained."""
        for name, slots in reversed([(GOOD.name, GOOD_SLOTS), *((cell.name, CELL_SLOTS) for cell in CELLS)]):
            folder, good = self.out / name, name == GOOD.name
            options = {"distill_tokens": budgets["good" if good else "cell"], "rates": rates}
            options |= {"start": folder / "alignment", "watch": 10 if good else 5}
            options |= {"snapshots": True} if good else {"micro_batch": self.args.micro_batch}
            command = self.cell(name, **options) + (["--compile"] if self.args.compile else [])
            waits_for = folder / "alignment" / TRAINING
            job = Job(name, command, folder / "cell.json", waits_for, slots=slots, wants=0 if good else None)
            self.floor.add("training", job, first=True)
            self.floor.add("measurement", self.measure_cell(name))
        for _ in self.walk():
            self.measure_good()
            if self.until - time.monotonic() < budgets["cell"] / budgets["rate"] + self.args.reserve:
                self.give_up_late()
        self.write_status()

    def measure_cell(self, name: str) -> Job:
        job = self.measure(name, str(self.out / name / "distillation"), f"{name}/measured.json")
        job.waits_for = self.out / name / "cell.json"
        return job

    def measure_good(self) -> None:
        """Queues the curve's points as the good student leaves them, and its heads' ablation in the end."""
        good = self.out / GOOD.name
        queued = {
            job.name for kind in self.floor.waiting for job in (*self.floor.waiting[kind], *self.floor.running[kind])
        }
        jobs = [self.measure("aligned", str(good / "alignment"), "good/curve/step-0.json", "--curve")]
        for folder in good.glob("snapshots/step-*"):
            if (folder / TRAINING).exists():
                jobs.append(self.measure(folder.name, str(folder), f"good/curve/{folder.name}.json", "--curve"))
        if (good / "cell.json").exists():
            final = str(good / "distillation")
            jobs.append(self.measure("good-curve", final, "good/curve/final.json", "--curve"))
            jobs.append(self.measure("good-ablated", final, "good/ablated.json", "--ablate"))
        for job in jobs:
            if job.name not in queued and job.name not in self.floor.failed:
                self.floor.add("measurement", job)

    def give_up_late(self) -> None:
        """Takes back the trainings that cannot end any more."""
        for job in self.floor.waiting["training"]:
            say(f"no time left for {job.name}")
        given_up = {job.name for job in self.floor.waiting["training"]}
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
    parser.add_argument("--reserve", type=float, default=75, help="seconds of them for the last measurements")
    parser.add_argument("--align-tokens", type=int, default=4_194_304, help="alignment of the good student")
    parser.add_argument("--cell-align-tokens", type=int, default=1_572_864, help="alignment of each cell")
    parser.add_argument("--trial-tokens", type=int, default=2_621_440, help="tokens of each trial of a learning rate")
    parser.add_argument(
        "--step-tokens", type=int, default=32_768, help="tokens of an optimizer step, as in the recipe"
    )
    parser.add_argument("--rate", type=float, help="tokens a second of one GPU, instead of the trials' speed")
    parser.add_argument("--workers", type=int, help="GPUs (default: all)")
    parser.add_argument("--micro-batch", type=int, default=16, help="rows at once where students share a GPU")
    parser.add_argument("--compile", action="store_true", help="compile the layers")
    parser.add_argument("--backend", default="auto", help="back end of the scan (auto, torch, triton)")
    parser.add_argument("--collect", metavar="FILE", help="only pack the small files of the run into this archive")
    args = parser.parse_args(arguments)
    if args.collect:
        collect(Path(args.out), Path(args.collect))
        return
    run = Run(args)
    try:
        run.aligned()
        run.tables(run.rates(), run.budgets())
    finally:
        run.floor.stop()
    say("done: " + json.dumps(read_json(run.out / "status.json")))


if __name__ == "__main__":
    main()
