"""Kills trainings with kill -9 at random moments and compares what comes out in the end with a run that was left alone.

    python benchmarks/fuzz/training_kills.py --kills 50 --seed 0

Each training is a small Faster R-CNN on rendered pictures, with validation, in a forked process that is killed after a
random time, begun again with resume=True, killed again, until it ends. Then its losses, results.csv and weights must be
those of the undisturbed run bit for bit. Prints where the kills struck; exit status 1 where anything differs.
"""

import argparse
import csv
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from training_stubs import cells, tiny

from fastrcnn.data import open_dataset
from fastrcnn.training import checkpoint, loop, train
from fastrcnn.weights import infer_model


def child(folder: Path, out: Path) -> int:
    """Starts a training in a process of its own."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        os.dup2(os.open(out.parent / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        data = open_dataset(folder / "all.json")
        loop.LOOK = 2
        train(tiny(), data, out=out, resume=True, val=data, epochs=3, batch_size=2, save_every=0.0, workers=1)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(pid: int, seconds: float) -> bool:
    """Waits for a process; kills it when the time is over. Whether it ended by itself, with success."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status:
                raise SystemExit(f"a training ended with status {status}")
            return True
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def losses(out: Path) -> list[dict]:
    keys = ("step", "loss", "lr", "grad_norm")
    return [{k: json.loads(line)[k] for k in keys} for line in (out / "log.jsonl").read_text().splitlines()]


def place(out: Path) -> str:
    """What the process was at when it was killed, as far as its files tell."""
    parts = [*out.glob(".*.part"), *out.glob("states/.*.part")]
    if parts:
        return "writing a file"
    if not (out / "log.jsonl").exists():
        return "before the first step"
    rows = (out / "log.jsonl").read_text().splitlines()
    epochs = list(csv.reader((out / "results.csv").open())) if (out / "results.csv").exists() else [[]]
    steps = len(rows)
    return "validating, or saving an epoch" if steps and steps % 3 == 0 and steps // 3 > len(epochs) - 1 else "stepping"


def compare(out: Path, whole: Path) -> list[str]:
    found = [] if losses(out) == losses(whole) else ["losses"]
    found += [] if (out / "results.csv").read_bytes() == (whole / "results.csv").read_bytes() else ["results.csv"]
    for name in ("best", "last"):
        a, b = (infer_model(folder / f"{name}.safetensors").state_dict() for folder in (out, whole))
        if not all(map(torch.equal, a.values(), b.values())):
            found.append(f"{name}.safetensors")
    return found + [f"left over: {part.name}" for part in out.rglob("*.part")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, kills, runs, wrong, places = random.Random(args.seed), 0, 0, 0, Counter()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        cells(folder, 6)
        whole = folder / "whole" / "run"
        whole.parent.mkdir()
        start = time.perf_counter()
        ended(child(folder, whole), 3600)
        length = time.perf_counter() - start
        while kills < args.kills:
            out = folder / f"cut{runs}" / "run"
            out.parent.mkdir()
            states, longer, before, start = [], 1.0, kills, time.perf_counter()
            while not ended(child(folder, out), length * rng.uniform(0.02, 0.5) * longer):
                kills += 1
                places[place(out)] += 1
                newest = checkpoint.state_files(out)[-1:]
                # Where a kill came before anything was saved, the next one waits longer: the machine may be busy.
                states, longer = newest, longer * 1.5 if newest == states else 1.0
                print(f"{kills} kills, {newest[0].name if newest else 'no state'}", flush=True)
            runs += 1
            if kills == before:  # the machine has become quicker
                length = time.perf_counter() - start
            differs = compare(out, whole)
            wrong += bool(differs)
            print(f"run {runs}: {kills} kills so far, {', '.join(differs) or 'the same bits'}", flush=True)
    print(f"{kills} kills in {runs} runs")
    for name, count in places.most_common():
        print(f"  {count:4} {name}")
    print(f"runs that differ from the undisturbed one: {wrong}")
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
