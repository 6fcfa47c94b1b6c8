"""Damaged annotation files against CocoDataset: each is read as it is written, or refused with a ValueError that names it.

    python benchmarks/fuzz/annotations.py --seconds 60 --seed 0

Every batch of files runs in a process of its own, so that a crash or a hang is a finding like any other. A finding is
printed with its number; --only NUMBER makes that file again, and keeps it as annotations_NUMBER.json. Exit status 1 with
findings.
"""

import argparse
import json
import math
import random
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


def check(path: Path, data: bytes) -> str:
    """ "read" or "refused"; raises AssertionError, or whatever the loader raises and must not."""
    import torch

    from fastrcnn.data import CocoDataset

    path.write_bytes(data)
    start = time.perf_counter()
    try:
        dataset = CocoDataset(path)
    except ValueError as error:
        text = str(error)
        assert str(path) in text and text.isprintable() and len(text) < 1000, f"not a message: {text[:200]!r}"
        return "refused"
    finally:
        assert time.perf_counter() - start < 5, "slow"
    written = json.loads(data)
    assert [a["bbox"] for a in dataset.annotations] == [[float(v) for v in a["bbox"]] for a in written["annotations"]]
    assert [str(a["image_id"]) for a in dataset.annotations] == [f"{a['image_id']}".removesuffix(".0")
                                                                 for a in written["annotations"]]  # fmt: skip
    assert len(set(dataset.class_names)) == len(set(dataset.category_ids)) == len(written["categories"])
    kept = 0
    for image, target in zip(dataset.images, dataset.targets, strict=True):
        boxes = torch.cat([target["boxes"], target["ignore_boxes"]])
        sides = torch.tensor([image["width"], image["height"]] * 2, dtype=torch.float32)
        assert boxes.isfinite().all() and (boxes >= 0).all() and (boxes <= sides).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all() and len(target["boxes"]) == len(target["labels"])
        assert ((target["labels"] >= 0) & (target["labels"] < len(dataset.class_names))).all()
        kept += len(boxes)
    lost = sum(n for reason, n in dataset.left_out.items() if reason != "cut at the edge")
    assert kept + lost == len(written["annotations"]), "annotations lost without a count"
    if any(not a["iscrowd"] for a in dataset.annotations):
        assert len(dataset.truth(range(len(dataset))).labels) == len(written["annotations"])
    return "read"


def work(first: int, count: int, seed: int, folder: Path) -> None:
    """One batch, in its own process: a line a file."""
    for number in range(first, first + count):
        data, kind = damaged(number, seed)
        print(number, flush=True)
        try:
            result = check(folder / "a.json", data)
        except Exception as error:
            result = f"{type(error).__name__}: {str(error)[:200]}"
        print(json.dumps([kind, result]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one file")
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)  # the first number: a process of ours
    args = parser.parse_args()
    if args.only is not None:
        data, kind = damaged(args.only, args.seed)
        print(kind, check(Path(f"annotations_{args.only}.json"), data))
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
                tried[f"{kind}: {result}" if result in ("read", "refused") else "FINDINGS"] += 1
                if result not in ("read", "refused"):
                    findings += 1
                    print(f"{number} ({kind}): {result}")
            first += BATCH
    for kind, count in sorted(tried.items()):
        print(f"{count:7} {kind}")
    print(f"{sum(tried.values())} files of seed {args.seed}, {findings} findings")
    sys.exit(findings > 0)


if __name__ == "__main__":
    main()
