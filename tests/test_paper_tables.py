"""The run behind the paper's tables: what is drawn, who gets which heads and how many tokens, and what is written."""

import dataclasses
import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState

from benchmarks.paper.carry import split_files
from benchmarks.paper.cell import BY_NAME, CELLS, GOOD, RECIPE, SCORES, Clock, Deadline, cell_recipe
from benchmarks.paper.data import DATA_RECIPE, draw_rows
from benchmarks.paper.figures import draw_curves
from benchmarks.paper.floor import Floor, Job
from benchmarks.paper.measure import asked
from benchmarks.paper.report import Results, card_text, curve_points, tables, write_card
from benchmarks.paper.run import collect
from modeling_rad_hybrid import RadHybridConfig
from trainers.data.packing import Manifest
from trainers.evaluation import coverage
from trainers.files import read_json, write_json
from trainers.heads.head_scoring import HeadScores
from trainers.recipe import Recipe
from trainers.workshop import Workshop


KEPT = {"good": 8, "none": 0, "random-8": 8, "found-8": 8, "layers-4": 63, "found-5": 5, "found-16": 16}


@pytest.mark.parametrize("name", KEPT)
def test_every_student_keeps_the_heads_of_its_name(name):
    assert BY_NAME[name].head_map(HeadScores.load(SCORES), seed=0).num_kept == KEPT[name]


def test_students_differ_in_one_thing_each():
    found = BY_NAME["found-8"].head_map(HeadScores.load(SCORES), 0)
    assert BY_NAME["random-8"].head_map(HeadScores.load(SCORES), 0).pairs != found.pairs
    assert [cell.state_size for cell in CELLS if cell.heads == "found-8"] == [8, 4, 16]
    unknown = dataclasses.replace(GOOD, heads="best-8")
    with pytest.raises(ValueError, match="found-N"):
        unknown.head_map(HeadScores.load(SCORES), 0)


def test_recipe_of_a_cell_changes_budget_and_state_size_alone():
    recipe = Recipe.load(RECIPE)
    changed = cell_recipe(recipe, BY_NAME["state-16"], 1024, 2048, save_strategy="no")
    assert (changed.convert.state_size, changed.align.tokens, changed.distill.tokens) == (16, 1024, 2048)
    assert changed.distill.arguments == recipe.distill.arguments | {"save_strategy": "no"}
    assert dataclasses.replace(changed, convert=recipe.convert, align=recipe.align, distill=recipe.distill) == recipe


def test_what_the_packed_rows_hold_is_marked_as_trained_on(tmp_path):
    sources = Recipe.load(DATA_RECIPE).data.sources
    nothing = {"rows": 0, "seed": 0, "vocabulary": "", "tokenizer": "", "given": [], "digest": "", "masked": False}
    write_json(tmp_path / "manifest.json", asdict(Manifest(length=1024, sources=sources, files=[], **nothing)))
    recipe = Recipe.load(RECIPE)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, packed=str(tmp_path)))
    suite = asked(Workshop(recipe))
    trained = {task.name for task in suite if task.trained_on}
    assert {"kv-json-20x2-numbers", "kv-json-20x2-words", "kv-paper-20x2-numbers"} <= trained
    assert not [name for name in trained if not name.startswith(("kv-json", "kv-paper"))]
    curve = asked(Workshop(recipe), curve=True)
    assert max(task.num_examples for task in curve) == 80 and len(curve) < len(suite)


def test_rates_fall_by_the_clock_and_end_the_run():
    clock = Clock(until=time.time() + 100)
    clock.start()
    deadline = Deadline(clock, decay=0.25, least=0.1)
    assert [deadline.factor(part) for part in (0.0, 0.75, 0.875, 0.99, 1.0)] == [1.0, 1.0, 0.5, 0.1, 0.1]
    assert clock.progress(None) < 0.01
    control = TrainerControl()
    deadline.on_step_end(None, None, control)
    assert not control.should_training_stop
    clock.until = time.time() - 1
    deadline.on_step_end(None, None, control)
    assert control.should_training_stop
    steps = TrainerState(global_step=5, max_steps=20)
    assert Clock().progress(steps) == 0.25


def job(path: Path, name: str, code: str, **options) -> Job:
    return Job(name, ["-c", code], path / f"{name}.done", **options)


def test_jobs_run_wait_and_fail_on_their_own(tmp_path):
    floor = Floor(tmp_path, gpus=2)
    touch = "import pathlib, os; pathlib.Path({!r}).write_text(os.environ['CUDA_VISIBLE_DEVICES'])"
    first = job(tmp_path, "first", touch.format(str(tmp_path / "first.done")))
    second = job(tmp_path, "second", touch.format(str(tmp_path / "second.done")), waits_for=first.done)
    failing = job(tmp_path, "failing", "raise SystemExit('no such luck')", most_tries=2, again=("--careful",))
    for kind, one in (("training", failing), ("training", first), ("measurement", second)):
        floor.add(kind, one)
    ended = []
    while floor.busy:
        ended += [one.name for one in floor.turn()]
    assert ended == ["first", "second"] and floor.failed == ["failing"] and failing.tries == 2
    assert failing.command[-1] == "--careful"
    assert "no such luck" in (tmp_path / "logs" / "failing.log").read_text()
    assert first.done.read_text() in ("0", "1") and second.done.read_text() == "1"
    floor.add("training", first)
    assert not floor.busy, "what is there already is not made again"


def test_collected_results_hold_no_weights(tmp_path):
    import tarfile

    run = tmp_path / "run"
    for name in ("good/distillation/model.safetensors", "good/distillation/rad/training.json", "good/measured.json"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}")
    collect(run, tmp_path / "results.tar.gz")
    with tarfile.open(tmp_path / "results.tar.gz") as tar:
        assert sorted(tar.getnames()) == ["run/good/distillation/rad/training.json", "run/good/measured.json"]


def test_rows_that_share_a_context_are_drawn_once():
    rows = [{"context": f"c{i // 4}", "question": i} for i in range(40)]
    drawn = draw_rows(rows, 10, "seed")
    assert len({row["context"] for row in drawn}) == 10 and drawn == draw_rows(rows, 10, "seed")
    with pytest.raises(ValueError, match="10 different contexts"):
        draw_rows(rows, 11, "seed")


def result(score: float, trained_on: bool = False, **more) -> dict:
    return {"score": score, "metric": "m", "examples": 100, "trained_on": trained_on, **more}


def test_multiple_choice_at_chance_is_not_covered():
    teacher = {"kv": result(1.0, True), "book": result(0.5), "easy": result(0.6, chance=0.25)}
    teacher["coin"] = result(0.55, chance=0.5)
    student = {name: result(0.5 * values["score"]) for name, values in teacher.items()}
    student["easy"] = result(0.6)
    covered = coverage(student, teacher)
    assert covered["left_out"] == ["coin"] and covered["value"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert covered["retrieval"] == pytest.approx(0.5) and covered["choices"] == pytest.approx(1.0)
    assert covered["held_out"] == pytest.approx((0.5 + 1) / 2)


def measured(kept: int, factor: float, **more) -> dict:
    names = {"kv-json-20x2-numbers": result(0.9 * factor, True), "phone-book-10x2": result(0.5 * factor)}
    names["choices-easy"] = result(0.6, chance=0.25)
    tasks = {"kv-json-20x2-numbers": {"probe": {"name": "kv"}, "num_examples": 100}}
    return {
        "results": names, "text_loss": 3.5 - factor / 2, "cache_bytes": {"2048": 1, "8192": 4}, "kept_heads": kept,
        "tokens_trained": 1_000_000 * (1 + kept), "tasks": tasks, "seed": 0, "hardware": "1 x a GPU",
        "versions": {"torch": "2.11.0"}, "date": "2026-11-25", **more,
    }  # fmt: skip


@pytest.fixture
def finished(tmp_path):
    """A run as it lies there when it has ended, with two of its students."""
    out, scores = tmp_path / "run", HeadScores.load(SCORES)
    sizes = {"vocab_size": 64, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9}
    for name, factor in (("good", 0.8), ("none", 0.1)):
        head_map = BY_NAME[name].head_map(scores, 0)
        final = out / name / "distillation"
        head_map.save(out / name / "head_map.json")
        config = RadHybridConfig(**sizes, num_key_value_heads=3, head_dim=64, kept_heads=head_map.kept_heads)
        write_json(final / "config.json", config.to_dict())
        write_json(out / name / "measured.json", measured(head_map.num_kept, factor))
        write_json(final / "rad" / "training.json", {"tokens_trained": 9_000_000, "stages": []})
        (final / "rad" / "scores.json").write_bytes(SCORES.read_bytes())
    watched = {"step": 0, "tokens": 0, "train_seconds": 0, "steps_since_start": 0, "kv": 0.25, "text_loss": 4.5}
    lines = [json.dumps(watched), json.dumps(watched | {"tokens": 2_000_000, "kv": 0.75, "text_loss": 3.1})]
    (out / "good" / "watch.jsonl").write_text("\n".join(lines) + "\n")
    write_json(out / "good" / "curve" / "step-10.json", measured(8, 0.4))
    for name in ("teacher.json", "teacher-curve.json"):
        write_json(out / name, measured(270, 1.0))
    group = {"name": "all kept heads", "heads": 8, "accuracy": 0.1, "log_prob": -9.0}
    whole = {"name": "nothing", "heads": 0, "accuracy": 0.8, "log_prob": -1.0}
    found = {"whole": whole, "groups": [group], "kept": {"16.0": group}, "recurrent": {"3.1": whole}}
    write_json(out / "good" / "ablated.json", {"kv-json-20x2-numbers": found})
    return out


def test_tables_hold_what_was_measured_and_nothing_else(finished):
    text = tables(Results(finished))
    students = [line for line in text.splitlines() if "long run |" in line or line.startswith("| 0 heads |")]
    assert "| 8 found heads, long run | 8 | 9.0 M |" in students[0] and "| 80.0 % | 80.0 % |" in students[0]
    assert "| 0 heads | 0 | 1.0 M |" in students[1] and "| 10.0 % | 10.0 % | 100.0 % |" in students[1]
    assert "random" not in text and "every 4th layer" not in text
    assert "| kept head 16.0 | 0.10 | -9.00 |" in text and "| 9.00 M | 40.0 % | 40.0 % |" in text
    assert "| 8 found heads, long run | 2.0 M | 0.25, 0.75 | 4.50, 3.10 |" in text


def test_card_comes_from_the_files_beside_it(finished, tmp_path):
    write_card(Results(finished), tmp_path / "card", "python -m benchmarks.paper.run")
    report = read_json(tmp_path / "card" / "eval.json")
    assert report["hardware"] == "1 x a GPU" and list(report["controls"]) == ["0 heads"]
    card = (tmp_path / "card" / "README.md").read_text(encoding="utf-8")
    assert card == card_text(tmp_path / "card") and "over retrieval alone: **80.0%**" in card


def test_the_card_of_the_student_trained_on_a_gpu_is_the_golden_one():
    folder = Path("hub_cards/smollm2-135m-rad")
    assert card_text(folder) == (folder / "README.md").read_text(encoding="utf-8")
    assert (
        read_json(folder / "eval.json")["student"]["tokens_trained"]
        == read_json(folder / "training.json")["tokens_trained"]
    )


def test_curves_are_drawn(finished, tmp_path):
    results = Results(finished)
    for path in draw_curves(results, curve_points(results), tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_job_that_wants_a_whole_gpu_gets_it_before_smaller_ones(tmp_path):
    floor = Floor(tmp_path, gpus=2, trainings=2)
    write = (
        "import pathlib, os, time; time.sleep({}); pathlib.Path({!r}).write_text(os.environ['CUDA_VISIBLE_DEVICES'])"
    )
    busy = job(tmp_path, "busy", write.format(0.2, str(tmp_path / "busy.done")), wants=0)
    whole = job(tmp_path, "whole", write.format(0, str(tmp_path / "whole.done")), slots=2, wants=0)
    small = [job(tmp_path, f"small-{i}", write.format(0.3, str(tmp_path / f"small-{i}.done"))) for i in range(4)]
    for one in (busy, whole, *small):
        floor.add("training", one)
    ended = []
    while floor.busy:
        ended += [one.name for one in floor.turn()]
    assert whole.done.read_text() == "0" and ended.index("whole") < ended.index("small-3")


def test_the_last_gpu_takes_no_job_before_it_opens(tmp_path):
    opens = tmp_path / "open"
    floor = Floor(tmp_path, gpus=2, opens=opens)
    write = "import pathlib, os; pathlib.Path({!r}).write_text(os.environ['CUDA_VISIBLE_DEVICES'])"
    first, second = (job(tmp_path, name, write.format(str(tmp_path / f"{name}.done"))) for name in ("first", "second"))
    floor.add("measurement", first)
    while floor.busy:
        floor.turn()
    opens.touch()
    floor.add("measurement", second)
    while floor.busy:
        floor.turn()
    assert (first.done.read_text(), second.done.read_text()) == ("0", "1")


def test_parts_hold_every_byte_and_no_more_than_they_may(tmp_path):
    files = []
    for name, size in (("small", 30), ("large", 250), ("last", 20)):
        (tmp_path / name).write_bytes(bytes(range(256))[:size])
        files.append((tmp_path / name, name))
    parts = split_files(files, 100)
    assert [sum(len(content) for content, _ in part) for part in parts] == [100, 100, 100]
    joined = {}
    for content, name in (piece for part in parts for piece in part):
        joined[name.split(".")[0]] = joined.get(name.split(".")[0], b"") + content
    assert joined == {name: path.read_bytes() for path, name in files}
    assert [name for part in parts for _, name in part] == ["small", "large.00", "large.01", "large.02", "last"]
