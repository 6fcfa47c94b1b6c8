"""Builds fastrcnn._C (CPU kernels) and, where wanted, fastrcnn._C_cuda (CUDA kernels).

FASTRCNN_BUILD=auto (default): CPU kernels, and CUDA kernels where torch is a CUDA build, nvcc is found and either a GPU
is visible or TORCH_CUDA_ARCH_LIST is set.  =cpu: CPU kernels alone.  =cuda: both, or an error.  =none: no kernels.
"""

import os
import platform
import shutil
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import setup

MODE = os.environ.get("FASTRCNN_BUILD", "auto")
if MODE not in ("auto", "cpu", "cuda", "none"):
    sys.exit(f"FASTRCNN_BUILD={MODE!r}: expected auto, cpu, cuda or none")
# Only the part of torch's C++ API that 2.11 has: one build then loads in 2.11 and every later release.
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
DEFAULT_ARCHS = "8.0;8.6;8.9;9.0+PTX"


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


def find_cuda_home():
    """The toolkit's prefix. An nvcc on PATH may be a wrapper elsewhere, so the headers decide."""
    nvcc = shutil.which("nvcc")
    guesses = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parents[1]]
    guesses += ["/usr/local/cuda", *sorted(glob("/usr/local/cuda-*"), reverse=True), "/opt/cuda"]
    for guess in guesses:
        if guess and (Path(guess) / "include/cuda_runtime.h").is_file() and (Path(guess) / "bin/nvcc").is_file():
            return str(guess)
    return None


def wants_cuda(torch, cuda_home):
    if MODE == "cpu":
        return False
    missing = []
    if torch.version.cuda is None:
        missing.append(f"torch {torch.__version__} is a CPU-only build")
    if cuda_home is None:
        missing.append("no CUDA toolkit was found (looked for bin/nvcc and include/cuda_runtime.h; set CUDA_HOME)")
    if MODE == "cuda" and missing:
        sys.exit("FASTRCNN_BUILD=cuda: " + "; ".join(missing))
    return not missing and (MODE == "cuda" or torch.cuda.is_available() or "TORCH_CUDA_ARCH_LIST" in os.environ)


def extensions(torch):
    cuda_home = find_cuda_home()
    if cuda_home:
        os.environ["CUDA_HOME"] = cuda_home  # torch.utils.cpp_extension reads it when it is imported
    import pybind11
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    # pybind11's own headers come first: torch's bundled copy refuses the stable target before torch 2.13.
    include = [pybind11.get_include(), str(Path("csrc").resolve())]
    # NMS and matching compare with thresholds, and a fused multiply-add would move ties: contraction is off.
    cxx = [TARGET, "-O3", "-fopenmp-simd", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    if platform.machine() in ("x86_64", "AMD64"):
        cxx.append("-mprefer-vector-width=512")  # for the AVX-512 clones; the baseline stays x86-64
    cpu = ["csrc/module.cpp", *sorted(glob("csrc/cpu/*.cpp"))]
    found = [CppExtension("fastrcnn._C", cpu, include_dirs=include, extra_compile_args=cxx)]
    if wants_cuda(torch, cuda_home):
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS)
        flags = {"cxx": [*cxx, "-DUSE_CUDA"], "nvcc": [TARGET, "-DUSE_CUDA", "-O3", "-fmad=false", "-lineinfo"]}
        cuda = ["csrc/module.cpp", *sorted(glob("csrc/cuda/*.cu"))]
        found.append(CUDAExtension("fastrcnn._C_cuda", cuda, include_dirs=include, extra_compile_args=flags))
    return dict(ext_modules=found, cmdclass={"build_ext": BuildExtension})


torch = None if MODE == "none" else import_torch()
if MODE == "none":
    setup()
elif torch is None:
    # The build backend reports this as a build requirement: pip brings torch into the isolated environment and runs
    # this file again, and the runtime dependency then installs the same release.
    setup(setup_requires=["torch>=2.11"])
else:
    setup(**extensions(torch))
