"""
What can be seen of a training run beside its losses: answers to probes while it lasts, whole measurements of it, and a
picture of it in the end.

    trainer.add_callback(ProbeCallback(trainer, ProbeTask(KVRetrieval(pairs=20), 40), every=100))
    trainer.add_callback(MeasureCallback(trainer, measure, every=100, path="runs/mine/measurements.jsonl"))
    trainer.add_callback(PlotCallback())
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TrainerCallback

from trainers.distillation.checkpoints import last_good
from trainers.evaluation import coverage
from trainers.plots import training_curves
from trainers.tasks import ProbeTask


PLOT = "training.png"
MEASUREMENTS = "measurements.jsonl"


class DivergedError(ValueError):
    """The loss ran away while it was still finite; the message says when, in which layer and what is still good."""


class DivergenceCallback(TrainerCallback):
    """
    Stops a run whose loss ran away: above its first value and above ten times its lowest.

    Args:
        layer_errors (`Path`):
            File of the layers' errors in the alignment stage; its last line names the worst layer.
    """

    TIMES = 10

    def __init__(self, layer_errors: Path):
        self.layer_errors = layer_errors

    def on_log(self, args, state, control, **kwargs):
        losses = [(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry]
        if not losses or losses[-1][0] != state.global_step:
            return
        lowest_step, lowest = min(losses, key=lambda entry: entry[1])
        loss = losses[-1][1]
        if loss <= max(losses[0][1], self.TIMES * lowest):
            return
        where = ""
        if self.layer_errors.is_file():
            errors = json.loads(self.layer_errors.read_text(encoding="utf-8").splitlines()[-1])["relative_error"]
            where = f", most of all in layer {max(range(len(errors)), key=errors.__getitem__)}"
        raise DivergedError(
            f"The loss is {loss:.4g} at step {state.global_step}{where}, after {lowest:.4g} at step {lowest_step}: the "
            f"run diverges. {last_good(args.output_dir, lowest_step)} Lower the learning rate or warm up longer."
        )


class ProbeCallback(TrainerCallback):
    """
    Asks a probe every some steps and logs the accuracy, to whatever `report_to` names too.

    Args:
        trainer ([`~trainers.distillation.distill_trainer.RadDistillationTrainer`]):
            The trainer; its student answers, on the main process, so it must not be sharded.
        task ([`~trainers.tasks.ProbeTask`]):
            What is asked. The same questions each time.
        every (`int`):
            Steps between.
        batch_size (`int`, *optional*, defaults to 16):
            Prompts generated for at once.
    """

    def __init__(self, trainer, task: ProbeTask, every: int, batch_size: int = 16):
        if every < 1:
            raise ValueError(f"A probe cannot be asked every {every} steps; give at least 1.")
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError("A sharded student cannot answer probes in mid-run; evaluate its checkpoints instead.")
        self.trainer, self.task, self.every, self.batch_size = trainer, task, every, batch_size

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every or not state.is_world_process_zero:
            return
        student, was_training = self.trainer.accelerator.unwrap_model(model), model.training
        # Generating draws nothing, but a resumed run must find the random state of an unbroken one in any case.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            tokenizer = self.trainer.processing_class
            accuracy = self.task.measure(student.eval(), tokenizer, self.batch_size, args.seed, progress=False)
        model.train(was_training)
        self.trainer.log({f"probe_accuracy/{self.task.name}": accuracy})


class MeasureCallback(TrainerCallback):
    """
    Measures the student every some steps and keeps each measurement as a line of a file.

    Args:
        trainer ([`~trainers.distillation.distill_trainer.RadDistillationTrainer`]):
            The trainer; a copy of its student is measured, on the main process, so it must not be sharded.
        measure (`Callable`):
            Takes the copy and returns what [`~trainers.evaluation.evaluate`] does.
        every (`int`):
            Steps between.
        path (`Path`):
            JSON Lines file: `step`, `tokens` of all stages, and what `measure` returns.
        tokens_before (`int`, *optional*, defaults to 0):
            Tokens of the stages before.
        at_start (`bool`, *optional*, defaults to `False`):
            Whether to measure before the first step, too.
    """

    def __init__(
        self, trainer, measure: Callable, every: int, path: Path, tokens_before: int = 0, at_start: bool = False
    ):
        if every < 1:
            raise ValueError(f"A student cannot be measured every {every} steps; give at least 1.")
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError("A sharded student cannot be measured in mid-run; evaluate its checkpoints instead.")
        self.trainer, self.measure, self.every, self.path = trainer, measure, every, Path(path)
        self.tokens_before, self.at_start = tokens_before, at_start

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.at_start and state.global_step == 0:
            self._measure(state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._measure(state, model)

    def _measure(self, state, model) -> None:
        if not state.is_world_process_zero:
            return
        student = copy.deepcopy(self.trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            measured = self.measure(student)
        tokens = self.tokens_before + int(state.num_input_tokens_seen)
        line = {"step": state.global_step, "tokens": tokens, **measured}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def measurements(folders: list[Path]) -> list[dict]:
    """
    Reads what [`MeasureCallback`] wrote.

    Args:
        folders (`list[Path]`):
            Folders of a student's stages, in their order.

    Returns:
        `list[dict]`: one for each measurement, with the `stage` it was made in. Of those that a resumed stage made
        anew, the last one counts.
    """
    found = {}
    for path in (folder / MEASUREMENTS for folder in folders):
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            measured = {"stage": path.parent.name, **json.loads(line)}
            found[path, measured["step"]] = measured
    return list(found.values())


def draw_measurements(measured: list[dict], teacher: dict, floor: float, path: Path, title: str) -> None:
    """
    Draws a student's loss on text, its coverage and its score on every task against the tokens it has seen.

    Args:
        measured (`list[dict]`):
            As [`measurements`] returns them.
        teacher (`dict`):
            What [`~trainers.evaluation.evaluate`] returns for the teacher, on the same tasks.
        floor (`float`):
            As in [`~trainers.evaluation.coverage`].
        path (`Path`):
            PNG file to write.
        title (`str`):
            Line above the figure.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    stages, seen = {}, measured[0]["tokens"]
    for point in measured:
        stages.setdefault(point["stage"], seen)
        seen = tokens = point["tokens"]
        results = point["results"]
        values = {"loss on text": point["text_loss"]}
        values["probe_accuracy/coverage"] = coverage(results, teacher["results"], floor)["value"]
        values |= {f"probe_accuracy/{name}": result["score"] for name, result in results.items()}
        for name, value in values.items():
            if value is not None:
                curves.setdefault(name, []).append((tokens, value))
    level = teacher["text_loss"]
    training_curves(curves, path, title, {} if level is None else {"teacher's loss": level}, stages)


class PlotCallback(TrainerCallback):
    """Draws losses and probe accuracies against tokens into `training.png` of the output folder."""

    def on_train_end(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        curves: dict[str, list[tuple[int, float]]] = {}
        for entry in state.log_history:
            for name, value in entry.items():
                if name in ("relative_error", "kl", "divergence") or name.startswith("probe_accuracy/"):
                    curves.setdefault(name, []).append((entry.get("num_input_tokens_seen", entry["step"]), value))
        if curves:
            training_curves(curves, Path(args.output_dir) / PLOT, Path(args.output_dir).name)
