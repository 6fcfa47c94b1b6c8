"""Damaged pictures for the decoder: `python benchmarks/fuzz/pictures.py --minutes 15 --seed 0`.

Small pictures of every format that is read are damaged from a seed (bits, bytes, lengths, parts of other files; PNGs
also inside their chunks, with checksums that fit) and decoded in a subprocess with 3 GiB of memory and 20 seconds of a
processor a picture. Each must give pixels or a ValueError. A picture that ends the process, or does anything else, is
written to --keep under its number, and the run goes on with the next one; the exit status is the number of such
pictures, at most 99.
"""

import argparse
import io
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

SECONDS, MEMORY = 20, 3 << 30
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
FORMATS = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "RGBA", "L", "P", "1", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("P",),
    "BMP": ("RGB", "P"),
    "TIFF": ("RGB", "L", "F", "I;16", "CMYK"),
    "AVIF": ("RGB",),
    "JPEG2000": ("RGB", "L"),
    "PPM": ("RGB", "L", "1"),
}
OPTIONS = {
    "JPEG": ({}, dict(progressive=True)),
    "TIFF": ({}, dict(compression="tiff_lzw"), dict(compression="tiff_deflate")),
    "WEBP": ({}, dict(lossless=True)),
}


def whole_pictures() -> list[tuple[str, bytes]]:
    """(format, file) of a small picture in every format and mode, with EXIF data where the format takes it."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (21, 34, 3), np.uint8))
    exif, files = Image.Exif(), []
    exif[0x0112] = 6
    for kind, modes in FORMATS.items():
        for mode in modes:
            for options in OPTIONS.get(kind, ({},)):
                picture = noise.convert("L").convert("I").convert(mode) if mode == "I;16" else noise.convert(mode)
                if mode == "F":
                    picture = Image.fromarray(np.asarray(picture) / np.float32(255))
                file = io.BytesIO()
                extra = dict(exif=exif) if kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") else {}
                picture.save(file, kind, **options, **extra)
                files.append((kind, file.getvalue()))
    return files


def damaged(data: bytes, others: list[tuple[str, bytes]], rng: random.Random) -> bytes:
    """One to four damages, one after the other."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, what = rng.randrange(len(out) + 1), rng.randrange(7)
        if what == 0:
            for _ in range(rng.randint(1, 8)):
                if out:
                    out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        elif what == 1:
            out[at : at + 1] = rng.randbytes(1)
        elif what == 2:
            form = rng.choice(("<H", ">H", "<I", ">I"))
            number = struct.pack(form, rng.choice(NUMBERS) & (0xFFFF if form[1] == "H" else 0xFFFFFFFF))
            out[at : at + len(number)] = number
        elif what == 3:
            del out[at : at + rng.randint(1, 64)]
        elif what == 4:
            out[at:at] = out[at : at + rng.randint(1, 64)]
        elif what == 5:
            del out[rng.randrange(len(out) // 2, len(out) + 1) :]
        else:
            other = rng.choice(others)[1]
            start = rng.randrange(len(other))
            out[at : at + 64] = other[start : start + 64]
    return bytes(out)


def damaged_png(data: bytes, others: list[tuple[str, bytes]], rng: random.Random) -> bytes:
    """A PNG whose header, rows before compression, or another chunk is damaged, and whose checksums fit."""
    out, at, chunks = data[:8], 8, []
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    hit = rng.randrange(len(chunks))
    for i, (kind, content) in enumerate(chunks):
        if i == hit and kind == b"IDAT":
            content = zlib.compress(damaged(zlib.decompress(content), others, rng))
        elif i == hit:
            content = damaged(content or b"\0", others, rng)
        out += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return out


def case(number: int, seed: int, files: list[tuple[str, bytes]]) -> tuple[str, bytes]:
    rng = random.Random(f"{seed} {number}")
    kind, data = files[number % len(files)]
    damage = damaged_png if kind == "PNG" and rng.random() < 0.6 else damaged
    return kind, damage(data, files, rng)


def work(first: int, last: int, seed: int) -> None:
    """Decodes pictures first..last-1; says on a line each, before, which one it is, and after, what came of it."""
    from fastrcnn.data.decode import decode

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
    files = whole_pictures()
    for _, data in files:  # they are right, and what is imported late is imported now
        decode(data)
    for number in range(first, last):
        kind, data = case(number, seed, files)
        print(number, kind, end=" ", flush=True)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            pixels = decode(data)
            right = str(pixels.dtype) == "torch.uint8" and pixels.shape[0] == 3 and 0 not in pixels.shape
            print("pixels" if right else f"wrong: {pixels.dtype} {list(pixels.shape)}", flush=True)
        except ValueError as error:
            clean = "\n" not in str(error) and " at 0x" not in str(error)
            print("refused" if clean else f"wrong: {error!r}", flush=True)
        except BaseException as error:
            print(f"wrong: {error!r}", flush=True)
    print(last, "MiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz_found"), help="folder for what is found")
    parser.add_argument("--work", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*options.work, options.seed)
        return 0
    files, number, found, counts, largest = whole_pictures(), 0, [], Counter(), 0
    end = time.monotonic() + 60 * options.minutes
    while time.monotonic() < end:
        command = [sys.executable, "-W", "ignore", __file__, "--seed", str(options.seed), "--work"]
        run = subprocess.run([*command, str(number), str(number + 2000)], capture_output=True, text=True, errors="replace",
                             preexec_fn=lambda: os.nice(10), env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        rows = [line.split(" ", 2) for line in run.stdout.splitlines()]
        if not rows:
            print(run.stderr[-2000:])
            return 99
        for row in rows:
            number, kind = int(row[0]), row[1]
            outcome = row[2] if len(row) > 2 and row[2] else f"dead: {run.returncode}"
            if kind == "MiB":
                largest = max(largest, int(outcome))
                break
            counts[kind, outcome.split(":")[0]] += 1
            if outcome.startswith(("wrong", "dead")):
                found.append((number, kind, outcome))
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / f"{options.seed}_{number}").write_bytes(case(number, options.seed, files)[1])
            number += 1
    table = {kind: {o: n for (k, o), n in sorted(counts.items()) if k == kind} for kind in FORMATS}
    print(json.dumps(dict(seed=options.seed, pictures=sum(counts.values()), most_memory_mib=largest, **table)))
    for row in found:
        print(*row)
    return min(len(found), 99)


if __name__ == "__main__":
    sys.exit(main())
