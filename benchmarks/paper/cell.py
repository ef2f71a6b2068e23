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
from trainers.distill_trainer import NonFiniteError
from trainers.evaluation import evaluate, hardware
from trainers.files import read_json, write_json
from trainers.head_map import HeadMap
from trainers.head_scoring import HeadScores
from trainers.precision import resolve_dtype
from trainers.probes import KVRetrieval, PhoneBook
from trainers.recipe import Recipe
from trainers.selection import every_nth_layer, no_heads, random_heads, top_k
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
SNAPSHOTS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
RETRIES = 2


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
    Cell("random-8", "random-8", title="8 random heads"),
    Cell("found-8", "found-8", title="8 found heads"),
    Cell("layers-4", "layers-4", title="every 4th layer"),
    Cell("found-5", "found-5", title="5 found heads"),
    Cell("found-16", "found-16", title="16 found heads"),
    Cell("state-4", "found-8", 4, title="8 found heads, d_state 4"),
    Cell("state-16", "found-8", 16, title="8 found heads, d_state 16"),
)
BY_NAME = {cell.name: cell for cell in (GOOD, *CELLS)}


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
        times (`int`):
            Measurements in a run, evenly spaced, beside the one before the first step.
        snapshots (`tuple[float, ...]`, *optional*):
            Parts of the run after which the student is kept.
    """

    def __init__(self, workshop: Workshop, folder: Path, source: Path, times: int, snapshots: tuple[float, ...] = ()):
        self.workshop, self.folder, self.source = workshop, folder, source
        self.times, self.snapshots = times, snapshots
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
        if state.global_step == 0:
            self._measure(model, args, state)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        every = max(1, state.max_steps // self.times)
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            line = self._measure(model, args, state)
            # Once, when warmup is over; a trial of a few steps is judged by its end alone.
            if not self.checked and self.times >= 5 and state.global_step >= 0.1 * state.max_steps:
                self.checked = True
                self._check(line)
        if state.global_step in [max(1, round(part * state.max_steps)) for part in self.snapshots]:
            self._keep(model, args, state)

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
        training["stages"].append(
            {"stage": "distillation", "tokens": tokens, "probes": self.workshop.recipe.data.probes}
        )
        write_json(folder / actions.TRAINING, training)


class Compile(TrainerCallback):
    """Compiles the layers of teacher and student before the first step of distillation."""

    def __init__(self, workshop: Workshop):
        self.workshop = workshop

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # Layers that keep different heads are different graphs.
        torch._dynamo.config.cache_size_limit = 64
        teacher = self.workshop.teacher_in(resolve_dtype("auto", default_device()))
        for layer in (*teacher.model.layers, *model.model.layers):
            layer.compile()


def cell_recipe(
    recipe: Recipe,
    cell: Cell,
    align_tokens: int,
    distill_tokens: int,
    rates: list[float],
    micro_batch: int | None = None,
) -> Recipe:
    """
    The recipe of one cell: that of the good student with the cell's state size, budget and rates. Cells are short and
    share a GPU: they come in smaller batches (`micro_batch` rows at once) and write no checkpoints.
    """
    at_once = {}
    if micro_batch is not None:
        at_once = {"per_device_train_batch_size": micro_batch, "save_strategy": "no"}
    arguments = recipe.distill.arguments | at_once
    if rates:
        arguments |= {"mixer_learning_rate": rates[0], "learning_rate": rates[1]}
    return dataclasses.replace(
        recipe,
        convert=dataclasses.replace(recipe.convert, state_size=cell.state_size),
        align=dataclasses.replace(recipe.align, tokens=align_tokens, arguments=recipe.align.arguments | at_once),
        distill=dataclasses.replace(recipe.distill, tokens=distill_tokens, arguments=arguments),
    )


def make_cell(
    cell: Cell,
    recipe: Recipe,
    folder: Path,
    start: Path | None = None,
    snapshots: tuple[float, ...] = (),
    watch: int = 10,
    compiled: bool = False,
    backend: str = "auto",
) -> None:
    """
    Walks one cell, or what is left of it.

    Args:
        cell ([`Cell`]):
            Which student.
        recipe ([`~trainers.recipe.Recipe`]):
            Its recipe, see [`cell_recipe`].
        folder (`Path`):
            Folder of the cell: `head_map.json`, `student/`, `alignment/`, `distillation/`, `watch.jsonl`, `cell.json`.
        start (`Path`, *optional*):
            Folder of an aligned student to start from, instead of converting and aligning one.
        snapshots (`tuple[float, ...]`, *optional*):
            Parts of the distillation after which the student is kept.
        watch (`int`, *optional*, defaults to 10):
            Measurements during distillation.
        compiled (`bool`, *optional*, defaults to `False`):
            Whether the layers of teacher and student are compiled for distillation.
        backend (`str`, *optional*, defaults to `"auto"`):
            Back end of the scan, as in [`RadHybridConfig`].
    """
    folder.mkdir(parents=True, exist_ok=True)
    workshop, began = Workshop(recipe, progress=False), time.monotonic()
    seconds = {}
    if start is None:
        if not (folder / "student").exists():
            cell.head_map(HeadScores.load(SCORES), recipe.seed).save(folder / "head_map.json")
            actions.convert_student(workshop, folder / "head_map.json", folder / "student", SCORES)
            config = folder / "student" / "config.json"
            write_json(config, read_json(config) | {"ssm_backend": backend})
            seconds["convert"] = time.monotonic() - began
        start = folder / "student"
        if recipe.align.tokens:
            if not (folder / "alignment" / actions.TRAINING).exists():
                began = time.monotonic()
                actions.train(workshop, start, folder / "alignment", "alignment", recipe.align, resume=True)
                seconds["alignment"] = time.monotonic() - began
            start = folder / "alignment"
    if not recipe.distill.tokens or (folder / "cell.json").exists():
        return
    rates = [recipe.distill.arguments["mixer_learning_rate"], recipe.distill.arguments["learning_rate"]]
    if not (folder / "distillation" / actions.TRAINING).exists():
        began = time.monotonic()
        # Packed rows are read on from where the stage before ended; all students shall read the same ones here.
        workshop.recipe = dataclasses.replace(recipe, align=dataclasses.replace(recipe.align, tokens=0))
        rates = distill(workshop, start, folder, snapshots, watch, compiled)
        seconds["distillation"] = time.monotonic() - began
    budget = {"align_tokens": recipe.align.tokens, "distill_tokens": recipe.distill.tokens, "rates": rates}
    timing = {"seconds": {name: round(value, 1) for name, value in seconds.items()}, "hardware": hardware()}
    write_json(folder / "cell.json", {**dataclasses.asdict(cell), **budget, **timing})


def distill(
    workshop: Workshop, start: Path, folder: Path, snapshots: tuple[float, ...], watch: int, compiled: bool
) -> list[float]:
    """Distils, at lower rates where the first ones go wrong; returns the rates of mixers and of the rest."""
    settings = workshop.recipe.distill
    rates = [settings.arguments["mixer_learning_rate"], settings.arguments["learning_rate"]]
    for attempt in range(RETRIES + 1):
        arguments = settings.arguments | {"mixer_learning_rate": rates[0], "learning_rate": rates[1]}
        callbacks = [Watch(workshop, folder, start, watch, snapshots)]
        if compiled:
            callbacks.append(Compile(workshop))
        try:
            actions.train(
                workshop,
                start,
                folder / "distillation",
                "distillation",
                dataclasses.replace(settings, arguments=arguments),
                resume=True,
                callbacks=callbacks,
            )
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
    parser.add_argument("--out", required=True, help="folder of the whole")
    parser.add_argument("--folder", help="folder of this cell in it (default: the cell's name)")
    parser.add_argument("--align-tokens", type=int, default=0)
    parser.add_argument("--distill-tokens", type=int, default=0)
    parser.add_argument("--rates", type=float, nargs=2, metavar=("MIXERS", "REST"), default=[])
    parser.add_argument("--micro-batch", type=int, help="rows at once, where the recipe's do not fit into memory")
    parser.add_argument("--start", help="an aligned student to start from")
    parser.add_argument("--snapshots", action="store_true", help="keep the student at some points of the run")
    parser.add_argument("--watch", type=int, default=10, help="measurements during the run")
    parser.add_argument("--compile", action="store_true", help="compile the layers for distillation")
    parser.add_argument("--backend", default="auto", help="back end of the scan")
    args = parser.parse_args(arguments)
    cell = BY_NAME[args.cell]
    make_cell(
        cell,
        cell_recipe(
            Recipe.load(args.recipe), cell, args.align_tokens, args.distill_tokens, args.rates, args.micro_batch
        ),
        Path(args.out) / (args.folder or cell.name),
        args.start and Path(args.start),
        SNAPSHOTS if args.snapshots else (),
        args.watch,
        args.compile,
        args.backend,
    )


if __name__ == "__main__":
    main()
