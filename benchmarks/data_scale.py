"""A dataset of ten million pictures: the index in time and memory, workers that stay flat, a plan that covers each once.

    python benchmarks/data_scale.py --pictures 10000000 --boxes 1

Writes a COCO file of that many pictures (their files are sixteen photographs, again and again) to a temporary folder, opens
it in a process of its own, reads a few hundred batches in two workers, and deals an epoch out to 256 processes. Prints one
line of JSON a measurement.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FILES = 16


def write(folder: Path, pictures: int, boxes: int) -> Path:
    from PIL import Image

    from fastrcnn.data.rendered_cells import render_cells

    (folder / "images").mkdir()
    for i in range(FILES):
        Image.fromarray(render_cells(i, 96, 128)[0]).save(folder / "images" / f"{i:012d}.jpg")
    path = folder / "instances_large.json"
    with open(path, "w") as file:
        file.write('{"info": {}, "images": [')
        for first in range(0, pictures, 100_000):
            rows = (f'{{"license": 1, "file_name": "{i % FILES:012d}.jpg", "height": 96, "width": 128, "id": {i + 1}}}'
                    for i in range(first, min(first + 100_000, pictures)))  # fmt: skip
            file.write((", " if first else "") + ", ".join(rows))
        file.write('], "annotations": [')
        total = pictures * boxes
        for first in range(0, total, 100_000):
            rows = (f'{{"area": 702.1057, "iscrowd": 0, "image_id": {i // boxes + 1}, '
                    f'"bbox": [{i % 97 / 2}, 12.36, {20 + i % 7}.5, 33.17], "category_id": {i % 80 + 1}, "id": {i + 1}}}'
                    for i in range(first, min(first + 100_000, total)))  # fmt: skip
            file.write((", " if first else "") + ", ".join(rows))
        categories = [dict(id=i + 1, name=f"class {i}") for i in range(80)]
        file.write('], "categories": ' + json.dumps(categories) + "}")
    return path


def private_mb(process: int) -> float:
    """Memory that a process shares with nobody."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(path: Path) -> None:
    import numpy as np

    from fastrcnn.data import batches, open_dataset
    from fastrcnn.data.batches import _share, plan

    def say(what: str, **values) -> None:
        values = {k: round(v, 1) if isinstance(v, float) else v for k, v in values.items()}
        print(json.dumps({"what": what, **values, "peak_mb": round(peak_mb(), 1)}), flush=True)

    say("before")
    start, busy = time.perf_counter(), time.process_time()
    dataset = open_dataset(path)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    say("index", pictures=len(dataset), boxes=len(dataset.table.boxes), seconds=seconds, cpu_seconds=busy)
    loader, seen, start = batches(dataset, 8, seed=0, epoch=0, workers=2), 0, time.perf_counter()
    for step, (images, _, _) in enumerate(loader, 1):
        seen += len(images)
        if step in (20, 200, 1000):
            private = [round(private_mb(process), 1) for process in loader._pool._processes]
            say("workers", batches=step, private_mb=private, images_a_second=seen / (time.perf_counter() - start))
        if step == 1000:
            break
    loader.close()
    start = time.perf_counter()
    order, ends = plan(dataset, 8, seed=0, epoch=1, world=256)
    seconds, times = time.perf_counter() - start, np.zeros(len(dataset), np.int32)
    for a, b in zip([0, *ends[:-1]], ends):
        for rank in range(256):
            times[_share(order[a:b], rank, 256)] += 1
    say("plan", processes=256, steps=len(ends), seconds=seconds, least=int(times.min()), most=int(times.max()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=10_000_000)
    parser.add_argument("--boxes", type=int, default=1, help="of each picture")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # a process of ours
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), args.pictures, args.boxes)
        print(json.dumps({"what": "file", "mb": path.stat().st_size >> 20, "cpus": os.cpu_count()}), flush=True)
        sys.exit(subprocess.run([sys.executable, __file__, "--measure", str(path)]).returncode)


if __name__ == "__main__":
    main()
