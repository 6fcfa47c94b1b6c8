"""Builds fastrcnn._C (CPU kernels) and, where wanted, fastrcnn._C_cuda (CUDA kernels).

FASTRCNN_BUILD=auto (default): CPU kernels where there is a compiler, and CUDA kernels where torch is a CUDA build, an nvcc
of its major version is found and either a GPU that can run them is visible or TORCH_CUDA_ARCH_LIST is set.  =cpu: CPU
kernels alone.  =cuda: both, or an error.  =none: no kernels, no compiler.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import setup

MODE = os.environ.get("FASTRCNN_BUILD", "auto")
# Only the part of torch's C++ API that 2.11 has: one build then loads in 2.11 and every later release.
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
OLDEST_SM = 75  # what csrc/cuda compiles for
# One binary a generation; the PTX of sm_90 serves the later ones that are not named, compiled at their first use.
DEFAULT_ARCHS = {75: "7.5", 80: "8.0", 86: "8.6", 89: "8.9", 90: "9.0+PTX", 100: "10.0", 120: "12.0"}


def stop(message):
    sys.exit(f"fastrcnn: {message}")


def output(*command, stdin=""):
    """What a program prints; OSError or CalledProcessError where it cannot be run or fails."""
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=True).stdout


def check_compiler():
    """Ends in one sentence, before torch is fetched, where there is no C++ compiler that can build the kernels."""
    command = os.environ.get("CXX", "c++")  # as torch.utils.cpp_extension chooses it
    found = f"the kernels need a C++ compiler, g++ >= 11: {command!r}"
    advice = (
        "Install one, name it with CXX=..., or set FASTRCNN_BUILD=none to install without kernels (slow references)."
    )
    try:
        gnu, clang = output(*shlex.split(command), "-E", "-P", "-x", "c++", "-", stdin="__GNUC__ __clang__").split()
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        stop(f"{found} does not work ({error}). {advice}")
    if clang == "__clang__" and gnu.isdigit() and int(gnu) < 11:
        stop(f"{found} is g++ {gnu}. {advice}")


def compiler_is_missing():
    """Whether nobody named a compiler and there is none: on Windows, say, or in a small image."""
    return "CXX" not in os.environ and not shutil.which("c++")


def import_torch():
    """The torch the package will run with, also from inside pip's isolated build environment; None where there is none."""
    try:
        import torch
    except ImportError:
        sys.path += [p for p in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")) if p not in sys.path]
        try:
            import torch
        except ImportError:
            return None
    return torch


def find_toolkit(torch_cuda):
    """(prefix, sm numbers its nvcc knows) of the first CUDA toolkit of torch's major version, or (None, what was seen)."""
    nvcc = shutil.which("nvcc")  # may be a wrapper elsewhere, so the headers decide
    guesses = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parents[1]]
    guesses += ["/usr/local/cuda", *sorted(glob("/usr/local/cuda-*"), reverse=True), "/opt/cuda"]
    seen = []
    for home in dict.fromkeys(str(guess) for guess in guesses if guess):
        nvcc = f"{home}/bin/nvcc"
        if not (os.path.isfile(f"{home}/include/cuda_runtime.h") and os.path.isfile(nvcc)):
            continue
        try:
            release = re.search(r"release (\d+)\.\d+", output(nvcc, "--version"))
            known = {int(sm) for sm in re.findall(r"compute_(\d+)", output(nvcc, "--list-gpu-arch"))}
        except (OSError, subprocess.CalledProcessError) as error:
            seen.append(f"{nvcc} does not run ({error})")
            continue
        if release and release[1] == torch_cuda.split(".")[0]:
            return home, sorted(sm for sm in known if sm >= OLDEST_SM)
        seen.append(f"{nvcc} is of another {release[0] if release else 'release'}")
    return None, "; ".join(seen) or "no bin/nvcc with include/cuda_runtime.h was found; set CUDA_HOME"


def dotted(sm):
    return f"{sm // 10}.{sm % 10}"


def check_arch_list(archs, known):
    """Ends where TORCH_CUDA_ARCH_LIST names an architecture that the sources or this nvcc do not know."""
    for arch in re.split(r"[ ;]+", archs):
        number = re.match(r"(\d+)\.(\d)", arch)
        if arch.startswith(("Kepler", "Maxwell", "Pascal", "Volta")) or (number and float(number[0]) < OLDEST_SM / 10):
            stop(f"TORCH_CUDA_ARCH_LIST={archs!r}: {arch} is too old, the kernels need {dotted(OLDEST_SM)} or newer")
        if number and int(number[1] + number[2]) not in known:
            stop(f"TORCH_CUDA_ARCH_LIST={archs!r}: nvcc does not know {arch}, only {', '.join(map(dotted, known))}")


def plan_cuda(torch):
    """(toolkit's prefix, architectures) of the CUDA build, or (None, why there is none)."""
    if MODE == "cpu":
        return None, "FASTRCNN_BUILD=cpu"
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is not a CUDA build"
    home, known = find_toolkit(torch.version.cuda)
    if home is None:
        return None, f"torch needs a toolkit of CUDA {torch.version.cuda}: {known}"
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "native")
    if asked not in ("", "native"):
        check_arch_list(asked, known)
        return home, asked
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        cards = {10 * major + minor for major, minor in cards}
        archs = sorted({max(sm for sm in known if sm <= card) for card in cards if card >= known[0]})
        if archs:  # PTX, for a card that is newer than the toolkit
            return home, ";".join(map(dotted, archs)) + "+PTX"
        facts = f"compute capability {dotted(max(cards))}, the kernels need {dotted(known[0])} or newer"
        return None, f"the visible GPU is of {facts} (TORCH_CUDA_ARCH_LIST builds them for others)"
    if MODE == "cuda":
        return home, ";".join(arch for sm, arch in DEFAULT_ARCHS.items() if sm in known)
    return None, "no GPU is visible (FASTRCNN_BUILD=cuda builds the CUDA kernels nevertheless)"


def extensions(torch):
    cuda_home, archs = plan_cuda(torch)
    if cuda_home:
        os.environ["CUDA_HOME"] = cuda_home  # torch.utils.cpp_extension reads it when it is imported
        os.environ["TORCH_CUDA_ARCH_LIST"] = archs
    elif MODE == "cuda":
        stop(f"FASTRCNN_BUILD=cuda: {archs}")
    import pybind11
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class BuildKernels(BuildExtension):
        def build_extensions(self):
            kernels = (
                f"CPU and CUDA kernels for {archs} with {cuda_home}" if cuda_home else f"CPU kernels alone: {archs}"
            )
            print(f"fastrcnn: {kernels}", flush=True)
            try:
                super().build_extensions()
            except Exception as error:  # the compiler has said above what is wrong
                stop(
                    f"the kernels did not build ({error}). The compiler's own words stand above; FASTRCNN_BUILD=cpu "
                    "leaves out the CUDA kernels, FASTRCNN_BUILD=none all kernels (slow references)."
                )

    # pybind11's own headers come first: torch's bundled copy refuses the stable target before torch 2.13.
    include = [pybind11.get_include(), str(Path("csrc").resolve())]
    # NMS and matching compare with thresholds, and a fused multiply-add would move ties: contraction is off. Python's own
    # flags may hold -g, which costs a third of the time and nine tenths of the size.
    cxx = [TARGET, "-O3", "-g0", "-fopenmp-simd", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    if platform.machine() in ("x86_64", "AMD64"):
        cxx.append("-mprefer-vector-width=512")  # for the AVX-512 clones; the baseline stays x86-64
    cpu = ["csrc/module.cpp", *sorted(glob("csrc/cpu/*.cpp"))]
    found = [CppExtension("fastrcnn._C", cpu, include_dirs=include, extra_compile_args=cxx)]
    if cuda_home:
        flags = {"cxx": [*cxx, "-DUSE_CUDA"], "nvcc": [TARGET, "-DUSE_CUDA", "-O3", "-fmad=false", "-lineinfo"]}
        cuda = ["csrc/module.cpp", *sorted(glob("csrc/cuda/*.cu"))]
        found.append(CUDAExtension("fastrcnn._C_cuda", cuda, include_dirs=include, extra_compile_args=flags))
    return dict(ext_modules=found, cmdclass={"build_ext": BuildKernels})


if MODE not in ("auto", "cpu", "cuda", "none"):
    stop(f"FASTRCNN_BUILD={MODE!r}: expected auto, cpu, cuda or none")
# A source distribution needs neither torch nor a compiler: MANIFEST.in names its files. Only the hook's name on the command
# line tells that one is asked for.
if MODE == "none" or "sdist" in sys.argv or any("build_sdist" in word for word in sys.orig_argv):
    setup()
elif MODE == "auto" and compiler_is_missing():
    print("fastrcnn: no C++ compiler was found: installing without kernels, the slow references will answer (see "
          "`fastrcnn info`). For the kernels install g++ >= 11, then fastrcnn again.", file=sys.stderr)  # fmt: skip
    setup()
else:
    check_compiler()
    torch = import_torch()
    # Without torch the build backend reports it as a build requirement: pip brings it into the isolated environment and
    # runs this file again, and the runtime dependency then installs the same release.
    setup(**extensions(torch)) if torch else setup(setup_requires=["torch>=2.11"])
