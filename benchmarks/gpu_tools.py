"""What the GPU benchmarks share: clocks, memory, errors, tables and the JSON beside them."""

import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from trainers.files import write_json


CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def milliseconds(function: Callable[[], object], budget: float = 0.15, most: int = 50) -> float:
    """Median milliseconds of a call, after warm-up; `budget` bounds the seconds spent, `most` the calls."""
    function()
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    once = time.perf_counter() - start
    repeats = max(3, min(most, int(budget / max(once, 1e-6))))
    if not CUDA:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        function()
        end.record()
    synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def peak_bytes(function: Callable[[], object]) -> int:
    """Greatest memory that a call takes on top of what was taken before it."""
    if not CUDA:
        function()
        return 0
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def relative_error(ours: torch.Tensor, oracle: torch.Tensor) -> float:
    """Norm of the difference over the norm of the oracle; infinite where ours is not finite."""
    error = ((ours.double() - oracle).norm() / oracle.norm()).item()
    return error if error == error else float("inf")


def copy_bandwidth() -> float:
    """Bytes a second of a large copy on the device, read and written bytes counted."""
    size = 2**30 if CUDA else 2**22
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size / (milliseconds(lambda: target.copy_(source)) / 1e3)


def first_line(error: Exception) -> str:
    """Kind and first line of an error, for one line of a log."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:90] if str(error).strip() else ''}"


class Report:
    """Tables as they come, on the screen and in one JSON file."""

    def __init__(self, path: Path, about: dict):
        self.path, self.content = path, {**about, "tables": {}}

    def table(self, name: str, columns: Iterable[str]) -> Callable[..., None]:
        """Starts a table; the result adds a row of values, in the order of the columns, and prints it."""
        columns = list(columns)
        rows = self.content["tables"].setdefault(name, [])
        print(f"\n### {name}\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)

        def add(*values) -> None:
            rows.append(dict(zip(columns, values, strict=True)))
            print(f"| {' | '.join(map(shown, values))} |", flush=True)
            write_json(self.path, self.content)

        return add


def shown(value) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    if value != 0 and (abs(value) < 1e-2 or abs(value) >= 1e5):
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
