"""Head maps: what cannot be right is refused with a reason, what is right survives the disk, the shipped ones load."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from transformers import LlamaConfig, Qwen2Config

import hub_cards
from trainers.heads.head_map import HeadMap, TeacherShape, shipped_head_map, shipped_head_maps


PUBLISHED = {
    # First three heads as the authors list them, and KV groups under the first ten.
    "meta-llama/Llama-3.2-1B-Instruct": ([(9, 25), (4, 4), (10, 26)], 9),
    "meta-llama/Llama-3.1-8B-Instruct": ([(13, 18), (15, 11), (17, 24)], 5),
    "Qwen/Qwen2.5-1.5B-Instruct": ([(13, 4), (18, 0), (16, 3)], 8),
}
SHAPE = TeacherShape("org/teacher", "abc123", 3, 6, 2, 16)


@pytest.fixture
def head_map():
    return HeadMap.from_pairs(
        SHAPE,
        [(2, 5), (0, 3), (2, 1)],
        selection={"method": "top-k", "heads": 3},
        ranking=[(2, 5), (0, 3), (2, 1), (1, 0)],
        probe={"name": "kv", "format": "json"},
        scores_sha256="0" * 64,
        source="a test",
    )


def test_saved_map_loads_equal(head_map, tmp_path):
    head_map.save(tmp_path / "rad" / "head_map.json")
    for path in (tmp_path, tmp_path / "rad", tmp_path / "rad" / "head_map.json"):
        assert HeadMap.load(path) == head_map
    content = json.loads((tmp_path / "rad" / "head_map.json").read_text())
    assert content["schema_version"] == 1
    assert content["kept_heads"] == [[3], [], [1, 5]]
    assert content["ranking"][0] == [2, 5]
    assert content["created_with"].startswith("hf-rad")


def test_groups_and_counts(head_map):
    assert head_map.num_kept == 3
    assert head_map.pairs == [(0, 3), (2, 1), (2, 5)]
    assert head_map.kv_groups == {(0, 1), (2, 0), (2, 1)}
    assert head_map.summary == ("3 of 18 heads (16.7%) in 2 of 3 layers; 3 of 6 KV groups (50.0% of the KV cache)")


def test_a_map_without_heads_is_legal(tmp_path):
    empty = HeadMap.from_pairs(SHAPE, [])
    empty.save(tmp_path / "map.json")
    assert HeadMap.load(tmp_path / "map.json").kept_heads == [[], [], []]
    assert empty.kv_groups == set()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema_version": 2}, "schema version 2"),
        ({"kept_heads": [[0], []]}, "each of the 3 layers"),
        ({"kept_heads": [[6], [], []]}, "from 0 to 5"),
        ({"kept_heads": [[-1], [], []]}, "from 0 to 5"),
        ({"kept_heads": [[True], [], []]}, "from 0 to 5"),
        ({"kept_heads": [["0"], [], []]}, "from 0 to 5"),
        ({"kept_heads": [[2, 1], [], []]}, "sorted"),
        ({"kept_heads": [[1, 1], [], []]}, "sorted"),
        ({"kept_heads": [1, 2, 3]}, "layer 0"),
        ({"ranking": [[0, 0], [0, 0]]}, "twice"),
        ({"ranking": [[3, 0]]}, "does not exist"),
        ({"ranking": [3]}, "pair"),
        ({"ranking": "best"}, "must be a list"),
        ({"source": None}, "must be a str"),
        ({"selection": 8}, "must be a dict"),
        ({"head": 1}, "unknown fields"),
        ({"teacher": {"id": "x"}}, "four sizes"),
        ({"teacher": 3}, "four sizes"),
        ({"teacher": {**SHAPE.__dict__, "num_key_value_heads": 4}}, "evenly"),
        ({"teacher": {**SHAPE.__dict__, "head_dim": 0}}, "head_dim"),
    ],
)
def test_what_cannot_be_right_is_refused(head_map, tmp_path, change, reason):
    path = tmp_path / "map.json"
    path.write_text(json.dumps({**head_map.to_dict(), **change}))
    with pytest.raises(ValueError, match=reason) as caught:
        HeadMap.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "{}", "not JSON", '{"schema_version": 1}'])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "map.json").write_text(content)
    with pytest.raises(ValueError, match="map.json"):
        HeadMap.load(tmp_path / "map.json")


def test_a_missing_map_names_what_there_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="Qwen/Qwen2.5-1.5B-Instruct"):
        HeadMap.load(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match="Qwen/Qwen2.5-1.5B-Instruct"):
        shipped_head_map("org/unknown")


def test_the_map_of_a_published_student_loads_from_the_hub(head_map, hub, tmp_path):
    head_map.save(tmp_path / "head_map.json")
    api = HfApi()
    api.create_repo("alice/head-map-student")
    api.upload_file(
        path_or_fileobj=tmp_path / "head_map.json",
        path_in_repo="rad/head_map.json",
        repo_id="alice/head-map-student",
    )
    assert HeadMap.load("alice/head-map-student") == head_map
    with pytest.raises(FileNotFoundError, match="alice/no-such-student.*Hub"):
        HeadMap.load("alice/no-such-student")


@pytest.mark.parametrize("pairs", [[(0, 0), (0, 0)], [(0, 6)], [(3, 0)], [(0,)]])
def test_pairs_outside_the_teacher_are_refused(pairs):
    with pytest.raises(ValueError):
        HeadMap.from_pairs(SHAPE, pairs)


def test_a_map_fits_its_own_teacher_only(head_map):
    config = LlamaConfig(
        num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, hidden_size=96, intermediate_size=8
    )
    assert TeacherShape.from_config(config, SHAPE.id, SHAPE.revision) == SHAPE
    head_map.check_teacher(config)
    config.num_hidden_layers = 4
    with pytest.raises(ValueError, match="org/teacher .3 layers.*other has 4 layers"):
        head_map.check_teacher(config, "other")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_maps_ship(name):
    head_map = shipped_head_map(name)
    first, groups = PUBLISHED[name]
    assert HeadMap.load(name) == head_map
    assert head_map.teacher.id == name
    assert head_map.ranking[:3] == first
    assert len(head_map.ranking) == 40
    assert set(head_map.pairs) == set(head_map.ranking[:10])
    assert len(head_map.kv_groups) == groups
    assert "2602.11374" in head_map.source and "MIT" in head_map.source


def test_every_shipped_map_is_valid_and_named_after_its_teacher():
    assert set(PUBLISHED) <= set(shipped_head_maps())
    for name in shipped_head_maps():
        head_map = shipped_head_map(name)
        assert head_map.teacher.id == name
        assert head_map.source
        assert set(head_map.pairs) == set(head_map.ranking[: head_map.num_kept])


def test_the_published_qwen_map_fits_qwen():
    config = Qwen2Config(
        hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960
    )
    shipped_head_map("Qwen/Qwen2.5-1.5B-Instruct").check_teacher(config)


def test_the_schema_says_what_the_validator_checks():
    folder = Path(hub_cards.__file__).parent
    schema = json.loads((folder / "head_map.schema.json").read_text())
    own = {"schema_version", "created_with"}
    assert set(schema["properties"]) == {item.name for item in fields(HeadMap)} | own
    teacher = schema["properties"]["teacher"]
    assert set(teacher["required"]) == set(teacher["properties"]) == {item.name for item in fields(TeacherShape)}
    content = HeadMap(TeacherShape("org/teacher", None, 2, 4, 2, 8), [[1], []], source="Made up.").to_dict()
    assert set(content) == set(schema["properties"])
    for name in content:
        without = {key: value for key, value in content.items() if key != name}
        if name in schema["required"]:
            with pytest.raises(ValueError):
                HeadMap.from_dict(without)
        else:
            HeadMap.from_dict(without)
    with pytest.raises(ValueError, match="unknown fields"):
        HeadMap.from_dict({**content, "more": 1})
