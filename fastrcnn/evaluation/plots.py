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


def short(name: str) -> str:
    """A name as a chart can show it: one line, no control characters, not longer than LETTERS."""
    name = "".join(c if c.isprintable() else " " for c in name).strip() or "?"
    return name if len(name) <= LETTERS else name[: LETTERS - 1] + "…"


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
