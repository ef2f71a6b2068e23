"""
Steps that are taken once: a run's ledger remembers what each step was made from and what it wrote.

A step is skipped when the ledger says that it finished with the same inputs and everything it wrote is still there as
it was written. Inputs are plain JSON values, with the fingerprints of the steps before it among them, so a changed
setting redoes its own step and all that depend on it, and no other.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from trainers.files import read_json, sha256, write_json


# A file up to this size is recognised by its digest, a larger one by its size: hashing gigabytes at every start is
# slow.
DIGEST_BYTES = 2**20


@dataclass
class Step:
    """
    One step of a run.

    Args:
        name (`str`):
            Name for the ledger and the screen, different from that of any other step of the run.
        inputs (`dict`):
            Settings that the outcome depends on, as JSON values.
        outputs (`list[Path]`):
            Files and folders that the step writes.
        action (`Callable[[bool], None]`):
            Does the work. Its argument is `True` when an earlier attempt with the same inputs was cut off, so that it
            may take up what it left.
        after (`list[Step]`, *optional*):
            Steps whose outcome this one uses.
        detail (`str`, *optional*, defaults to `""`):
            What the step will do, for the plan.
    """

    name: str
    inputs: dict
    outputs: list[Path]
    action: Callable[[bool], None]
    after: list["Step"] = field(default_factory=list)
    detail: str = ""

    @property
    def fingerprint(self) -> str:
        """Digest of the name, the inputs and the fingerprints of the steps before."""
        content = [self.name, self.inputs, [step.fingerprint for step in self.after]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Ledger:
    """
    The record of a run's finished steps, kept in one JSON file.

    Args:
        path (`str` or `os.PathLike`):
            The file; it need not exist yet.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.records = read_json(self.path) if self.path.is_file() else {}

    def is_done(self, step: Step) -> bool:
        """Whether `step` finished with the same inputs and its outputs are as it left them."""
        record = self.records.get(step.name, {})
        if record.get("fingerprint") != step.fingerprint or "outputs" not in record:
            return False
        return record["outputs"] == {str(path): stamp(path) for path in step.outputs}

    def seconds(self, step: Step) -> dict:
        """Returns `{"seconds", "cpu_seconds"}` that `step` took when it was done."""
        record = self.records[step.name]
        return {"seconds": record["seconds"], "cpu_seconds": record["cpu_seconds"]}

    def take(self, step: Step) -> None:
        """Does `step` and records it; an attempt that fails is remembered as begun only."""
        begun = self.records.get(step.name, {})
        resumed = begun.get("fingerprint") == step.fingerprint and "outputs" not in begun
        self.records[step.name] = {"fingerprint": step.fingerprint}
        write_json(self.path, self.records)
        start, cpu_start = time.perf_counter(), time.process_time()
        step.action(resumed)
        missing = [str(path) for path in step.outputs if not path.exists()]
        if missing:
            raise RuntimeError(f"The step {step.name} ended without writing {', '.join(missing)}.")
        self.records[step.name] = {
            "fingerprint": step.fingerprint,
            "inputs": step.inputs,
            "seconds": round(time.perf_counter() - start, 1),
            "cpu_seconds": round(time.process_time() - cpu_start, 1),
            "outputs": {str(path): stamp(path) for path in step.outputs},
        }
        write_json(self.path, self.records)


def stamp(path: Path) -> list | dict | None:
    """Recognises a file or folder again: size and, for a small file, digest; `None` when there is none."""
    if path.is_dir():
        files = sorted(item for item in path.rglob("*") if item.is_file())
        return {item.relative_to(path).as_posix(): stamp(item) for item in files}
    if not path.is_file():
        return None
    size = path.stat().st_size
    return [size, sha256(path) if size <= DIGEST_BYTES else None]
