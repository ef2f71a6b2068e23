"""The verbs that talk to the Hub, as words of a command line; the conventions of `hf`; the completion of a shell."""

import json
import subprocess

import pytest
from student import make_head_map

from trainers.cli import main, make_parser, without_token
from trainers.completion import SHELLS, completion_script
from trainers.files import read_json
from trainers.heads.head_map import HeadMap, TeacherShape, shipped_head_maps
from trainers.hub.head_map_repo import pull_head_map


SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def repo_id(request, hub, monkeypatch):
    # `--token` sets it for the process; what it was comes back after the test.
    monkeypatch.setenv("HF_TOKEN", hub.token("alice"))
    name = f"alice/{request.node.name.removeprefix('test_').replace('_', '-')}"
    yield name
    hub.repos.pop(("datasets", name), None)


@pytest.fixture
def answer(capsys):
    """Runs a command line in JSON and returns what it printed."""

    def run(*words):
        code = main([*map(str, words), "--format", "json"])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return json.loads(printed.out)

    return run


def test_shipped_maps_go_to_the_hub_and_come_back(hub, repo_id, answer, tmp_path):
    """What a head map repository is for: by id and revision, from push to conversion."""
    assert answer("heads", "push", "--repo-id", repo_id, "--dry-run") == {"url": f"{hub.url}/datasets/{repo_id}"}
    assert ("datasets", repo_id) not in hub.repos
    pushed = answer("heads", "push", "--repo-id", repo_id)
    files = set(hub.repo(repo_id, "datasets").branches["main"].files)
    names = [f"{name.replace('/', '--')}.json" for name in shipped_head_maps()]
    assert {f"head_maps/{name}" for name in names} | {f"scores/{SMOLLM2.replace('/', '--')}.json"} <= files
    out = tmp_path / "map.json"
    pulled = answer("heads", "pull", repo_id, "--teacher", SMOLLM2, "--revision", pushed["commit"], "--out", out)
    assert pulled["teacher"] == SMOLLM2 and HeadMap.load(out) == HeadMap.load(SMOLLM2)
    shown = answer("heads", "show", repo_id, "--teacher", SMOLLM2)
    assert [row["kept query heads"] for row in shown["rows"]] == [
        heads for heads in HeadMap.load(out).kept_heads if heads
    ]


def test_conversion_takes_a_map_by_id_and_revision(hub, repo_id, answer, tmp_path, tiny_llama, tiny_tokenizer, capsys):
    teacher = tmp_path / "teacher"
    tiny_llama.save_pretrained(teacher)
    tiny_tokenizer.save_pretrained(teacher)
    (teacher / "rad_teacher.json").write_text(json.dumps({"id": "acme/teacher", "license": "mit"}))
    head_map, scores = make_head_map(TeacherShape.from_config(tiny_llama.config, "acme/teacher"))
    head_map.save(tmp_path / "first.json")
    scores.save(tmp_path / "scores.json")
    first = answer(
        *("heads", "push", tmp_path / "first.json", "--scores", tmp_path / "scores.json", "--repo-id", repo_id)
    )
    HeadMap.from_pairs(head_map.teacher, [(0, 0)]).save(tmp_path / "second.json")
    answer("heads", "push", tmp_path / "second.json", "--repo-id", repo_id, "--create-pr", "--token", hub.token("bob"))
    assert pull_head_map(repo_id, revision="refs/pr/1").num_kept == 1
    common = ("convert", teacher, "--tokens", 0, "--out", tmp_path / "student", "--head-map", repo_id)
    answer(*common, "--head-map-revision", first["commit"])
    assert read_json(tmp_path / "student" / "config.json")["kept_heads"] == head_map.kept_heads
    answer(*common, "--head-map-revision", "refs/pr/1")
    assert read_json(tmp_path / "student" / "config.json")["kept_heads"] == [[0], [], []]
    assert HeadMap.load(tmp_path / "student").teacher.id == "acme/teacher"
    assert main(["convert", str(teacher), "--out", str(tmp_path / "none")]) == 1
    assert "There is no head map: name a file" in capsys.readouterr().err


def test_what_goes_wrong_is_one_line_and_leaves_nothing(hub, repo_id, tmp_path, capsys):
    out = tmp_path / "map.json"
    main(["heads", "push", "--repo-id", repo_id, "--private", "-q"])
    capsys.readouterr()
    for words, said in (
        (("heads", "pull", repo_id, "--out", str(out)), "name the teacher"),
        (("heads", "pull", repo_id, "--teacher", "acme/none", "--out", str(out)), "no head map of acme/none"),
        (("heads", "pull", repo_id, "--revision", "v9", "--out", str(out)), "no such repository or revision"),
        (("heads", "pull", repo_id, "--out", str(out), "--token", "hf_bob"), "may not see it"),
        (("heads", "pull", repo_id, "--out", str(out), "--token=hf_nobody"), "hf auth login"),
        (("heads", "push", "--repo-id", "acme/x", "--token", "hf_bob"), "may not write there"),
    ):
        assert main(list(words)) == 1
        printed = capsys.readouterr()
        assert printed.err.startswith("Error: ") and printed.err.count("\n") == 1 and said in printed.err
        assert "hf_" not in printed.err and not printed.out and not any(tmp_path.iterdir())


def test_every_verb_keeps_the_conventions():
    """--format, -q and --token everywhere; --revision wherever a verb reads or writes a repository."""
    script = completion_script(make_parser(), "bash")
    verbs = [line for line in script.splitlines() if line.startswith('    "')]
    assert len(verbs) >= 13
    for line in verbs:
        if not line.startswith(('    " heads "', '    " completion "')):
            assert "--format) words='human json'" in line and " --quiet" in line and " --token" in line
        if any(line.startswith(f'    " {verb} "') for verb in ("score", "convert", "publish", "heads pull")):
            assert " --revision" in line


def test_a_recorded_command_line_has_no_token():
    words = ["publish", "s", "--token", "hf_secret", "--tag", "v1", "--token=hf_secret", "--tokens", "7"]
    assert without_token(words) == ["publish", "s", "--tag", "v1", "--tokens", "7"]
    with pytest.raises(SystemExit):
        main(["score", "x", "--out", "y", "--tok", "hf_secret"])


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["sc"], "score"),
        (["heads", ""], "show compare curves kinds layers locate push pull"),
        (["heads", "pu"], "push pull"),
        (["heads", "push", "--sc"], "--scores"),
        (["convert", "smollm2", "--mixing", ""], "replace parallel"),
        (["score", "--format", "j"], "json"),
        (["completion", ""], "bash zsh"),
        (["convert", "--out", ""], ""),
    ],
)
def test_bash_completes(typed, offered, tmp_path):
    (tmp_path / "hf-rad.sh").write_text(completion_script(make_parser(), "bash"))
    words = " ".join(f"'{word}'" for word in ["hf-rad", *typed])
    code = f"source hf-rad.sh; COMP_WORDS=({words}); COMP_CWORD={len(typed)}; _hf_rad; "
    process = subprocess.run(
        ["bash", "-c", code + 'echo "${COMPREPLY[*]}"'], cwd=tmp_path, capture_output=True, text=True
    )
    assert not process.stderr and process.stdout.strip() == offered


def test_completion_is_printed(capsys):
    for shell in SHELLS:
        assert main(["completion", shell]) == 0
        printed = capsys.readouterr().out
        assert printed.rstrip() == completion_script(make_parser(), shell)
        assert ("bashcompinit" in printed) == (shell == "zsh")
