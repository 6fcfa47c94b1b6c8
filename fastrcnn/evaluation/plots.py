"""Charts as PNG files' bytes, drawn by matplotlib (extra `plots`), which is imported when the first one is asked for."""

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

# Okabe and Ito's colours, which are told apart with any kind of sight.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f3c8d", "#666666")
STYLE = {
    "text.parse_math": False,  # a class may be called $x$
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "legend.fontsize": 8,
}
POINTS = 2000  # of a line: more than there are pixels
LETTERS = 22  # of a name


def require_matplotlib():
    """matplotlib, or ImportError that says how to get it."""
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError:
        raise ImportError("charts need matplotlib: pip install 'fastrcnn[plots]'") from None
    return matplotlib


def drawable(text: str) -> str:
    """Text on one line, without control characters and what UTF-8 cannot carry."""
    return "".join(c if c.isprintable() else " " for c in text).strip() or "?"


def short(name: str) -> str:
    """A name as a chart can show it, of at most LETTERS, its beginning and its end."""
    name = drawable(name)
    half = LETTERS // 2
    return name if len(name) <= LETTERS else f"{name[: half - 1]}…{name[-half:]}"


@contextmanager
def _figure(width: float, height: float):
    """A figure of so many inches, and `png`, a list that holds its bytes at the end."""
    matplotlib = require_matplotlib()
    png: list[bytes] = []
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks
        figure = matplotlib.figure.Figure((width, height), dpi=110, layout="constrained")
        yield figure, png
        content = io.BytesIO()
        figure.savefig(content, format="png")
        png.append(content.getvalue())


def _thin(x: np.ndarray, y: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of neighbours, at most `most` of them; of what is not finite none."""
    parts = np.array_split(np.arange(len(x)), min(most, len(x)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a part without a finite value
        y = np.where(np.isfinite(y), y, np.nan)
        return np.array([x[p].mean() for p in parts]), np.array([np.nanmean(y[p]) for p in parts])


Lines = Mapping[str, Sequence[float]]


def _panel(title: str, lines: dict[str, np.ndarray], x: np.ndarray, unit: str, noisy: bool = False) -> Callable | None:
    """What draws lines that begin at 0, the noisy ones smoothed; None where they have no finite value."""
    lines = {name: y for name, y in lines.items() if np.isfinite(y).any()}

    def draw(axes) -> None:
        marker = dict(marker="o", markersize=3.5) if len(x) < 40 else {}
        smooth = noisy and len(x) > 100
        for (name, y), colour in zip(lines.items(), COLOURS * len(lines)):
            if smooth and len(lines) == 1:
                axes.plot(*_thin(x, y, POINTS), color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(*_thin(x, y, 100 if smooth else POINTS), color=colour, label=name, linewidth=1.6, **marker)
        values = np.concatenate(list(lines.values()))
        # The first steps of a loss would flatten the rest.
        top = np.percentile(values[np.isfinite(values)], 99 if smooth else 100)
        axes.set(title=title, xlabel=unit)
        axes.set_ylim(0, top * 1.08 if top > 0 else 1)
        axes.xaxis.set_major_locator(require_matplotlib().ticker.MaxNLocator(8, integer=True, min_n_ticks=1))
        if len(lines) > 1:
            axes.legend()

    return draw if lines else None


def training_curves(epochs: Lines, steps: Lines) -> bytes | None:
    """Losses, AP, learning rate and speed of a training; None where there is nothing to draw.

    epochs: columns of equal length by name, of which epoch, loss, val_loss, AP, AP50, AP75 and lr are drawn; steps:
    step, loss, loss_*, lr and images/s. What is missing, or nowhere finite, is left out.
    """
    epochs, steps = ({k: np.asarray(v, np.float64) for k, v in part.items()} for part in (epochs, steps))
    number = epochs.get("epoch", np.arange(1.0, 1 + max(map(len, epochs.values()), default=0)))
    step = steps.get("step", np.arange(max(map(len, steps.values()), default=0), dtype=float))
    some = lambda part, *names: {name: part[name] for name in names if name in part}  # noqa: E731
    losses = {name: y for name, y in steps.items() if name.startswith("loss_") or name.endswith("_loss")}
    rate = _panel("Learning rate", some(steps, "lr"), step, "step")
    panels = [
        _panel("Loss", some(epochs, "loss", "val_loss"), number, "epoch"),
        _panel("AP (percent)", some(epochs, "AP", "AP50", "AP75"), number, "epoch"),
        _panel("Loss by step", some(steps, "loss"), step, "step", noisy=True),
        _panel("Parts of the loss", losses, step, "step", noisy=True),
        rate or _panel("Learning rate", some(epochs, "lr"), number, "epoch"),
        _panel("Images per second", some(steps, "images/s"), step, "step", noisy=True),
    ]
    panels = [draw for draw in panels if draw]
    if not panels:
        return None
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    with _figure(5.2 * columns, 2.9 * rows) as (figure, png):
        for i, draw in enumerate(panels, 1):
            draw(figure.add_subplot(rows, columns, i))
    return png[0]


def _area(curve: np.ndarray) -> str:
    return f"{100 * curve.mean():.1f}"


def precision_recall(means: dict[str, np.ndarray], classes: dict[str, np.ndarray]) -> bytes:
    """Precision [101] over recall 0 ... 1: the classes' mean by IoU, and each class at IoU 0.5. Of many classes the best
    and the worst have a name, and the others are grey."""
    recall = np.linspace(0, 1, 101)
    classes = {name: curve for name, curve in classes.items() if np.isfinite(curve).all()}
    ranked = sorted(classes, key=lambda name: -classes[name].mean())
    named = ranked if len(ranked) <= len(COLOURS) else [*ranked[:4], *ranked[-4:]]
    with _figure(12.2, 3.9) as (figure, png):
        left, right = figure.subplots(1, 2)
        for (name, curve), colour in zip(means.items(), COLOURS):
            left.plot(recall, curve, color=colour, label=f"{name}: {_area(curve)}", linewidth=1.8)
        for name in set(ranked) - set(named):
            right.plot(recall, classes[name], color="#cccccc", linewidth=0.8, zorder=1)
        for name, colour in zip(named, COLOURS):
            right.plot(
                recall, classes[name], color=colour, label=f"{short(name)}: {_area(classes[name])}", linewidth=1.6
            )
        left.set_title("Mean of the classes, by IoU")
        right.set_title("Classes at IoU 0.5" + (f", 4 best and 4 worst of {len(ranked)}" if named != ranked else ""))
        for axes in (left, right):
            axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.005), ylim=(0, 1.02))
            if axes.lines:
                axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return png[0]


def confusion(matrix: np.ndarray, names: Sequence[str]) -> bytes:
    """int [C + 1, C + 1], rows the annotated and columns the detected classes, last of both the background. Of more than 40
    classes those with the most confusions are drawn, and the others together."""
    matrix, names = np.asarray(matrix), [short(name) for name in names]
    if len(names) > 40:
        off = matrix.sum(0) + matrix.sum(1) - 2 * matrix.diagonal()
        kept = np.sort(np.argsort(-off[:-1], kind="stable")[:38])
        rest = np.setdiff1d(np.arange(len(names)), kept)
        group = np.zeros(len(matrix), np.int64)
        group[kept], group[rest], group[-1] = np.arange(38), 38, 39
        joined = np.zeros((40, 40), matrix.dtype)
        np.add.at(joined, (group[:, None], group[None]), matrix)
        matrix, names = joined, [*(names[i] for i in kept), f"{len(rest)} others"]
    count = len(matrix)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = min(2.6 + 0.62 * count, 12)
    with _figure(side + 0.8, side) as (figure, png):
        axes = figure.subplots()
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(
            range(count),
            [*names, "missed"],
            rotation=45 if count <= 12 else 90,
            ha="right" if count <= 12 else "center",
        )
        axes.set_yticks(range(count), [*names, "nothing there"])
        axes.tick_params(labelsize=9 if count <= 15 else 6.5, length=0)
        axes.set(xlabel="detected", ylabel="annotated")
        axes.grid(False)
        axes.spines[:].set_visible(False)
        for line in np.arange(0.5, count - 1):
            axes.axhline(line, color="white", linewidth=1)
            axes.axvline(line, color="white", linewidth=1)
        for i, j in zip(*np.nonzero(matrix)):
            if count <= 15 or share[i, j] >= 0.01:
                text = f"{share[i, j]:.0%}\n{matrix[i, j]}" if count <= 8 else f"{share[i, j] * 100:.0f}"
                colour = "white" if share[i, j] > 0.55 else "#222222"
                axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=9 if count <= 15 else 5.5)
    return png[0]


def scores(by_score, bins: np.ndarray, error: float) -> bytes:
    """How many detections of each score are right and wrong, precision, recall and F1 by threshold, and calibration.

    by_score: a `diagnosis.ByScore`; bins, error: of `diagnosis.calibration`.
    """
    with _figure(13.2, 3.8) as (figure, png):
        left, middle, right = figure.subplots(1, 3)
        counts = [column.reshape(20, -1).sum(1) for column in (by_score.right, by_score.wrong)]
        edges = np.arange(20) / 20
        left.bar(edges, counts[0], 0.045, align="edge", color=COLOURS[2], label="right")
        left.bar(edges, counts[1], 0.045, counts[0], align="edge", color=COLOURS[1], label="wrong")
        left.set(title="Detections by score", xlabel="score", xlim=(0, 1), ylabel="detections")
        for name, colour in (("precision", 0), ("recall", 1), ("f1", 2)):
            label = "F1" if name == "f1" else name
            middle.plot(by_score.score, getattr(by_score, name), color=COLOURS[colour], label=label, linewidth=1.6)
        middle.axvline(by_score.best, color="#888888", linestyle=":", label=f"best F1: score {by_score.best:.2f}")
        middle.set(title="Detections from a score up", xlabel="score threshold", xlim=(0, 1), ylim=(0, 1.02))
        right.plot([0, 1], [0, 1], color="#888888", linestyle=":", label="as sure as right")
        right.plot(
            bins[:, 0], bins[:, 1], color=COLOURS[0], marker="o", ms=4, linewidth=1.6, label=f"mean error {error:.2f}"
        )
        right.set(
            title="Calibration", xlabel="mean score", ylabel="share of right detections", xlim=(0, 1), ylim=(0, 1.02)
        )
        for axes in (left, middle, right):
            axes.legend()
    return png[0]


KIND_NAMES = dict(Cls="wrong class", Loc="badly placed", Both="class and place", Dupe="second box", Bkg="nothing there",
                  Miss="missed")  # fmt: skip


def errors(kinds: Mapping[str, Mapping[str, float]]) -> bytes:
    """`diagnosis.tide` as bars."""
    with _figure(7.6, 3) as (figure, png):
        axes = figure.subplots()
        gains = [kinds[kind]["dAP"] for kind in KIND_NAMES]
        bars = axes.barh([KIND_NAMES[kind] for kind in KIND_NAMES], gains, color=COLOURS[0], height=0.65)
        axes.bar_label(
            bars, [f"{g:.1f}  ({kinds[k]['count']} errors)" for k, g in zip(KIND_NAMES, gains)], padding=4, fontsize=8
        )
        axes.set(title="AP50 that one kind of error costs", xlabel="percent of AP", xlim=(0, max(1.0, *gains) * 1.3))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    return png[0]
