"""Pictures of a run: loss over steps and tokens, and loss by position in the context."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

from trainer.logs.jsonl import EVALUATION, METRICS, read

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#4a5568"


def plots(directory: Path | str, title: str | None = None) -> list[Path]:
    """Draw what the rows of a run directory allow, into its report/; the pictures made.

    Reads `step`, `loss`, `tokens` of metrics.jsonl and those rows of evaluation.jsonl that have a `by_position`: a list
    of {"begin", "end", "loss"} over half-open ranges of positions. Their `value` is the held-out loss.
    """
    directory = Path(directory)
    title = title or directory.resolve().name
    rows = [row for row in read(directory / METRICS) if row.get("loss") is not None]
    evaluations = [row for row in read(directory / EVALUATION) if row.get("by_position") and row["value"] is not None]
    drawn = {}
    if rows:
        drawn["loss"] = _loss(rows, evaluations, f"{title}: loss")
    if evaluations:
        drawn["loss_by_position"] = _by_position(evaluations, f"{title}: held-out loss by position")
    return [_save(figure, directory / "report" / f"{name}.png") for name, figure in drawn.items()]


def _figure(title: str) -> tuple[Figure, Axes]:
    """An empty picture; a Figure of its own draws without a screen and without pyplot's global state."""
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=12, loc="left", color=GREY, pad=12)
    axes.grid(color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines["right"].set_visible(False)
    axes.tick_params(colors=GREY)
    return figure, axes


def _smooth(values: Sequence[float], reach: int) -> list[float]:
    """Means over `reach` neighbours on either side, as many left as right, so that a slope is not shifted."""
    result = []
    for index in range(len(values)):
        near = min(reach, index, len(values) - 1 - index)
        result.append(fmean(values[index - near : index + near + 1]))
    return result


def _loss(rows: list[dict[str, Any]], held_out: list[dict[str, Any]], title: str) -> Figure:
    figure, axes = _figure(title)
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    reach = len(rows) // 50
    single = {"marker": "o", "markersize": 4} if len(rows) < 3 else {}
    if reach:
        axes.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=0.9, label="training, each step")
        label = f"training, mean of {2 * reach + 1} rows"
        axes.plot(steps, _smooth(losses, reach), color=BLUE, linewidth=1.8, label=label)
    else:
        axes.plot(steps, losses, color=BLUE, linewidth=1.6, label="training", **single)
    if held_out:
        x, y = [row["step"] for row in held_out], [row["value"] for row in held_out]
        axes.plot(x, y, color=ORANGE, marker="o", markersize=4, linewidth=1.4, label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    axes.legend(frameon=False)
    rate = max(rows[-1]["tokens"], 1) / rows[-1]["step"]  # every step trains on about as many tokens
    above = axes.secondary_xaxis("top", functions=(lambda step: step * rate, lambda tokens: tokens / rate))
    above.set_xlabel("tokens trained on")
    above.xaxis.set_major_formatter(EngFormatter(sep=""))
    above.tick_params(colors=GREY)
    return figure


def _by_position(evaluations: list[dict[str, Any]], title: str) -> Figure:
    """The first, a middle and the last evaluation, so that learning to use the context shows."""
    figure, axes = _figure(title)
    last = len(evaluations) - 1
    chosen = sorted({0, last // 2, last})
    for order, index in enumerate(chosen):
        bars = [bar for bar in evaluations[index]["by_position"] if bar["loss"] is not None]
        middles = [((bar["begin"] + 1) * bar["end"]) ** 0.5 for bar in bars]
        newest = index == last
        axes.plot(
            middles,
            [bar["loss"] for bar in bars],
            color=BLUE,
            alpha=0.35 + 0.65 * (order + 1) / len(chosen) if not newest else 1.0,
            linewidth=2.0 if newest else 1.2,
            linestyle="-" if newest else "--",
            marker="o",
            markersize=4,
            label=f"step {evaluations[index]['step']}",
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.set_xlabel("position in the document (tokens, ranges twice as long each)")
    axes.set_ylabel("mean loss (nats per token)")
    axes.spines["top"].set_visible(False)
    axes.legend(frameon=False)
    return figure


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
