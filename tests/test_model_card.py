"""
The card says what the report says, and says so where the report says nothing.

`python tests/test_model_card.py` writes the golden file anew, to be looked at before it is committed.
"""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from student import make_head_map, make_report

from modeling_rad_hybrid import RadHybridConfig
from trainers.heads.head_map import HeadMap, TeacherShape
from trainers.hub.model_card import load_snippet, pin_snippet, render_card, without_paths


GOLDEN = Path(__file__).parent / "golden" / "model_card.md"
TEACHER = TeacherShape("acme/teacher", "0123abcd", 3, 4, 2, 16)


def make_config(head_map):
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    return RadHybridConfig(**sizes, head_dim=16, kept_heads=head_map.kept_heads)


def make_card(report=None, head_map=None, **options) -> str:
    head_map = head_map or make_head_map(TEACHER)[0]
    options = {"license": "apache-2.0", "model_name": "Tiny-RAD3", **options}
    return str(render_card(head_map, make_config(head_map), report, **options))


def golden_card() -> str:
    provenance = {"id": "acme/teacher", "quantization": "Q4_1 (dequantised)", "source": "teacher.gguf"}
    where = {"repo": "alice/tiny-rad3", "revision": "v1"}
    return make_card(make_report(), provenance=provenance, datasets=("acme/text",), **where) + "\n"


def test_card_is_the_golden_one():
    assert golden_card() == GOLDEN.read_text(encoding="utf-8")


def test_metadata():
    data = ModelCard(make_card(make_report(), datasets=("acme/text",), language=("en", "de"))).data
    assert (data.base_model, data.license, data.library_name) == ("acme/teacher", "apache-2.0", "transformers")
    assert (data.pipeline_tag, data.datasets, data.language) == ("text-generation", ["acme/text"], ["en", "de"])
    assert data.base_model_relation == "finetune" and "arxiv:2602.11374" in data.tags


def test_without_a_report_the_card_states_no_result():
    card = make_card()
    assert "Not measured: no evaluation came with this model" in card
    assert "published without an evaluation" in card
    assert "exact match" not in card and "Coverage" not in card and "perplexity" not in card


def missing(report, *path):
    inner = report
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return report


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (("coverage",), "divided by the teacher's): not measured."),
        (("student", "text_loss"), "| 3.00 | 4.50 | not measured |"),
        (("teacher", "results", "kv-json-20"), "| trained on | 100 | not measured | 0.04 | 0.96 |"),
        (("student", "results"), "| held out | 100 | 0.50 | 0.00 | not measured |"),
        (("student", "tokens_trained"), "tokens trained on: not recorded"),
        (("student", "kept_heads"), "| 0 heads | this model |"),
        (("controls",), "| teacher | this model, 3 heads |"),
        (("seed",), "seed: not recorded"),
        (("date",), "date: not recorded"),
        (("hardware",), "hardware: not recorded"),
        (("versions",), "software: not recorded"),
        (("command",), "command: not recorded"),
    ],
)
def test_a_missing_number_is_said_to_be_missing(path, said):
    whole, card = make_card(make_report()), make_card(missing(make_report(), *path))
    assert said in card and said not in whole


def test_limits_follow_from_the_numbers():
    report = make_report()
    report["student"]["results"]["phone-book-20"]["score"] = 0.5
    report["student"]["text_loss"] = 3.0
    card = make_card(report)
    assert "less than 80 %" not in card and "perplexity" not in card
    del report["student"]["results"]["phone-book-20"]
    assert "No task above was held out" in make_card(report)


def test_controls_are_called_controls():
    none = HeadMap.from_pairs(TEACHER, [], selection={"method": "none"})
    assert "No head was kept: this model is a control" in make_card(make_report(), none)
    random = HeadMap.from_pairs(TEACHER, [(1, 2)], selection={"method": "random", "seed": 0})
    assert "drawn at random" in make_card(make_report(), random)


def test_snippet_is_pinned_where_the_card_goes():
    card = pin_snippet(make_card(), "alice/student", "v7")
    assert load_snippet("alice/student", "v7") in card and len(load_snippet("a", "b").splitlines()) == 5
    assert load_snippet("bob/student", None) in pin_snippet(card, "bob/student", None)
    with pytest.raises(ValueError, match="no line `repo, revision"):
        pin_snippet("# A card of somebody else's", "alice/student", "v1")


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("/home/me/.venv/bin/hf-rad eval student --out=/data/x/eval.json", "hf-rad eval student --out=eval.json"),
        ("hf-rad eval '/data/my/corpus.jsonl' ~/runs/s runs/demo", "hf-rad eval 'corpus.jsonl' s runs/demo"),
        ("hf-rad eval acme/student --revision refs/pr/1", "hf-rad eval acme/student --revision refs/pr/1"),
        ("see https://huggingface.co/acme/x", "see https://huggingface.co/acme/x"),
    ],
)
def test_paths_are_reduced_to_their_last_name(text, clean):
    assert without_paths(text) == clean


if __name__ == "__main__":
    GOLDEN.write_text(golden_card(), encoding="utf-8")
