"""A tiny student with everything that publishing needs, for the tests of publishing and of the Hub."""

from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from modeling_rad_hybrid import RadHybridConfig, RadHybridForCausalLM
from trainers.heads.head_map import HeadMap, TeacherShape
from trainers.heads.head_scores import HeadScores
from trainers.hub.staging import stage


PROBE = {"name": "kv", "format": "json", "pairs": 6, "shots": 1}
DROPS = [[0.0, 0.1, 0.0, 0.05], [0.1, 0.8, 0.0, 0.0], [0.5, 0.0, 0.0, 0.4]]
SCORED = {
    "teacher": {"score": 0.98, "metric": "exact match", "examples": 100, "trained_on": True},
    "control": {"score": 0.04, "metric": "exact match", "examples": 100, "trained_on": True},
    "student": {"score": 0.96, "metric": "exact match", "examples": 100, "trained_on": True},
}
HELD_OUT = {
    "teacher": {"score": 0.5, "metric": "exact match", "examples": 100, "trained_on": False},
    "control": {"score": 0.0, "metric": "exact match", "examples": 100, "trained_on": False},
    "student": {"score": 0.3, "metric": "exact match", "examples": 100, "trained_on": False},
}


def make_report(teacher: str = "acme/teacher") -> dict:
    """What an evaluation of the tiny student could have said; the numbers are made up."""

    def measured(who: str, **more) -> dict:
        results = {"kv-json-20": SCORED[who], "phone-book-20": HELD_OUT[who]}
        return {"results": results, "cache_bytes": {"2048": 1, "8192": 2}, **more}

    return {
        "schema_version": 1,
        "command": "/opt/venv/bin/hf-rad eval runs/student --teacher acme/teacher --text /data/corpus.jsonl",
        "date": "2026-01-02",
        "hardware": "Test processor, 2 cores",
        "versions": {"hf-rad": "0.1.0", "torch": "2.9.0", "transformers": "5.20.0", "trl": "1.16.0"},
        "seed": 0,
        "teacher": {"name": teacher, **measured("teacher", text_loss=3.0)},
        "student": measured("student", text_loss=3.5, kept_heads=3, tokens_trained=123_456),
        "controls": {"0 heads": measured("control", text_loss=4.5, kept_heads=0, tokens_trained=123_456)},
        "coverage": {
            "value": 0.79,
            "tasks": ["kv-json-20", "phone-book-20"],
            "left_out": ["kv-words-20"],
            "floor": 0.2,
            "held_out": 0.6,
        },
    }


def make_head_map(teacher: TeacherShape) -> tuple[HeadMap, HeadScores]:
    """A map that keeps three heads, and the scores it comes from."""
    scores = HeadScores(
        teacher=teacher,
        probe=PROBE,
        num_examples=20,
        seed=0,
        base_accuracy=1.0,
        base_logprob=-0.1,
        accuracy_drop=DROPS,
        logprob_drop=DROPS,
        dtype="float32",
        date="2026-01-01",
        versions={},
    )
    head_map = HeadMap.from_pairs(
        teacher,
        scores.ranking()[:3],
        selection={"method": "top-k", "heads": 3},
        ranking=scores.ranking(),
        probe=PROBE,
        scores_sha256=scores.sha256,
        source="Scored on 20 questions.",
    )
    return head_map, scores


def make_student(llama: LlamaForCausalLM, head_map: HeadMap, seed: int = 0, **changes) -> RadHybridForCausalLM:
    """An untrained student of a tiny teacher."""
    backbone = {
        key: value for key, value in llama.config.to_dict().items() if key not in ("model_type", "architectures")
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = RadHybridConfig(**{**backbone, "kept_heads": head_map.kept_heads, **changes})
        return RadHybridForCausalLM(config).eval()


def stage_student(
    folder: Path, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, seed: int = 0, **options
) -> Path:
    """Stages a tiny student, with scores and report, in `folder`."""
    head_map, scores = make_head_map(TeacherShape.from_config(llama.config, "acme/teacher"))
    student = make_student(llama, head_map, seed)
    options = {"report": make_report(), "license": "apache-2.0", **options}
    return stage(student, folder, tokenizer=tokenizer, head_map=head_map, scores=scores, **options)
