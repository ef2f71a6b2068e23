"""The verbs that score, select and look at heads, on a tiny teacher without training."""

import json

import pytest

from trainers.cli import main
from trainers.conversion import convert
from trainers.heads.head_map import HeadMap
from trainers.heads.head_scores import HeadScores


@pytest.fixture
def teacher(tiny_llama, tiny_tokenizer, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "teacher")
    tiny_tokenizer.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def run(capsys, *words) -> dict:
    assert main([*map(str, words), "--format", "json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_from_scores_to_pictures(teacher, tiny_llama, tiny_tokenizer, tmp_path, capsys):
    asked = ["--pairs", 4, "--shots", 1, "--queries", 2, "--num-examples", 4, "--min-accuracy", 0]
    second = '{"name": "kv", "format": "lines", "pairs": 4, "shots": 1}'
    out = tmp_path / "run"
    found = run(
        capsys, "score", teacher, "--out", out, *asked, "--probe", "kv", "--probe", second, "--screen", "damped"
    )
    scores = HeadScores.load(out / "scores.json")
    assert scores.probe["name"] == "mean" and scores.screen == "damped" and scores.num_ablated == 3
    assert len(found["rows"]) == 10 and (out / "scores.png").is_file()
    run(capsys, "select", out / "scores.json", "--heads", 2, "--out", out / "head_map.json")
    assert HeadMap.load(out / "head_map.json").pairs == sorted(scores.ranking()[:2])

    options = ["--teacher", teacher, "--out", out]
    curves = run(capsys, "heads", "curves", out / "scores.json", *options, "--counts", 1, 12, "--num-examples", 2)
    assert [row["heads"] for row in curves["rows"]] == [1, 12] and (out / "curves.png").is_file()
    content = json.loads((out / "curves.json").read_text())["curves"]
    assert content["best heads removed"]["order"] == [list(pair) for pair in scores.ranking()]

    kinds = run(capsys, "heads", "kinds", out / "head_map.json", *options, "--num-examples", 1)
    assert {row["kind"] for row in kinds["rows"]} <= {"gather", "aggregate", "both", "neither"}
    assert len(list(out.glob("head_[0-9]*.png"))) == 2

    layers = out / "layers.json"
    measured = run(capsys, "heads", "layers", teacher, "--out", layers, "--num-examples", 2, "--text-tokens", 512)
    importance = {name: [row[name] for row in measured["rows"]] for name in ("leave-one-layer-out", "kl-guided")}
    assert json.loads(layers.read_text()) == importance and min(importance["kl-guided"]) > 0
    for method, values in importance.items():
        run(
            capsys,
            "select",
            out / "scores.json",
            "--method",
            method,
            "--layers",
            layers,
            "--heads",
            4,
            "--out",
            out / "m",
        )
        assert HeadMap.load(out / "m").pairs == [(values.index(max(values)), head) for head in range(4)]

    student = convert(tiny_llama, HeadMap.load(out / "head_map.json"))
    student.save_pretrained(tmp_path / "student")
    tiny_tokenizer.save_pretrained(tmp_path / "student")
    where = ["--num-examples", 2, "--random-heads", 1, "--out", out / "located.json"]
    located = run(capsys, "heads", "locate", tmp_path / "student", *where)
    assert len(located["kept"]) == 2 and len(located["recurrent"]) == 1
    assert json.loads((out / "located.json").read_text()) == located


def test_heads_ranked_by_what_text_loses(teacher, tmp_path, capsys):
    out = tmp_path / "run"
    asked = ["--pairs", 4, "--shots", 1, "--queries", 2, "--num-examples", 2, "--min-accuracy", 0]
    found = run(capsys, "score", teacher, "--out", out, *asked, "--text-tokens", 512)
    scores = HeadScores.load(out / "scores.json")
    table = {(layer, head): value for layer, row in enumerate(scores.text_kl) for head, value in enumerate(row)}
    assert min(table.values()) > 0 and {"KL on text"} <= set(found["rows"][0])
    run(capsys, "select", out / "scores.json", "--heads", 2, "--by", "text_kl", "--out", out / "map.json")
    head_map = HeadMap.load(out / "map.json")
    assert set(head_map.pairs) == set(sorted(table, key=table.get)[-2:]) and head_map.selection["by"] == "text_kl"


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["--heads", 2], [[], [0, 1]]),
        (["--heads", 3, "--method", "top-groups"], [[1], [0, 1]]),
        (["--threshold", 0.5], [[], [0]]),
        (["--heads", 2, "--by", "logprob_drop"], [[], [0, 3]]),
        (["--heads", 4, "--method", "uniform-layers"], [[], [0, 1, 2, 3]]),
        (["--n", 2, "--method", "every-nth-layer"], [[], [0, 1, 2, 3]]),
        (["--cache-bytes", 4000, "--tokens", 64, "--state-size", 2], [[], [0, 1]]),
    ],
)
def test_selections_by_verb(words, kept, tmp_path, capsys):
    shape = {"id": "org/teacher", "revision": None, "num_hidden_layers": 2, "num_attention_heads": 4}
    content = {
        "schema_version": 1,
        "teacher": {**shape, "num_key_value_heads": 2, "head_dim": 8},
        "probe": {"name": "kv"},
        "num_examples": 50,
        "seed": 7,
        "base_accuracy": 0.98,
        "base_logprob": -0.1,
        "accuracy_drop": [[0.0, 0.1, 0.0, 0.0], [0.5, 0.1, 0.0, -0.02]],
        "logprob_drop": [[-0.1, 0.3, 0.02, 0.0], [2.0, 0.4, 0.01, 0.5]],
        "dtype": "float32",
        "date": "2026-01-01",
        "versions": {},
    }
    (tmp_path / "scores.json").write_text(json.dumps(content))
    run(capsys, "select", tmp_path / "scores.json", *words, "--out", tmp_path / "map.json")
    assert HeadMap.load(tmp_path / "map.json").kept_heads == kept


def test_maps_are_compared_by_verb(capsys):
    name = "Qwen/Qwen2.5-1.5B-Instruct"
    assert run(capsys, "heads", "compare", name, name)["spearman"] == 1
    assert main(["heads", "compare", name, "meta-llama/Llama-3.2-1B-Instruct"]) == 1
    assert "cannot be compared" in capsys.readouterr().err


def test_a_probe_that_cannot_be_read_is_named(teacher, tmp_path, capsys):
    assert main(["score", str(teacher), "--out", str(tmp_path), "--probe", "{copy"]) == 1
    assert "settings as JSON" in capsys.readouterr().err
