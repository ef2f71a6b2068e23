"""
What the closed-form fit is worth when it is done otherwise: which tokens and how many, how strong a ridge, in which
type its products are, on whose stream, and with gradient steps for each layer between two closed forms.

    python -m benchmarks.calibration_study --out runs/calibration
    python -m benchmarks.calibration_study --out runs/try --tokens 8192 --num-examples 4     a rehearsal

Cells on the teacher's stream share their sums, which are kept in `--out`; a cell is one small file there, so the
command given anew goes on with the next one. Prints one table. Streams of a fit: `teacher` gives every layer the
teacher's input; `student` the one that the fitted layers before it give, with the teacher's output as target;
`corrected` the same, with the target that also takes the student's stream back to the teacher's; `both` the sums of
`teacher` and `corrected`.
"""

import argparse
import dataclasses
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from tqdm.auto import tqdm

from modeling_rad_hybrid import RadHybridForCausalLM
from trainers import actions, calibration
from trainers.calibration import NormalEquations, _collect, _fit, _recurrent_terms
from trainers.conversion import convert
from trainers.data import token_batches
from trainers.distillation.losses import alignment_loss
from trainers.distillation.stage_losses import recorded_mixers
from trainers.evaluation import evaluate, hardware, versions
from trainers.files import atomic_path, read_json, write_json
from trainers.heads.head_map import HeadMap
from trainers.precision import fast_dtype
from trainers.recipe import EvalSettings, Recipe, StageSettings
from trainers.workshop import Workshop, mixture_rows, text_and_held_out


@dataclass(frozen=True)
class Cell:
    """
    One way to fit, and what follows it.

    Args:
        share (`float`): of `--tokens`, what is fitted on.
        probes (`float`, *optional*): share of probes among them; by default the recipe's.
        exact (`bool`): whether the products of the normal equations are those of float32, not of bfloat16.
        ridge (`float`, *optional*): strength of the ridge; `None` chooses one for each layer by held-out rows.
        stream (`str`, *optional*): `None` takes the shared sums of the teacher's stream; otherwise layer by layer.
        steps (`int`): gradient steps of each layer, between two closed forms.
        align (`bool`): whether an alignment follows.
    """

    share: float = 1.0
    probes: float | None = None
    exact: bool = False
    ridge: float | None = 1e-5
    stream: str | None = None
    steps: int = 0
    align: bool = False


CELLS = {
    "as it was": Cell(),
    "products in float32": Cell(exact=True),
    "a quarter of the tokens": Cell(share=0.25),
    "half of the tokens": Cell(share=0.5),
    "twice the tokens": Cell(share=2.0),
    "text only": Cell(probes=0.0),
    "probes only": Cell(probes=0.99),
    "ridge 1e-2": Cell(ridge=1e-2),
    "ridge chosen by layer": Cell(ridge=None),
    "student's stream": Cell(stream="student", ridge=None),
    "corrected stream": Cell(stream="corrected", ridge=None),
    "both streams": Cell(stream="both", ridge=None),
    "32 steps a layer": Cell(stream="teacher", ridge=None, steps=32),
    "as it was, aligned": Cell(align=True),
    "ridge chosen, aligned": Cell(ridge=None, align=True),
    "corrected stream, aligned": Cell(stream="corrected", ridge=None, align=True),
    "both streams, aligned": Cell(stream="both", ridge=None, align=True),
}
RIDGES = tuple(10.0**power for power in range(-6, 1))
# Shares of `--tokens` where shared sums begin and end. Of all rows the last eighth chooses a layer's ridge before it is
# fitted on, too.
EDGES = (0.0, 0.25, 0.5, 0.875, 1.0, 2.0)
# Tokens of the rows that residuals are measured on, of text and of probes each; of a layer's step and of the alignment.
HELD_OUT, STEP, ALIGNED, RATE = 4096, 512, 16_384, 1e-3
LENGTH, ROWS = 512, 8


class ExactEquations(NormalEquations):
    """Sums of products of float32 under autocast, too."""

    def add(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        with torch.autocast(features.device.type, enabled=False):
            super().add(features, targets)


class Study:
    """Teacher, rows, sums and measurements of one folder."""

    def __init__(self, args):
        self.args, self.out = args, Path(args.out)
        self.recipe = dataclasses.replace(
            Recipe.load("recipes/demo.yaml"),
            teacher=args.teacher,
            seed=args.seed,
            students=["found"],
            eval=EvalSettings(
                text_tokens=4096,
                tasks=[
                    {
                        "probe": {"name": "kv", "format": format, "pairs": 20, "shots": 2, "queries": 4},
                        "num_examples": args.num_examples,
                    }
                    for format in ("json", "lines")
                ],
            ),
        )
        self.workshop = Workshop(self.recipe, progress=not args.quiet)
        self.head_map = HeadMap.load(args.head_map)

    def batches(self, tokens: int, probes: float | None = None) -> list[torch.Tensor]:
        """The first so many tokens of the calibration's rows, `[8, 512]` each."""
        data = self.recipe.data if probes is None else dataclasses.replace(self.recipe.data, probe_share=probes)
        workshop = Workshop(dataclasses.replace(self.recipe, data=data), progress=False)
        return token_batches(workshop.rows(tokens, "calibration"), ROWS)

    def student(self) -> RadHybridForCausalLM:
        return convert(self.workshop.teacher, self.head_map, seed=self.args.seed)

    def sums(self, first: float, last: float, probes: float | None, exact: bool) -> dict[int, NormalEquations]:
        """Sums of all layers over the rows between two shares of `--tokens`, on the teacher's stream; kept on disk."""
        path = self.out / "sums" / f"{first}-{last}-{probes}-{'float32' if exact else 'bfloat16'}.pt"
        if not path.is_file():
            begin, end = (round(share * self.args.tokens) for share in (first, last))
            rows = torch.cat(self.batches(end, probes))[begin // LENGTH :]
            mixers = [layer.mixer for layer in self.student().model.layers]
            start = time.process_time()
            with mock.patch.object(calibration, "NormalEquations", ExactEquations if exact else NormalEquations):
                found = _collect(
                    self.workshop.teacher, mixers, rows.split(ROWS), _recurrent_terms, path.stem, not self.args.quiet
                )
            kept = {layer: (sums.gram, sums.cross, sums.energy) for layer, sums in found.items()}
            with atomic_path(path) as temporary:
                torch.save({"sums": kept, "seconds": time.process_time() - start}, temporary)
        loaded = torch.load(path)
        self.seconds += loaded["seconds"]
        return {layer: equations(*kept) for layer, kept in loaded["sums"].items()}

    @torch.no_grad()
    def fitted(self, cell: Cell) -> RadHybridForCausalLM:
        """A student fitted on the shared sums."""
        student = self.student()
        shared = cell.probes is None and not cell.exact
        edges = [edge for edge in EDGES if edge <= cell.share] if shared else [0.0, cell.share]
        parts = [self.sums(*pair, cell.probes, cell.exact) for pair in zip(edges, edges[1:], strict=False)]
        start = time.process_time()
        for index, layer in enumerate(student.model.layers):
            if layer.mixer.ssm is None:
                continue
            *most, rest = (part[index] for part in parts)
            self.fit(layer.mixer.ssm.out_proj, total(most), rest, cell.ridge, index)
        self.seconds += time.process_time() - start
        return student

    def fit(self, projection, most: NormalEquations, rest: NormalEquations, ridge: float | None, layer: int) -> None:
        self.ridges.append(chosen_ridge(most, rest) if ridge is None else ridge)
        _fit(projection, total([most, rest]), self.ridges[-1], layer)

    @torch.no_grad()
    def fitted_by_layer(self, cell: Cell) -> RadHybridForCausalLM:
        """A student whose layers are fitted one after the other, each on the stream that the cell names."""
        student, teacher = self.student(), self.workshop.teacher
        batches = torch.cat(self.batches(round(cell.share * self.args.tokens))).split(ROWS // 2)
        start = time.process_time()
        with bfloat16():
            positions = torch.arange(LENGTH, device=teacher.device)[None]
            theirs = [teacher.model.embed_tokens(batch) for batch in batches]
            ours, rotary = theirs, teacher.model.rotary_emb(theirs[0], positions)
            layers = list(zip(student.model.layers, teacher.model.layers, strict=True))
            for index, (layer, teacher_layer) in enumerate(tqdm(layers, desc="layers", disable=self.args.quiet)):
                with recorded_mixers([teacher_layer]) as records:
                    after = [teacher_layer(stream, position_embeddings=rotary) for stream in theirs]
                pairs = []
                for own, stream, (hidden, _, output) in zip(ours, theirs, records, strict=True):
                    if cell.stream in ("teacher", "both"):
                        pairs.append((hidden, output))
                    if cell.stream == "student":
                        pairs.append((layer.input_layernorm(own), output))
                    if cell.stream in ("corrected", "both"):
                        # The few positions of massive activations would outweigh all others.
                        usual = stream.norm(dim=-1, keepdim=True)
                        usual = usual < 10 * usual.median()
                        target = torch.where(usual, output + stream - own, torch.nan)
                        pairs.append((layer.input_layernorm(own), target))
                for number in range(2 if cell.steps else 1):
                    if number:
                        descend(layer.mixer, pairs, rotary, cell.steps, index)
                    most, rest = NormalEquations(), NormalEquations()
                    for place, (hidden, target) in enumerate(pairs):
                        attended = 0 if layer.mixer.attention is None else layer.mixer.attention(hidden, rotary)[0]
                        sums, counted = rest if place % 6 == 5 else most, target.isfinite().all(-1)
                        sums.add(layer.mixer.ssm.features(hidden)[counted], (target - attended)[counted])
                    self.fit(layer.mixer.ssm.out_proj, most, rest, cell.ridge, index)
                if cell.stream != "teacher":
                    ours = [layer(own, position_embeddings=rotary) for own in ours]
                theirs = after
        self.seconds += time.process_time() - start
        return student

    def aligned(self, student: RadHybridForCausalLM) -> RadHybridForCausalLM:
        """The student after a short alignment."""
        source, folder = self.out / "work" / "fitted", self.out / "work" / "aligned"
        actions.save_student(
            student, self.workshop, source, self.head_map, None, {"tokens_trained": self.args.tokens, "stages": []}
        )
        arguments = {"isolate_documents": False, "mixer_learning_rate": RATE}
        tokens = min(ALIGNED, self.args.tokens)
        start = time.process_time()
        actions.train(self.workshop, source, folder, "alignment", StageSettings(tokens, STEP, arguments))
        self.seconds += time.process_time() - start
        student = actions.load_student(folder)
        shutil.rmtree(self.out / "work")
        return student

    def run(self, cell: Cell) -> dict:
        """Makes a cell's student and measures it."""
        self.seconds, self.ridges = 0.0, []
        student = self.fitted(cell) if cell.stream is None else self.fitted_by_layer(cell)
        if cell.align:
            student = self.aligned(student)
        residuals = {kind: residual(self.workshop.teacher, student, rows) for kind, rows in self.held_out().items()}
        return {
            **dataclasses.asdict(cell),
            "seconds": self.seconds,
            "ridges": self.ridges,
            "residuals": residuals,
            **self.measured(student),
        }

    def measured(self, model) -> dict:
        suite = actions.suite(self.recipe.eval.tasks, self.recipe.data.probes)
        dtype = fast_dtype(model.device)
        model = self.workshop.teacher_in(dtype) if model is self.workshop.teacher else model.to(dtype)
        return evaluate(model, self.workshop.tokenizer, suite, **actions.measure_options(self.workshop))

    def held_out(self) -> dict[str, list[torch.Tensor]]:
        """Rows of text and of probes that no fit has seen."""
        documents, probes = text_and_held_out(None)[1], self.recipe.data.probes
        return {
            kind: token_batches(
                mixture_rows(self.workshop.tokenizer, documents, probes, share, LENGTH, HELD_OUT, 2**31, False), ROWS
            )
            for kind, share in (("text", 0.0), ("probes", 0.99))
        }


def bfloat16():
    # No cache of cast weights: gradient steps and fits change them within the block.
    return torch.autocast("cpu", torch.bfloat16, enabled=fast_dtype() is torch.bfloat16, cache_enabled=False)


def equations(gram: torch.Tensor, cross: torch.Tensor, energy: torch.Tensor) -> NormalEquations:
    made = NormalEquations()
    made.gram, made.cross, made.energy = gram, cross, energy
    return made


def total(parts: list[NormalEquations]) -> NormalEquations:
    sums = [(part.gram, part.cross, part.energy) for part in (NormalEquations(), *parts)]
    return equations(*(sum(values) for values in zip(*sums, strict=True)))


def chosen_ridge(fitted: NormalEquations, rest: NormalEquations) -> float:
    """The ridge whose fit on some rows leaves the least residual on the others."""
    return min(RIDGES, key=lambda ridge: rest.residual(fitted.solve(ridge)))


@torch.enable_grad()
def descend(mixer, pairs: list[tuple[torch.Tensor, torch.Tensor]], rotary, steps: int, seed: int) -> None:
    """Gradient steps of a layer's recurrent heads towards the targets, one row of tokens a step."""
    optimizer = torch.optim.AdamW(mixer.ssm.parameters(), lr=RATE, weight_decay=0.0)
    hidden, targets = (torch.cat(tensors).detach() for tensors in zip(*pairs, strict=True))
    order = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(seed))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (steps - step) / (0.5 * steps))
        row = order[step % len(order)][None]
        output, _ = mixer(hidden[row], rotary)
        loss, _ = alignment_loss(output, targets[row], torch.ones(1, LENGTH), "relative")
        (loss / LENGTH).backward()
        torch.nn.utils.clip_grad_norm_(mixer.ssm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def residual(teacher, student: RadHybridForCausalLM, batches: list[torch.Tensor]) -> list[float]:
    """For each layer |student's mixer - teacher's attention| / |teacher's attention|, on the teacher's stream."""
    sums = torch.zeros(2, len(student.model.layers), dtype=torch.float64)
    with bfloat16():
        for batch in batches:
            with recorded_mixers(teacher.model.layers) as records:
                teacher.model(input_ids=batch, use_cache=False)
            for index, (hidden, rotary, target) in enumerate(records):
                output, _ = student.model.layers[index].mixer(hidden, rotary)
                sums[0, index] += (output.float() - target.float()).square().sum().item()
                sums[1, index] += target.float().square().sum().item()
    return (sums[0] / sums[1]).sqrt().tolist()


def cells(names: list[str]) -> Iterator[tuple[str, Cell]]:
    unknown = [name for name in names if name not in CELLS]
    if unknown:
        raise SystemExit(f"There is no cell {', '.join(unknown)}; there are {', '.join(CELLS)}.")
    yield from ((name, cell) for name, cell in CELLS.items() if not names or name in names)


def main() -> None:
    args = parse()
    study = Study(args)
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "quiet", "cells")}
    written = study.out / "settings.json"
    if written.is_file() and read_json(written) != settings:
        raise SystemExit(f"{args.out} holds cells of other settings, {read_json(written)}. Name another --out.")
    write_json(written, settings)
    teacher = study.out / "cells" / "teacher.json"
    if not teacher.is_file():
        write_json(teacher, study.measured(study.workshop.teacher))
    report = {"teacher": read_json(teacher)}
    for name, cell in tqdm(list(cells(args.cells)), desc="cells", unit="cell", disable=args.quiet):
        path = study.out / "cells" / f"{name.replace(' ', '-')}.json"
        if not path.is_file():
            write_json(path, study.run(cell))
        report[name] = read_json(path)
    show(report, args)
    write_json(study.out / "study.json", {"settings": settings, "versions": versions(), "cells": report})


def show(report: dict[str, dict], args) -> None:
    """Prints the table."""
    print(f"\n{args.teacher}; {args.tokens:,} tokens; {args.num_examples} questions a task; one run, seed {args.seed}")
    print(f"{hardware()}, {torch.get_num_threads()} threads; {versions()}")
    tasks = list(report["teacher"]["results"])
    print("|", " | ".join([" " * 38, *tasks, "text loss", "residual text", "residual probes", "CPU s"]), "|")
    print("| --- |" + " ---: |" * (len(tasks) + 4))
    for name, measured in report.items():
        scores = [f"{measured['results'][task]['score']:.2f}" for task in tasks]
        means = [f"{sum(layers) / len(layers):.3f}" for layers in measured.get("residuals", {}).values()] or ["", ""]
        seconds = f"{measured['seconds']:.0f}" if "seconds" in measured else ""
        print("|", " | ".join([f"{name:38s}", *scores, f"{measured['text_loss']:.3f}", *means, seconds]), "|")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of what is made")
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--head-map", default="hub_cards/head_maps/HuggingFaceTB--SmolLM2-135M-Instruct.json")
    parser.add_argument("--tokens", type=int, default=24_576, help="tokens of a fit (default: 24576)")
    parser.add_argument("--num-examples", type=int, default=48, help="questions of each task (default: 48)")
    parser.add_argument("--cells", nargs="*", default=[], help="names of the cells to run (default: all)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.tokens % (16 * LENGTH):
        parser.error(
            f"--tokens is {args.tokens}; it must be a multiple of {16 * LENGTH}, so that its parts are whole rows."
        )
    return args


if __name__ == "__main__":
    main()
