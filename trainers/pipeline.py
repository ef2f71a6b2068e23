"""
The walk from a teacher to a published student: every step of a recipe in order, each skipped when it is done already.

    score ─► for each student: select ─► convert and calibrate ─► train ─► distill ─► measure ─► report ─► publish

A recipe may ask for several students: the first keeps the heads that were found and is published, the others are
controls (no heads, random heads) that get the same data in the same order. Folder of a run:

    scores.json scores.png                                                   the teacher's heads
    head_map.json student/ alignment/ distillation/ measured.json            the first student, step by step
    controls/<kind>/ with the same names                                     each control
    teacher.json eval.json eval.png published/ publication.json steps.json

    Pipeline(Recipe.load("recipes/demo.yaml")).run()
"""

import dataclasses
import functools
import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trainers import actions, head_actions
from trainers.data.packing import Manifest
from trainers.distillation.watching import draw_measurements, measurements
from trainers.estimates import Estimate
from trainers.evaluation import comparison_table, make_report
from trainers.files import read_json, write_json
from trainers.heads.head_map import HeadMap
from trainers.heads.head_scores import HeadScores
from trainers.hub.local_hub import publish_to_local_hub
from trainers.hub.publish import publish
from trainers.hub.staging import stage
from trainers.plots import accuracy_bars
from trainers.probes import probe_from_settings
from trainers.recipe import Recipe, StageSettings
from trainers.steps import Ledger, Step, stamp
from trainers.workshop import Workshop


# Layers side by side in the table of residuals.
RESIDUAL_COLUMNS = 3
# Enough for an answer and the end of its line.
PUBLISHED_TOKENS = 6
LABELS = {"found": "found heads", "none": "0 heads", "random": "random heads"}


class Pipeline:
    """
    Walks a recipe.

    Args:
        recipe ([`~trainers.recipe.Recipe`]):
            What to do.
        command (`str`, *optional*, defaults to `""`):
            Command line, for the report.
        quiet (`bool`, *optional*, defaults to `False`):
            Whether to leave out progress bars and tables.
        fresh (`bool`, *optional*, defaults to `False`):
            Whether to do every step anew.
    """

    def __init__(self, recipe: Recipe, command: str = "", quiet: bool = False, fresh: bool = False):
        self.recipe, self.command, self.quiet, self.fresh = recipe, command, quiet, fresh
        self.out = Path(recipe.out)
        self.workshop = Workshop(recipe, progress=not quiet)
        self.console = Console(quiet=quiet)
        self.suite = actions.suite(recipe.eval.tasks, self.workshop.trained_probes)
        files = [recipe.data.text, recipe.data.held_out_text, *(source.get("text") for source in recipe.data.sources)]
        self.text = [_stamp(source) for source in files]
        if recipe.data.packed:
            self.text.append(Manifest.load(recipe.data.packed).digest)

    def steps(self) -> list[Step]:
        """Lists the steps in the order they are walked. Nothing is loaded yet."""
        recipe, scored = self.recipe, []
        if recipe.select.head_map is None:
            probe = probe_from_settings(recipe.score.probe)
            scored.append(
                Step(
                    "score",
                    {**self._teacher_inputs(), **dataclasses.asdict(recipe.score), "seed": recipe.seed},
                    [self.out / "scores.json"],
                    self._score,
                    detail=f"ablate every head on {recipe.score.num_examples} questions of {probe.name}",
                )
            )
        students = [step for kind in recipe.students for step in self._student_steps(kind, scored)]
        measured = Step(
            "teacher: measure",
            {**self._teacher_inputs(), **self._measure_inputs()},
            [self.out / "teacher.json"],
            lambda resumed: self._measure_teacher(),
            detail=self._suite_detail(),
        )
        report = Step(
            "report",
            {"floor": recipe.eval.floor},
            [self.out / "eval.json", self.out / "eval.png"],
            lambda resumed: self._report(),
            [measured, *(step for step in students if step.name.endswith(": measure"))],
            "compare teacher and students",
        )
        where = " on a Hub server of this machine" if recipe.publish.local_hub else ""
        target = f", push to {recipe.publish.repo_id}{where}" if recipe.publish.repo_id else ""
        publishing = Step(
            "publish",
            dataclasses.asdict(recipe.publish),
            [self.out / "published", self.out / "publication.json"],
            lambda resumed: self._publish(),
            [report],
            f"stage in {self.out / 'published'}, reload it without our packages{target}",
        )
        return [*scored, *students, measured, report, publishing]

    def _student_steps(self, kind: str, scored: list[Step]) -> list[Step]:
        recipe, folder, label = self.recipe, self.folder(kind), LABELS[kind]
        data = {"data": dataclasses.asdict(recipe.data), "seed": recipe.seed, "text": self.text}
        select = Step(
            f"{label}: select",
            {**self._teacher_inputs(), **dataclasses.asdict(recipe.select), "seed": recipe.seed},
            [folder / "head_map.json"],
            lambda resumed: self._select(kind),
            scored,
            self._select_detail(kind),
        )
        convert = Step(
            f"{label}: convert",
            {**dataclasses.asdict(recipe.convert), "tokens": recipe.fitted_at_conversion, **data},
            [folder / "student", folder / "conversion.json"],
            lambda resumed: self._convert(kind),
            [select],
            f"{recipe.convert.mixing}, state size {recipe.convert.state_size}, "
            f"closed-form fit on {recipe.fitted_at_conversion:,} tokens",
        )
        steps = [select, convert]
        for name, source, settings in self._stages():
            count = actions.num_steps(settings)
            fit = {"fit": recipe.calibrate.tokens} if name == "orientation" else {}
            steps.append(
                Step(
                    f"{label}: {name}",
                    {**dataclasses.asdict(settings), **fit, **data},
                    [folder / name],
                    functools.partial(self._train, kind, name, source, settings),
                    [steps[-1]],
                    f"{count * settings.batch_tokens:,} tokens, {count} steps of {settings.batch_tokens:,}",
                )
            )
        measure = Step(
            f"{label}: measure",
            self._measure_inputs(),
            [folder / "measured.json"],
            lambda resumed: self._measure_student(kind),
            [steps[-1]],
            self._suite_detail(),
        )
        return [*steps, measure]

    def _stages(self) -> list[tuple[str, str, StageSettings]]:
        """(stage and folder, folder it starts from, settings) of the training stages that the recipe asks for."""
        stages, source = [], "student"
        for name, settings in self.recipe.stages():
            if settings.tokens:
                stages.append((name, source, settings))
                source = name
        return stages

    @property
    def final(self) -> str:
        """Name of the folder that holds a student after all stages."""
        return self._stages()[-1][0] if self._stages() else "student"

    def _teacher_inputs(self) -> dict:
        teacher = self.recipe.teacher
        return {"teacher": teacher, "revision": self.recipe.teacher_revision, "files": _stamp(teacher)}

    def _measure_inputs(self) -> dict:
        settings = dataclasses.asdict(self.recipe.eval)
        del settings["floor"]
        tasks = [task.settings() for task in self.suite]
        return {**settings, "tasks": tasks, "seed": self.recipe.seed, "text": self.text}

    def _suite_detail(self) -> str:
        questions = sum(task.num_examples for task in self.suite)
        return f"{questions} questions in {len(self.suite)} tasks, {self.recipe.eval.text_tokens:,} tokens of text"

    def _select_detail(self, kind: str) -> str:
        settings = self.recipe.select
        if kind == "none":
            return "keep no head"
        budget = settings.head_map or (f"{settings.heads} heads" if settings.heads else f"{settings.fraction:.1%}")
        return (
            f"keep the heads of {budget}"
            if settings.head_map
            else f"keep {budget}, " + ("the best-scored" if kind == "found" else "drawn at random")
        )

    def plan(self) -> list[dict]:
        """Lists for each step its name, what it will do, and whether it is done already."""
        ledger = Ledger(self.out / "steps.json")
        return [
            {"step": step.name, "what": step.detail, "done": ledger.is_done(step) and not self.fresh}
            for step in self.steps()
        ]

    def run(self) -> dict:
        """
        Takes every step that is not done yet and prints what came out.

        Returns:
            `dict`: the report, as in `eval.json`, with `seconds` for each step.
        """
        ledger = Ledger(self.out / "steps.json")
        steps, seconds = self.steps(), {}
        for number, step in enumerate(steps, start=1):
            skipped = ledger.is_done(step) and not self.fresh
            self.console.print(
                f"[bold][{number}/{len(steps)}] {step.name}[/bold]: {step.detail}"
                + (" — done before" if skipped else ""),
                highlight=False,
            )
            if not skipped:
                ledger.take(step)
            seconds[step.name] = {**ledger.seconds(step), "skipped": skipped}
        report = read_json(self.out / "eval.json")
        self.console.print(comparison_table(report, f"{report['teacher']['name']} and its students"))
        self.console.print(phase_table(seconds))
        self._print_publication()
        return {**report, "seconds": seconds}

    def folder(self, kind: str) -> Path:
        """Folder of a student's artefacts: the run's own for the first one."""
        return self.out if kind == self.recipe.students[0] else self.out / "controls" / kind

    def _score(self, resumed: bool) -> None:
        if not resumed:
            (self.out / "scores.partial.jsonl").unlink(missing_ok=True)
        head_actions.score(self.workshop, self.out)

    def _select(self, kind: str) -> None:
        head_map = head_actions.select(self.workshop, kind, self._scores(), self.folder(kind) / "head_map.json")
        if kind == "found" and self._scores() is not None:
            head_actions.draw(HeadScores.load(self._scores()), head_map, self.out / "scores.png")
        self.console.print(kept_table(head_map))

    def _scores(self) -> Path | None:
        return None if self.recipe.select.head_map is not None else self.out / "scores.json"

    def _convert(self, kind: str) -> None:
        folder = self.folder(kind)
        scores = self._scores() if kind == "found" else None
        outcome = actions.convert_student(self.workshop, folder / "head_map.json", folder / "student", scores)
        write_json(folder / "conversion.json", outcome)
        self.console.print(*conversion_tables(outcome))

    def _train(self, kind: str, name: str, source: str, settings: StageSettings, resumed: bool) -> None:
        folder = self.folder(kind)
        actions.train(self.workshop, folder / source, folder / name, name, settings, resumed)

    def _measure_teacher(self) -> None:
        write_json(self.out / "teacher.json", actions.measure_teacher(self.workshop, self.suite))

    def _measure_student(self, kind: str) -> None:
        measured = actions.measure_student(self.workshop, self.folder(kind) / self.final, self.suite)
        write_json(self.folder(kind) / "measured.json", measured)

    def _report(self) -> None:
        first, *others = self.recipe.students
        controls = {self._title(kind): read_json(self.folder(kind) / "measured.json") for kind in others}
        student = read_json(self.folder(first) / "measured.json")
        name, teacher = self.workshop.teacher_name, read_json(self.out / "teacher.json")
        recipe = self.recipe
        report = make_report(
            name, teacher, student, controls, recipe.eval.floor, recipe.seed, self.command, self.suite
        )
        write_json(self.out / "eval.json", report)
        models = {"teacher": teacher, **controls, self._title(first): student}
        bars = {
            model: {task: result["score"] for task, result in measured["results"].items()}
            for model, measured in models.items()
        }
        accuracy_bars(bars, self.out / "eval.png", f"{name} and its students", highlight=self._title(first))
        if measured := measurements([self.folder(first) / stage for stage, _, _ in self._stages()]):
            title = f"{name}, {self._title(first)}"
            draw_measurements(measured, teacher, recipe.eval.floor, self.out / "progress.png", title)

    def _title(self, kind: str) -> str:
        kept = HeadMap.load(self.folder(kind) / "head_map.json").num_kept
        return f"{kept} {kind} heads" if kept else "0 heads"

    def _publish(self) -> None:
        settings = self.recipe.publish
        folder = stage(
            self.folder(self.recipe.students[0]) / self.final,
            self.out / "published",
            report=self.out / "eval.json",
            teacher=self.workshop.teacher_path,
            datasets=tuple(settings.datasets),
            language=tuple(settings.language),
        )
        # A question that no step of the run has asked.
        example = probe_from_settings(self.recipe.score.probe).examples(1, seed=self.recipe.seed + 1)[0]
        question = {"prompt": example.prompt, "max_new_tokens": PUBLISHED_TOKENS, "private": settings.private or None}
        printed = None
        if settings.local_hub:
            publication, printed = publish_to_local_hub(folder, settings.repo_id, **question)
        else:
            publication = publish(folder, settings.repo_id, **question)
        write_json(
            self.out / "publication.json",
            {
                "folder": str(folder),
                "repo_id": publication.repo_id,
                "url": publication.url,
                "commit": publication.commit,
                "tag": publication.tag,
                "prompt": example.prompt,
                "right_answer": example.answer.strip(),
                "generated": publication.reload.text,
                "module": publication.reload.module,
                "max_logit_difference": publication.reload.max_difference,
                "snippet": publication.snippet,
                "printed": printed,
            },
        )

    def _print_publication(self) -> None:
        """Says what the process without our packages saw, and how anybody loads the student."""
        seen = read_json(self.out / "publication.json")
        question, answer = seen["prompt"].splitlines()[-1], seen["generated"].strip().split("\n")[0]
        lines = [
            f"Published to {seen['url'] or seen['folder']} and reloaded through AutoModel in a process without our "
            f"packages: greatest logit difference {seen['max_logit_difference']:.1e} (float32).",
            f"Asked {question!r}, it answers {answer!r}; right is {seen['right_answer']!r}.",
            "",
            *seen["snippet"].splitlines(),
        ]
        if seen["printed"] is not None:
            lines += ["", "These lines, run in a process of their own, printed:", seen["printed"]]
            lines += ["", f"The server ran on this machine for this step; what it was sent lies in {seen['folder']}."]
        self.console.print(*lines, sep="\n", highlight=False, markup=False, soft_wrap=True)


def _stamp(source: str | None) -> list | dict | None:
    # A Hub id is no path; its revision stands for its content.
    return None if source is None else stamp(Path(source))


def kept_table(head_map: HeadMap) -> Table:
    """Renders which query heads of which layers a head map keeps."""
    shape = head_map.teacher
    title = f"{head_map.num_kept} of {shape.num_heads} heads of {shape.id}, {len(head_map.kv_groups)} of "
    title += f"{shape.num_hidden_layers * shape.num_key_value_heads} KV groups"
    table = Table(title=title, title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("kept query heads")
    for layer, kept in enumerate(head_map.kept_heads):
        if kept:
            table.add_row(str(layer), ", ".join(map(str, kept)))
    return table


def conversion_tables(outcome: dict) -> list[Table]:
    """Renders what [`~trainers.actions.convert_student`] gave: sizes, and the residuals of the fit by layer."""
    sizes = Table("", "teacher", "student", title="Conversion", title_justify="left")
    for row in outcome["summary"]:
        sizes.add_row(*row)
    if not outcome["residuals"]:
        return [sizes]
    title = "Recurrent heads: relative error before and after the closed-form fit"
    fits = Table(title=title, title_justify="left")
    for name in ("layer", "before", "after") * RESIDUAL_COLUMNS:
        fits.add_column(name, justify="right")
    cells = [
        (str(layer), f"{pair[0]:.1f}", f"{pair[1]:.3f}")
        for layer, pair in enumerate(outcome["residuals"])
        if pair is not None
    ]
    height = math.ceil(len(cells) / RESIDUAL_COLUMNS)
    for row in range(height):
        fits.add_row(*(cell for layer in cells[row::height] for cell in layer))
    return [sizes, fits]


def plan_table(plan: list[dict], title: str) -> Table:
    """Renders what [`Pipeline.plan`] gave."""
    table = Table(title=title, title_justify="left")
    for column in ("step", "what", ""):
        table.add_column(column)
    for step in plan:
        table.add_row(step["step"], step["what"], "done, will be skipped" if step["done"] else "to do")
    return table


def estimates_table(estimates: list[Estimate]) -> Table:
    """Renders what [`~trainers.estimates.recipe_estimates`] gave."""
    title = "Training, estimated; time is that of matrix products alone, at the rate measured here just now"
    table = Table(title=title, title_justify="left")
    for column in ("stage", "tokens", "steps", "trained parameters", "memory", "time at least"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for estimate in estimates:
        hours, minutes = divmod(math.ceil(estimate.seconds / 60), 60)
        table.add_row(
            estimate.stage,
            f"{estimate.tokens:,}",
            f"{estimate.steps:,}",
            f"{estimate.trained / 1e6:.1f} M",
            f"{estimate.bytes / 2**30:.1f} GiB",
            f"{hours} h {minutes} min",
        )
    return table


def phase_table(seconds: dict[str, dict]) -> Table:
    """Renders what each step took; a step that was skipped shows what it took when it was done."""
    table = Table(title="Time", title_justify="left", show_footer=True)
    total = sum(value["seconds"] for value in seconds.values() if not value["skipped"])
    table.add_column("step", "this run")
    table.add_column("seconds", f"{total:.0f}", justify="right")
    table.add_column("CPU seconds", justify="right")
    table.add_column("")
    for name, value in seconds.items():
        note = "done before" if value["skipped"] else ""
        table.add_row(name, f"{value['seconds']:.0f}", f"{value['cpu_seconds']:.0f}", note)
    return table
