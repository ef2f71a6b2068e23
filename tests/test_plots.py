"""Figures: PNG files of the table they were given, with the kept heads outlined in the right cells."""

import matplotlib.image
import numpy as np
import pytest

from trainers.plots import ACCENT, accuracy_bars, accuracy_curves, attention_pattern, score_heat_map


def pixels(path, colour: str) -> np.ndarray:
    """(row, column) of every pixel of `path` in exactly `colour`, as parts of height and width."""
    image = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return np.argwhere((image == wanted).all(-1)) / image.shape[:2]


@pytest.mark.parametrize("shape", [(3, 4), (30, 9), (16, 32), (1, 1)])
def test_heat_map_of_any_shape(tmp_path, shape):
    layers, heads = shape
    matrix = [[(layer + head) / (layers + heads) - 0.1 for head in range(heads)] for layer in range(layers)]
    path = tmp_path / "scores.png"
    score_heat_map(matrix, None, path, "A title")
    plain = path.read_bytes()
    assert plain.startswith(b"\x89PNG")
    assert not len(pixels(path, ACCENT))
    score_heat_map(matrix, [[heads - 1]] + [[] for _ in matrix[1:]], path, "A title")
    assert path.read_bytes() != plain and len(pixels(path, ACCENT))
    assert [item.name for item in tmp_path.iterdir()] == ["scores.png"]


@pytest.mark.parametrize(("layer", "head"), [(0, 0), (9, 0), (0, 4), (9, 4)])
def test_kept_heads_are_outlined_where_they_are(tmp_path, layer, head):
    path = tmp_path / "scores.png"
    score_heat_map([[0.0] * 5] * 10, [[head] if i == layer else [] for i in range(10)], path, "")
    # The highest accent pixels belong to the line of text above the grid; what is left is the outline.
    found = pixels(path, ACCENT)
    found = found[found[:, 0] > found[:, 0].min() + 0.1]
    row, column = found.mean(0)
    assert (row > 0.5) == (head == 0)
    assert (column > 0.5) == (layer == 9)


def test_tables_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="rows"):
        score_heat_map([[0.1], [0.1, 0.2]], None, tmp_path / "a.png", "")
    with pytest.raises(ValueError, match="2 layers x 1 heads"):
        score_heat_map([[0.1], [0.1]], [[0], [1]], tmp_path / "a.png", "")
    with pytest.raises(ValueError, match="no task"):
        accuracy_bars({"teacher": {}}, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_bars_are_as_high_as_their_numbers(tmp_path):
    path = tmp_path / "bars.png"
    heights = []
    for value in (0.25, 0.5, 1.0):
        accuracy_bars({"teacher": {"a task": 1.0, "b": 0.5}, "student": {"a task": value}}, path, highlight="student")
        rows = pixels(path, ACCENT)[:, 0]
        # The lowest block of the colour is the bar; the other is the legend's.
        rows = rows[rows > 0.2]
        heights.append(rows.max() - rows.min())
    assert heights[1] / heights[0] == pytest.approx(2, rel=0.03)
    assert heights[2] / heights[0] == pytest.approx(4, rel=0.03)


def test_curves_and_patterns_are_drawn(tmp_path):
    path = tmp_path / "curves.png"
    accuracy_curves({"kept": ([0, 1, 8], [0.0, 0.5, 1.0]), "removed": ([0, 8], [1.0, 0.0])}, path, "t", "heads")
    rows = pixels(path, ACCENT)
    assert rows[:, 0].max() - rows[:, 0].min() > 0.5  # the first curve climbs the whole figure
    with pytest.raises(ValueError, match="no curve"):
        accuracy_curves({}, path, "t", "heads")
    path = tmp_path / "pattern.png"
    attention_pattern([[1.0, 0.0], [0.5, 0.5]], ["a", "\n"], path, "t", {"value": [1]})
    assert len(pixels(path, ACCENT))
    with pytest.raises(ValueError, match="square of the 3 tokens"):
        attention_pattern([[1.0, 0.0], [0.5, 0.5]], ["a", "b", "c"], path, "t", {})
