"""Comparing head maps: overlap, rank correlation, and what each keeps alone."""

import pytest

from trainers.heads.head_compare import compare, overlap, spearman
from trainers.heads.head_map import HeadMap, TeacherShape, shipped_head_map


SHAPE = TeacherShape("org/teacher", None, 2, 4, 2, 8)


def test_overlap_and_spearman():
    order = [(0, 0), (1, 2), (0, 3), (1, 1)]
    assert overlap(order, order[::-1], 1) == 0 and overlap(order, order[::-1], 4) == 1
    assert overlap(order, [(1, 2), (0, 0), (1, 0)], 2) == 1
    assert spearman(order, order) == 1 and spearman(order, order[::-1]) == -1
    # Ranks 0, 1, 2 against 1, 0, 2 among the three heads that both rank.
    assert spearman(order, [(1, 2), (1, 0), (0, 0), (0, 3)]) == pytest.approx(0.5)
    assert spearman(order, [(0, 0)]) is None
    with pytest.raises(ValueError, match="no 5 best"):
        overlap(order, order, 5)


def test_maps_are_compared_by_kept_heads_and_ranking():
    one = HeadMap(SHAPE, [[0, 3], [2]], ranking=[(0, 0), (1, 2), (0, 3), (1, 1)])
    two = HeadMap(SHAPE, [[0, 2], [2]], ranking=[(1, 2), (0, 0), (0, 2)])
    found = compare(one, two)
    assert found["both"] == [[0, 0], [1, 2]]
    assert found["only_first"] == [[0, 3]] and found["only_second"] == [[0, 2]]
    assert found["kv_groups_both"] == 3  # groups are shared though heads 2 and 3 differ
    assert found["overlap"] == {"1": 0.0, "2": 1.0}
    assert found["spearman"] == -1 and found["ranked_by_both"] == 2
    assert compare(one, HeadMap(SHAPE, [[], []]))["overlap"] == {}


def test_other_layouts_are_refused():
    with pytest.raises(ValueError, match="cannot be compared.*28 layers"):
        compare(HeadMap(SHAPE, [[], []]), shipped_head_map("Qwen/Qwen2.5-1.5B-Instruct"))
