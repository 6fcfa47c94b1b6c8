"""Compiles csrc/cuda/*.cu for the CPU, over include/emulated_cuda.h, into one library that registers them for CPU tensors.

python tests/emulated_cuda/build.py OUTPUT.so [name ...]     (all sources, or those stems)
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
TORCH = Path(torch.__file__).parent
SANITISED = os.environ.get("EMULATED_CUDA_SANITIZE") == "thread"  # then sanitize.sh's environment has to run it
FLAGS = ["-std=c++20", "-O1", "-march=native", "-ffp-contract=off", "-fPIC", "-w"]
KERNELS = [*FLAGS, f"-I{HERE / 'include'}", f"-I{CSRC}", f"-I{CSRC / 'cuda'}", f"-isystem{TORCH / 'include'}"]
KERNELS += [f"-isystem{TORCH / 'include/torch/csrc/api/include'}", "-DTORCH_TARGET_VERSION=0x020b000000000000"]


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
                  r"\1* \2 = reinterpret_cast<\1*>(::emulated::here.dynamic_shared);", text)  # fmt: skip
    return re.sub(r"STABLE_TORCH_LIBRARY_IMPL\((\w+), CUDA,", r"STABLE_TORCH_LIBRARY_IMPL(\1, CPU,", text)


def _compiler(*arguments) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}  # a sanitiser's runtime is not for g++
    subprocess.run(["g++", *arguments], check=True, env=environment)


def _compile_device(output: Path, sanitised: bool) -> None:
    tsan = ["-DEMULATED_CUDA_TSAN"] if sanitised else []
    _compiler(*FLAGS, *tsan, "-c", HERE / "device.cpp", "-o", output)


def _compile_kernels(source: Path, output: Path, prelude: str, sanitised: bool) -> None:
    """`prelude` makes the source CUDA: emulated_torch.h, or emulated_cuda.h alone."""
    tsan = ["-g1", "-fsanitize=thread", "--param", "tsan-distinguish-volatile=1"] if sanitised else []
    _compiler(*KERNELS, *tsan, "-include", prelude, "-c", source, "-o", output)


def _link(objects: Sequence[Path], output: Path, flags: Sequence[str], sanitised: bool) -> None:
    tsan = ["-fsanitize=thread"] if sanitised else []
    _compiler(*tsan, *objects, *flags, "-o", output)


def build(
    output: Path,
    names: Sequence[str] = (),
    sanitised: bool = SANITISED,
    edit: Callable[[str], str] = lambda text: text,
) -> None:
    """The library of all sources, or of those stems, each of them and of the headers as `edit` leaves it. Raises
    CalledProcessError; what the compiler said is on stderr."""
    folder = output.parent / f"{output.stem}_sources"
    folder.mkdir(parents=True, exist_ok=True)
    for header in CSRC.glob("cuda/*.cuh"):
        (folder / header.name).write_text(translate(edit(header.read_text())))
    sources = []
    for source in sorted(CSRC.glob("cuda/*.cu")):
        if not names or source.stem in names:
            sources.append(folder / f"{source.stem}.cpp")
            sources[-1].write_text(f'#line 1 "{source}"\n' + translate(edit(source.read_text())))
    objects = [s.with_suffix(".o") for s in sources]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda s, o: _compile_kernels(s, o, "emulated_torch.h", sanitised), sources, objects))
    device = folder / "device.o"
    _compile_device(device, sanitised)
    torch_libraries = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    _link([*objects, device], output, ["-shared", *torch_libraries], sanitised)


def build_program(text: str, output: Path, sanitised: bool = False) -> None:
    """A program of one translated source with a main, without torch."""
    source, kernels, device = (output.with_suffix(s) for s in (".cpp", ".o", ".device.o"))
    source.write_text(text)
    _compile_kernels(source, kernels, "emulated_cuda.h", sanitised)
    _compile_device(device, sanitised)
    _link([kernels, device], output, [], sanitised)


if __name__ == "__main__":
    build(Path(sys.argv[1]).resolve(), sys.argv[2:])
