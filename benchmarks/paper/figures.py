"""The curves of the paper's tables: coverage and loss on text against tokens, heads kept and cache bytes, as PNG."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from trainers.files import atomic_path
from trainers.plots import ACCENT, DPI, FAINT, INK


# Cells that differ from one another in the number of found heads alone.
BY_HEADS = ("none", "found-5", "found-8", "found-16")
CACHE_TOKENS = 2048


def draw_curves(results, points: list[dict], folder: Path) -> list[Path]:
    """
    Draws `coverage_tokens.png`, `coverage_heads.png` and `coverage_bytes.png`.

    Args:
        results ([`~benchmarks.paper.report.Results`]):
            The run.
        points (`list[dict]`):
            The good student over its run: `tokens`, `coverage`, `held_out` and `text_loss` of each snapshot.
        folder (`Path`):
            Where they go.

    Returns:
        `list[Path]`: the files.
    """
    teacher_loss = results.teacher["text_loss"]
    tokens = [point["tokens"] for point in points]
    lines = {
        "all retrieval tasks": (tokens, [point["coverage"] for point in points]),
        "tasks held out of training": (tokens, [point["held_out"] for point in points]),
    }
    losses = {"8 found heads": (tokens, [point["text_loss"] for point in points])}
    files = [folder / name for name in ("coverage_tokens.png", "coverage_heads.png", "coverage_bytes.png")]
    _panels(files[0], "8 found heads over their training", "tokens trained on", lines, losses, teacher_loss, log=True)
    others = [name for name in results.students if name not in ("good", *BY_HEADS)]
    for path, title, label, place in (
        (files[1], "Heads kept, at equal tokens", "attention heads kept, of 270", _heads),
        (files[2], "Cache bytes, at equal tokens", f"cache at {CACHE_TOKENS:,} tokens, MB (bf16)", _megabytes),
    ):
        line = [name for name in BY_HEADS if name in results.students]
        chosen = others if place is _megabytes else [name for name in others if not name.startswith("state")]
        places = [place(results, name) for name in line]
        covered = {"found heads": (places, [results.retrieval(name)[0] for name in line])}
        lost = {"found heads": (places, [results.students[name]["text_loss"] for name in line])}
        for name in chosen:
            covered[results.title(name)] = ([place(results, name)], [results.retrieval(name)[0]])
            lost[results.title(name)] = ([place(results, name)], [results.students[name]["text_loss"]])
        _panels(path, title, label, covered, lost, teacher_loss, log=place is _megabytes)
    return files


def _heads(results, name: str) -> float:
    return results.students[name]["kept_heads"]


def _megabytes(results, name: str) -> float:
    return results.bytes(name, CACHE_TOKENS) / 1e6


def _panels(path: Path, title: str, label: str, covered: dict, losses: dict, teacher_loss: float, log: bool) -> None:
    """Two panels over one another's axis: coverage above, loss on text below; single points as markers of their own."""
    figure = Figure(figsize=(7.2, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    colours = (ACCENT, "#1f5aa6", "#7a9e7e", "#f2b134", "#a26769", "#5b8fd0")
    for axes, series in ((above, covered), (below, losses)):
        for number, (name, (places, values)) in enumerate(series.items()):
            style = {"marker": "o" if len(places) > 1 else "D", "color": colours[number % len(colours)]}
            axes.plot(places, values, label=name, linewidth=2, markersize=6, **style)
        axes.grid(color="#e6e9ef", linewidth=0.8)
        axes.tick_params(length=0, colors=INK, labelsize=9)
        axes.spines[:].set_visible(False)
    above.axhline(0.95, color=FAINT, linestyle="--", linewidth=1)
    above.annotate(
        "95 %, the paper's claim", (0.01, 0.955), xycoords=("axes fraction", "data"), fontsize=8, color=FAINT
    )
    above.set_ylim(0, 1.08)
    above.yaxis.set_major_formatter(PercentFormatter(1))
    above.set_ylabel("retrieval coverage", color=INK)
    below.axhline(teacher_loss, color=FAINT, linestyle="--", linewidth=1)
    below.annotate(
        "teacher", (0.01, teacher_loss), xycoords=("axes fraction", "data"), fontsize=8, color=FAINT, va="bottom"
    )
    below.set_ylabel("loss on text, nats", color=INK)
    below.set_xlabel(label, color=INK)
    if log:
        below.set_xscale("log")
    above.set_title(title, color=INK, fontsize=13, fontweight="bold", loc="left")
    above.legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.86), ncols=2)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png", facecolor="white")
