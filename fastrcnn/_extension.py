"""Loads the compiled kernels and says, for every op, device and dtype, what answers it.

The operators are declared in `fastrcnn.ops` with their reference as the default kernel. Loading `_C` (CPU) and `_C_cuda`
(CUDA) registers faster kernels for their dispatch keys; where they are absent the reference runs, and `fastrcnn info`
shows why.
"""

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# (operator, device) -> whether the kernel there takes a dtype, for those that hand some on to the reference. An operator's
# file says it beside its kernel.
TAKES: dict[tuple[str, str], Callable[[torch.dtype], bool]] = {}


def _load(name: str) -> str:
    """Imports fastrcnn.<name>. Returns "" when its kernels are registered, the reason otherwise."""
    if not any(Path(__file__).parent.glob(f"{name}.*.so")) and not any(Path(__file__).parent.glob(f"{name}.*.pyd")):
        return f"fastrcnn.{name} is not built"
    try:
        importlib.import_module(f"fastrcnn.{name}")
    except ImportError as error:
        reason = f"fastrcnn.{name} is built but does not load: {error}"
        warnings.warn(f"{reason}. The slow references run instead; build again with `pip install -e .`", stacklevel=3)
        return reason
    return ""


# Devices of torch's for which there are no kernels: the references answer, slowly and right.
OTHERS = ("mps", "xpu")


def _cuda_reason() -> str:
    if torch.version.hip:
        return f"torch {torch.__version__} is a ROCm build, for which there are no kernels"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU-only build"
    return _load("_C_cuda")


CPU_REASON = _load("_C")
CUDA_REASON = _cuda_reason()


def has_kernel(op: str, device: str, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a kernel, not the reference, answers `fastrcnn::<op>` in `dtype` on "cpu" or "cuda"."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastrcnn::{op}", device.upper()):
        return False
    return (op, device) not in TAKES or TAKES[op, device](dtype)


def operators() -> list[str]:
    """The names of all operators, of what is registered; their gradients and parts (_name) go with them."""
    names = (name.removeprefix("fastrcnn::") for name in torch._C._dispatch_get_all_op_names() if "fastrcnn::" in name)
    return sorted(name for name in names if not name.endswith("_backward") and not name.startswith("_"))


def kernel_table(dtype: torch.dtype = torch.float32) -> dict[str, dict[str, str]]:
    """{op: {"cpu": "kernel" | "reference", "cuda": ...}} of what answers now in `dtype`."""
    return {
        op: {d: "kernel" if has_kernel(op, d, dtype) else "reference" for d in ("cpu", "cuda")} for op in operators()
    }


def kernel_tables() -> dict[str, dict[str, dict[str, str]]]:
    """{"float64": kernel_table(torch.float64), ...} for each dtype that operators take."""
    return {str(dtype).removeprefix("torch."): kernel_table(dtype) for dtype in DTYPES}


def reasons() -> dict[str, str]:
    """Why a reference answers, per device; "" where the compiled library is loaded."""
    return {"cpu": CPU_REASON, "cuda": CUDA_REASON}


def devices() -> list[str]:
    """The devices that torch sees here; those without kernels say that the references answer."""
    found = [f"cpu ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"]
    rest = " by ROCm: no kernels, the references answer" if torch.version.hip else ""
    found += [f"cuda:{i} ({torch.cuda.get_device_name(i)}{rest})" for i in range(torch.cuda.device_count())]
    for name in OTHERS:
        if (module := getattr(torch, name)).is_available():
            found += [f"{name}:{i} (no kernels, the references answer)" for i in range(module.device_count())]
    return found


def built_with_torch() -> str | None:
    """The torch release whose headers the CPU kernels were compiled against; None where they are not loaded."""
    return None if CPU_REASON else importlib.import_module("fastrcnn._C").built_with_torch
