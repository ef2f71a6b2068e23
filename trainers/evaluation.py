"""
Evaluation of a teacher and its students: retrieval tasks, loss on held-out text, coverage and cache bytes, in one
`eval.json` and one table.

Coverage is the paper's summary (section 5, https://huggingface.co/papers/2602.11374): the mean over tasks of the
student's score divided by the teacher's. A task the teacher itself hardly solves would put noise in the denominator,
so tasks where it scores below a stated floor, or no better than guessing, are left out, and the report names them.
Multiple choice, which a student solves by what it knows, also has a mean of its own, beside that of retrieval.

    suite = [task_from_settings({"probe": {"name": "kv", "format": "json"}, "trained_on": True})]
    teacher_results = evaluate(teacher, tokenizer, suite, text=held_out)
    student_results = evaluate(student, tokenizer, suite, text=held_out)
    report = make_report("teacher-id", teacher_results, student_results, ...)

What `eval.json` holds is written at [`make_report`].
"""

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.table import Table
from tqdm.auto import tqdm

from trainers.families import logits_scale
from trainers.memory import cache_bytes
from trainers.tasks import ChoiceTask, Task


SCHEMA_VERSION = 1
CACHE_TOKENS = (2048, 8192)
# Tokens whose logits exist at once: 256 of a vocabulary of 50 thousand are 50 MB.
HEAD_CHUNK = 256


def evaluate(
    model,
    tokenizer,
    suite: list[Task],
    text: Iterable[torch.Tensor] | None = None,
    batch_size: int = 25,
    seed: int = 0,
    progress: bool = True,
) -> dict:
    """
    Measures one model.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model, in the type and on the device to measure it in.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        suite (`list[Task]`):
            Tasks of [`trainers.tasks`].
        text (`Iterable[torch.Tensor]`, *optional*):
            Batches `[B, T]` of token ids of held-out text.
        batch_size (`int`, *optional*, defaults to `25`):
            Prompts run at once.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the questions.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars.

    Returns:
        `dict`: `{"results": {task: {"score", "metric", "examples", "trained_on"}}, "text_loss": float or None,
        "cache_bytes": {"2048": int, "8192": int}}`, the cache in bytes for one sequence in bfloat16. Multiple choice has
        its `chance` in its result, a task on a public benchmark that one's id.
    """
    names = [task.name for task in suite]
    if len(set(names)) != len(names):
        raise ValueError(f"Two tasks of the suite have the same name: {sorted(names)}.")
    was_training = model.training
    model.eval()
    results = {}
    for task in suite:
        results[task.name] = {
            "score": task.measure(model, tokenizer, batch_size, seed, progress),
            "metric": task.metric,
            "examples": task.num_examples,
            "trained_on": task.trained_on,
        }
        if isinstance(task, ChoiceTask):
            results[task.name]["chance"] = task.chance(seed)
        if benchmark := task.settings().get("benchmark"):
            results[task.name]["benchmark"] = benchmark
    loss = None if text is None else text_loss(model, text, progress)
    model.train(was_training)
    return {
        "results": results,
        "text_loss": loss,
        "cache_bytes": {str(tokens): cache_bytes(model.config, tokens) for tokens in CACHE_TOKENS},
    }


@torch.no_grad()
def text_loss(model, batches: Iterable[torch.Tensor], progress: bool = True) -> float:
    """
    Mean cross-entropy in nats of every token but the first of each sequence.

    The language-model head runs on [`HEAD_CHUNK`] tokens at a time, so that logits of a whole batch never exist.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        batches (`Iterable[torch.Tensor]`):
            Token ids `[B, T]`, without padding.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Raises:
        `ValueError`: when there is no token to predict.
    """
    total, count = 0.0, 0
    # Gemma 2 caps its logits.
    scale, softcap = logits_scale(model.config), model.config.to_dict().get("final_logit_softcapping")
    for input_ids in tqdm(batches, desc="held-out text", disable=not progress, leave=False):
        input_ids = input_ids.to(model.device)
        hidden_states = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # [B, T, D]
        hidden_states = hidden_states[:, :-1].flatten(0, 1)  # [B * (T - 1), D]
        targets = input_ids[:, 1:].flatten()
        for chunk, chunk_targets in zip(hidden_states.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True):
            logits = model.get_output_embeddings()(chunk).float() * scale  # [chunk, V]
            if softcap:
                logits = torch.tanh(logits / softcap) * softcap
            total += torch.nn.functional.cross_entropy(logits, chunk_targets, reduction="sum").item()
            count += chunk_targets.numel()
    if not count:
        raise ValueError("There is no held-out text to measure the loss on; give a longer text or fewer tokens.")
    return total / count


def coverage(student: dict, teacher: dict, floor: float = 0.2) -> dict:
    """
    Mean over tasks of the student's score divided by the teacher's.

    Args:
        student (`dict`):
            `results` of the student.
        teacher (`dict`):
            `results` of the teacher, on the same tasks.
        floor (`float`, *optional*, defaults to `0.2`):
            Tasks where the teacher scores less are left out, as is multiple choice where it is not above chance by two
            standard errors.

    Returns:
        `dict`: `{"value", "tasks", "left_out", "floor", "held_out"}`; `value` is the mean over all `tasks`, `held_out`
        the mean over those that no training data contained. Where there is multiple choice, `retrieval` and `choices`
        are the means over the other tasks and over those. Each is `None` where there is no such task.
    """
    if set(student) != set(teacher):
        raise ValueError(f"Coverage needs the same tasks: student {sorted(student)}, teacher {sorted(teacher)}.")
    tasks = [name for name, result in teacher.items() if result["score"] >= max(_least(result, floor), 1e-9)]
    ratios = {name: student[name]["score"] / teacher[name]["score"] for name in tasks}
    covered = {
        "value": _mean(ratios.values()),
        "tasks": tasks,
        "left_out": [name for name in teacher if name not in ratios],
        "floor": floor,
        "held_out": _mean(ratio for name, ratio in ratios.items() if not teacher[name]["trained_on"]),
    }
    if any("chance" in result for result in teacher.values()):
        covered["retrieval"] = _mean(ratio for name, ratio in ratios.items() if "chance" not in teacher[name])
        covered["choices"] = _mean(ratio for name, ratio in ratios.items() if "chance" in teacher[name])
    return covered


def _least(result: dict, floor: float) -> float:
    """The score from which on a teacher's result counts."""
    chance = result.get("chance")
    if chance is None:
        return floor
    return max(floor, chance + 2 * (chance * (1 - chance) / result["examples"]) ** 0.5)


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def make_report(
    teacher_name: str,
    teacher: dict,
    student: dict,
    controls: dict[str, dict] | None = None,
    floor: float = 0.2,
    seed: int = 0,
    command: str = "",
    suite: list[Task] | None = None,
) -> dict:
    """
    Puts the measurements of a teacher and its students together, as `eval.json` holds them.

    Args:
        teacher_name (`str`):
            Name of the teacher.
        teacher (`dict`):
            What [`evaluate`] gave for the teacher.
        student (`dict`):
            What [`evaluate`] gave for the student, with `kept_heads` and `tokens_trained` added.
        controls (`dict[str, dict]`, *optional*):
            The same for each control, such as `"0 heads"`.
        floor (`float`, *optional*, defaults to `0.2`):
            Teacher score below which a task does not count for coverage.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the questions.
        command (`str`, *optional*, defaults to `""`):
            Command line that measured.
        suite (`list[Task]`, *optional*):
            The tasks, whose settings are then part of the report.

    Returns:
        `dict`: `{"schema_version", "command", "date", "hardware", "versions", "seed", "teacher": {"name", "results",
        "text_loss", "cache_bytes"}, "student": {the same, "kept_heads", "tokens_trained"}, "controls": {name: {as the
        student, "coverage"}}, "coverage": {"value", "tasks", "left_out", "floor", "held_out"} and more, see
        [`coverage`], "tasks": {name: settings}}`.
    """
    measured = {
        name: {**values, "coverage": coverage(values["results"], teacher["results"], floor)}
        for name, values in (controls or {}).items()
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": versions(),
        "seed": seed,
        "teacher": {"name": teacher_name, **teacher},
        "student": student,
        "controls": measured,
        "coverage": coverage(student["results"], teacher["results"], floor),
        "tasks": {task.name: task.settings() for task in suite or []},
    }


def comparison_table(report: dict, title: str = "") -> Table:
    """
    Renders a report as one table: tasks in rows, teacher, controls and student in columns.

    Args:
        report (`dict`):
            What [`make_report`] gave, or the content of an `eval.json`.
        title (`str`, *optional*, defaults to `""`):
            Heading of the table.
    """
    teacher, student = report["teacher"], report["student"]
    models = [teacher, *report["controls"].values(), student]
    caption = _left_out(report["coverage"])
    table = Table(title=title or None, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("")
    table.add_column("training data")
    for name in ("teacher", *report["controls"], f"student, {student['kept_heads']} heads"):
        table.add_column(name, justify="right", no_wrap=True)
    for task, result in teacher["results"].items():
        source = "trained on" if result["trained_on"] else "held out"
        table.add_row(task, source, *(f"{model['results'][task]['score']:.2f}" for model in models))
    table.add_section()
    table.add_row("loss on text (nats a token)", "held out", *(_number(model["text_loss"], 2) for model in models))
    covered = [*(control["coverage"] for control in report["controls"].values()), report["coverage"]]
    table.add_row("coverage, all tasks", "", "1.00", *(_number(item["value"], 2) for item in covered))
    table.add_row("coverage, held-out tasks", "", "1.00", *(_number(item["held_out"], 2) for item in covered))
    if "retrieval" in report["coverage"]:
        table.add_row("coverage, retrieval", "", "1.00", *(_number(item["retrieval"], 2) for item in covered))
        table.add_row("coverage, multiple choice", "", "1.00", *(_number(item["choices"], 2) for item in covered))
    for tokens in CACHE_TOKENS:
        sizes = (model["cache_bytes"][str(tokens)] / 1e6 for model in models)
        table.add_row(f"cache at {tokens // 1024}k tokens (MB, bf16)", "", *(f"{size:.2f}" for size in sizes))
    table.add_row("tokens trained on", "", "", *(f"{model['tokens_trained']:,}" for model in models[1:]))
    return table


def hardware() -> str:
    """Names the processor or accelerator that runs this process."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Versions of the packages a measurement depends on."""
    found = {}
    for name in ("hf-rad", "torch", "transformers", "trl"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"  # hf-rad, run from its checkout
    return found


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _left_out(covered: dict) -> str | None:
    if not covered["left_out"]:
        return None
    names = ", ".join(covered["left_out"])
    return f"Coverage leaves out {names}: the teacher itself scores below {covered['floor']} there, or no better than guessing."
