"""Reads checkpoint files without running anything that is in them.

`.pth` goes through torch.load(weights_only=True), `.safetensors` through safetensors, Detectron2's `.pkl` through an
unpickler that knows numpy arrays and nothing else.
"""

import hashlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# What a pickle of numpy arrays refers to. Everything else is refused.
_NUMPY = {
    (module, name)
    for module in (
        "numpy",
        "numpy.core.multiarray",
        "numpy._core.multiarray",
        "numpy.core.numeric",
        "numpy._core.numeric",
    )
    for name in ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer")
}


class _NumpyUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("_codecs", "encode"):  # how protocol-2 pickles carry bytes
            return lambda text, encoding="latin1": text.encode(encoding)
        if (module, name) not in _NUMPY:
            raise pickle.UnpicklingError(f"refused: it refers to {module}.{name}, and only numpy arrays are read")
        return super().find_class(module, name)


class _Inert:
    """Stands for a class of a checkpoint's bookkeeping (a training log's buffers): holds state, does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        self.state = state


def _inert_attribute(owner, name) -> _Inert:
    return _Inert()


def _safe_globals() -> list:
    """Beyond tensors: numpy's array constructors, and mmengine's log buffers as inert objects."""
    numpy_core = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
    allowed = [np.ndarray, np.dtype, *{type(np.dtype(c)) for c in "?bBhHiIlLqQefd"}]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed += [(numpy_core._reconstruct, f"{module}._reconstruct"), (numpy_core.scalar, f"{module}.scalar")]
    # A log buffer names its own methods through getattr: the name is taken, the look-up never made.
    allowed += [(_inert_attribute, "builtins.getattr"), (_inert_attribute, "__builtin__.getattr")]
    return [*allowed, (_Inert, "mmengine.logging.history_buffer.HistoryBuffer")]


def _read_pth(path: Path):
    try:
        with torch.serialization.safe_globals(_safe_globals()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"\bGLOBAL ([\w.]+)", str(error))  # the rest is advice to run it
        if refused is None:
            raise ValueError(f"{path}: not a readable PyTorch checkpoint") from None
        raise ValueError(
            f"{path}: refused, because reading it would run code that the file names ({refused[1]}). Save the tensors "
            f"alone where it was written: torch.save({{'state_dict': model.state_dict()}}, path)"
        ) from None
    except Exception as error:  # damaged bytes run into any kind
        raise ValueError(f"{path}: not a readable PyTorch checkpoint ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or ["it ends early"])[0]


def _read_pkl(path: Path):
    try:
        with open(path, "rb") as file:
            return _NumpyUnpickler(file, encoding="latin1").load()
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


def fetch(path_or_url: str | Path) -> Path:
    """A local file for a path or an https address (downloaded once into torch.hub's cache).

    A download is checked by the digits that its name ends in, where it has any: `-0123abcd` of the SHA-256, as MMDetection
    and torchvision write them, or `_0123ab.pkl` of the MD5, Detectron2's. Raises FileNotFoundError, ValueError for a
    damaged download (which is removed) and for another kind of address, OSError for one that fails.
    """
    text = str(path_or_url)
    if not text.startswith(("http://", "https://")):
        path = Path(text).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no such checkpoint file: {path}")
        return path
    if text.startswith("http://"):
        raise ValueError(f"{text}: expected an https address")
    target = Path(torch.hub.get_dir()) / "checkpoints" / text.split("?")[0].rsplit("/", 1)[-1]
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = re.search(r"-([0-9a-f]{8,})\.", target.name)
        try:
            torch.hub.download_url_to_file(text, str(target), digest[1] if digest else None, progress=True)
        except RuntimeError as error:
            raise ValueError(f"{text}: the download is damaged ({error})") from None
        except OSError as error:  # URLError is one
            raise OSError(f"cannot download {text}: {error}. Pass a local file with --weights instead.") from None
        md5 = re.search(r"_([0-9a-f]{6})\.pkl$", target.name)
        if md5 and not hashlib.md5(target.read_bytes(), usedforsecurity=False).hexdigest().startswith(md5[1]):
            target.unlink()
            raise ValueError(f"{text}: the download is damaged (its MD5 does not begin with {md5[1]})")
    return target


def read(source: str | Path | Mapping) -> tuple[dict[str, Tensor], dict]:
    """(state dict of tensors, metadata) of a `.pth`, `.pt`, `.pkl` or `.safetensors` file, an https address, or a state
    dict that is in memory already.

    Raises FileNotFoundError, OSError for a failed download, ValueError for a file that is damaged, holds no tensors, or
    others under their names, or wants to run code.
    """
    if isinstance(source, Mapping):
        path, content = "the state dict", dict(source)
    else:
        path = fetch(source)
        content = {".pkl": _read_pkl, ".safetensors": _read_safetensors}.get(path.suffix, _read_pth)(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(content).__name__}")
    meta = content.get("meta", {})
    nested = [content[k] for k in ("state_dict", "model", "model_state_dict") if isinstance(content.get(k), dict)]
    state = nested[0] if nested else content
    tensors = {}
    for key, value in state.items():
        if isinstance(value, np.ndarray):
            try:
                value = torch.from_numpy(value)
            except (TypeError, ValueError):
                raise ValueError(f"{path}: {key}: expected an array of numbers, got dtype {value.dtype}") from None
        if isinstance(value, Tensor):
            if not isinstance(key, str):
                raise ValueError(f"{path}: expected names as the keys of tensors, got {key!r}")
            tensors[key.removeprefix("module.")] = value
    if not tensors:
        raise ValueError(f"{path}: holds no tensors")
    return tensors, meta if isinstance(meta, dict) else {}
