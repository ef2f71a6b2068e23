"""
Jobs on the GPUs of one machine: processes that are queued, started where there is room, and started again where they
fail once.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path


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
        slots (`int`, *optional*, defaults to 1):
            Its share of a GPU, see [`Floor`].
        wants (`int`, *optional*):
            The one GPU that it may run on. While a job waits that wants a whole one, no other starts there.
        again (`tuple[str, ...]`, *optional*):
            Further arguments for when it is started again: the careful way of doing the same.
    """

    name: str
    command: list[str]
    done: Path
    waits_for: Path | None = None
    most_tries: int = 2
    slots: int = 1
    wants: int | None = None
    again: tuple[str, ...] = ()
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
    Runs jobs on the GPUs. Every GPU has slots for trainings and slots for measurements; a job takes those that it asks
    for, and waits until one GPU has them.

    Args:
        out (`Path`):
            Folder of the run.
        gpus (`int`):
            GPUs, numbered from 0.
        trainings (`int`, *optional*, defaults to 5), measurements (`int`, *optional*, defaults to 2):
            Slots of each kind on one GPU.
        opens (`Path`, *optional*):
            The last GPU takes no job before this file is there: other work has it until then.
    """

    def __init__(self, out: Path, gpus: int, trainings: int = 5, measurements: int = 2, opens: Path | None = None):
        self.out, self.gpus, self.opens = out, gpus, opens
        self.most = {"training": trainings, "measurement": measurements}
        self.waiting: dict[str, list[Job]] = {"training": [], "measurement": []}
        self.running: dict[str, list[Job]] = {"training": [], "measurement": []}
        self.failed: list[str] = []

    def add(self, kind: str, job: Job, first: bool = False) -> None:
        """Queues a job, before all others where it comes first, unless its outcome is there already."""
        if not job.done.exists():
            self.waiting[kind].insert(0 if first else len(self.waiting[kind]), job)

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
                    job.command = [*job.command, *job.again]
                    self.waiting[kind].insert(0, job)
                else:
                    self.failed.append(job.name)
                    say(tail(self.out / "logs" / f"{job.name}.log"))
        for kind in self.waiting:
            for job in [job for job in self.waiting[kind] if job.waits_for is None or job.waits_for.exists()]:
                gpu = self._free(kind, job)
                if gpu is not None:
                    self.waiting[kind].remove(job)
                    job.start(gpu, self.out / "logs")
                    self.running[kind].append(job)
                    say(f"{job.name} started on GPU {gpu}")
        return ended

    def _free(self, kind: str, job: Job) -> int | None:
        """The GPU that a job can start on."""
        most, closed = self.most[kind], self.opens is not None and not self.opens.exists()
        taken = [sum(one.slots for one in self.running[kind] if one.gpu == gpu) for gpu in range(self.gpus)]
        kept = {
            one.wants
            for one in self.waiting[kind]
            if one.slots >= most and (not one.waits_for or one.waits_for.exists())
        }
        free = [
            gpu
            for gpu in (range(self.gpus) if job.wants is None else [job.wants])
            if taken[gpu] + job.slots <= most and (job.slots >= most or gpu not in kept)
            if not (closed and gpu == self.gpus - 1)
        ]
        if not free:
            return None
        # The first GPU trains the good student: the others are filled before it.
        return free[-1]

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
