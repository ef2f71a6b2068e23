"""
Repositories that are broken or mean harm, on the Hub itself: each is one clear error, nothing of it runs or stays.

What a folder may have wrong has its own table in test_publish.py; here are the ways that only a repository has, and a
few of those, to see that both are judged alike.
"""

import dataclasses
import json
import tempfile

import pytest
from hub_server import Repo
from student import make_head_map, stage_student

from trainers.cli import main
from trainers.heads.head_map import TeacherShape
from trainers.hub.inspection import MAX_FILES, inspect_student


REPO = "alice/inspected"
TEACHER = TeacherShape("acme/teacher", None, 3, 4, 2, 16)
MAP, SCORES = make_head_map(TEACHER)
GOOD = json.dumps(MAP.to_dict())
MAP_FILE = "head_maps/acme--teacher.json"


@pytest.fixture
def student(tmp_path_factory, tiny_llama, tiny_tokenizer):
    """Files of a sound student, by path."""
    folder = stage_student(tmp_path_factory.mktemp("staged") / "published", tiny_llama, tiny_tokenizer)
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder that temporary files lie in, empty but for the run's own."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def plant(hub, files: dict[str, bytes | int], kind: str = "models") -> None:
    """Makes a repository of any content and any names, as no client would; a number claims a size."""
    repo = hub.repos[kind, REPO] = Repo(kind, REPO)
    entries = {}
    for path, content in files.items():
        entry = hub.store(b"" if isinstance(content, int) else content)
        entries[path] = dataclasses.replace(entry, size=content) if isinstance(content, int) else entry
    repo.branches["main"] = repo.add(entries, "planted", "", "mallory", None)


def replaced(name: str, old: str, new: str):
    return lambda files: files.update({name: files[name].replace(old.encode(), new.encode())})


def added(name: str, content: bytes | int):
    return lambda files: files.update({name: content})


STUDENTS = [
    # Names that lead elsewhere.
    (added("../outside.json", b"{}"), "may lead out of its folder"),
    (added("rad/../../outside.json", b"{}"), "may lead out of its folder"),
    (added("/tmp/outside.json", b"{}"), "may lead out of its folder"),
    (added("rad\\..\\outside.json", b"{}"), "may lead out of its folder"),
    (added("C:/outside.json", b"{}"), "may lead out of its folder"),
    (added("~/outside.json", b"{}"), "may lead out of its folder"),
    (added("-rf", b"{}"), "may lead out of its folder"),
    (added("rad//outside.json", b"{}"), "may lead out of its folder"),
    (added("a\nb.json", b"{}"), "may lead out of its folder"),
    # What would run when it is unpickled, and what would fill a disk.
    (added("pytorch_model.bin", b"\x80\x04."), "pytorch_model.bin could run code"),
    (added("rad/Scores.PKL", b"\x80\x04."), "Scores.PKL could run code"),
    (added("rad/scores.npz", b"PK"), "could run code"),
    (added("tokenizer.json", 2**40), "more than the 67108864 allowed"),
    (added("README.md", 2**30), "more than the 67108864 allowed"),
    (lambda files: files.update({f"a/{i}.txt": b"" for i in range(MAX_FILES)}), f"more than the {MAX_FILES} looked"),
    # Code of somebody else.
    (replaced("config.json", '"modeling_rad_hybrid.', '"mallory/evil--modeling.'), "somebody else's code"),
    (added("custom_generate/generate.py", b"import os"), "is not imported by the model"),
    (replaced("ssd.py", "import torch\n", "import torch, subprocess\n"), "no business with subprocess"),
    (
        replaced("modeling_rad_hybrid.py", "import torch\n", "import torch\nfrom ..x import y\n"),
        "only `from .module import name`",
    ),
    # Weights and configuration.
    (lambda files: files.update({"model.safetensors": files["model.safetensors"][:-64]}), "cut off or corrupt"),
    (added("model.safetensors", b"\x80\x04."), "cut off or corrupt"),
    (added("model-00001-of-00002.safetensors", b""), "does not belong to the weights"),
    (lambda files: files.pop("model.safetensors"), "lack the file model.safetensors"),
    (added("config.json", b" " * (2**20 + 1)), "more than the 1048576 allowed"),
    (added("config.json", b"[" * 100_000), "is not a JSON file"),
    (replaced("config.json", '"mixing": "replace"', '"mixing": "stir"'), "does not load"),
    (replaced("rad/head_map.json", '"num_key_value_heads": 2', '"num_key_value_heads": 4'), "was made for"),
]
MAPS = [
    ({MAP_FILE: b"["}, "is not a JSON file"),
    ({MAP_FILE: b"[" * 100_000}, "is not a JSON file"),
    ({MAP_FILE: b"\xff\xfe"}, "is not a JSON file"),
    ({MAP_FILE: b"\x80\x04."}, "is not a JSON file"),
    ({MAP_FILE: b"null"}, "not a head map"),
    ({MAP_FILE: 2**40}, "more than the 4194304 allowed"),
    ({MAP_FILE: GOOD.replace('"schema_version": 1', '"schema_version": 9').encode()}, "schema version 9"),
    ({MAP_FILE: GOOD.replace("acme/teacher", "acme/other").encode()}, "is the head map of acme/other"),
    ({MAP_FILE: GOOD.replace('"num_attention_heads": 4', '"num_attention_heads": 1e9').encode()}, "positive integer"),
    ({MAP_FILE: GOOD.replace('"kept_heads": [[]', '"kept_heads": [[-1]').encode()}, "from 0 to 3"),
    ({MAP_FILE: GOOD.replace('"kept_heads": [[]', '"kept_heads": [[NaN]').encode()}, "from 0 to 3"),
    ({MAP_FILE: GOOD.replace('"kept_heads": [[], ', '"kept_heads": [').encode()}, "one list for each of the 3 layers"),
    ({MAP_FILE: GOOD.replace('"source"', '"__import__"').encode()}, "unknown fields ['__import__']"),
    ({"head_maps/../../acme--teacher.json": GOOD.encode()}, "it has none"),
    ({"/head_maps/acme--teacher.json": GOOD.encode()}, "it has none"),
    ({"head_maps/acme--teacher.json/x": GOOD.encode()}, "it has none"),
    ({"head_maps/acme--teacher.pkl": b"\x80\x04."}, "it has none"),
]


def test_students_that_no_one_should_load(hub, student, temporary, tmp_path, capsys):
    plant(hub, student)
    assert inspect_student(REPO).own_code and not any(temporary.iterdir())
    for number, (change, message) in enumerate(STUDENTS):
        files = dict(student)
        change(files)
        assert files != student, f"case {number} changes nothing"
        plant(hub, files)
        assert main(["verify", REPO, "-q"]) == 1, f"case {number}"
        printed = capsys.readouterr()
        assert message in printed.err and printed.err.count("\n") == 1 and not printed.out
        assert not any(temporary.iterdir()) and list(tmp_path.iterdir()) == [temporary]
    del hub.repos["models", REPO]


def test_maps_that_no_one_should_convert_by(hub, temporary, tmp_path, capsys):
    out = tmp_path / "head_map.json"
    words = ["heads", "pull", REPO, "--teacher", "acme/teacher", "--out", str(out), "-q"]
    plant(hub, {MAP_FILE: GOOD.encode()}, "datasets")
    assert main(words) == 0
    out.unlink()
    for number, (files, message) in enumerate(MAPS):
        plant(hub, files, "datasets")
        capsys.readouterr()
        assert main(words) == 1, f"case {number}"
        printed = capsys.readouterr()
        assert message in printed.err and printed.err.count("\n") == 1 and not printed.out
        assert not any(temporary.iterdir()) and list(tmp_path.iterdir()) == [temporary]
    del hub.repos["datasets", REPO]


def test_code_of_another_version_is_told(hub, student, capsys):
    plant(hub, {**student, "ssd.py": student["ssd.py"] + b"\n# Another version.\n"})
    assert main(["verify", REPO, "--format", "json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert "read it first" in seen["code"] and seen["commit"] == hub.repo(REPO).branches["main"].sha
    del hub.repos["models", REPO]
