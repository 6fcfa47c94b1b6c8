"""Damaged annotation files of COCO's, Pascal VOC's and YOLO's: each is read as it is written, or refused with a ValueError
that names it; without `strict`, what is dropped is counted.

    python benchmarks/fuzz/annotations.py --seconds 60 --seed 0

Every batch of files runs in a process of its own, so that a crash or a hang is a finding like any other. A finding is
printed with its number; --only NUMBER makes those files again, and keeps them in annotations_NUMBER/. Exit status 1 with
findings.
"""

import argparse
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

BATCH, PATIENCE_S = 200, 60
HOSTILE = [
    *(None, True, False, "", "x", "0", "1", "-0", "007", "1e3", " 1", "٣", "\0", "\x1b[31m", "é" * 300),
    *(0, -1, -0.0, 1.0, 1.5, 1e-320, 1e308, 1e400, math.nan, -math.inf, 2**31, 2**63, 10**30, 10**400),
    *([], [1], [[]], {}, {"id": 1}),
]


def plain(rng: random.Random) -> dict:
    """A file without damage; some boxes are thin, outside, or over the edge."""
    images = [dict(id=i, file_name=f"{i}.png", width=rng.randint(1, 90), height=rng.randint(1, 90))
              for i in rng.sample(range(50), rng.randint(1, 4))]  # fmt: skip
    categories = [dict(id=i, name=f"c{i}") for i in rng.sample(range(9), rng.randint(1, 4))]
    annotations = []
    for n in range(rng.randint(0, 8)):
        box = [
            rng.choice([0, rng.uniform(-20, 100)]),
            rng.uniform(-20, 100),
            rng.choice([0, 0.4, 30, 1e6]),
            rng.uniform(0, 60),
        ]
        annotations.append(dict(id=n, image_id=rng.choice(images)["id"], category_id=rng.choice(categories)["id"], bbox=box,
                                area=box[2] * box[3], iscrowd=int(rng.random() < 0.2)))  # fmt: skip
    return dict(images=images, annotations=annotations, categories=categories)


def damage(content: dict, rng: random.Random) -> str:
    """Changes one thing in place; returns what kind it was."""
    part = rng.choice(list(content))
    rows = content[part]
    if rng.random() < 0.1 or not isinstance(rows, list) or not rows:
        content[part] = rng.choice([*HOSTILE, rows and [rows]])
        return "a part replaced"
    at = rng.randrange(len(rows))
    if not isinstance(rows[at], dict) or rng.random() < 0.1:
        rows[at] = rng.choice(HOSTILE)
        return "an entry replaced"
    key = rng.choice(sorted(rows[at], key=str) or ["id"])
    kind = rng.choice(["removed", "replaced", "replaced", "as a text", "twice", "number"])
    if kind == "removed":
        rows[at].pop(key, None)
    elif kind == "replaced":
        rows[at][key] = rng.choice(HOSTILE)
    elif kind == "as a text":
        rows[at][key] = str(rows[at].get(key))
    elif kind == "twice":
        rows.insert(rng.randrange(len(rows) + 1), dict(rows[at]))
    elif isinstance(rows[at].get("bbox"), list) and rows[at]["bbox"]:
        rows[at]["bbox"][rng.randrange(len(rows[at]["bbox"]))] = rng.choice(HOSTILE)
    return f"a field {kind}"


def damaged(number: int, seed: int) -> tuple[bytes, str]:
    """The bytes of a file, and what was done to it."""
    rng = random.Random(f"{seed}/{number}")
    content = plain(rng)
    kinds = [damage(content, rng) for _ in range(rng.choice([0, 1, 1, 1, 2, 3]))]
    data = json.dumps(content, ensure_ascii=rng.random() < 0.5).encode("utf-8", "replace")
    way = rng.random()
    if way < 0.1:
        encoding = rng.choice(["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "latin-1", "utf-7"])
        return data.decode().encode(encoding, "replace"), f"in {encoding}"
    if way < 0.3:
        raw = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(raw))
            raw[at : at + rng.choice([0, 1, 1, 9])] = rng.choice(
                [b"", b"\0", b"[" * 2000, b"1" * 5000, rng.randbytes(1)]
            )
            raw = raw or bytearray(b" ")
        return bytes(raw[: rng.randrange(len(raw))] if rng.random() < 0.3 else raw), "bytes changed or cut"
    return data, kinds[0] if kinds else "no damage"


TEXTS = [
    "",
    "x",
    "-1",
    "0",
    "1.5",
    "1e400",
    "nan",
    "-inf",
    "9" * 400,
    "\0",
    "\x1b[31m",
    "&b;",
    "<b/>",
    "é" * 300,
    "'",
    "[",
]

BYTES = [b"", b"\0", b"<a>" * 200, b"[" * 200, b"<!DOCTYPE a [<!ENTITY b 'c'>]>", b"\n  - ", b": "]


def voc(rng: random.Random) -> dict[str, str]:
    """Some annotation files, some of whose values are not as they should be."""
    wrong = rng.choice([0, 0.01, 0.1])
    value = lambda v: rng.choice(TEXTS) if rng.random() < wrong else v  # noqa: E731
    files = {}
    for name in "abc"[: rng.randint(1, 3)]:
        rows = "".join(
            f"<object><name>{value('cat')}</name><difficult>{value(rng.randint(0, 1))}</difficult><bndbox>"
            + "".join(f"<{k}>{value(rng.randint(1, 70))}</{k}>" for k in ("xmin", "ymin")) + "".join(
            f"<{k}>{value(rng.randint(60, 90))}</{k}>" for k in ("xmax", "ymax")) + "</bndbox></object>\n"
            for _ in range(rng.randint(0, 3)))  # fmt: skip
        size = f"<size><width>{value(90)}</width><height>{value(80)}</height></size>"
        files[f"{name}.xml"] = f"<annotation><filename>{value(name + '.png')}</filename>{size}{rows}</annotation>"
    return files


def yolo(rng: random.Random) -> dict[str, str]:
    wrong = rng.choice([0, 0.01, 0.1])
    value = lambda v: rng.choice(TEXTS) if rng.random() < wrong else str(v)  # noqa: E731
    files = {}
    for name in "abc"[: rng.randint(1, 3)]:
        rows = []
        for _ in range(rng.randint(0, 4)):
            numbers = rng.choice([4, 4, 4, 6, 8, 5])
            rows.append([value(rng.randint(0, 2)), *(value(round(rng.random(), 3)) for _ in range(numbers))])
        files[f"labels/{name}.txt"] = "".join(" ".join(row) + "\n" for row in rows)
    if rng.random() < 0.5:
        names = rng.choice(["[cat, dog, fox]", "\n- cat\n- 'dog'\n- fox", "\n  0: cat\n  1: dog\n  2: fox"])
        files["data.yaml"] = f"path: {value('.')}\ntrain: {value('images')}\nnc: {value(3)}\nnames: {names}\n"
    return files


def damaged_files(number: int, seed: int) -> tuple[dict[str, bytes], str]:
    """Files by name, and what was done to them."""
    rng = random.Random(f"{seed}/{number}")
    which = ("coco", "voc", "yolo")[number % 3]
    if which == "coco":
        data, kind = damaged(number, seed)
        return {"a.json": data}, f"coco, {kind}"
    files, kind = (voc if which == "voc" else yolo)(rng), "values"
    files = {name: text.encode("utf-8", "replace") for name, text in files.items()}
    if rng.random() < 0.5:
        name, kind = rng.choice(sorted(files)), "bytes changed or cut"
        raw = bytearray(files[name])
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(raw) + 1)
            raw[at : at + rng.choice([0, 1, 1, 9])] = rng.choice([*BYTES, rng.randbytes(1)])
        files[name] = bytes(raw[: rng.randrange(len(raw) + 1)] if rng.random() < 0.3 else raw)
    return files, f"{which}, {kind}"


def check(folder: Path, files: dict[str, bytes]) -> str:
    """ "read" or "refused"; raises AssertionError, or whatever a reader raises and must not."""
    from fastrcnn.data import open_dataset

    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    path = folder / "a.json" if "a.json" in files else folder
    results = []
    for strict in (True, False):
        start = time.perf_counter()
        try:
            dataset = open_dataset(path, strict=strict)
        except ValueError as error:
            text = str(error)
            assert str(folder) in text and text.isprintable() and len(text) < 1000, f"not a message: {text[:200]!r}"
            results.append("refused")
            continue
        finally:
            assert time.perf_counter() - start < 5, "slow"
        results.append("read")
        whole(dataset)
        if strict and path.suffix:
            as_written(dataset, json.loads(files["a.json"]))
        assert not strict or not dataset.findings.dropped
    assert results != ["read", "refused"], "read when strict alone"
    return "read" if results[0] == "read" else f"refused, {results[1]} without strict"


def whole(dataset) -> None:
    """Every box is one, and none is lost without a count."""
    import torch

    kept = 0
    for index, target in enumerate(dataset.targets):
        boxes = torch.cat([target["boxes"], target["ignore_boxes"]])
        sides = torch.tensor(dataset.sizes[index].tolist()[::-1] * 2, dtype=torch.float32)
        assert boxes.isfinite().all() and (boxes >= 0).all() and (boxes <= sides).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all() and len(target["boxes"]) == len(target["labels"])
        assert ((target["labels"] >= 0) & (target["labels"] < len(dataset.class_names))).all()
        kept += len(boxes)
    lost = sum(dataset.left_out[reason] for reason in ("less than a pixel wide or high", "outside the picture"))
    assert kept + lost == len(dataset.rows(range(len(dataset)))), "annotations lost without a count"
    assert len(set(dataset.class_names)) == len(set(dataset.category_ids)) == len(dataset.class_names)
    assert all(str(finding) for finding in dataset.findings)


def as_written(dataset, written: dict) -> None:
    rows = dataset.rows(range(len(dataset)))
    assert len(rows) == len(written["annotations"])
    place = {str(dataset.targets[i]["image_id"]): i for i in range(len(dataset))}
    order = sorted(written["annotations"], key=lambda a: place[f"{a['image_id']}".removesuffix(".0")])
    assert [row["bbox"] for row in rows] == [[float(v) for v in a["bbox"]] for a in order]
    assert len(dataset.class_names) == len(written["categories"])


def pictures(folder: Path) -> None:
    """What the files speak of."""
    from PIL import Image

    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (90, 80)).save(folder / "images" / name)


def work(first: int, count: int, seed: int, folder: Path) -> None:
    """One batch, in its own process: a line a file."""
    for number in range(first, first + count):
        files, kind = damaged_files(number, seed)
        print(number, flush=True)
        pictures(place := folder / str(number))
        try:
            result = check(place, files)
        except Exception as error:
            result = f"{type(error).__name__}: {str(error)[:200]}"
        shutil.rmtree(place)
        print(json.dumps([kind, result]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one file")
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)  # the first number: a process of ours
    args = parser.parse_args()
    if args.only is not None:
        files, kind = damaged_files(args.only, args.seed)
        pictures(folder := Path(f"annotations_{args.only}"))
        print(kind, check(folder, files))
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.batch is not None:
            return work(args.batch, BATCH, args.seed, Path(folder))
        first, tried, findings, end = 0, Counter(), 0, time.time() + args.seconds
        while time.time() < end:
            command = [sys.executable, __file__, "--batch", str(first), "--seed", str(args.seed)]
            try:
                run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
                lines, ended = run.stdout.splitlines(), f"the process ended with {run.returncode}: {run.stderr[-200:]}"
            except subprocess.TimeoutExpired as late:
                lines, ended = (late.stdout or b"").decode().splitlines(), f"no answer in {PATIENCE_S} s"
            for number, line in zip(lines[::2], [*lines[1::2], None]):
                kind, result = json.loads(line) if line else ("crash", ended)
                tried[f"{kind}: {result}" if result.startswith(("read", "refused")) else "FINDINGS"] += 1
                if not result.startswith(("read", "refused")):
                    findings += 1
                    print(f"{number} ({kind}): {result}")
            first += BATCH
    for kind, count in sorted(tried.items()):
        print(f"{count:7} {kind}")
    print(f"{sum(tried.values())} files of seed {args.seed}, {findings} findings")
    sys.exit(findings > 0)


if __name__ == "__main__":
    main()
