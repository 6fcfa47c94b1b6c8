"""Compiles csrc/cuda/*.cu for the CPU, over include/emulated_cuda.h, into one library that registers them for CPU tensors.

python tests/emulated_cuda/build.py OUTPUT.so [name ...]     (all sources, or those stems)
"""

import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
TORCH = Path(torch.__file__).parent
FLAGS = ["-std=c++20", "-O1", "-march=native", "-ffp-contract=off", "-fPIC", "-w"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-include", "emulated_cuda.h"]
SYSTEM = [f"-isystem{TORCH / 'include'}", f"-isystem{TORCH / 'include/torch/csrc/api/include'}"]


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError("unbalanced parentheses")


def _split(arguments: str) -> list[str]:
    """At the commas outside brackets."""
    parts, depth, begin = [], 0, 0
    for i, c in enumerate(arguments):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append(arguments[begin:i])
            begin = i + 1
    return [*parts, arguments[begin:]]


def translate(text: str) -> str:
    """What g++ cannot parse of CUDA C++: launches and dynamic shared memory; and the CUDA key becomes the CPU key."""
    while (at := text.find("<<<")) >= 0:
        end = text.index(">>>", at)
        name = re.search(r"[\w:]+\s*(<[^;{}()]*>)?\s*$", text[:at])
        grid, threads, *rest = _split(text[at + 3 : end])
        shared = rest[0] if rest else "0"
        open_ = text.index("(", end)
        close = _closing(text, open_)
        call = (
            f"[&](auto... emulated_args) {{ ::emulated::launch({grid}, {threads}, {shared}, "
            f"[=] {{ {name[0]}(emulated_args...); }}); }}({text[open_ + 1 : close]})"
        )
        text = text[: name.start()] + call + text[close + 1 :]
    text = re.sub(r"extern\s+__shared__\s+(?:__align__\(\d+\)|alignas\(\d+\))?\s*([\w ]+?)\s+(\w+)\[\];",
                  r"\1* \2 = static_cast<\1*>(::emulated::dynamic_shared());", text)  # fmt: skip
    return re.sub(r"STABLE_TORCH_LIBRARY_IMPL\((\w+), CUDA,", r"STABLE_TORCH_LIBRARY_IMPL(\1, CPU,", text)


def compile_source(source: Path, output: Path) -> None:
    includes = [f"-I{p}" for p in (HERE / "include", source.parent, CSRC, CSRC / "cuda")]
    subprocess.run(["g++", *FLAGS, *includes, *SYSTEM, "-c", source, "-o", output], check=True)


def link(objects: Sequence[Path], output: Path, shared: bool) -> None:
    libraries = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", *(["-shared"] if shared else []), *objects, *libraries, "-o", output], check=True)


def build(output: Path, names: Sequence[str] = ()) -> None:
    """Raises CalledProcessError; what the compiler said is on stderr."""
    folder = output.parent / f"{output.stem}_sources"
    folder.mkdir(parents=True, exist_ok=True)
    for header in CSRC.glob("cuda/*.cuh"):
        (folder / header.name).write_text(translate(header.read_text()))
    sources = []
    for source in sorted(CSRC.glob("cuda/*.cu")):
        if not names or source.stem in names:
            sources.append(folder / f"{source.stem}.cpp")
            sources[-1].write_text(f'#line 1 "{source}"\n' + translate(source.read_text()))
    objects = [s.with_suffix(".o") for s in sources]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_source, sources, objects))
    link(objects, output, shared=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]).resolve(), sys.argv[2:])
