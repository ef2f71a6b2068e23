"""Selections: the budget is met, the order is that of the scores, and what a map says of itself is true."""

import pytest

from trainers.head_map import HeadMap, TeacherShape
from trainers.head_scoring import HeadScores
from trainers.selection import every_nth_layer, no_heads, random_heads, top_k


SHAPE = TeacherShape("org/teacher", None, 2, 4, 2, 8)


@pytest.fixture
def scores():
    return HeadScores(
        teacher=SHAPE,
        probe={"name": "kv", "format": "json", "pairs": 20, "shots": 2, "queries": 1, "values": "numbers"},
        num_examples=50,
        seed=7,
        base_accuracy=0.98,
        base_logprob=-0.1,
        accuracy_drop=[[0.0, 0.1, 0.0, 0.0], [0.5, 0.1, 0.0, -0.02]],
        logprob_drop=[[-0.1, 0.3, 0.02, 0.0], [2.0, 0.4, 0.01, 0.5]],
        dtype="float32",
        date="2026-01-01",
        versions={},
    )


def test_top_k_goes_by_accuracy_then_log_probability(scores, tmp_path):
    head_map = top_k(scores, heads=3)
    assert head_map.ranking == [(1, 0), (1, 1), (0, 1), (0, 2), (1, 2), (0, 3), (0, 0), (1, 3)]
    assert head_map.kept_heads == [[1], [0, 1]]
    assert head_map.selection == {"method": "top-k", "heads": 3}
    assert head_map.probe == scores.probe
    scores.save(tmp_path / "scores.json")
    assert head_map.scores_sha256 == HeadScores.load(tmp_path / "scores.json").sha256
    assert "50 examples of kv-json-20x2-numbers, seed 7" in head_map.source and "98%" in head_map.source
    head_map.save(tmp_path / "map.json")
    assert HeadMap.load(tmp_path / "map.json") == head_map


@pytest.mark.parametrize(("fraction", "count"), [(0.01, 1), (0.3, 2), (0.3125, 3), (1.0, 8)])
def test_a_fraction_is_rounded_to_the_nearest_head(scores, fraction, count):
    head_map = top_k(scores, fraction=fraction)
    assert head_map.num_kept == count
    assert head_map.selection == {"method": "top-k", "heads": count, "fraction": fraction}


def test_group_mates_that_help_are_free(scores):
    plain, filled = top_k(scores, heads=2), top_k(scores, heads=2, fill_groups=True)
    assert plain.kept_heads == [[], [0, 1]]
    assert filled.kept_heads == [[], [0, 1]]
    plain, filled = top_k(scores, heads=4), top_k(scores, heads=4, fill_groups=True)
    assert plain.kept_heads == [[1, 2], [0, 1]]
    # Head 0 of layer 0 shares the KV head of head 1, but the teacher does better without it.
    assert filled.kept_heads == [[1, 2], [0, 1]]
    one, filled = top_k(scores, heads=1), top_k(scores, heads=1, fill_groups=True)
    assert filled.kept_heads == [[], [0, 1]]
    assert filled.kv_groups == one.kv_groups
    assert filled.selection == {"method": "top-k", "heads": 1, "fill_groups": True}


@pytest.mark.parametrize(
    "budget",
    [{}, {"heads": 2, "fraction": 0.5}, {"heads": 0}, {"heads": 9}, {"heads": -1}, {"fraction": 0}, {"fraction": 1.5}],
)
def test_budgets_that_cannot_work_are_refused(scores, budget):
    with pytest.raises(ValueError, match="exactly one|cannot be kept|fraction must"):
        top_k(scores, **budget)
    with pytest.raises(ValueError, match="exactly one|cannot be kept|fraction must"):
        random_heads(SHAPE, **budget)


def test_scores_of_another_teacher_are_refused(scores):
    renamed = TeacherShape("me/renamed", "abc", 2, 4, 2, 8)
    assert top_k(scores, renamed, heads=1).teacher == renamed
    with pytest.raises(ValueError, match="2 layers.*3 layers"):
        top_k(scores, TeacherShape("me/other", None, 3, 4, 2, 8), heads=1)


def test_random_heads_are_seeded_and_spread(scores):
    big = TeacherShape("org/big", None, 30, 9, 3, 64)
    assert random_heads(big, heads=8, seed=1) == random_heads(big, heads=8, seed=1)
    draws = [random_heads(big, fraction=0.03, seed=seed) for seed in range(200)]
    assert {draw.num_kept for draw in draws} == {8}
    assert len({pair for draw in draws for pair in draw.pairs}) > 260
    assert draws[3].selection == {"method": "random", "heads": 8, "fraction": 0.03, "seed": 3}


def test_controls():
    assert no_heads(SHAPE).kept_heads == [[], []]
    big = TeacherShape("org/big", None, 7, 2, 1, 8)
    assert every_nth_layer(big, 3).kept_heads == [[], [], [0, 1], [], [], [0, 1], []]
    assert every_nth_layer(big, 1).num_kept == 14
    for n in (0, 8):
        with pytest.raises(ValueError, match="1 to the 7 layers"):
            every_nth_layer(big, n)
