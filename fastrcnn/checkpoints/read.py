"""Reads files of tensors without running anything that is in them, by what they hold and not by what they are called."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastrcnn.checkpoints.fetch import fetch
from fastrcnn.checkpoints.unpickle import plain, read_pickle, read_torch

_TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what torch.save wrote before it wrote archives
# Where a training program puts the state dict, the plain weights before their average.
_NAMES = ("state_dict", "model", "model_state_dict", "model_state", "net", "network", "module", "weights", "params",
          "parameters", "state", "ema_state_dict", "state_dict_ema", "model_ema", "ema", "checkpoint")  # fmt: skip
# Parts of a key that wrappers add: DataParallel, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_COUNTERS = {"n_averaged", "steps", "num_updates", "decay"}  # of averaged models
# What else people hand over, by its first bytes.
_OTHERS = {b"\xff\xd8\xff": "a picture", b"\x89PNG": "a picture", b"RIFF": "a picture", b"GIF8": "a picture",
           b"{": "a text", b"[": "a text", b"#": "a text", b"<": "a text"}  # fmt: skip
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
           torch.int8, torch.uint8, torch.bool)  # fmt: skip


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or ["it ends early"])[0][:200]


def _read_torch(path: Path):
    try:
        return read_torch(path)
    except pickle.UnpicklingError as error:
        refused = re.search(r"\bGLOBAL ([\w.]+)", str(error))  # the rest is advice to run it
        if refused is None:
            why = str(error) if str(error).startswith("refused") else "not a readable PyTorch checkpoint"
            raise ValueError(f"{path}: {why}") from None
        if refused[1].startswith("ultralytics."):
            raise ValueError(f"{path}: a model of ultralytics, which is no Faster R-CNN or RetinaNet") from None
        raise ValueError(
            f"{path}: refused, because reading it would run code that the file names ({refused[1]}): a whole model, or "
            "more than weights. Save the tensors alone where it was written: torch.save(model.state_dict(), path)"
        ) from None
    except Exception as error:  # damaged bytes run into any kind
        raise ValueError(f"{path}: not a readable PyTorch checkpoint ({_reason(error)})") from None


def _read_pickle(path: Path):
    try:
        return read_pickle(path)
    except Exception as error:  # damaged bytes run into any kind
        raise ValueError(f"{path}: not a readable pickle of numpy arrays ({_reason(error)})") from None


def _read_safetensors(path: Path):
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError("reading .safetensors needs the package safetensors: pip install safetensors") from None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
            return {"state_dict": tensors, "meta": dict(file.metadata() or {})}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None


def _reader(path: Path):
    """By the first bytes: an archive or the old form of torch.save, a safetensors header, else a pickle; by the name where
    the bytes are nobody's."""
    with open(path, "rb") as file:
        first = file.read(16)
    if first.startswith(b"PK\x03\x04") or first.startswith(_TORCH_MAGIC[: len(first)]):
        return _read_torch
    if first[8:9] == b"{" and int.from_bytes(first[:8], "little") + 8 <= path.stat().st_size:
        return _read_safetensors
    if kind := next((kind for start, kind in _OTHERS.items() if first.startswith(start)), None):
        raise ValueError(f"{path}: {kind}, expected weights")
    if first.startswith(b"\x80") or path.suffix.lower() == ".pkl":
        return _read_pickle
    return _read_safetensors if path.suffix.lower() == ".safetensors" else _read_torch


def _state_of(content: Mapping, depth: int = 3) -> Mapping | None:
    """The dict of tensors in a file's content: under one of the usual names, else the content itself, else the only dict in
    it that has tensors."""
    inner = {key: value for key, value in content.items() if isinstance(value, Mapping) and depth}
    for name in _NAMES:
        found = _state_of(inner[name], depth - 1) if name in inner else None
        if found is not None:
            return found
    if any(isinstance(plain(value), Tensor | np.ndarray) for value in content.values()):
        return content
    found = [value for value in (_state_of(value, 0) for value in inner.values()) if value is not None]
    return found[0] if len(found) == 1 else None


def _tensor(value, key, where: str, own_memory: bool) -> Tensor:
    """own_memory: each number of it lies in memory, as in a file; an expanded view would outgrow what it was read from."""
    if isinstance(value, np.ndarray):
        try:
            value = torch.from_numpy(value)
        except (TypeError, ValueError):
            raise ValueError(f"{where}: {key}: expected an array of numbers, got dtype {value.dtype}") from None
    if not isinstance(key, str):
        raise ValueError(f"{where}: expected names as the keys of tensors, got {key!r}")
    if value.layout != torch.strided or value.is_quantized or value.dtype not in _DTYPES:
        raise ValueError(f"{where}: {key}: expected a plain tensor of numbers, got {value.dtype} on {value.device}")
    if own_memory and value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"{where}: {key}: {list(value.shape)} are more numbers than it holds")
    return value.detach()


def read_tensors(source: str | Path | Mapping) -> tuple[dict[str, Tensor], dict]:
    """(tensors by name, metadata) of a file of torch.save, of safetensors or of pickled numpy arrays, of an https address,
    or of a state dict that is in memory already.

    What wrappers of models add to names is taken off. The metadata are plain data, with what lies beside the tensors of a
    `state_dict()` under the key "peer". Raises FileNotFoundError, OSError for a failed download, ValueError for a file that
    is damaged, holds no tensors, or others under their names, or wants to run code.
    """
    if isinstance(source, Mapping):
        path, content = "the state dict", source
    else:
        path = fetch(source)
        content = _reader(path)(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(content).__name__}")
    meta = content.get("meta", {})
    meta = dict(meta) if isinstance(meta, dict) else {}
    state, tensors = _state_of(content), {}
    for key, value in (state or {}).items():
        value = plain(value)
        if isinstance(value, Tensor | np.ndarray):
            value = _tensor(value, key, str(path), content is not source)
            key = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
            if key in tensors:
                raise ValueError(f"{path}: two tensors of the name {key}")
            tensors[key] = value
    if not tensors:
        raise ValueError(f"{path}: holds no tensors")
    # Beside the keys of a module's state dict torch keeps each part's version; a detector writes its options there.
    beside = getattr(state, "_metadata", None)
    for part in beside.values() if isinstance(beside, dict) else ():
        if isinstance(part, dict) and isinstance(part.get("peer"), str):
            meta["peer"] = part["peer"]
    return {key: value for key, value in tensors.items() if key not in _COUNTERS}, meta


def within(tensors: dict[str, Tensor], anchors: tuple[str, ...], where: str) -> dict[str, Tensor]:
    """The tensors of the network that has one of the keys `anchors`, without what a program put before its names; all of
    them where none has. Raises ValueError where several networks have it."""
    found = {key[: -len(anchor)] for key in tensors for anchor in anchors if key.endswith(anchor)}
    found = {
        p for p in found if p == "" or (p.endswith(".") and "backbone" not in p)
    }  # a backbone is part of a network
    prefix = min(found, key=len, default="")
    others = [p for p in found if not p.startswith(prefix)]
    if others:
        raise ValueError(f"{where}: holds several networks ({', '.join(sorted([prefix, *others]))}): save one alone")
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def check_finite(tensors: dict[str, Tensor], where: str) -> None:
    """Raises ValueError naming the weights that are NaN or infinite: what a diverged training left detects nothing."""
    numbers = {k: v for k, v in tensors.items() if v.is_floating_point() and v.device.type != "meta"}
    broken = [k for k, v in numbers.items() if not v.isfinite().all()]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise ValueError(f"{where}: NaN or infinite weights in {', '.join(broken[:3])}{more}")
