"""Checkpoints of a run: which is the newest whole one, and what is said where the next could not be written."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class SavingError(OSError):
    """A checkpoint or the student could not be written; the message says where, why and what is whole."""


def last_checkpoint(output_dir: str | Path, most_steps: float = math.inf) -> str | None:
    """
    Finds the newest whole checkpoint of a run.

    The trainer's state is written last, so a checkpoint that a kill or a full disk cut short has none that can be
    read.

    Args:
        output_dir (`str` or `Path`):
            Folder of the run; it need not exist.
        most_steps (`float`, *optional*):
            Greatest step to look at.

    Returns:
        `str`, *optional*: the checkpoint's folder, or `None` where there is no whole one.
    """
    steps = {}
    for state in Path(output_dir).glob("checkpoint-*/trainer_state.json"):
        try:
            steps[json.loads(state.read_text(encoding="utf-8"))["global_step"]] = str(state.parent)
        except (json.JSONDecodeError, KeyError):
            continue
    steps = {step: folder for step, folder in steps.items() if step <= most_steps}
    return steps[max(steps)] if steps else None


def last_good(output_dir: str | Path, most_steps: float = math.inf) -> str:
    """[`last_checkpoint`] as a sentence."""
    checkpoint = last_checkpoint(output_dir, most_steps)
    return f"The last good checkpoint is {checkpoint}." if checkpoint else "No good checkpoint had been written."


@contextmanager
def saving(folder: str | Path, output_dir: str | Path) -> Iterator[None]:
    """
    Says in one line why a block could not write `folder`, and what is whole; a checkpoint that it began is removed,
    so that a full disk has room again and nobody resumes from a half.

    Args:
        folder (`str` or `Path`):
            What the block writes: a checkpoint below `output_dir`, or `output_dir` itself.
        output_dir (`str` or `Path`):
            Folder of the run.

    Raises:
        `SavingError`: in place of what safetensors, torch or the system raise.
    """
    try:
        yield
    except SavingError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        if last_checkpoint(output_dir) == str(folder):
            raise  # It is whole; what failed came after, a push for example.
        if Path(folder).name.startswith("checkpoint-"):
            shutil.rmtree(folder, ignore_errors=True)
        # torch says of a full disk only that a file is shorter than it thought.
        free = shutil.disk_usage(output_dir).free / 1e6
        raise SavingError(
            f"{folder} could not be written; {free:,.0f} MB are free now ({error}). {last_good(output_dir)} "
            "Make room and go on with --resume_from_checkpoint last, or run the recipe again."
        ) from error
