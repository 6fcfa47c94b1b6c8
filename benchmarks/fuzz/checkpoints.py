"""Damages files of weights and configurations, reads each in a process of its own, and counts how it ends.

    python benchmarks/fuzz/checkpoints.py --count 2000 --seed 0

A file is read, or refused by ValueError, OSError or ImportError; anything else (another exception, a signal, more than
--seconds, more than --memory of address space) is a fault: its file is kept in --out, and the exit status is 1.
"""

import argparse
import collections
import io
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save as safetensors_bytes

from fastrcnn.models import faster_rcnn
from fastrcnn.weights import export_weights, infer_model, load_checkpoint, save
from fastrcnn.zoo.config_file import read_config

SMALL = dict(
    min_size=64, max_size=96, backbone=dict(base_channels=4), neck=dict(in_channels=[4, 8, 16, 32], out_channels=8),
    rpn_head=dict(in_channels=8, feat_channels=8),
    roi_head=dict(bbox_roi_extractor=dict(out_channels=8), bbox_head=dict(in_channels=8, fc_out_channels=4)),
)  # fmt: skip
CONFIG = b"""_base_ = []
size = (4, 5)
names = [*['a', 'b'], *list('cd')]
model = dict(type='RPN', neck=None, scale={'x': size[0] ** 2, **dict(y=[i * 2 for i in range(3)])})
text = f'{size}' + '{{ fileDirname }}' + '{{$HOME:x}}' * 2
model['again'] = [names] * 3
other = dict(_delete_=True, model=model, lr=-0.02 / 4)
"""


def originals(folder: Path) -> dict[str, bytes]:
    """Small files of every kind that is read, by their names."""
    model = faster_rcnn("r18_fpn", 2, **SMALL)
    state = model.state_dict()
    theirs = export_weights(faster_rcnn("r18_fpn", 2, "detectron2", **SMALL), "detectron2")
    arrays = dict(model={key: value.numpy() for key, value in theirs.items()})
    old, cfg = io.BytesIO(), dict(cfg="data_preprocessor=dict(mean=[1, 2, 3], std=[4, 5, 6])\nstyle='caffe'")
    torch.save(dict(meta=cfg, state_dict=state), old, _use_new_zipfile_serialization=False)
    files = {f"own{kind}": save(model, folder / f"own{kind}").read_bytes() for kind in (".pth", ".safetensors")}
    return files | {
        "old.pth": old.getvalue(),
        "plain.safetensors": safetensors_bytes(state),
        **{f"protocol{p}.pkl": pickle.dumps(arrays, p) for p in (2, 4, 5)},
        "config.py": CONFIG,
        "config.json": json.dumps(dict(model=dict(type="RPN"), x=[1, [2, dict(y="{{ fileDirname }}")]])).encode(),
    }


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, swapped, repeated, left out or cut off, most of them where the structure is: at the ends."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        near = min(len(out) - 1, 3000)
        at = rng.choice((rng.randrange(len(out)), rng.randrange(near + 1), len(out) - 1 - rng.randrange(near + 1)))
        length = rng.choice((1, 1, 2, 8, 64))
        match rng.randrange(6):
            case 0:
                out[at] = rng.randrange(256)
            case 1:
                out[at] ^= 1 << rng.randrange(8)
            case 2:
                del out[at : at + length]
            case 3:
                out[at:at] = out[at : at + length] * rng.choice((1, 3, 1000))
            case 4:
                out[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4), b"\x85" * 4))
            case 5:
                del out[at:]
        out = out or bytearray(b"\0")
    return bytes(out)


def read(paths: list[str], seconds: float) -> None:
    """In the process that may end: says before and after each file how it went. A file that hangs ends it by SIGALRM."""
    for path in paths:
        print(f"begin {path}", flush=True)
        signal.alarm(max(int(3 * seconds), 1))
        start = time.monotonic()
        try:
            if Path(path).suffix in (".py", ".json"):
                read_config(path)
            else:  # our own files say what they are of; the others are too small for a name
                infer_model(path) if "_own" in path else load_checkpoint(path)
            how = "read"
        except (ValueError, OSError, ImportError) as error:
            how = f"refused ({type(error).__name__})"
        except BaseException as error:
            how = f"FAULT {type(error).__name__}: {str(error)[:100]}"
        print(f"end {path}\t{how}\t{time.monotonic() - start:.2f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--memory", type=float, default=8.0, help="GiB")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "fuzz_checkpoints")
    parser.add_argument("--read", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_AS, (int(args.memory * 2**30),) * 2)
        read(args.read, args.seconds)
        return 0
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    files, rng, counts = originals(args.out), random.Random(args.seed), collections.Counter()
    todo = []
    for i in range(args.count):
        name = rng.choice(list(files))
        todo.append(args.out / f"{i:06d}_{name}")
        todo[-1].write_bytes(damaged(files[name], rng))
    while todo:
        batch, todo = todo[:100], todo[100:]
        command = [sys.executable, "-W", "ignore", __file__, "--memory", str(args.memory)]
        command += ["--seconds", str(args.seconds), "--read", *map(str, batch)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            lines = process.stdout.read().splitlines()
        begun = [line[6:] for line in lines if line.startswith("begin ")]
        for line in (line for line in lines if line.startswith("end ")):
            path, how, seconds = line[4:].split("\t")
            how = f"FAULT took {seconds} s" if float(seconds) > args.seconds else how
            counts[Path(path).suffix, how.split(":")[0][:40]] += 1
            if how.startswith("FAULT"):
                print(path, how)
            else:
                os.unlink(path)
        if process.returncode:  # it ended at the last file begun: go on behind it
            last = begun[-1] if begun else str(batch[0])
            print(last, f"FAULT the process ended with {process.returncode}")
            counts[Path(last).suffix, f"FAULT exit {process.returncode}"] += 1
            todo = batch[[str(p) for p in batch].index(last) + 1 :] + todo
    for (suffix, how), number in sorted(counts.items()):
        print(f"{suffix:14}{how:40}{number:8}")
    return int(any("FAULT" in how for _, how in counts))


if __name__ == "__main__":
    sys.exit(main())
