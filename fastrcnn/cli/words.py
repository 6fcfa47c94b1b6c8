"""The words `name=value` of ultralytics' command line, as the options that they are here."""

from collections.abc import Sequence

PLAIN = ("source", "data")
OPTIONS = dict(
    model="--weights", conf="--score", iou="--iou", max_det="--max-det", epochs="--epochs", batch="--batch", lr0="--lr",
    device="--device", workers="--workers", seed="--seed", patience="--patience", project="--out", format="--to",
    split="--split", line_width="--line-width",
)  # fmt: skip
FORMATS = dict(save_txt="yolo", save_crop="crops")


def in_options(words: Sequence[str]) -> list[str] | None:
    """A verb and its words with those of ultralytics' said as options; None where there are none. What is unknown stays."""
    verb, known = words[:1], {"imgsz", *PLAIN, *OPTIONS, *FORMATS}
    if not any("=" in word and word.partition("=")[0] in known for word in words[1:]):
        return None
    said: list[str] = []
    formats: list[str] = []
    for word in words[1:]:
        name, _, value = word.partition("=")
        if name in FORMATS:
            formats += [FORMATS[name]] if value in ("", "True", "true") else []
        elif not value:
            said.append(word)
        elif name in PLAIN or (name == "model" and verb == ["export"]):
            said.insert(0, value)
        elif name == "imgsz":
            said += ["--min-size", value, "--max-size", value]
        elif name in OPTIONS:
            said += [OPTIONS[name], value]
        else:
            said.append(word)
    return [*verb, *said, *(["--format", ",".join(formats)] if formats else [])]
