"""Unpickles tensors, numpy arrays and plain data, and runs nothing that a file names.

Arrays are built here from a numeric dtype, a shape and bytes of exactly that length; numpy's own constructors, which
take objects and any state for a dtype, are never called. A pickle is looked through before it is read: what it refers
to, and how deep it nests, since Python's hash of a deep tuple ends the process.
"""

import io
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

_DEEPEST = 100  # nests of a pickle's containers; a checkpoint with its configuration has some ten
_MOST = 2_000_000  # steps of a pickle; one with an optimizer has some 200,000
_NUMERIC = re.compile(r"[<>|=]?[biuf][1248]|bool|(u?int|float)\d\d?")
_CORE = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
# Of torch's own names those that a plain tensor in memory needs: no sparse, quantised, nested or distributed ones.
_TORCH = re.compile(
    r"torch\.([a-z]+\d*|\w*Storage|Size|Tensor|storage\.\w*Storage|_utils\._rebuild_(tensor(_v[23])?|parameter)|"
    r"nn\.parameter\.Parameter|serialization\._get_layout|torch_version\.\w+)"
)
# Bookkeeping of training programs. Objects of these modules are taken as inert ones, by whatever name.
_BOOKKEEPING = ("argparse", "pathlib", "datetime", "mmengine", "mmcv", "mmdet", "lightning", "pytorch_lightning",
                "omegaconf", "yacs", "fvcore", "detectron2", "uuid", "decimal", "fractions")  # fmt: skip


class _Inert:
    """Stands for an object of a checkpoint's bookkeeping: takes whatever it is given, does nothing."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def append(self, item):  # a subclass of list or dict is pickled with its items
        pass

    def extend(self, items):
        pass

    def __setitem__(self, key, value):
        pass


class _Dtype:
    """Stands for numpy.dtype: of numbers and truth values alone."""

    def __init__(self, code, align=False, copy=True):
        code = code.decode("latin1") if isinstance(code, bytes) else code
        if not isinstance(code, str) or not _NUMERIC.fullmatch(code):
            raise pickle.UnpicklingError(f"refused: an array of dtype {str(code)[:20]!r}, and only numbers are read")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        """(version, byte order, then nothing of a structure, of a size or of flags)."""
        order = state[1] if isinstance(state, tuple) and len(state) in (8, 9) else None
        order = order.decode("latin1") if isinstance(order, bytes) else order
        if order not in ("<", ">", "|", "=") or tuple(state[2:8]) != (None, None, None, -1, -1, 0):
            raise pickle.UnpicklingError("refused: a dtype with a state of its own")
        self.dtype = self.dtype.newbyteorder(order)


def _bytes(data) -> bytes:
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(data, bytes | bytearray):
        raise pickle.UnpicklingError(f"refused: an array from {type(data).__name__}, expected bytes")
    return bytes(data)


def _build(data, dtype, shape, order: str) -> np.ndarray:
    data = _bytes(data)
    if not isinstance(dtype, _Dtype) or not isinstance(shape, tuple) or len(shape) > 32:
        raise pickle.UnpicklingError("refused: an array without a dtype and a shape")
    if not all(type(side) is int and side >= 0 for side in shape):
        raise pickle.UnpicklingError(f"refused: an array of the shape {str(shape)[:60]}")
    if math.prod(shape) * dtype.dtype.itemsize != len(data):
        raise pickle.UnpicklingError(f"refused: {len(data)} bytes for an array of {str(shape)[:60]} {dtype.dtype}")
    return np.frombuffer(bytearray(data), dtype.dtype).reshape(shape, order=order)


class _Array:
    """Stands for numpy.ndarray until its state says what it holds."""

    array = None

    def __init__(self, *args):  # numpy's _reconstruct(type, shape, kind): placeholders
        pass

    def __setstate__(self, state):
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("refused: an array without its state")
        _, shape, dtype, fortran, data = state
        self.array = _build(data, dtype, shape, "F" if fortran else "C")


class _FromBuffer(_Array):
    """numpy's _frombuffer, of protocol 5."""

    def __init__(self, data=b"", dtype=None, shape=None, order="C"):
        self.array = _build(data, dtype, shape, "F" if order == "F" else "C")


class _Scalar(_Array):
    """numpy's scalar(dtype, bytes)."""

    def __init__(self, dtype=None, data=b""):
        self.array = _build(data, dtype, (), "C")


_STAND_INS = {"dtype": _Dtype, "ndarray": _Array, "_reconstruct": _Array, "scalar": _Scalar, "_frombuffer": _FromBuffer}


def _stand_in(module: str, name: str):
    """The class that is taken in the place of what a pickle refers to, or None."""
    if module in _CORE and name in _STAND_INS:
        return _STAND_INS[name]
    if module.startswith("numpy.dtypes") or (module == "numpy" and name in ("float64", "float32", "int64", "bool_")):
        return _Inert  # the kind of a scalar in a log
    if module.split(".")[0] in _BOOKKEEPING:
        return _Inert
    # A log buffer names its own methods through getattr: the name is taken, the look-up never made.
    return _Inert if name == "getattr" and module in ("builtins", "__builtin__") else None


class _Dict(dict):
    """Stands for an OrderedDict; what a pickle adds to it (a state dict's versions) is left."""

    def __setstate__(self, state):
        pass


class _Bytes(bytes):
    """Stands for _codecs.encode."""

    def __new__(cls, text="", encoding="latin1"):
        if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
            raise pickle.UnpicklingError("refused: bytes of another encoding than latin1")
        return bytes.__new__(cls, text.encode("latin1"))

    def __setstate__(self, state):
        pass


class _NumpyUnpickler(pickle._Unpickler):
    """In Python, whose memo is a dict: the one in C makes room for any number that a file says.

    What it calls are the classes above. Each has a `__setstate__`, so that no state of a pickle becomes an attribute.
    """

    def find_class(self, module: str, name: str):
        known = {("collections", "OrderedDict"): _Dict, ("_codecs", "encode"): _Bytes}
        found = known.get((module, name)) or _stand_in(module, name)
        if found is None:
            raise pickle.UnpicklingError(f"refused: it refers to {module}.{name}, and only numpy arrays are read")
        return found


def plain(value):
    """The arrays that a pickle's stand-ins hold, in the place of the stand-ins; other values as they are."""
    return value.array if isinstance(value, _Array) else value


def _references(data: BinaryIO) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that the next pickle in `data` refers to.

    Follows the depth of each value on the pickle's stack, and texts, by pickletools' own description of the steps. Raises
    UnpicklingError for a nest deeper than any checkpoint's.
    """
    stack: list = []  # depths, texts and the mark None
    memo: dict = {}
    for step, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if step > _MOST:
            raise pickle.UnpicklingError(f"more than {_MOST} steps")
        name, taken = opcode.name, []
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
            continue
        if name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
            continue
        for need in reversed(opcode.stack_before):
            if need is pickletools.stackslice or need is pickletools.markobject:
                if need is pickletools.stackslice:
                    while stack[-1] is not None:
                        taken.append(stack.pop())
                elif stack.pop() is not None:
                    raise pickle.UnpicklingError("a mark is missing")
            else:
                taken.append(stack.pop())
        if name in ("GLOBAL", "INST"):
            yield tuple(argument.split(" ", 1))
        elif name == "STACK_GLOBAL":
            yield taken[1], taken[0]
        depths = [d if isinstance(d, int) else 0 for d in taken]
        if name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"):  # they add to what lies below
            depth = max(depths[-1], 1 + max(depths[:-1], default=0))
        else:
            depth = 1 + max(depths, default=-1)
        if depth > _DEEPEST:
            raise pickle.UnpicklingError(f"nested deeper than {_DEEPEST}")
        text = argument if isinstance(argument, str) and "UNICODE" in name else None
        stack += [None if kind is pickletools.markobject else depth if text is None else text
                  for kind in opcode.stack_after]  # fmt: skip


def read_pickle(path: Path):
    """The content of a pickle of plain data and numpy arrays."""
    data = path.read_bytes()
    for _ in _references(io.BytesIO(data)):
        pass
    return _NumpyUnpickler(io.BytesIO(data), encoding="latin1").load()


def _torch_pickles(path: Path) -> Iterator[BinaryIO]:
    """The pickles of a file of torch.save: one in an archive, or, before torch 1.6, five in a row."""
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            for _ in range(5):
                yield file
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or (
            sum(e.file_size for e in entries) > path.stat().st_size
        ):
            raise pickle.UnpicklingError("refused: an archive that holds more than its size")
        for entry in entries:
            if entry.filename.endswith("data.pkl"):
                yield io.BytesIO(archive.read(entry))


def read_torch(path: Path):
    """The content of a file of torch.save, by torch.load(weights_only=True)."""
    references = {found for pickled in _torch_pickles(path) for found in _references(pickled)}
    # torch looks Python 2's name of the module up under Python 3's.
    stand_ins = {
        f"{'builtins' if module == '__builtin__' else module}.{name}": _stand_in(module, name)
        for module, name in references
    }
    for name, stand_in in stand_ins.items():
        if name.startswith("torch.") and stand_in is None and not _TORCH.fullmatch(name):
            raise pickle.UnpicklingError(f"GLOBAL {name} is no plain tensor's")
    allowed = [(stand_in, name) for name, stand_in in stand_ins.items() if stand_in is not None]
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, map_location="cpu", weights_only=True)
