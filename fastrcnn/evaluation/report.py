"""One self-contained HTML page of a training or of an evaluation: tables, charts and pictures, nothing from outside, no
script. Whatever a file holds goes through `tag`, which escapes it."""

import base64
import csv
import io
import json
import math
from collections.abc import Iterable
from html import escape
from pathlib import Path

from fastrcnn.data import ImageError, read_image
from fastrcnn.evaluation import plots
from fastrcnn.inference.output import replace_file

PERCENT = ("AP", "AR", "VOC")
ABOUT = ("weights", "data", "pictures", "objects", "detections", "charts")  # of metrics.json, in a page's head
SAMPLES = 12  # pictures of training batches on a page
SIDE = 1280  # pixels of a picture's longer side on a page
CHARTS = {
    "precision_recall.png": "Precision and recall. A line that falls late and ends far right is a good detector's; the "
    "legend has the area under each, which is AP at that IoU.",
    "confusion.png": "Confusion at IoU 0.5, rows the annotated class, columns the detected one, in shares of the row. The "
    "last column is what was missed, the last row what was found where nothing is annotated.",
    "scores.png": "Scores. Left: how many detections of each score are right. Right: how often detections of a score are "
    "right; below the diagonal the detector is surer than it should be.",
    "errors.png": "What AP at IoU 0.5 would gain if one kind of error were mended (TIDE): wrong class, box too far off, "
    "both, a second box on one object, nothing there, not found.",
    "worst.jpg": "The pictures with the most errors, worst first. Green: found; red: found but not there, or of another "
    "class; yellow: missed.",
}
CSS = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;background:#f6f7f8;margin:0}
main{max-width:1160px;margin:0 auto;padding:24px}
h1{font-size:24px;margin:0 0 4px;overflow-wrap:anywhere}h2{font-size:17px;margin:0 0 12px}
section{background:#fff;border:1px solid #e2e4e7;border-radius:8px;padding:18px 20px;margin:16px 0}
.about{color:#666;margin:0;overflow-wrap:anywhere}
.tiles{display:flex;flex-wrap:wrap;gap:12px}
.tiles div{background:#f6f7f8;border-radius:6px;padding:8px 16px;min-width:84px}
.tiles b{display:block;font-size:22px;font-variant-numeric:tabular-nums}.tiles span{color:#666;font-size:13px}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px}
th,td{padding:3px 14px 3px 0;text-align:right;border-bottom:1px solid #eceef0;vertical-align:top;white-space:nowrap}
th{color:#666;font-weight:600}th:first-child,td:first-child{text-align:left;white-space:normal;overflow-wrap:anywhere}
table.plain td{text-align:left;white-space:normal;overflow-wrap:anywhere}
img{max-width:100%;height:auto;display:block}figure{margin:0 0 18px}figure:last-child{margin-bottom:0}
figcaption{color:#666;font-size:13px;margin-top:4px;overflow-wrap:anywhere}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(480px,100%),1fr));gap:14px}.grid figure{margin:0}
summary{cursor:pointer;font-size:17px;font-weight:600}details table{margin-top:12px}
"""


class Html(str):
    """Markup. All other text is escaped on its way into a `tag`."""


def tag(name: str, *inside, **attributes: str) -> Html:
    """<name attributes>inside</name>; class_ is the attribute class."""
    given = "".join(f' {key.rstrip("_")}="{escape(_shown(value))}"' for key, value in attributes.items())
    body = "".join(part if isinstance(part, Html) else escape(_shown(part)) for part in inside)
    return Html(f"<{name}{given}>" if name in ("img", "link", "meta") else f"<{name}{given}>{body}</{name}>")


def _shown(value) -> str:
    """Text on one line that hides and turns round nothing; "-" for what is no number."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"
    return plots.drawable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def table(head: Iterable, rows: Iterable[Iterable], class_: str = "") -> Html:
    top = [tag("tr", *(tag("th", cell) for cell in head))] if head else []
    body = [tag("tr", *(tag("td", cell) for cell in row)) for row in rows]
    return tag("div", tag("table", *top, *body, class_=class_), class_="wide")


def measured(name: str, value) -> str:
    """A number under its name: AP and AR are percent."""
    is_percent = name.startswith(PERCENT) and _is_number(value) and math.isfinite(value)
    return f"{value:.1f}" if is_percent else _shown(value)


def _folded(title: str, *inside, open_: bool = False) -> Html:
    # An attribute without a value counts as set: it may only be there where it is meant.
    return tag("section", tag("details", tag("summary", title), *inside, **({"open": ""} if open_ else {})))


def page(title: str, about: str, sections: Iterable[Html]) -> str:
    """The whole document. Its policy forbids scripts and whatever lies outside, even if markup got in."""
    policy = {"http-equiv": "Content-Security-Policy",
              "content": "default-src 'none'; img-src data:; style-src 'unsafe-inline'"}  # fmt: skip
    head = tag("head", tag("meta", charset="utf-8"), tag("meta", **policy), tag("title", title),
               tag("meta", name_="viewport", content="width=device-width"),
               tag("link", rel="icon", href="data:,"), tag("style", Html(CSS)))  # fmt: skip
    main = tag("main", tag("h1", title), tag("p", about, class_="about"), *sections)
    return f"<!doctype html>\n{tag('html', head, tag('body', main), lang='en')}\n"


def _json(path: Path):
    """A JSON file's content; None where there is none that can be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _number(value) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _columns(rows: list[dict]) -> dict[str, list[float]]:
    """Columns by name, NaN for what is no number; those without one are left out."""
    names = dict.fromkeys(name for row in rows for name in row if isinstance(name, str))
    columns = {name: [_number(row.get(name)) for row in rows] for name in names}
    return {name: c for name, c in columns.items() if not all(map(math.isnan, c))}


def _csv(path: Path) -> dict[str, list[float]]:
    try:
        text = path.read_text("utf-8", "replace")
        return _columns(list(csv.DictReader(io.StringIO(text.replace("\0", "")))))
    except (OSError, csv.Error):
        return {}


def _lines(path: Path) -> dict[str, list[float]]:
    """The columns of a file with a JSON object a line; a line that is none was not finished."""
    rows = []
    try:
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            rows += [row] if isinstance(row, dict) else []
    except OSError:
        pass
    return _columns(rows)


def _inline(content: bytes, kind: str, caption: str) -> Html:
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return tag("figure", tag("img", src=source, alt=caption), tag("figcaption", caption))


def _picture(path: Path, caption: str) -> Html | None:
    """A picture of a folder, a photograph made smaller where it is large; None where it cannot be read."""
    from PIL import Image

    try:
        pixels = read_image(path)
        if path.suffix == ".png":  # a chart
            return _inline(path.read_bytes(), "png", caption)
    except (ImageError, OSError):
        return None
    image, encoded = Image.fromarray(pixels.permute(1, 2, 0).numpy()), io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(encoded, "JPEG", quality=85)
    return _inline(encoded.getvalue(), "jpeg", caption)


def _tiles(values: dict[str, str]) -> Html:
    return tag(
        "div", *(tag("div", tag("b", value), tag("span", name)) for name, value in values.items()), class_="tiles"
    )


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def evaluation_sections(folder: Path) -> list[Html]:
    """What `write_evaluation` left in a folder: numbers, classes, charts, the worst pictures; whatever of it is there."""
    metrics, sections = _json(folder / "metrics.json"), []
    metrics = metrics if isinstance(metrics, dict) else {}
    numbers = {k: measured(k, v) for k, v in metrics.items() if k.startswith(PERCENT) and (v is None or _is_number(v))}
    if numbers:
        sections.append(
            tag("section", tag("h2", "Average precision and recall, in percent"), _tiles(numbers), *_told(metrics))
        )
    classes = _dicts(metrics.get("classes"))
    if classes:
        names = list(dict.fromkeys(name for row in classes for name in row if name != "name"))
        rows = [[row.get("name"), *(measured(name, row.get(name)) for name in names)] for row in classes]
        sections.append(_folded(f"Classes ({len(classes)})", table(["class", *names], rows), open_=len(classes) <= 30))
    figures = [_picture(folder / name, caption) for name, caption in CHARTS.items()]
    if any(figures):
        sections.append(tag("section", tag("h2", "Where it fails"), *filter(None, figures)))
    suspects = _dicts(metrics.get("suspects"))
    if suspects:
        names = ("picture", "found", "score", "annotated", "iou")
        rows = [[row.get(name, "nothing") or "nothing" for name in names[:-1]] + [row.get("iou")] for row in suspects]
        title = "Sure detections that the annotations deny: are they complete and right?"
        sections.append(_folded(title, table(names, rows), open_=True))
    return sections


def _dicts(value) -> list[dict]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _told(metrics: dict) -> list[Html]:
    """One sentence about the score to choose."""
    best = [metrics.get(name) for name in ("best_score", "precision", "recall")]
    if not all(_is_number(value) for value in best):
        return []
    score, precision, recall = best
    said = (f"With a score threshold of {score:.2f}, where F1 is best, {100 * precision:.0f} % of the detections are right "
            f"and {100 * recall:.0f} % of the objects are found, at IoU 0.5.")  # fmt: skip
    return [tag("p", said)]


def evaluation_report(folder: Path) -> Path:
    """Writes report.html into an evaluation's folder, from what is there; gives its path."""
    metrics = _json(folder / "metrics.json")
    metrics = metrics if isinstance(metrics, dict) else {}
    texts = [f"{name}: {_shown(metrics[name])}" for name in ABOUT if metrics.get(name) is not None]
    replace_file(folder / "report.html", page("Evaluation", "; ".join(texts), evaluation_sections(folder)).encode())
    return folder / "report.html"


def training_report(run: Path) -> Path:
    """Writes curves.png and report.html into a training run's folder, from what of config.json, results.csv, log.jsonl,
    metrics.json, samples/*.jpg and evaluation/ is there; gives the page's path.

    What is missing or damaged is left out, and curves.png where matplotlib is missing. Raises OSError where the two cannot
    be written.
    """
    run = Path(run)
    config, metrics = _json(run / "config.json"), _json(run / "metrics.json")
    epochs, steps = _csv(run / "results.csv"), _lines(run / "log.jsonl")
    sections, tiles = [], {}

    aps = {i: ap for i, ap in enumerate(epochs.get("AP", [])) if not math.isnan(ap)}
    if aps:
        best = max(aps, key=aps.get)  # of equal ones the first, whose weights are kept
        tiles = {name: measured(name, epochs[name][best]) for name in ("AP", "AP50", "AP75") if name in epochs}
        tiles["best epoch"] = _shown(epochs["epoch"][best] if "epoch" in epochs else best + 1)
    if epochs:
        tiles["epochs"] = str(max(map(len, epochs.values())))
    seen = {name: sorted(filter(math.isfinite, column)) for name, column in steps.items()}
    middle = {name: column[len(column) // 2] for name, column in seen.items() if column}
    if "images/s" in middle:
        tiles["images/s"] = f"{middle['images/s']:.3g}"
    if "waiting" in middle:
        tiles["waiting for data"] = f"{middle['waiting']:.0%}"
    if "memory" in middle:
        tiles["GB of memory"] = f"{seen['memory'][-1]:.3g}"
    if tiles:
        sections.append(tag("section", tag("h2", "What came out"), _tiles(tiles)))

    try:
        curves = plots.training_curves(epochs, steps)
        if curves:
            replace_file(run / "curves.png", curves)
            sections.append(tag("section", _inline(curves, "png", "Losses, AP, learning rate and speed.")))
    except ImportError as error:
        sections.append(tag("section", tag("p", f"No curves: {error}", class_="about")))
    samples = sorted(p for p in (run / "samples").glob("*.jpg") if p.is_file())[:SAMPLES]
    figures = list(filter(None, (_picture(path, path.name) for path in samples)))
    if figures:
        head = tag("h2", "Training batches as the model saw them: are these the right boxes and names?")
        sections.append(tag("section", head, tag("div", *figures, class_="grid")))
    if epochs:
        rows = zip(*([measured(name, v) for v in column] for name, column in epochs.items()))
        sections.append(_folded("Epochs", table(epochs, rows), open_=len(next(iter(epochs.values()))) <= 24))
    if isinstance(metrics, dict) and metrics:
        sections.append(_metrics(metrics))
    sections += evaluation_sections(run / "evaluation")
    if isinstance(config, dict) and config:
        sections.append(_folded("Every setting", table((), config.items(), "plain")))
    about = "A training of fastrcnn" + (": nothing is written down here yet" if not sections else "")
    replace_file(run / "report.html", page(run.resolve().name, about, sections).encode())
    return run / "report.html"


def _metrics(metrics: dict) -> Html:
    """A column for each dict of numbers in metrics.json ("best", "last"), or one for the numbers themselves."""
    parts = {name: part for name, part in metrics.items() if isinstance(part, dict)}
    parts = parts or {"": metrics}
    names = dict.fromkeys(name for part in parts.values() for name, v in part.items() if v is None or _is_number(v))
    rows = [[name, *(measured(name, part.get(name)) for part in parts.values())] for name in names]
    return _folded("Numbers of the evaluations", table(["", *parts], rows), open_=True)
