"""
Figures, one function each, written as PNG: the heat map of head scores, curves over numbers of heads, the pattern of a
head, and the bars of an evaluation.

    score_heat_map(scores.accuracy_drop, head_map.kept_heads, "scores.png", "Retrieval heads of SmolLM2-135M-Instruct")
"""

import math
import os
import textwrap

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from trainers.files import atomic_path


INK, FAINT, ACCENT = "#1d2433", "#8a93a5", "#e4572e"
SCORE_COLOURS = LinearSegmentedColormap.from_list("scores", ["#f4f6fa", "#b9cdea", "#5b8fd0", "#1f5aa6", "#0b2447"])
BAR_COLOURS = ("#1d2433", "#e4572e", "#5b8fd0", "#f2b134", "#7a9e7e", "#a26769", "#8a93a5", "#c9b28f")
DPI = 160


def score_heat_map(
    matrix: list[list[float]],
    kept_heads: list[list[int]] | None,
    path: str | os.PathLike,
    title: str,
    label: str = "drop in accuracy when ablated",
) -> None:
    """
    Draws scores as a grid, layers from left to right and heads from bottom to top, kept heads outlined.

    Args:
        matrix (`list[list[float]]`):
            Scores [L][H]. Those below zero, and `None`, get the colour of zero.
        kept_heads (`list[list[int]]`, *optional*):
            Kept heads of each layer.
        path (`str` or `os.PathLike`):
            PNG file to write.
        title (`str`):
            First line above the grid.
        label (`str`, *optional*, defaults to `"drop in accuracy when ablated"`):
            What the colours say.

    Raises:
        `ValueError`: when the rows differ in length, or the kept heads are not of such a grid.
    """
    matrix = [[value or 0.0 for value in row] for row in matrix]
    layers, heads = len(matrix), len(matrix[0])
    if any(len(row) != heads for row in matrix):
        raise ValueError("The rows of a score table must all have one score for each head.")
    kept_heads = kept_heads or [[] for _ in matrix]
    if len(kept_heads) != layers or any(head >= heads for kept in kept_heads for head in kept):
        raise ValueError(f"The kept heads do not belong to a table of {layers} layers x {heads} heads.")
    cell = min(0.34, 12 / max(layers, heads))
    figure = Figure(figsize=(max(cell * layers, 3) + 1.9, max(cell * heads, 1) + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    highest = max(max(map(max, matrix)), 1e-9)
    # A square root spreads the small scores, which are most of them, over the colours.
    image = axes.imshow(
        [list(row) for row in zip(*matrix, strict=True)],
        cmap=SCORE_COLOURS,
        norm=PowerNorm(0.5, vmin=0, vmax=highest, clip=True),
        origin="lower",
    )
    axes.set_xticks([i - 0.5 for i in range(1, layers)], minor=True)
    axes.set_yticks([i - 0.5 for i in range(1, heads)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0, colors=INK, labelsize=9)
    for axis, count in ((axes.xaxis, layers), (axes.yaxis, heads)):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=min(16, count), steps=[1, 2, 5, 10]))
    axes.set_xlim(-0.5, layers - 0.5)
    axes.set_ylim(-0.5, heads - 0.5)
    axes.spines[:].set_visible(False)
    for layer, kept in enumerate(kept_heads):
        for head in kept:
            corner = (layer - 0.44, head - 0.44)
            axes.add_patch(Rectangle(corner, 0.88, 0.88, fill=False, edgecolor=ACCENT, linewidth=2))
    axes.set_xlabel("layer", color=INK, fontsize=10)
    axes.set_ylabel("query head", color=INK, fontsize=10)
    axes.set_title(title, color=INK, fontsize=13, fontweight="bold", loc="left", pad=22)
    count = sum(map(len, kept_heads))
    if count:
        outlined = f"outlined: the {count} kept heads, {count / (layers * heads):.1%} of {layers * heads}"
        axes.annotate(
            outlined, (0, 1), xytext=(0, 5), xycoords="axes fraction", textcoords="offset points", color=ACCENT
        )
    bar = figure.colorbar(image, cax=axes.inset_axes([1 + 0.5 / layers, 0, 0.45 / layers, 1]))
    bar.set_ticks(
        [value for value in (0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1) if value < highest * 0.97] + [highest]
    )
    bar.ax.yaxis.set_major_formatter("{x:.2g}")
    bar.set_label(label, color=INK, fontsize=9)
    bar.ax.tick_params(length=0, colors=INK, labelsize=8)
    bar.outline.set_visible(False)
    _save(figure, path)


def accuracy_bars(
    table: dict[str, dict[str, float]], path: str | os.PathLike, title: str = "Accuracy", highlight: str = ""
) -> None:
    """
    Draws one group of bars for each task, one bar in it for each model.

    Args:
        table (`dict[str, dict[str, float]]`):
            Model name -> task name -> accuracy from 0 to 1. A task that a model lacks leaves a gap.
        path (`str` or `os.PathLike`):
            PNG file to write.
        title (`str`, *optional*, defaults to `"Accuracy"`):
            Line above the bars.
        highlight (`str`, *optional*, defaults to `""`):
            Model drawn in the accent colour; by default the colours go by order.

    Raises:
        `ValueError`: when the table is empty.
    """
    tasks = list(dict.fromkeys(task for row in table.values() for task in row))
    if not tasks:
        raise ValueError("There is nothing to draw: the table holds no task.")
    # Room for the names of the tasks, and for a number above each bar.
    figure = Figure(figsize=(max(6.0, len(tasks) * max(1.3, 0.24 * len(table)) + 0.8), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(table)
    others = [colour for colour in BAR_COLOURS if not highlight or colour != ACCENT]
    for i, (model, row) in enumerate(table.items()):
        colour = ACCENT if model == highlight else others[i % len(others)]
        places = [t + (i - (len(table) - 1) / 2) * width for t, task in enumerate(tasks) if task in row]
        values = [row[task] for task in tasks if task in row]
        bars = axes.bar(places, values, width * 0.92, label=model, color=colour)
        axes.bar_label(bars, [f"{100 * value:.0f}" for value in values], padding=2, fontsize=8, color=INK)
    axes.set_xticks(range(len(tasks)), [textwrap.fill(task.replace("-", " "), 14) for task in tasks])
    _accuracy_axis(axes)
    _title_and_legend(axes, title, list(table))
    _save(figure, path)


def accuracy_curves(
    curves: dict[str, tuple[list[float], list[float]]],
    path: str | os.PathLike,
    title: str,
    label: str,
    highlight: str = "",
) -> None:
    """
    Draws accuracy against a number of heads (or bytes), one line for each curve.

    Args:
        curves (`dict[str, tuple[list[float], list[float]]]`):
            Name -> places on the axis, zero or more, and accuracies from 0 to 1.
        path (`str` or `os.PathLike`):
            PNG file to write.
        title (`str`), label (`str`):
            Line above the figure, and what its axis counts.
        highlight (`str`, *optional*, defaults to `""`):
            Curve drawn in the accent colour; by default the first.

    Raises:
        `ValueError`: when there is no curve.
    """
    if not curves:
        raise ValueError("There is nothing to draw: no curve was given.")
    highlight = highlight or next(iter(curves))
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    others = iter([colour for colour in BAR_COLOURS if colour != ACCENT] * len(curves))
    for name, (places, accuracies) in curves.items():
        colour = ACCENT if name == highlight else next(others)
        axes.plot(places, accuracies, marker="o", markersize=4, linewidth=2, color=colour, label=name)
    # Counts double from one point to the next; zero has a place too.
    axes.set_xscale("symlog", base=2, linthresh=1)
    ticks = sorted({place for places, _ in curves.values() for place in places})
    # The label of a place that all but touches the next one would run into its label.
    ticks = [tick for tick, after in zip(ticks, [*ticks[1:], math.inf], strict=True) if after >= 1.25 * tick]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label, color=INK, fontsize=10)
    _accuracy_axis(axes)
    _title_and_legend(axes, title, list(curves))
    _save(figure, path)


def training_curves(
    curves: dict[str, list[tuple[int, float]]],
    path: str | os.PathLike,
    title: str,
    levels: dict[str, float] | None = None,
    stages: dict[str, int] | None = None,
) -> None:
    """
    Draws what a training run logged against the tokens seen: losses on the left, accuracies, if any, on the right.

    Args:
        curves (`dict[str, list[tuple[int, float]]]`):
            Name -> (tokens, value). Names that begin with `probe_accuracy/` are accuracies.
        path (`str` or `os.PathLike`):
            PNG file to write.
        title (`str`):
            Line above the figure.
        levels (`dict[str, float]`, *optional*):
            Name -> value of a dashed line beside the losses, such as the teacher's.
        stages (`dict[str, int]`, *optional*):
            Name of a stage -> tokens at which it begins.

    Raises:
        `ValueError`: when there is no curve.
    """
    if not curves:
        raise ValueError("There is nothing to draw: no curve was given.")
    accuracies = {name: points for name, points in curves.items() if name.startswith("probe_accuracy/")}
    losses = {name: points for name, points in curves.items() if name not in accuracies}
    panels = [panel for panel in (losses, accuracies) if panel]
    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for colour, (name, points) in zip(BAR_COLOURS[1:] * len(panel), panel.items(), strict=False):
            label, marker = name.removeprefix("probe_accuracy/"), "o" if len(points) < 30 else None
            axes.plot(*zip(*points, strict=True), linewidth=2, color=colour, label=label, marker=marker, markersize=4)
        if panel is accuracies:
            _accuracy_axis(axes)
        else:
            for name, value in (levels or {}).items():
                axes.axhline(value, linestyle="--", linewidth=1.2, color=FAINT, label=name)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(colors=INK, labelsize=9)
        for number, (name, tokens) in enumerate((stages or {}).items()):
            axes.axvline(tokens, linestyle=":", linewidth=1, color=FAINT)
            # In two rows: stages may be short.
            place = {"xycoords": ("data", "axes fraction"), "xytext": (3, 2 + 10 * (number % 2))}
            place["textcoords"] = "offset points"
            axes.annotate(name, (tokens, 1), color=FAINT, fontsize=8, **place)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("tokens", color=INK, fontsize=10)
        # Many curves leave no room among them.
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncols": 2} if len(panel) > 4 else {}
        axes.legend(frameon=False, fontsize=9, **below)
    figure.suptitle(title, color=INK, fontsize=13, fontweight="bold", x=0.02, ha="left")
    _save(figure, path)


def attention_pattern(
    weights: list[list[float]], tokens: list[str], path: str | os.PathLike, title: str, marked: dict[str, list[int]]
) -> None:
    """
    Draws what one head attends to on one prompt: queries from top to bottom, keys from left to right.

    Args:
        weights (`list[list[float]]`):
            [T][T], each row of them a distribution over keys.
        tokens (`list[str]`):
            Text of the T tokens.
        path (`str` or `os.PathLike`):
            PNG file to write.
        title (`str`):
            Line above the pattern.
        marked (`dict[str, list[int]]`):
            Name -> key positions to mark on the axis, such as those of the right value.

    Raises:
        `ValueError`: when the weights are not those of the tokens.
    """
    length = len(tokens)
    if len(weights) != length or any(len(row) != length for row in weights):
        raise ValueError(f"The weights are not a square of the {length} tokens.")
    size = min(12.0, max(4.0, 0.09 * length))
    figure = Figure(figsize=(size + 1.5, size + 1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(weights, cmap=SCORE_COLOURS, norm=PowerNorm(0.5, vmin=0, vmax=1), interpolation="nearest")
    axes.tick_params(length=0, colors=INK, labelsize=5)
    shown = [token.replace("\n", "\u21b5").strip() or "\u00b7" for token in tokens]
    axes.set_xticks(range(length), shown, rotation=90)
    axes.set_yticks(range(length), shown)
    axes.spines[:].set_visible(False)
    for (name, positions), colour in zip(marked.items(), (ACCENT, *BAR_COLOURS[2:]), strict=False):
        for position in positions:
            axes.axvline(position, color=colour, linewidth=0.6, alpha=0.7)
        axes.plot([], [], color=colour, label=name)
    axes.set_xlabel("key", color=INK, fontsize=10)
    axes.set_ylabel("query", color=INK, fontsize=10)
    axes.set_title(title, color=INK, fontsize=12, fontweight="bold", loc="left", pad=24)
    if marked:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=9, borderaxespad=0.2)
    _save(figure, path)


def _title_and_legend(axes, title: str, names: list[str]) -> None:
    """Writes the title, and below it the names in as many columns as the figure has room for."""
    columns = max(1, min(4, int(axes.figure.get_figwidth() * 12) // (max(map(len, names)) + 8)))
    rows = math.ceil(len(names) / columns)
    axes.set_title(title, color=INK, fontsize=13, fontweight="bold", loc="left", pad=12 + 16 * rows)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, fontsize=9, borderaxespad=0.2)


def _accuracy_axis(axes) -> None:
    axes.set_ylim(0, 1.08)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.grid(axis="y", color="#e6e9ef", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=INK, labelsize=9)
    axes.spines[:].set_visible(False)


def _save(figure: Figure, path: str | os.PathLike) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png", facecolor="white")
