"""Selections: the budget is met, the order is that of the scores, and what a map says of itself is true."""

import pytest

from trainers.heads.head_map import HeadMap, TeacherShape
from trainers.heads.head_scores import HeadScores
from trainers.heads.selection import (
    CacheBudget,
    best_layers,
    every_nth_layer,
    no_heads,
    random_heads,
    threshold,
    top_groups,
    top_k,
    uniform_layers,
)


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


def test_layers_are_spread_evenly(scores):
    big = TeacherShape("org/big", None, 30, 9, 3, 64)
    one, two, four = (uniform_layers(big, heads=9 * number) for number in (1, 2, 4))
    assert [one.kept_heads.index(list(range(9)))] == [15]
    assert [layer for layer, kept in enumerate(two.kept_heads) if kept] == [7, 22]
    assert [layer for layer, kept in enumerate(four.kept_heads) if kept] == [3, 11, 18, 26]
    assert four.num_kept == 36 and four.selection == {"method": "uniform-layers", "heads": 36, "layers": 4}
    # What pays only part of a layer keeps none of it, but one layer is always kept.
    assert uniform_layers(big, heads=17) == uniform_layers(big, heads=9)
    assert uniform_layers(big, heads=2).num_kept == 9
    assert uniform_layers(big, fraction=1.0).num_kept == 270


def test_best_layers_keeps_the_most_important(scores):
    big = TeacherShape("org/big", None, 5, 2, 1, 8)
    head_map = best_layers(big, [0.1, 0.9, 0.0, 0.5, 0.2], "leave-one-layer-out", heads=5)
    assert head_map.kept_heads == [[], [0, 1], [], [0, 1], []]
    assert head_map.ranking[:4] == [(1, 0), (1, 1), (3, 0), (3, 1)]
    assert head_map.selection == {"method": "leave-one-layer-out", "heads": 4, "layers": 2}
    with pytest.raises(ValueError, match="3 importances"):
        best_layers(big, [1, 2, 3], "x", heads=2)


def test_a_threshold_keeps_what_reaches_it(scores):
    assert threshold(scores, accuracy_drop=0.1).kept_heads == [[1], [0, 1]]
    assert threshold(scores, logprob_drop=0.4).kept_heads == [[], [0, 1, 3]]
    with pytest.raises(ValueError, match="lower threshold"):
        threshold(scores, accuracy_drop=0.6)
    with pytest.raises(ValueError, match="exactly one"):
        threshold(scores)


def test_groups_are_ranked_as_wholes(scores):
    # Group sums of accuracy: layer 1 (heads 0, 1) 0.6, layer 0 (0, 1) 0.1, then log-probability: (1, 1) 0.51, (0, 1) 0.02.
    assert top_groups(scores, heads=2).kept_heads == [[], [0, 1]]
    assert top_groups(scores, heads=3).kept_heads == [[1], [0, 1]]
    assert top_groups(scores, heads=5).kept_heads == [[1], [0, 1, 2, 3]]
    with pytest.raises(ValueError, match="only be kept together"):
        top_groups(scores, heads=1)


def test_a_cache_budget_counts_groups_once(scores):
    def budget(pairs):
        return CacheBudget(CacheBudget(0, tokens=64, state_size=2).cost(SHAPE, pairs), tokens=64, state_size=2)

    # Heads (1, 0) and (1, 1) share a group: what holds the first holds the second too, but not (0, 1).
    head_map = top_k(scores, cache=budget([(1, 0)]))
    assert head_map.kept_heads == [[], [0, 1]]
    assert head_map.selection["cache"] == {
        "bytes": budget([(1, 0)]).bytes,
        "tokens": 64,
        "state_size": 2,
        "mixing": "replace",
    }
    # 2 x 8 x 2 bytes for each token of a group; a head less in the states.
    more = budget([(1, 0), (0, 1)]).bytes - budget([(1, 0)]).bytes
    assert more == 64 * 2 * 8 * 2 - (8 * 2 * 4 + (8 + 2 * 2) * 4 * 2)
    layer = [(0, head) for head in range(4)]
    assert uniform_layers(SHAPE, cache=budget(layer)).num_kept == 4
    assert best_layers(SHAPE, [2, 1], "x", cache=budget(layer)).kept_heads == [[0, 1, 2, 3], []]
    drawn = random_heads(SHAPE, cache=budget(layer), seed=3)
    assert budget(drawn.pairs).bytes <= budget(layer).bytes
    for select in (top_k, top_groups):
        with pytest.raises(ValueError, match="hold no head"):
            select(scores, cache=CacheBudget(10))
    with pytest.raises(ValueError, match="exactly one"):
        uniform_layers(SHAPE, heads=4, cache=budget(layer))
    with pytest.raises(ValueError, match="hold no head"):
        uniform_layers(SHAPE, cache=CacheBudget(10))
