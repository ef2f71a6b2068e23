"""
Trains and measures every student of the paper's tables on the GPUs of one machine, in a given number of seconds.

    python -m benchmarks.paper.run --out runs/paper --seconds 900
    python -m benchmarks.paper.run --out runs/rehearsal --seconds 3000 --workers 1 --trial-tokens 8192 --rate 100

1. The good student is converted and aligned; meanwhile another GPU measures the teacher.
2. Short trials of several learning rates from there; the best by [`best_rates`] goes to everyone (`rates.json`).
3. Budgets from the speed of the trials and the time that is left ([`plan`], `plan.json`).
4. The good student on the first GPU, the cells in their order on the others, and on the first once it is free.
   Whatever is trained is measured at once, beside the training.

Every step is a process of its own with a log in `logs/`; killed and started again, the same command goes on where it
was. `status.json` says what runs. Results are small files: `--collect FILE` packs them into one archive.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.paper.cell import CELLS, GOOD, RECIPE, WATCHED
from trainers.actions import TRAINING
from trainers.files import atomic_path, read_json, write_json


# Rates of the recurrent heads and of the rest, from careful to bold.
TRIALS = ((1e-4, 3e-5), (3e-4, 1e-4), (1e-3, 3e-4), (2e-3, 1e-3))
# Tokens that a cell is aligned on, as a part of those that it is distilled on.
ALIGN_SHARE = 0.08
CELL_SHARE = 0.2
# Seconds of a cell beside its distillation: start, conversion, calibration, alignment.
CELL_OVERHEAD = 45
# GPU seconds of one measurement beside a training.
MEASURE_SECONDS = 30
# Rows at once where the recipe's did not fit into memory.
SMALL_BATCH = 8
# Results that are worth more than their bytes: everything but weights and optimizer states.
COLLECTED = (".json", ".jsonl", ".log", ".png", ".yaml")


@dataclass
class Job:
    """
    One process.

    Args:
        name (`str`):
            Its name in logs and status.
        command (`list[str]`):
            Arguments of this Python.
        done (`Path`):
            The file that is there once the job is done.
        waits_for (`Path`, *optional*):
            A file that must be there before the job can start.
        most_tries (`int`, *optional*, defaults to 2):
            How often it is started before it counts as failed.
    """

    name: str
    command: list[str]
    done: Path
    waits_for: Path | None = None
    most_tries: int = 2
    tries: int = 0
    gpu: int | None = None
    process: subprocess.Popen | None = field(default=None, repr=False)
    started: float = 0.0

    def start(self, gpu: int, logs: Path) -> None:
        """Starts the process on one GPU, its output appended to its log."""
        self.gpu, self.started, self.tries = gpu, time.monotonic(), self.tries + 1
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        logs.mkdir(parents=True, exist_ok=True)
        with open(logs / f"{self.name}.log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.command], stdout=log, stderr=subprocess.STDOUT, env=environment
            )


class Floor:
    """
    Runs jobs on the GPUs: at most `trainings` and `measurements` at a time on each.

    Args:
        out (`Path`):
            Folder of the run.
        gpus (`int`):
            GPUs, numbered from 0.
        trainings (`int`, *optional*, defaults to 1), measurements (`int`, *optional*, defaults to 2):
            Jobs of each kind on one GPU.
    """

    def __init__(self, out: Path, gpus: int, trainings: int = 1, measurements: int = 2):
        self.out, self.gpus = out, gpus
        self.most = {"training": trainings, "measurement": measurements}
        self.waiting: dict[str, list[Job]] = {"training": [], "measurement": []}
        self.running: dict[str, list[Job]] = {"training": [], "measurement": []}
        self.failed: list[str] = []

    def add(self, kind: str, job: Job) -> None:
        """Queues a job, unless its outcome is there already."""
        if not job.done.exists():
            self.waiting[kind].append(job)

    def turn(self) -> list[Job]:
        """Takes in what has ended, starts what can start; returns the jobs that are done since the last turn."""
        ended = []
        for kind, jobs in self.running.items():
            for job in [job for job in jobs if job.process.poll() is not None]:
                jobs.remove(job)
                took = time.monotonic() - job.started
                say(f"{job.name} ended with code {job.process.returncode} after {took:.0f} s")
                if job.done.exists():
                    ended.append(job)
                elif job.tries < job.most_tries:
                    if kind == "training" and "--micro-batch" not in job.command:
                        # What most likely stopped it is memory.
                        job.command += ["--micro-batch", str(SMALL_BATCH)]
                    self.waiting[kind].insert(0, job)
                else:
                    self.failed.append(job.name)
                    say(tail(self.out / "logs" / f"{job.name}.log"))
        for kind in self.waiting:
            for job in list(self.waiting[kind]):
                gpu = self._free(kind)
                if gpu is not None and (job.waits_for is None or job.waits_for.exists()):
                    self.waiting[kind].remove(job)
                    job.start(gpu, self.out / "logs")
                    self.running[kind].append(job)
                    say(f"{job.name} started on GPU {gpu}")
        return ended

    def _free(self, kind: str) -> int | None:
        loads = [[job.gpu for job in self.running[kind]].count(gpu) for gpu in range(self.gpus)]
        free = [gpu for gpu in range(self.gpus) if loads[gpu] < self.most[kind]]
        if not free:
            return None
        # The first GPU trains the good student: measurements go to the last one as long as it has room.
        return free[-1] if kind == "measurement" else min(free, key=lambda gpu: loads[gpu])

    @property
    def busy(self) -> bool:
        """Whether anything runs or waits."""
        return any(self.running.values()) or any(self.waiting.values())

    def stop(self) -> None:
        """Ends what still runs; it goes on when started again."""
        self.waiting = {kind: [] for kind in self.waiting}
        for job in (job for jobs in self.running.values() for job in jobs):
            job.process.terminate()


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


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

    The good student and `cells` cells of a fifth of its tokens, each with its alignment, shall together fill the GPUs,
    and the good student alone one of them at most.

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
    measurements = (cells + 10) * MEASURE_SECONDS / 2
    free = gpus * seconds - cells * CELL_OVERHEAD - measurements
    # Alignment runs no head and no MLP of the student: about half the cost of a token of distillation.
    shares = 1 + CELL_SHARE * (1 + ALIGN_SHARE / 2) * cells
    good = max(0.0, min(free / shares, 0.95 * seconds - 20)) * rate
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
        self.floor = Floor(self.out, self.gpus, args.trainings)
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

    def walk(self, until: float) -> Iterator[Job]:
        """Lets the jobs run until none is left or the time is up; yields each job that is done."""
        while self.floor.busy and time.monotonic() < until:
            ended = self.floor.turn()
            if ended:
                self.write_status()
            yield from ended
            time.sleep(0.3)

    def write_status(self) -> None:
        states = {kind: [job.name for job in jobs] for kind, jobs in self.floor.running.items()}
        states |= {f"waiting {kind}": [job.name for job in jobs] for kind, jobs in self.floor.waiting.items()}
        states |= {"failed": self.floor.failed, "seconds left": round(self.until - time.monotonic())}
        write_json(self.out / "status.json", states)

    def aligned(self) -> None:
        """Converts and aligns the good student; meanwhile the teacher is measured."""
        folder = self.out / GOOD.name
        done = folder / "alignment" / TRAINING
        self.floor.add("training", Job("good-start", self.cell(GOOD.name, align_tokens=self.args.align_tokens), done))
        self.floor.add("measurement", self.measure("teacher", "teacher", "teacher.json"))
        self.floor.add("measurement", self.measure("teacher-curve", "teacher", "teacher-curve.json", "--curve"))
        for _ in self.walk(self.until):
            if done.exists():
                return
        if not done.exists():
            raise SystemExit(f"The good student was not made; see {self.out / 'logs'}.")

    def rates(self) -> tuple[float, float]:
        """Tries learning rates, all trials at once."""
        path = self.out / "rates.json"
        if not path.exists():
            most = self.floor.most["training"]
            self.floor.most["training"] = -(-len(TRIALS) // self.gpus)
            folders = [self.out / "trials" / str(number) for number in range(len(TRIALS))]
            for number, rates in enumerate(TRIALS):
                options = {"folder": f"trials/{number}", "distill_tokens": self.args.trial_tokens, "rates": rates}
                options |= {"start": self.out / GOOD.name / "alignment", "watch": 1}
                # Several share a GPU's memory.
                options["micro_batch"] = self.args.trial_batch
                job = Job(f"trial-{number}", self.cell(GOOD.name, **options), folders[number] / "cell.json")
                job.most_tries = 1
                self.floor.add("training", job)
            for _ in self.walk(self.until):
                if not self.floor.running["training"] and not self.floor.waiting["training"]:
                    break
            self.floor.most["training"] = most
            ended = [last_watch(folder) if (folder / "cell.json").exists() else None for folder in folders]
            rate = speed([line for line in ended if line]) / self.gpus
            chosen = best_rates(list(zip(TRIALS, ended, strict=True)))
            write_json(
                path, {"rates": chosen, "trials": list(zip(TRIALS, ended, strict=True)), "tokens_a_second": rate}
            )
            say(f"rates {chosen}, {rate:,.0f} tokens a second on each GPU")
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
        good = self.out / GOOD.name
        options = {"distill_tokens": budgets["good"], "rates": rates, "start": good / "alignment", "snapshots": True}
        self.floor.add("training", Job("good", self.train(GOOD.name, 20, **options), good / "cell.json"))
        for cell in CELLS:
            align = int(ALIGN_SHARE * budgets["cell"] / self.args.step_tokens + 1) * self.args.step_tokens
            options = {"align_tokens": align, "distill_tokens": budgets["cell"], "rates": rates}
            done = self.out / cell.name / "cell.json"
            self.floor.add("training", Job(cell.name, self.train(cell.name, 8, **options), done))
        self.measure_good()
        for name in [GOOD.name, *(cell.name for cell in CELLS)]:
            self.floor.add("measurement", self.measure_cell(name))
        for _ in self.walk(self.until):
            self.measure_good()
            if self.until - time.monotonic() < self.args.reserve:
                self.give_up_late()
        self.write_status()

    def train(self, name: str, watch: int, **options) -> list[str]:
        return self.cell(name, watch=watch, **options) + (["--compile"] if self.args.compile else [])

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
    parser.add_argument("--trial-tokens", type=int, default=2_621_440, help="tokens of each trial of a learning rate")
    parser.add_argument(
        "--step-tokens", type=int, default=16_384, help="tokens of an optimizer step, as in the recipe"
    )
    parser.add_argument("--trial-batch", type=int, default=SMALL_BATCH, help="rows at once of a trial")
    parser.add_argument("--rate", type=float, help="tokens a second of one GPU, instead of the trials' speed")
    parser.add_argument("--workers", type=int, help="GPUs (default: all)")
    parser.add_argument("--trainings", type=int, default=1, help="trainings at once on one GPU")
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
