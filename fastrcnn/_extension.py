"""Loads the compiled kernels and says, for every op and device, what answers it.

The operators are declared in `fastrcnn.ops` with their reference as the default kernel. Loading `_C` (CPU) and `_C_cuda`
(CUDA) registers faster kernels for their dispatch keys; where they are absent the reference runs, and `fastrcnn info`
shows why.
"""

import importlib
import warnings
from pathlib import Path

import torch

OPS = (
    "nms",
    "batched_nms",
    "nms_padded",
    "soft_nms",
    "batched_soft_nms",
    "roi_align",
    "multilevel_roi_align",
    "decode_boxes",
    "decode_proposals",
    "deform_conv2d",
    "deform_roi_pool",
    "match_boxes",
    "conv_bn_relu",
    "preprocess",
)


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


def _cuda_reason() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU-only build"
    return _load("_C_cuda")


CPU_REASON = _load("_C")
CUDA_REASON = _cuda_reason()


def has_kernel(op: str, device: str) -> bool:
    """Whether a kernel, not the reference, answers `fastrcnn::<op>` on "cpu" or "cuda"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastrcnn::{op}", device.upper())


def kernel_table() -> dict[str, dict[str, str]]:
    """{op: {"cpu": "kernel" | "reference", "cuda": ...}} of what is registered now."""
    return {op: {d: "kernel" if has_kernel(op, d) else "reference" for d in ("cpu", "cuda")} for op in OPS}


def reasons() -> dict[str, str]:
    """Why a reference answers, per device; "" where the compiled library is loaded."""
    return {"cpu": CPU_REASON, "cuda": CUDA_REASON}


def built_with_torch() -> str | None:
    """The torch release whose headers the CPU kernels were compiled against; None where they are not loaded."""
    return None if CPU_REASON else importlib.import_module("fastrcnn._C").built_with_torch
