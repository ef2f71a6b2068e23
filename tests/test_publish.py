"""A staged folder is complete, tells nothing of its maker's machine, and loads where our packages are missing."""

import dataclasses
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import EvalResultEntry, ModelCard, parse_eval_result_entries
from safetensors.torch import load_file, save_file
from student import make_head_map, make_report, make_student, stage_student

import trainers.hub.reload
from modeling_rad_hybrid import AUTO_MAP, RadHybridForCausalLM
from trainers.evaluation import evaluate
from trainers.files import read_json, write_json
from trainers.heads.head_map import HeadMap, TeacherShape
from trainers.hub.model_card import eval_results
from trainers.hub.publish import publish
from trainers.hub.reload import reload_check
from trainers.hub.staging import code_files, find_license, stage
from trainers.hub.verify import verify
from trainers.tasks import task_from_settings


@pytest.fixture
def staged(tmp_path, tiny_llama, tiny_tokenizer):
    return stage_student(tmp_path / "published", tiny_llama, tiny_tokenizer)


@pytest.fixture
def head_map(tiny_llama):
    return make_head_map(TeacherShape.from_config(tiny_llama.config, "acme/teacher"))[0]


def listing(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_staged_folder_is_complete(staged, tiny_llama, tiny_tokenizer):
    code = {file.name for file in code_files()}
    assert {"configuration_rad_hybrid.py", "modeling_rad_hybrid.py", "discrete_mamba2.py", "ssd.py"} <= code
    texts = {"README.md", "LICENSE", "NOTICE", "config.json", "generation_config.json"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    rad = {"rad/head_map.json", "rad/scores.json", "rad/heads.png", "rad/eval.json"}
    assert listing(staged) == code | texts | tokenizer | rad | {"model.safetensors"}
    assert read_json(staged / "config.json")["auto_map"] == AUTO_MAP
    assert (staged / "rad" / "heads.png").read_bytes()[:4] == b"\x89PNG"
    assert (staged / "chat_template.jinja").read_text() == tiny_tokenizer.chat_template
    notice = (staged / "NOTICE").read_text()
    assert "acme/teacher" in notice and "apache-2.0" in notice and "Llama" not in notice
    assert [path.name for path in staged.parent.iterdir()] == [staged.name]
    verify(staged)


def test_folder_of_a_student_is_staged_as_it_is(staged, tmp_path, tiny_llama, tiny_tokenizer, head_map):
    """From a folder, in shards, and with what a training run leaves beside it."""
    student, folder = make_student(tiny_llama, head_map), tmp_path / "trained"
    student.generation_config.max_new_tokens = 7
    student.save_pretrained(folder, max_shard_size="100KB")
    tiny_tokenizer.save_pretrained(folder)
    head_map.save(folder / "rad" / "head_map.json")
    (folder / "optimizer.pt").write_bytes(b"pickle")
    (folder / "trainer_state.json").write_text("{}")
    out = stage(folder, tmp_path / "again", license="llama3.2")
    verify(out)
    assert "model.safetensors.index.json" in listing(out) and "model.safetensors" not in listing(out)
    assert not {"optimizer.pt", "trainer_state.json", "rad/scores.json", "rad/heads.png"} & listing(out)
    assert read_json(out / "generation_config.json")["max_new_tokens"] == 7
    assert "Built with Llama" in (out / "NOTICE").read_text()
    assert "rad/heads.png" not in (out / "README.md").read_text()
    loaded = RadHybridForCausalLM.from_pretrained(out)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_tuned_student_is_staged_with_its_provenance(staged, tmp_path, tiny_tokenizer):
    """What a stranger saves has no rad/ folder; its config.json still says where the kept heads come from."""
    tuned = tmp_path / "tuned"
    model = RadHybridForCausalLM.from_pretrained(staged)
    model.save_pretrained(tuned)
    tiny_tokenizer.save_pretrained(tuned)
    out = stage(tuned, tmp_path / "again", license="apache-2.0")
    verify(out)
    again, first = HeadMap.load(out), HeadMap.load(staged)
    assert again == dataclasses.replace(first, ranking=[])


def test_public_benchmarks_become_eval_results(tmp_path, tiny_llama, tiny_tokenizer):
    report = make_report()
    benchmark = {"dataset_id": "allenai/ai2_arc", "task_id": "ARC-Easy", "revision": "0123abc"}
    report["student"]["results"]["arc-easy"] = {"score": 0.41, "metric": "accuracy", "examples": 200}
    report["student"]["results"]["arc-easy"]["benchmark"] = benchmark
    out = stage_student(tmp_path / "published", tiny_llama, tiny_tokenizer, report=report)
    verify(out)
    entries = parse_eval_result_entries(yaml.safe_load((out / ".eval_results" / "hf-rad.yaml").read_text()))
    assert entries == [
        EvalResultEntry(
            dataset_id="allenai/ai2_arc",
            task_id="ARC-Easy",
            value=0.41,
            dataset_revision="0123abc",
            date="2026-01-02",
            notes="accuracy, 200 examples, hf-rad",
        )
    ]


def test_a_task_tells_its_benchmark(tmp_path, tiny_llama, tiny_tokenizer):
    """From a recipe's task to the results that are published."""
    rows = [{"query": "the sea", "choices": ["wind", "rain"], "gold": 0}] * 2
    (tmp_path / "arc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark = {"dataset_id": "allenai/ai2_arc", "task_id": "ARC-Easy"}
    settings = {"choices": str(tmp_path / "arc.jsonl"), "num_examples": 2, "benchmark": benchmark}
    task = task_from_settings(settings)
    assert task.settings()["benchmark"] == benchmark and task_from_settings(task.settings()) == task
    report = {"student": evaluate(tiny_llama, tiny_tokenizer, [task], progress=False), "date": "2026-01-02"}
    (entry,) = eval_results(report)
    assert entry["dataset"] == {"id": "allenai/ai2_arc", "task_id": "ARC-Easy"}
    assert entry["notes"] == "log-likelihood per character, 2 examples, hf-rad"
    with pytest.raises(ValueError, match="needs dataset_id and task_id"):
        task_from_settings({**settings, "benchmark": {"dataset_id": "allenai/ai2_arc"}})
    assert "benchmark" not in task_from_settings({"reading": "x.jsonl"}).settings()


def test_staging_again_replaces_the_folder(staged, tiny_llama, tiny_tokenizer):
    before = load_file(staged / "model.safetensors")
    (staged / "rad" / "left.json").write_text("{}")
    stage_student(staged, tiny_llama, tiny_tokenizer, seed=1, report=None)
    after = load_file(staged / "model.safetensors")
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert not {"rad/left.json", "rad/eval.json"} & listing(staged)


def test_staging_that_cannot_work_leaves_nothing(tmp_path, tiny_llama, tiny_tokenizer, head_map):
    student, out = make_student(tiny_llama, head_map), tmp_path / "out" / "published"
    good = {"tokenizer": tiny_tokenizer, "head_map": head_map, "license": "apache-2.0"}
    other_shape = HeadMap.from_pairs(TeacherShape("acme/big", None, 5, 4, 2, 16), [])
    other_heads = HeadMap.from_pairs(head_map.teacher, [(0, 0)])
    empty, weightless = tmp_path / "empty", tmp_path / "weightless"
    empty.mkdir()
    student.config.save_pretrained(weightless)
    bare = tmp_path / "bare"
    student.save_pretrained(bare)
    cases = [
        (student, {"head_map": other_shape}, ValueError, "acme/big .5 layers"),
        (student, {"head_map": other_heads}, ValueError, "with the map it was converted with"),
        (student, {"head_map": None}, ValueError, "pass `head_map`"),
        (student, {"tokenizer": None}, FileNotFoundError, "pass `tokenizer`"),
        (student, {"license": None}, ValueError, "licence of the teacher teacher is unknown"),
        (empty, {}, FileNotFoundError, "no config.json"),
        (weightless, {}, FileNotFoundError, "only safetensors"),
        (bare, {"head_map": None}, FileNotFoundError, "no head map"),
        (bare, {"report": tmp_path / "none.json"}, FileNotFoundError, "none.json"),
    ]
    for what, changed, kind, message in cases:
        with pytest.raises(kind, match=message):
            stage(what, out, **{**good, **changed})
        assert not out.parent.exists() or not any(out.parent.iterdir())


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path, tiny_llama, tiny_tokenizer):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="was not staged by this tool"):
        stage_student(tmp_path / "mine", tiny_llama, tiny_tokenizer)
    assert listing(tmp_path / "mine") == {"thesis.tex"}


def test_licence_is_looked_up(tmp_path, hub):
    (tmp_path / "gguf").mkdir()
    assert find_license(tmp_path, {"id": "acme/teacher", "license": "mit"}) == "mit"
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: acme-1.0\n---\n# A teacher\n")
    assert find_license(tmp_path) == "acme-1.0"
    with pytest.raises(ValueError, match="gguf is unknown: its card names none"):
        find_license(tmp_path / "gguf")
    with pytest.raises(ValueError, match="cannot be read"):
        find_license("acme/nowhere")


def edit(change):
    """Wraps a change of a JSON file's content for the table below."""

    def apply(path):
        content = read_json(path)
        change(content)
        write_json(path, content)

    return apply


def text(old, new):
    return lambda path: path.write_text(path.read_text().replace(old, new))


def tensors(change):
    def apply(path):
        content = load_file(path)
        change(content)
        save_file(content, path, metadata={"format": "pt"})

    return apply


def poison(value):
    def change(content):
        content["model.norm.weight"][3] = value

    return tensors(change)


def replace_tensor(name, make):
    return tensors(lambda content: content.update({name: make(content[name])}))


def huge_header(path):
    path.write_bytes(struct.pack("<Q", 2**40) + path.read_bytes()[8:])


def link(path):
    path.unlink()
    path.symlink_to("/etc/hostname")


def add(content=b"x"):
    def apply(path):
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return apply


def shard_index(name):
    return add(json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": name}}))


NORM = "model.norm.weight"
CONFIG, MAP, CODE = "config.json", "rad/head_map.json", "modeling_rad_hybrid.py"
BROKEN = [
    # Weights.
    ("model.safetensors", poison(float("nan")), "NaN or infinite"),
    ("model.safetensors", poison(float("-inf")), "NaN or infinite"),
    (
        "model.safetensors",
        tensors(lambda content: content.pop(NORM)),
        "lack 1 tensors of the model, model.norm.weight",
    ),
    ("model.safetensors", tensors(lambda c: c.update(extra=torch.ones(2))), "extra, which the model does not have"),
    (
        "model.safetensors",
        replace_tensor(NORM, lambda t: t[:-1].clone()),
        r"shape \(63,\); the configuration asks for",
    ),
    ("model.safetensors", replace_tensor(NORM, lambda t: t.to(torch.int64)), "is torch.int64"),
    ("model.safetensors", replace_tensor(NORM, lambda t: t.double()), "is torch.float64"),
    ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-100]), "cut off or corrupt"),
    ("model.safetensors", lambda path: path.write_bytes(b""), "cut off or corrupt"),
    ("model.safetensors", lambda path: path.write_bytes(b"\x80\x04pickle" * 9), "cut off or corrupt"),
    ("model.safetensors", huge_header, "cut off or corrupt"),
    ("model.safetensors", Path.unlink, "lack the file model.safetensors"),
    ("model-00001-of-00002.safetensors", add(), "does not belong to the weights"),
    ("model.safetensors.index.json", shard_index("../../secret.safetensors"), "must name files beside it"),
    ("model.safetensors.index.json", shard_index("/etc/passwd"), "must name files beside it"),
    ("model.safetensors.index.json", shard_index("model-00001-of-00001.safetensors"), "lack the file model-00001"),
    ("model.safetensors.index.json", add("[1, 2]"), "must name files beside it"),
    ("pytorch_model.bin", add(b"\x80\x04."), "could run code"),
    ("rad/extra.pkl", add(b"\x80\x04."), "could run code"),
    ("model.safetensors", link, "is a link"),
    # Configuration.
    (CONFIG, Path.unlink, "lacks config.json"),
    (CONFIG, add("{"), "is not a JSON file"),
    (CONFIG, add("[]"), "model_type None"),
    (CONFIG, add("{" + " " * 2**20 + "}"), "more than the 1048576 allowed"),
    (CONFIG, edit(lambda c: c.update(model_type="llama")), "model_type 'llama'"),
    (CONFIG, edit(lambda c: c.pop("auto_map")), "auto_map of config.json is None"),
    (CONFIG, edit(lambda c: c["auto_map"].update(AutoModel="mallory/evil--x.Y")), "somebody else's code"),
    (CONFIG, edit(lambda c: c["auto_map"].update(AutoTokenizer="x.Y")), "somebody else's code"),
    (CONFIG, edit(lambda c: c.update(kept_heads=[[], [1], [0, 9]])), "does not load.*heads 0 to 3"),
    (CONFIG, edit(lambda c: c.update(hidden_size="64")), "does not load"),
    (CONFIG, edit(lambda c: c.update(mixing="stir")), "does not load.*stir"),
    (CONFIG, edit(lambda c: c.update(kept_heads=[[], [2], [0, 3]])), "keeps other heads than config.json"),
    # Head map and scores.
    (MAP, Path.unlink, "lacks rad/head_map.json"),
    (MAP, add("not json"), "is not a JSON file"),
    (MAP, add("{" + " " * (5 * 2**20) + "}"), "more than the 4194304 allowed"),
    (MAP, edit(lambda c: c.update(schema_version=99)), "schema version 99"),
    (MAP, edit(lambda c: c.update(surprise=1)), "unknown fields"),
    (MAP, edit(lambda c: c["teacher"].update(num_key_value_heads=4)), "was made for acme/teacher"),
    (MAP, edit(lambda c: c["kept_heads"][0].append(3)), "keeps other heads"),
    (MAP, edit(lambda c: c["kept_heads"][0].append("1")), "not a list of heads"),
    (MAP, edit(lambda c: c["ranking"].append([0, -1])), "not a .layer, head. pair"),
    (MAP, edit(lambda c: c["teacher"].update(id="acme/other")), "tells of another map"),
    (CONFIG, edit(lambda c: c["head_map"].update(source="thin air")), "tells of another map"),
    ("rad/scores.json", text("0.8", "0.9"), "its digest differs"),
    # Code.
    ("ssd.py", Path.unlink, "code file ssd.py is missing"),
    ("helper.py", add("x = 1"), "helper.py is not imported by the model"),
    ("custom_generate/generate.py", add("x = 1"), "custom_generate/generate.py is not imported"),
    (CODE, text("import torch\n", "import torch, os\n"), "line .*no business with os"),
    (CODE, text("import torch\n", "import torch\nimport mamba_ssm\n"), "mamba_ssm must be imported inside `try:`"),
    (CODE, text("import torch\n", "import torch\nfrom . import ssd\n"), "only `from .module import name`"),
    (CODE, text("import torch\n", "import torch\nfrom ..x import y\n"), "only `from .module import name`"),
    (CODE, text("import torch\n", "import torch\nopen('x')\n"), r"must not call open\(\)"),
    (CODE, text("import torch\n", "import torch\ntorch.hub\n"), "must not use .hub"),
    (CODE, text("import torch\n", "import torch\ntorch.load('x')\n"), "must not use .load"),
    (CODE, text("import torch\n", "import torch\n().__class__.__subclasses__\n"), "must not use .__subclasses__"),
    (CODE, text("import torch\n", "import torch\n)\n"), "not Python"),
    (
        CODE,
        text("import torch\n", "from huggingface_hub import snapshot_download\n"),
        "no business with huggingface_hub",
    ),
    (CODE, add("#" * (2**20 + 1)), "more than the 1048576 allowed"),
    # Card, licence, privacy.
    ("README.md", Path.unlink, "lacks README.md"),
    ("README.md", text("license: apache-2.0\n", ""), "names no licence"),
    ("README.md", text("base_model: acme/teacher", "base_model: acme/else"), "base_model of README.md is 'acme/else'"),
    ("README.md", text("language:\n", "language: [\n"), "metadata of README.md cannot be read"),
    ("README.md", text("# teacher", f"{Path.home()}/student\n# teacher"), "a path of this machine"),
    ("README.md", text("# teacher", "/home/somebody/student\n# teacher"), "names /home/somebody"),
    ("README.md", text("# teacher", "hf_" + "a1B2" * 9 + "\n# teacher"), "holds an access token"),
    ("tokenizer.json", text('"tower"', '"hf_' + "a1B2" * 9 + '"'), "holds an access token"),
    ("rad/eval.json", text("hf-rad eval", f"{os.getcwd()}/x/hf-rad eval"), "a path of this machine"),
    ("NOTICE", text("acme/teacher", "a teacher"), "NOTICE does not name acme/teacher"),
    ("NOTICE", text("apache-2.0", "a licence"), "NOTICE does not name apache-2.0"),
]


def test_whatever_is_wrong_is_one_clear_error(staged, tmp_path):
    """Each change alone is found; none leaves anything behind, and nothing is loaded or run meanwhile."""
    for number, (name, change, message) in enumerate(BROKEN):
        folder = tmp_path / "broken"
        shutil.copytree(staged, folder)
        before = (folder / name).read_bytes() if (folder / name).is_file() else None
        change(folder / name)
        after = (folder / name).read_bytes() if (folder / name).is_file() else None
        assert before != after, f"case {number} changes nothing"
        here = listing(tmp_path)
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            publish(folder, check=False)
        assert "\n" not in str(caught.value) and listing(tmp_path) == here
        shutil.rmtree(folder)


def test_the_token_in_use_is_found(staged, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "not-of-the-usual-form")
    (staged / "rad" / "eval.json").write_text(json.dumps({"note": "not-of-the-usual-form"}))
    with pytest.raises(ValueError, match="holds an access token") as caught:
        verify(staged)
    assert "not-of-the-usual-form" not in str(caught.value)


def test_a_tied_student_is_complete_with_one_copy(tmp_path, tiny_llama, tiny_tokenizer, head_map):
    student = make_student(tiny_llama, head_map, tie_word_embeddings=True)
    out = stage(student, tmp_path / "tied", tokenizer=tiny_tokenizer, head_map=head_map, license="mit")
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    verify(out)


def test_fresh_process_without_our_packages(staged):
    """Publishing to a folder loads it as a stranger does, with the code that came with it, to the same logits."""
    publication = publish(staged, prompt="the key stone is", max_new_tokens=5)
    assert publication.reload.max_difference < 1e-4
    assert publication.reload.module.startswith("transformers_modules.published")
    assert len(publication.reload.text.split()) == 5
    assert f'repo, revision = "{staged}", None' in publication.snippet
    assert {change.path for change in publication.changes} == listing(staged)


def test_fresh_process_must_be_without_our_packages(staged, monkeypatch):
    """A package that can be imported there after all is an error: the check would prove nothing."""
    monkeypatch.setattr(trainers.hub.reload, "BLOCKED", ["json"])
    with pytest.raises(ValueError, match="json can be imported in a process that must do without it"):
        reload_check(staged)


def test_options_of_a_repository_need_one(staged):
    with pytest.raises(ValueError, match="name it with repo_id"):
        publish(staged, tag="v1")
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        publish(staged / "nowhere")


def test_card_of_the_staged_folder(staged):
    card = ModelCard.load(staged / "README.md")
    assert card.data.base_model == "acme/teacher" and card.data.model_name == "teacher-RAD3"
    assert read_json(staged / "rad" / "eval.json")["command"].startswith("hf-rad eval runs/student")
    assert make_report()["command"].startswith("/opt/venv")
