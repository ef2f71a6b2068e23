"""
Work in units that can be shared out over processes and taken up again after a kill.

Each process appends the units it has done to a file of its own, one JSON line each below a first line that says which
run they belong to. A later run of the same settings, on any number of processes, reads what all of them left.

    work = SharedWork("scores.partial.jsonl", run={"seed": 0})
    for key in work.mine(todo, cost=...):
        work.done({"key": key, ...})
    units = work.gather()
    work.remove()
"""

import datetime
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from trainers.files import atomic_path


T = TypeVar("T")


def num_processes() -> int:
    """Processes of this run, as `torchrun` or `accelerate launch` says."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    """Whether this process is the one that shows and writes things."""
    return int(os.environ.get("RANK", 0)) == 0


def agreed(value: T) -> T:
    """The value that the first process holds."""
    return value if num_processes() == 1 else _gathered([value])[0]


class SharedWork:
    """
    What is done of a run.

    Args:
        path (`str` or `os.PathLike`, *optional*):
            File of the units; with several processes each adds its number to the name. Without it nothing outlives
            the run.
        run (`dict`):
            Settings that must agree for units to be taken over.

    Raises:
        `ValueError`: when a file is of another run; the message says what differs.
    """

    def __init__(self, path: str | os.PathLike | None, run: dict):
        self.processes, self.rank = num_processes(), int(os.environ.get("RANK", 0))
        self.date, self.before, self.own = datetime.date.today().isoformat(), [], []
        self.path = None if path is None else Path(path)
        if self.path is None:
            return
        run = json.loads(json.dumps(run))
        mine = []
        for file in self._files():
            first, *units = list(_lines(file)) or [None]
            if first is None:
                continue
            self.date = min(self.date, first.pop("date"))
            if first != run:
                changed = sorted(name for name in {**run, **first} if first.get(name) != run.get(name))
                raise ValueError(f"{file} is of another run ({', '.join(changed)} differ). Delete it to begin anew.")
            self.before += units
            mine += units if file == self._file else []
        if self.processes > 1:
            # Nobody writes before everybody has read.
            _join().wait_for_everyone()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Rewriting what was read drops a last line that the kill cut in two.
        with atomic_path(self._file) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in [{**run, "date": self.date}, *mine]))

    def mine(self, todo: list[T], cost: Callable[[T], float]) -> list[T]:
        """This process's part of `todo`, in its order: the costs of all parts are as equal as can be."""
        loads, parts = [0.0] * self.processes, [set() for _ in range(self.processes)]
        for index in sorted(range(len(todo)), key=lambda index: -cost(todo[index])):
            least = loads.index(min(loads))
            loads[least] += cost(todo[index])
            parts[least].add(index)
        return [item for index, item in enumerate(todo) if index in parts[self.rank]]

    def done(self, unit: dict) -> None:
        """Takes in a unit, and writes it down."""
        self.own.append(unit)
        if self.path is not None:
            with open(self._file, "a", encoding="utf-8") as file:
                file.write(json.dumps(unit) + "\n")

    def gather(self) -> list[dict]:
        """The units of all processes, those of earlier runs before them."""
        return self.before + (self.own if self.processes == 1 else _gathered(self.own))

    def remove(self) -> None:
        """Deletes the files, once the work is complete."""
        if self.path is not None and self.rank == 0:
            for file in self._files():
                file.unlink(missing_ok=True)

    @property
    def _file(self) -> Path:
        return self.path if self.processes == 1 else self.path.with_suffix(f".{self.rank}{self.path.suffix}")

    def _files(self) -> list[Path]:
        siblings = sorted(self.path.parent.glob(f"{self.path.stem}.[0-9]*{self.path.suffix}"))
        return [file for file in (self.path, *siblings) if file.is_file()]


def _gathered(values: list) -> list:
    _join()
    return gather_object(values)


def _join() -> PartialState:
    return PartialState(cpu=not torch.cuda.is_available())


def _lines(file: Path) -> Iterator[dict]:
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
