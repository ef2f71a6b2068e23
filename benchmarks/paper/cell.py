"""
One student of the paper's tables: its heads, its conversion, its two training stages, watched while it trains.

    python -m benchmarks.paper.cell found-8 --out runs/paper --align-tokens 4_000_000 --distill-tokens 60_000_000

Every cell reads the same packed rows in the same order. What is there already is skipped, and a stage that was stopped
goes on from its newest checkpoint, so the same command may be given again at any time. `watch.jsonl` grows while a cell
trains: a little retrieval and the loss on held-out text, some ten times a run. Where the first tenth of a run loses all
retrieval and the text with it, the run starts anew at a third of its rates.
"""

import argparse
import copy
import dataclasses
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainerCallback

from modeling_rad_hybrid import RadHybridForCausalLM
from trainers import actions
from trainers.distillation.distill_trainer import NonFiniteError
from trainers.evaluation import evaluate, hardware
from trainers.files import read_json, write_json
from trainers.heads.head_map import HeadMap
from trainers.heads.head_scoring import HeadScores
from trainers.heads.selection import every_nth_layer, no_heads, random_heads, top_k
from trainers.precision import resolve_dtype
from trainers.probes import KVRetrieval, PhoneBook
from trainers.recipe import Recipe
from trainers.tasks import ProbeTask
from trainers.workshop import ROOT, Workshop, default_device


RECIPE = ROOT / "recipes" / "smollm2-gpu.yaml"
SCORES = ROOT / "hub_cards" / "scores" / "HuggingFaceTB--SmolLM2-135M-Instruct.json"
# What a student is asked while it trains: two trained formats and one that no training data holds.
WATCHED = [
    ProbeTask(KVRetrieval(format="json", pairs=20, queries=4), 32),
    ProbeTask(KVRetrieval(format="json", pairs=20, queries=4, values="words"), 32),
    ProbeTask(PhoneBook(pairs=10, queries=4), 32),
]
WATCHED_TEXT_TOKENS = 16_384
# Parts of a run at which the good student is kept, for the curves: the whole suite asks these afterwards.
SNAPSHOTS = (0.1, 0.3, 0.6)
RETRIES = 2
# Warmup of a run that ends by the clock, whose steps nobody knows beforehand.
WARMUP_STEPS = 120


class WentWrong(ValueError):
    """The first tenth of a run lost what alignment had won."""


@dataclass(frozen=True)
class Cell:
    """
    One student of the tables.

    Args:
        name (`str`):
            Its folder.
        heads (`str`):
            `"none"`, `"found-8"` (the best-scored), `"random-8"` or `"layers-4"` (every fourth layer whole).
        state_size (`int`, *optional*, defaults to 8):
            State size of its recurrent heads.
        title (`str`, *optional*):
            What tables call it.
    """

    name: str
    heads: str
    state_size: int = 8
    title: str = ""

    def head_map(self, scores: HeadScores, seed: int) -> HeadMap:
        """The heads that this student keeps."""
        kind, _, number = self.heads.partition("-")
        shape = scores.teacher
        if kind == "none":
            return no_heads(shape)
        if kind == "found":
            return top_k(scores, heads=int(number))
        if kind == "random":
            return random_heads(shape, heads=int(number), seed=seed)
        if kind == "layers":
            return every_nth_layer(shape, int(number))
        raise ValueError(f"The heads of {self.name} are {self.heads!r}; know none, found-N, random-N and layers-N.")


GOOD = Cell("good", "found-8", title="8 found heads")
# At a fifth of the good student's tokens each, as many as fit, in this order.
CELLS = (
    Cell("none", "none", title="0 heads"),
    Cell("found-8", "found-8", title="8 found heads"),
    Cell("random-8", "random-8", title="8 random heads"),
    Cell("layers-4", "layers-4", title="every 4th layer"),
    Cell("found-5", "found-5", title="5 found heads"),
    Cell("found-16", "found-16", title="16 found heads"),
    Cell("state-4", "found-8", 4, title="8 found heads, d_state 4"),
    Cell("state-16", "found-8", 16, title="8 found heads, d_state 16"),
)
BY_NAME = {cell.name: cell for cell in (GOOD, *CELLS)}


@dataclass
class Clock:
    """
    How far a run is, from 0 to 1: by its steps, or, with `until`, by the time from its start to that second.

    Args:
        until (`float`, *optional*):
            Second (as `time.time()` counts) at which the run ends, however many steps it has taken by then.
    """

    until: float | None = None
    began: float = 0.0

    def start(self) -> None:
        self.began = time.time()

    def progress(self, state) -> float:
        if self.until is None:
            return state.global_step / state.max_steps
        return min(1.0, (time.time() - self.began) / max(1e-9, self.until - self.began))


class Deadline(TrainerCallback):
    """
    Ends a run at a given second, its rates brought down before: a warmup-stable-decay schedule by the clock, for a
    machine that is paid by the minute. The schedule of the trainer is to be `constant_with_warmup`.

    Args:
        clock ([`Clock`]):
            Of the run, with `until`.
        decay (`float`, *optional*, defaults to 0.3):
            Part of the time in which the rates fall, in a straight line.
        least (`float`, *optional*, defaults to 0.02):
            What they fall to, as a part of themselves.
    """

    def __init__(self, clock: Clock, decay: float = 0.3, least: float = 0.02):
        self.clock, self.decay, self.least = clock, decay, least

    def factor(self, progress: float) -> float:
        """What the rates are multiplied by."""
        return max(self.least, min(1.0, (1 - progress) / self.decay))

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        # The trainer's scheduler has just written the rates anew.
        for group in optimizer.param_groups:
            group["lr"] *= self.factor(self.clock.progress(state))

    def on_step_end(self, args, state, control, **kwargs):
        if self.clock.progress(state) >= 1:
            control.should_training_stop = True


class Watch(TrainerCallback):
    """
    Measures the student while it trains and keeps snapshots of it.

    Args:
        workshop ([`~trainers.workshop.Workshop`]):
            Tokenizer and held-out text.
        folder (`Path`):
            Where `watch.jsonl` and `snapshots/` go.
        source (`Path`):
            Folder of the student that the run begins with.
        clock ([`Clock`]):
            Of the run.
        times (`int`):
            Measurements in a run, evenly spaced, beside the one before the first step.
        snapshots (`tuple[float, ...]`, *optional*):
            Parts of the run after which the student is kept.
    """

    def __init__(self, workshop, folder: Path, source: Path, clock: Clock, times: int, snapshots: tuple = ()):
        self.workshop, self.folder, self.source, self.clock = workshop, folder, source, clock
        self.at = [(number + 1) / times for number in range(times - 1)]
        self.snapshots = list(snapshots)
        rows = workshop.held_out_rows(WATCHED_TEXT_TOKENS)["input_ids"][:]
        self.text = list(torch.tensor(rows).split(8))
        self.before: dict | None = None
        self.checked = False
        self.seconds = 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # A copy, as it will be measured in the end: the model in training computes through accelerate's wrappers.
        dtype = resolve_dtype(self.workshop.recipe.eval.dtype, default_device())
        self.watched = RadHybridForCausalLM(copy.deepcopy(model.config)).to(default_device(), dtype).eval()
        self.watched.generation_config = model.generation_config
        # Time is counted from here, less what watching itself takes.
        self.start, self.start_step = time.monotonic(), state.global_step
        self.clock.start()
        if state.global_step == 0:
            self._measure(model, args, state)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        progress = self.clock.progress(state)
        if self.at and progress >= self.at[0]:
            first = self.before is not None and len(self.at) > 1 and self.at[0] <= 0.25
            self.at = [part for part in self.at if part > progress]
            line = self._measure(model, args, state)
            # Once, after warmup.
            if first and not self.checked:
                self.checked = True
                self._check(line)
        if self.snapshots and progress >= self.snapshots[0]:
            self.snapshots = [part for part in self.snapshots if part > progress]
            self._keep(model, args, state)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._measure(model, args, state)

    def _measure(self, model: RadHybridForCausalLM, args, state) -> dict:
        began = time.monotonic()
        self.watched.load_state_dict(model.state_dict())
        measured = evaluate(self.watched, self.workshop.tokenizer, WATCHED, self.text, batch_size=48, progress=False)
        line = {
            "step": state.global_step,
            "tokens": state.global_step * args.train_batch_size * args.gradient_accumulation_steps * args.max_length,
            "train_seconds": round(began - self.start - self.seconds, 2),
            "steps_since_start": state.global_step - self.start_step,
            "text_loss": round(measured["text_loss"], 4),
            **{name: result["score"] for name, result in measured["results"].items()},
        }
        self.seconds += time.monotonic() - began
        self.before = self.before or line
        with open(self.folder / "watch.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        return line

    def _check(self, line: dict) -> None:
        retrieval = [line[task.name] for task in WATCHED]
        if max(retrieval) == 0 and line["text_loss"] > self.before["text_loss"]:
            raise WentWrong(f"After step {line['step']} retrieval is gone and the loss on text rose: {line}")

    def _keep(self, model: RadHybridForCausalLM, args, state) -> None:
        folder = self.folder / "snapshots" / f"step-{state.global_step}"
        self.watched.load_state_dict(model.state_dict())
        self.watched.save_pretrained(folder)
        tokens = state.global_step * args.train_batch_size * args.gradient_accumulation_steps * args.max_length
        training = read_json(self.source / actions.TRAINING)
        training["tokens_trained"] += tokens
        training["stages"].append({"stage": "distillation", "tokens": tokens, "probes": self.workshop.trained_probes})
        write_json(folder / actions.TRAINING, training)


def cell_recipe(recipe: Recipe, cell: Cell, align_tokens: int, distill_tokens: int, **arguments) -> Recipe:
    """The recipe of one cell: that of the good student with the cell's state size, its budget and what else is given."""
    return dataclasses.replace(
        recipe,
        convert=dataclasses.replace(recipe.convert, state_size=cell.state_size),
        align=dataclasses.replace(recipe.align, tokens=align_tokens),
        distill=dataclasses.replace(
            recipe.distill, tokens=distill_tokens, arguments=recipe.distill.arguments | arguments
        ),
    )


def make_cell(
    cell: Cell, recipe: Recipe, folder: Path, watch: int = 10, until: float | None = None, backend: str = "auto"
) -> None:
    """
    Walks one cell, or what is left of it.

    Args:
        cell ([`Cell`]):
            Which student.
        recipe ([`~trainers.recipe.Recipe`]):
            Its recipe, see [`cell_recipe`]. Without tokens of distillation the cell ends aligned.
        folder (`Path`):
            Folder of the cell: `head_map.json`, `student/`, `alignment/`, `distillation/`, `watch.jsonl`, `cell.json`.
        watch (`int`, *optional*, defaults to 10):
            Measurements during distillation.
        until (`float`, *optional*):
            Second at which distillation ends; the recipe's tokens are then the most it can see. Snapshots are kept.
        backend (`str`, *optional*, defaults to `"auto"`):
            Back end of the scan, as in [`RadHybridConfig`].
    """
    folder.mkdir(parents=True, exist_ok=True)
    workshop, began = Workshop(recipe, progress=False), time.monotonic()
    if not (folder / "student").exists():
        cell.head_map(HeadScores.load(SCORES), recipe.seed).save(folder / "head_map.json")
        actions.convert_student(workshop, folder / "head_map.json", folder / "student", SCORES)
    for config in folder.glob("*/config.json"):
        write_json(config, read_json(config) | {"ssm_backend": backend})
    if not (folder / "alignment" / actions.TRAINING).exists():
        actions.train(workshop, folder / "student", folder / "alignment", "alignment", recipe.align, resume=True)
    if not recipe.distill.tokens or (folder / "cell.json").exists():
        return
    rates = [recipe.distill.arguments["mixer_learning_rate"], recipe.distill.arguments["learning_rate"]]
    if not (folder / "distillation" / actions.TRAINING).exists():
        # Packed rows are read on from where the stage before ended; all students shall read the same ones here.
        workshop.recipe = dataclasses.replace(recipe, align=dataclasses.replace(recipe.align, tokens=0))
        rates = distill(workshop, folder, watch, until)
    record = {**dataclasses.asdict(cell), "rates": rates, "hardware": hardware()}
    write_json(folder / "cell.json", record | {"seconds": round(time.monotonic() - began, 1)})


def distill(workshop: Workshop, folder: Path, watch: int, until: float | None) -> list[float]:
    """Distils, at lower rates where the first ones go wrong; returns the rates of mixers and of the rest."""
    settings, source = workshop.recipe.distill, folder / "alignment"
    rates = [settings.arguments["mixer_learning_rate"], settings.arguments["learning_rate"]]
    for attempt in range(RETRIES + 1):
        arguments = settings.arguments | {"mixer_learning_rate": rates[0], "learning_rate": rates[1]}
        clock = Clock(until)
        callbacks = [Watch(workshop, folder, source, clock, watch, SNAPSHOTS if until else ())]
        if until:
            arguments |= {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": WARMUP_STEPS}
            arguments |= {"lr_scheduler_kwargs": {}}
            callbacks.append(Deadline(clock))
        stage = dataclasses.replace(settings, arguments=arguments)
        try:
            actions.train(workshop, source, folder / "distillation", "distillation", stage, True, callbacks)
            return rates
        except (WentWrong, NonFiniteError) as error:
            print(f"{error} Rates were {rates}.", file=sys.stderr, flush=True)
            if attempt == RETRIES:
                raise
            shutil.rmtree(folder / "distillation", ignore_errors=True)
            (folder / "watch.jsonl").rename(folder / f"watch-failed-{attempt}.jsonl")
            rates = [rate / 3 for rate in rates]
    raise AssertionError("unreachable")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.cell", description=__doc__.split("\n")[1])
    parser.add_argument("cell", choices=BY_NAME)
    parser.add_argument("--recipe", default=str(RECIPE))
    parser.add_argument("--out", required=True, help="folder of the whole; the cell's is in it, by its name")
    parser.add_argument("--align-tokens", type=int, required=True)
    parser.add_argument("--distill-tokens", type=int, default=0)
    parser.add_argument("--until", type=float, help="second since 1970 at which distillation ends")
    parser.add_argument("--watch", type=int, default=10, help="measurements during the run")
    parser.add_argument("--backend", default="auto", help="back end of the scan")
    parser.add_argument("--no-checkpoints", action="store_true", help="for runs that are shorter than a few of these")
    args = parser.parse_args(arguments)
    cell, options = BY_NAME[args.cell], {"save_strategy": "no"} if args.no_checkpoints else {}
    recipe = cell_recipe(Recipe.load(args.recipe), cell, args.align_tokens, args.distill_tokens, **options)
    make_cell(cell, recipe, Path(args.out) / cell.name, args.watch, args.until, args.backend)


if __name__ == "__main__":
    main()
