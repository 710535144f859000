"""Pictures of a run: loss over steps and tokens, loss by position in the context, grades of a task,
and attention maps."""

import io
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

from models.analysis.attention_maps import AttentionMap
from trainer.files.safe_files import replace_inside
from trainer.logs.caption import caption
from trainer.logs.evaluation_plots import evaluation_figures
from trainer.logs.jsonl import EVALUATION, METRICS, read

BLUE = "#2b6cb0"
ORANGE = "#dd6b20"
GREY = "#4a5568"


def plots(directory: Path | str, title: str | None = None) -> list[Path]:
    """Draw what the rows of a run directory allow, into its report/; the pictures made.

    Reads `step`, `loss`, `tokens` of metrics.jsonl and those rows of evaluation.jsonl that have a
    `by_position`: a list of {"begin", "end", "loss"} over half-open ranges of positions. Their
    `value` is the held-out loss.
    """
    directory = Path(directory)
    title = caption(title or directory.resolve().name)
    rows = [row for row in read(directory / METRICS) if row.get("loss") is not None]
    evaluations = [
        row
        for row in read(directory / EVALUATION)
        if row.get("by_position") and row["value"] is not None
    ]
    drawn = {}
    if rows:
        drawn["loss"] = _loss(rows, evaluations, f"{title}: loss")
    if evaluations:
        drawn["loss_by_position"] = _by_position(evaluations, f"{title}: held-out loss by position")
    if graded := grades(directory):
        drawn["grades"] = _grades(graded, f"{title}: how held-out answers are graded")
    drawn |= dict(evaluation_figures(directory, title))
    return [_save(figure, directory / "report" / f"{name}.png") for name, figure in drawn.items()]


def grades(directory: Path) -> list[dict[str, Any]]:
    """[{"step", name: share of 1, ...}]: how a task graded each evaluation of a run; empty where
    the data is no task."""
    found: dict[int, dict[str, Any]] = {}
    for row in read(directory / EVALUATION):
        is_graded = "by_position" not in row and "part" not in row
        if is_graded and row.get("value") is not None:
            found.setdefault(row["step"], {"step": row["step"]})[row["name"]] = row["value"]
    return list(found.values())


def attention(
    maps: Sequence[AttentionMap], directory: Path | str, title: str, left_out: int = 0
) -> Path:
    """Draw maps into report/attention.png of a run directory: a row of pictures for each softmax,
    one for each head.

    Args:
        left_out: softmaxes of the model that have no map; as heads that have none, they are counted
            in the title.
    """
    columns = max(len(each.weight) for each in maps)
    size = max(7.0, 2.0 + 1.5 * columns), 1.3 + 1.5 * len(maps)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    hidden = max(each.heads - len(each.weight) for each in maps)
    missing = [
        f"{many} more {what}"
        for many, what in ((left_out, "softmaxes"), (hidden, "heads of each"))
        if many
    ]
    lines = [
        title,
        (
            "text runs down, what it sees to the right, white: nothing; a weight is where a head"
            " looks, not why it answers"
        ),
    ]
    lines += [f"not shown: {', '.join(missing)}"] if missing else []
    figure.suptitle("\n".join(map(caption, lines)), x=0.01, ha="left", fontsize=9, color=GREY)
    shown = None
    for line, each in zip(figure.subplots(len(maps), columns, squeeze=False), maps):
        queries, keys = each.weight.shape[1:]
        for head, axes in enumerate(line):
            axes.set_axis_off()
            if head == len(each.weight):
                break
            axes.set_axis_on()
            weight = np.ma.masked_equal(each.weight[head].numpy(), 0)
            shown = axes.imshow(weight, cmap="magma_r", norm=PowerNorm(0.4, 0, 1), aspect="auto")
            axes.set_title(f"head {head}", fontsize=7, color=GREY, pad=2)
            axes.set_xticks([0, keys - 1])
            axes.set_yticks([0, queries - 1] if head == 0 else [])
            axes.tick_params(labelsize=6, colors=GREY)
            if (
                each.streams == "row" and keys > queries
            ):  # behind the row: what stands for its tokens, or holds earlier ones
                axes.axvline(queries - 0.5, color=BLUE, linewidth=0.6)
        line[0].set_ylabel(caption(each.name), fontsize=7, color=GREY)
    assert shown is not None, "a softmax has heads"
    bar = figure.colorbar(
        shown, ax=figure.axes, location="right", aspect=40, pad=0.01, ticks=[0, 0.01, 0.1, 0.3, 1]
    )
    bar.ax.tick_params(labelsize=6, colors=GREY)
    return _save(figure, Path(directory) / "report" / "attention.png")


def _figure(title: str) -> tuple[Figure, Axes]:
    """An empty picture; a Figure of its own draws without a screen and without pyplot's global
    state."""
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=12, loc="left", color=GREY, pad=12)
    axes.grid(color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines["right"].set_visible(False)
    axes.tick_params(colors=GREY)
    return figure, axes


def _smooth(values: Sequence[float], reach: int) -> list[float]:
    """Means over `reach` neighbours on either side, as many left as right, so that a slope is not
    shifted."""
    result = []
    for index in range(len(values)):
        near = min(reach, index, len(values) - 1 - index)
        result.append(fmean(values[index - near : index + near + 1]))
    return result


def _loss(rows: list[dict[str, Any]], held_out: list[dict[str, Any]], title: str) -> Figure:
    figure, axes = _figure(title)
    steps = [row["step"] for row in rows]
    losses = [row["loss"] for row in rows]
    reach = len(rows) // 50
    single = {"marker": "o", "markersize": 4} if len(rows) < 3 else {}
    if reach:
        axes.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=0.9, label="training, each step")
        label = f"training, mean of {2 * reach + 1} rows"
        axes.plot(steps, _smooth(losses, reach), color=BLUE, linewidth=1.8, label=label)
    else:
        axes.plot(steps, losses, color=BLUE, linewidth=1.6, label="training", **single)
    if held_out:
        x = [row["step"] for row in held_out]
        y = [row["value"] for row in held_out]
        axes.plot(x, y, color=ORANGE, marker="o", markersize=4, linewidth=1.4, label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    axes.legend(frameon=False)
    rate = (
        max(rows[-1]["tokens"], 1) / rows[-1]["step"]
    )  # every step trains on about as many tokens
    above = axes.secondary_xaxis(
        "top", functions=(lambda step: step * rate, lambda tokens: tokens / rate)
    )
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


def _grades(rows: list[dict[str, Any]], title: str) -> Figure:
    figure, axes = _figure(title)
    for name in [
        name for name in dict.fromkeys(name for row in rows for name in row) if name != "step"
    ]:
        told = [row for row in rows if name in row]
        axes.plot(
            [row["step"] for row in told],
            [row[name] for row in told],
            marker="o",
            markersize=4,
            label=caption(name),
        )
    axes.set_xlabel("step")
    axes.set_ylabel("share of the answers")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(-0.03, 1.03)
    axes.spines["top"].set_visible(False)
    axes.legend(frameon=False)
    return figure


def _save(figure: Figure, path: Path) -> Path:
    path.parent.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.removeprefix("."))
    return replace_inside(path.parent.parent, f"{path.parent.name}/{path.name}", drawn.getvalue())
