"""
What each verb that makes, trains and measures students does, given a workshop and the files to read and write
(`head_actions.py` has those of the heads). `hf-rad VERB` calls one of these, the pipeline all.

    workshop = Workshop(Recipe(teacher="smollm2"))
    convert_student(workshop, Path("runs/mine/head_map.json"), Path("runs/mine/student"))
"""

import dataclasses
import math
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import TrainerCallback

from modeling_rad_hybrid import RadHybridForCausalLM
from trainers.calibration import calibrate
from trainers.conversion import convert, summary
from trainers.data import token_batches
from trainers.distillation.checkpoints import last_checkpoint
from trainers.distillation.distill_config import RadDistillationConfig
from trainers.distillation.distill_trainer import RadDistillationTrainer
from trainers.distillation.watching import MEASUREMENTS, MeasureCallback
from trainers.evaluation import evaluate
from trainers.files import read_json, write_json
from trainers.heads.head_map import HeadMap
from trainers.precision import fast_dtype, resolve_dtype
from trainers.probes import probe_from_settings
from trainers.recipe import StageSettings
from trainers.tasks import ProbeTask, Task, task_from_settings
from trainers.workshop import Workshop, default_device


# What a student's folder says of its making, beside the head map and the scores.
TRAINING = Path("rad") / "training.json"
# Rows of a calibration batch, and rows of a training batch that fit into the memory of a small machine.
CALIBRATION_ROWS = 8
TRAINING_ROWS = 8


def convert_student(workshop: Workshop, head_map: HeadMap | Path, folder: Path, scores: Path | None = None) -> dict:
    """
    Converts the teacher, fits the recurrent heads' readout in closed form and writes the student's folder.

    Args:
        workshop ([`~trainers.workshop.Workshop`]):
            Shared resources; `recipe.convert` and `recipe.calibrate` hold the settings.
        head_map ([`~trainers.heads.head_map.HeadMap`] or `Path`):
            Head map, or file with one.
        folder (`Path`):
            Folder to write.
        scores (`Path`, *optional*):
            `scores.json` to keep beside the head map.

    Returns:
        `dict`: `summary`, rows of (quantity, teacher, student), and `residuals`, for each layer the relative error of
        its recurrent heads before and after the fit (`None` in a layer without any; empty without a fit).
    """
    recipe = workshop.recipe
    chosen = head_map if isinstance(head_map, HeadMap) else HeadMap.load(head_map)
    chosen.check_teacher(workshop.teacher.config, workshop.recipe.teacher)
    student = convert(
        workshop.teacher, chosen, mixing=recipe.convert.mixing, state_size=recipe.convert.state_size, seed=recipe.seed
    )
    tokens = recipe.fitted_at_conversion
    residuals = fit_readout(workshop, student) if tokens else []
    stages = [{"stage": "calibration", "tokens": tokens, "probes": workshop.trained_probes}] if tokens else []
    training = {"tokens_trained": tokens, "stages": stages}
    save_student(student, workshop, folder, chosen, scores, training)
    return {"summary": summary(student, workshop.teacher), "residuals": residuals}


def fit_readout(workshop: Workshop, student: RadHybridForCausalLM) -> list[tuple[float, float] | None]:
    """Fits a student's readout in closed form on the recipe's calibration tokens, see [`trainers.calibration`]."""
    rows = workshop.rows(workshop.recipe.calibrate.tokens, "calibration")
    batches = token_batches(rows, CALIBRATION_ROWS)
    return calibrate(workshop.teacher, student, batches, progress=workshop.progress)


def save_student(student, workshop: Workshop, folder: Path, head_map: HeadMap, scores: Path | None, training: dict):
    """Writes a student's folder as a whole: model, tokenizer, head map, scores and how it was trained."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work:
        work = Path(work) / folder.name
        student.save_pretrained(work)
        workshop.tokenizer.save_pretrained(work)
        head_map.save(work / "rad" / "head_map.json")
        if scores is not None:
            shutil.copyfile(scores, work / "rad" / "scores.json")
        write_json(work / TRAINING, training)
        if folder.exists():
            shutil.rmtree(folder)
        work.rename(folder)


def load_student(folder: Path | str, dtype: torch.dtype = torch.float32) -> RadHybridForCausalLM:
    """Loads a student onto this machine's accelerator, in eval mode."""
    return RadHybridForCausalLM.from_pretrained(folder, dtype=dtype).to(default_device()).eval()


def train(
    workshop: Workshop,
    source: Path,
    folder: Path,
    stage: str,
    settings: StageSettings,
    resume: bool = False,
    callbacks: list[TrainerCallback] | None = None,
) -> None:
    """
    Trains one stage of a student and writes the outcome.

    Args:
        workshop ([`~trainers.workshop.Workshop`]):
            Shared resources.
        source (`Path`):
            Folder of the student to start from.
        folder (`Path`):
            Folder of the run: checkpoints while it lasts, the trained student in the end.
        stage (`str`):
            `"orientation"`, after which the readout is fitted in closed form, `"alignment"`, `"distillation"` or
            `"long"`, a distillation after the first.
        settings ([`~trainers.recipe.StageSettings`]):
            Tokens, batch and further arguments of the trainer.
        resume (`bool`, *optional*, defaults to `False`):
            Whether to go on from the newest checkpoint in `folder`; otherwise what is there is deleted.
        callbacks (`list` of [`~transformers.TrainerCallback`], *optional*):
            Further callbacks of the trainer.
    """
    if folder.exists() and not resume:
        shutil.rmtree(folder)
    student = load_student(source)
    rows = workshop.rows(settings.tokens, stage, settings)
    with workshop.stage_teacher(stage, settings.tokens) as teacher:
        trainer = RadDistillationTrainer(
            student,
            teacher,
            training_arguments(workshop, folder, stage, settings),
            rows,
            processing_class=workshop.tokenizer,
            callbacks=callbacks,
        )
        if settings.measure_steps:
            trainer.add_callback(_measure_callback(workshop, trainer, source, folder, settings.measure_steps))
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    tokens = trainer.state.num_input_tokens_seen
    if stage == "orientation" and workshop.recipe.calibrate.tokens:
        fit_readout(workshop, student)
        tokens += workshop.recipe.calibrate.tokens
    trainer.save_model(str(folder))
    record_training(source, folder, stage, tokens, workshop.trained_probes)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def _measure_callback(workshop: Workshop, trainer, source: Path, folder: Path, every: int) -> MeasureCallback:
    tasks = suite(workshop.recipe.eval.tasks, workshop.trained_probes)
    dtype = resolve_dtype(workshop.recipe.eval.dtype, default_device())

    def measure(student) -> dict:
        return evaluate(student.to(dtype), workshop.tokenizer, tasks, **measure_options(workshop))

    before = read_json(source / TRAINING)["tokens_trained"] if (source / TRAINING).is_file() else 0
    # What the stage before measured last is what this one would measure first.
    at_start = not (source / MEASUREMENTS).is_file()
    return MeasureCallback(trainer, measure, every, folder / MEASUREMENTS, before, at_start)


def record_training(source: Path | str, folder: Path, stage: str, tokens: int, probes: list[dict]) -> None:
    """
    Takes what a student's folder says of its making along to the folder of its next stage, and adds the stage.

    Args:
        source (`Path` or `str`):
            Folder or Hub id of the student that the stage began with.
        folder (`Path`):
            Folder of the trained student.
        stage (`str`):
            `"orientation"`, `"alignment"`, `"distillation"` or `"long"`.
        tokens (`int`):
            Tokens that it was trained on.
        probes (`list[dict]`):
            Settings of the probes among them.
    """
    HeadMap.load(source).save(folder / "rad" / "head_map.json")
    training = {"tokens_trained": 0, "stages": []}
    if Path(source).is_dir():
        shutil.copytree(Path(source) / "rad", folder / "rad", dirs_exist_ok=True)
        if (Path(source) / TRAINING).is_file():
            training = read_json(Path(source) / TRAINING)
    training["tokens_trained"] += tokens
    training["stages"].append({"stage": stage, "tokens": tokens, "probes": probes})
    write_json(folder / TRAINING, training)


def num_steps(settings: StageSettings) -> int:
    """Optimizer steps of a stage."""
    return math.ceil(settings.tokens / settings.batch_tokens)


def training_arguments(workshop: Workshop, folder: Path, stage: str, settings: StageSettings) -> RadDistillationConfig:
    """Turns a stage's settings into the trainer's arguments."""
    length = settings.length or workshop.recipe.data.length
    rows = settings.batch_tokens // length
    at_once = settings.arguments.get("per_device_train_batch_size", math.gcd(rows, TRAINING_ROWS))
    if rows * length != settings.batch_tokens or rows % at_once:
        raise ValueError(
            f"A step of {settings.batch_tokens} tokens is not a whole number of batches of {at_once} rows of {length} "
            "tokens. Choose batch_tokens as a multiple of the length (and of per_device_train_batch_size)."
        )
    defaults = {
        "output_dir": str(folder),
        "stage": "distillation" if stage == "long" else stage,
        "max_steps": num_steps(settings),
        "max_length": length,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": rows // at_once,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": not workshop.progress,
        "seed": workshop.recipe.seed,
        "bf16": fast_dtype(default_device()) is torch.bfloat16,
    }
    try:
        return RadDistillationConfig(**{**defaults, **settings.arguments})
    except TypeError as error:
        raise ValueError(f"The arguments of the {stage} stage cannot be used: {error}.") from error


def suite(tasks: list[dict], trained: list[dict]) -> list[Task]:
    """
    Makes tasks of their settings. A probe counts as trained on when the training data held one of the same kind,
    format and values, whatever its settings say.

    Args:
        tasks (`list[dict]`):
            Settings of the tasks.
        trained (`list[dict]`):
            Settings of the probes in the training data.
    """
    formats = set().union(*(probe_from_settings(settings).formats() for settings in trained))
    made = [task_from_settings(settings) for settings in tasks]
    return [
        dataclasses.replace(task, trained_on=True)
        if isinstance(task, ProbeTask) and task.probe.formats() & formats
        else task
        for task in made
    ]


def trained_probes(student: Path | str) -> list[dict]:
    """Settings of the probes that a student's folder says it was trained on."""
    path = Path(student) / TRAINING
    stages = read_json(path)["stages"] if path.is_file() else []
    return [settings for stage in stages for settings in stage["probes"]]


def measure_student(workshop: Workshop, folder: Path | str, suite: list[Task]) -> dict:
    """Measures a student in the type that the recipe's `eval` asks for."""
    settings = workshop.recipe.eval
    student = load_student(folder, resolve_dtype(settings.dtype, default_device()))
    training = Path(folder) / TRAINING
    return {
        **evaluate(student, workshop.tokenizer, suite, **measure_options(workshop)),
        "kept_heads": sum(map(len, student.config.kept_heads)),
        "tokens_trained": read_json(training)["tokens_trained"] if training.is_file() else None,
    }


def measure_teacher(workshop: Workshop, suite: list[Task]) -> dict:
    """Measures the teacher in the type that the recipe's `eval` asks for."""
    teacher = workshop.teacher_in(resolve_dtype(workshop.recipe.eval.dtype, default_device()))
    return evaluate(teacher, workshop.tokenizer, suite, **measure_options(workshop))


def measure_options(workshop: Workshop) -> dict:
    """The arguments of [`~trainers.evaluation.evaluate`] that every model of a run shares."""
    settings = workshop.recipe.eval
    text = None
    if settings.text_tokens:
        text = token_batches(workshop.held_out_rows(settings.text_tokens), CALIBRATION_ROWS)
    return {
        "text": text,
        "batch_size": settings.batch_size,
        "seed": workshop.recipe.seed,
        "progress": workshop.progress,
    }
