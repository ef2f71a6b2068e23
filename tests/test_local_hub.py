"""The way for somebody without an account: publish to the checkout's own server, load from there."""

import json
import signal
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard
from student import make_head_map

import trainers.hub.local_hub
from trainers.files import read_json
from trainers.heads.head_map import TeacherShape
from trainers.hub.local_hub import local_hub
from trainers.pipeline import Pipeline
from trainers.recipe import Recipe, shipped_recipe


@pytest.mark.timeout(900)  # five processes, each of which imports PyTorch
def test_a_recipe_ends_with_a_published_student(tmp_path, tiny_llama, tiny_tokenizer, capsys):
    """The way of `make demo` with a tiny teacher: every step, then the server, the real client, the snippet run."""
    teacher = tmp_path / "teacher"
    tiny_llama.save_pretrained(teacher)
    tiny_tokenizer.save_pretrained(teacher)
    (teacher / "rad_teacher.json").write_text(json.dumps({"id": "acme/teacher", "license": "mit"}))
    make_head_map(TeacherShape.from_config(tiny_llama.config, "acme/teacher"))[0].save(tmp_path / "head_map.json")
    probe = {"name": "kv", "format": "json", "pairs": 3, "shots": 1}
    recipe = {
        "teacher": str(teacher),
        "out": str(tmp_path / "run"),
        "select": {"head_map": str(tmp_path / "head_map.json")},
        "score": {"probe": probe},
        "data": {"length": 64, "probes": [probe]},
        "calibrate": {"tokens": 256},
        "eval": {"text_tokens": 64, "tasks": [{"probe": probe, "num_examples": 2}], "dtype": "float32"},
        "publish": {"repo_id": "alice/tiny", "local_hub": True, "language": ["la"], "datasets": ["acme/text"]},
    }
    Pipeline(Recipe.from_dict(recipe), "hf-rad run").run()
    seen = read_json(tmp_path / "run" / "publication.json")
    assert seen["url"].startswith("http://127.0.0.1:") and seen["url"].endswith("/alice/tiny")
    assert seen["tag"] == "v1" and 'repo, revision = "alice/tiny", "v1"' in seen["snippet"]
    assert seen["max_logit_difference"] < 1e-4 and seen["commit"] in seen["module"]
    # The tiny tokenizer knows neither of the prompt's words.
    assert seen["printed"].startswith("<unk> <unk>") and len(seen["printed"].split()) > 4
    lines = capsys.readouterr().out.splitlines()
    last = lines[lines.index(seen["snippet"].splitlines()[0]) :]
    assert last[:5] == seen["snippet"].splitlines() and last[7] == seen["printed"]
    assert any(seen["url"] in line for line in lines)
    data = ModelCard.load(tmp_path / "run" / "published" / "README.md").data
    assert (data.language, data.datasets, data.license) == (["la"], ["acme/text"], "mit")


def test_a_recipe_names_the_user_of_the_server():
    with pytest.raises(ValueError, match="begins with `alice/`"):
        Recipe.from_dict({"teacher": "x", "publish": {"local_hub": True, "repo_id": "me/x"}})
    assert Recipe.load(shipped_recipe("demo")).publish.local_hub


def test_server_is_gone_afterwards():
    # A shell's background job has interrupts ignored, and so have its children.
    interrupts = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with local_hub() as environment:
        code = "import sys; from huggingface_hub import HfApi; print(HfApi().whoami()['name'])"
        process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert process.stdout.strip() == "alice"
    signal.signal(signal.SIGINT, interrupts)
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert process.returncode


def test_installed_without_the_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(trainers.hub.local_hub, "SERVER", tmp_path / "hub_server.py")
    with pytest.raises(FileNotFoundError, match="installed without it"), local_hub():
        pass
