"""Head maps travel through a data set repository unchanged, and nothing else comes out of one."""

import dataclasses
import json

import pyarrow.parquet
import pytest
from huggingface_hub import DatasetCard, HfApi, hf_hub_download
from student import make_head_map, stage_student

from trainers.heads.head_map import HeadMap, TeacherShape, shipped_head_maps
from trainers.hub.head_map_repo import find_head_map, head_rows, pull_head_map, push_head_maps
from trainers.hub.publish import publish


TEACHER = TeacherShape("acme/teacher", None, 3, 4, 2, 16)
LLAMA = "meta-llama/Llama-3.2-1B-Instruct"


@pytest.fixture
def repo_id(request, hub):
    name = f"alice/{request.node.name.split('[')[0].removeprefix('test_').replace('_', '-')}"
    yield name
    hub.repos.pop(("datasets", name), None)
    hub.repos.pop(("models", name), None)


def table(repo_id):
    return pyarrow.parquet.read_table(hf_hub_download(repo_id, "data/heads.parquet", repo_type="dataset")).to_pylist()


def test_maps_travel_unchanged(hub, repo_id):
    head_map, scores = make_head_map(TEACHER)
    first = push_head_maps([head_map], repo_id, scores=[scores])
    assert first.url == f"{hub.url}/datasets/{repo_id}" and len(hub.repo(repo_id, "datasets").commits) == 2
    assert pull_head_map(repo_id) == head_map
    # The published maps join it; what was there stays, in the files and in the table.
    push_head_maps(shipped_head_maps(), repo_id)
    assert pull_head_map(repo_id, "acme/teacher") == head_map
    for name in shipped_head_maps():
        assert pull_head_map(repo_id, name) == HeadMap.load(name)
    assert pull_head_map(repo_id, revision=first.commit) == head_map
    with pytest.raises(
        ValueError, match=f"has {len(shipped_head_maps()) + 1} head maps; name the teacher: .*acme/teacher"
    ):
        pull_head_map(repo_id)
    with pytest.raises(FileNotFoundError, match="no head map of acme/other; it has .*acme/teacher"):
        pull_head_map(repo_id, "acme/other")
    card = DatasetCard.load(repo_id)
    assert card.data.configs[0]["data_files"] == "data/heads.parquet"
    assert LLAMA in card.text and "10 of 512" in card.text


def test_table_has_every_head(repo_id):
    head_map, scores = make_head_map(TEACHER)
    push_head_maps([head_map, LLAMA], repo_id, scores=[scores])
    rows = table(repo_id)
    assert len(rows) == 12 + 512
    assert rows[:12] == head_rows(head_map, scores)
    best = next(row for row in rows if row["rank"] == 1 and row["teacher"] == "acme/teacher")
    assert (best["layer"], best["head"], best["kept"], best["accuracy_drop"]) == (1, 1, True, 0.8)
    others = [row for row in rows if row["teacher"] == LLAMA]
    assert sum(row["kept"] for row in others) == 10 and sum(row["rank"] is not None for row in others) == 40
    assert all(row["accuracy_drop"] is None for row in others)


def test_a_new_map_replaces_the_old_one(hub, repo_id):
    head_map, scores = make_head_map(TEACHER)
    push_head_maps([head_map], repo_id, scores=[scores])
    other = HeadMap.from_pairs(TEACHER, [(0, 0)], source="Drawn at random.", selection={"method": "random"})
    upload = push_head_maps([other], repo_id)
    kinds = {change.path: change.kind for change in upload.changes}
    assert kinds["head_maps/acme--teacher.json"] == "changed" and kinds["scores/acme--teacher.json"] == "deleted"
    assert pull_head_map(repo_id) == other and len(table(repo_id)) == 12
    again = push_head_maps([other], repo_id)
    assert again.commit == upload.commit and {change.kind for change in again.changes} == {"same"}


def test_dry_run_branch_and_pull_request(hub, repo_id):
    head_map, _ = make_head_map(TEACHER)
    upload = push_head_maps([head_map], repo_id, dry_run=True)
    assert upload.commit is None and ("datasets", repo_id) not in hub.repos
    push_head_maps([head_map], repo_id, private=True)
    assert hub.repo(repo_id, "datasets").private
    push_head_maps([LLAMA], repo_id, revision="more")
    assert pull_head_map(repo_id, LLAMA, revision="more") == HeadMap.load(LLAMA)
    assert pull_head_map(repo_id, revision="main") == head_map
    pull = push_head_maps([LLAMA], repo_id, create_pr=True)
    assert pull.pull_request.endswith("/discussions/1")
    assert pull_head_map(repo_id, LLAMA, revision="refs/pr/1") == HeadMap.load(LLAMA)
    with pytest.raises(OSError, match="this account may not see it"):
        pull_head_map(repo_id, token=hub.token("bob"))


def test_found_wherever_it_is(hub, repo_id, tmp_path, tiny_llama, tiny_tokenizer):
    head_map, _ = make_head_map(TeacherShape.from_config(tiny_llama.config, "acme/teacher"))
    head_map.save(tmp_path / "head_map.json")
    assert find_head_map(tmp_path) == head_map and find_head_map(LLAMA) == HeadMap.load(LLAMA)
    staged = stage_student(tmp_path / "published", tiny_llama, tiny_tokenizer)
    student = publish(staged, repo_id, check=False)
    assert find_head_map(repo_id, revision=student.tag) == head_map
    push_head_maps([head_map, LLAMA], f"{repo_id}-maps")
    assert find_head_map(f"{repo_id}-maps", teacher="acme/teacher") == head_map
    with pytest.raises(OSError, match="alice/nowhere"):
        find_head_map("alice/nowhere")


@pytest.mark.parametrize(
    ("maps", "scores", "message"),
    [
        (
            [dataclasses.replace(make_head_map(TEACHER)[0], teacher=dataclasses.replace(TEACHER, id="x"))],
            [],
            "no Hub id",
        ),
        (
            [dataclasses.replace(make_head_map(TEACHER)[0], scores_sha256=None)],
            [make_head_map(TEACHER)[1]],
            "not those",
        ),
        ([LLAMA], [make_head_map(TEACHER)[1]], "not those"),
        (["nowhere.json"], [], "no head map at"),
    ],
)
def test_maps_that_nobody_could_use_are_not_pushed(hub, repo_id, maps, scores, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        push_head_maps(maps, repo_id, scores=scores)
    assert ("datasets", repo_id) not in hub.repos


GOOD = json.dumps(make_head_map(TEACHER)[0].to_dict())


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("head_maps/acme--teacher.json", "{", "is not a JSON file"),
        ("head_maps/acme--teacher.json", "[]", "not a head map"),
        ("head_maps/acme--teacher.json", " " * (5 * 2**20) + GOOD, "more than the 4194304 allowed"),
        ("head_maps/acme--teacher.json", GOOD.replace("acme/teacher", "acme/other"), "is the head map of acme/other"),
        ("head_maps/acme--teacher.json", GOOD.replace('"kept_heads": [[]', '"kept_heads": [[7]'), "from 0 to 3"),
        (
            "head_maps/acme--teacher.json",
            GOOD.replace('"schema_version": 1', '"schema_version": 2'),
            "schema version 2",
        ),
        ("head_maps/deep/acme--teacher.json", GOOD, "it has none"),
        ("head_maps/acme--teacher.pkl", GOOD, "it has none"),
        ("acme--teacher.json", GOOD, "it has none"),
    ],
)
def test_what_is_no_head_map_is_refused(hub, repo_id, tmp_path, path, content, message):
    HfApi().create_repo(repo_id, repo_type="dataset")
    HfApi().upload_file(path_or_fileobj=content.encode(), path_in_repo=path, repo_id=repo_id, repo_type="dataset")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pull_head_map(repo_id, "acme/teacher")
