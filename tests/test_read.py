"""Files of tensors: told by their content, read without running or following anything in them, damaged ones refused."""

import argparse
import collections
import datetime
import io
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn

from fastrcnn.checkpoints.checkpoint import load_checkpoint
from fastrcnn.checkpoints.read import read_tensors, within

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([7, 8])}
LOGITS = "proposal_generator.rpn_head.objectness_logits.weight"


def saved(content, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def pickled(content, protocol: int = 2) -> bytes:
    return pickle.dumps(content, protocol)


def read(tmp_path, data: bytes, name: str = "m.pth") -> dict:
    (tmp_path / name).write_bytes(data)
    return read_tensors(tmp_path / name)[0]


def assert_state(tensors) -> None:
    assert set(tensors) == set(STATE) and all(torch.equal(tensors[k], v) for k, v in STATE.items())


KINDS = {
    "archive": saved(STATE),
    "old": saved(STATE, _use_new_zipfile_serialization=False),
    "safetensors": safetensors_bytes(STATE),
    **{f"pickle{p}": pickled({"model": {k: v.numpy() for k, v in STATE.items()}}, p) for p in (2, 4, 5)},
    "columns": pickled({k: np.asfortranarray(v.numpy()) for k, v in STATE.items()}),
    "big endian": pickled({k: v.numpy().astype(v.numpy().dtype.newbyteorder(">")) for k, v in STATE.items()}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_files_kind_is_told_by_its_content(tmp_path, kind):
    for name in ("m.pth", "m.pkl", "m.bin", "m.SAFETENSORS", "weights"):
        if kind == "big endian":
            with pytest.raises(ValueError, match=r"a\.weight: expected an array of numbers, got dtype >f4"):
                read(tmp_path, KINDS[kind], name)
        else:
            assert_state(read(tmp_path, KINDS[kind], name))


@pytest.mark.parametrize(
    "name", ["state_dict", "model", "model_state", "net", "weights", "params", "ema_state_dict", "mine"]
)
def test_the_state_dict_is_found_by_whatever_name(tmp_path, name):
    beside = dict(optimizer=dict(state={0: dict(momentum=torch.ones(3))}), epoch=3)
    assert_state(read(tmp_path, saved({name: STATE, **beside})))
    assert_state(read(tmp_path, saved({"ema": {name: STATE}, **beside})))


def test_the_plain_weights_go_before_their_average(tmp_path):
    average = {k: v + 1 for k, v in STATE.items()}
    for content in (dict(model_ema=average, model=STATE), dict(ema_state_dict=average, state_dict=STATE)):
        assert_state(read(tmp_path, saved(content)))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.module.", "_fsdp_wrapped_module."])
def test_what_wrappers_add_to_the_keys_is_taken_off(prefix):
    assert_state(read_tensors({**{prefix + k: v for k, v in STATE.items()}, "n_averaged": torch.tensor(3)})[0])
    assert set(read_tensors({f"backbone.{prefix}w": torch.ones(1)})[0]) == {"backbone.w"}


def test_a_network_within_another_is_found_by_its_own_keys():
    keys = {"head.cls.weight": torch.ones(1), "body.weight": torch.ones(2)}
    for prefix in ("", "model.", "model.detector."):
        held = {**{prefix + k: v for k, v in keys.items()}, **({"loss.weight": torch.ones(3)} if prefix else {})}
        assert within(held, ("head.cls.weight",), "it") == keys
    twins = {f"{name}.{k}": v for name in ("student", "teacher") for k, v in keys.items()}
    with pytest.raises(ValueError, match=r"it: holds several networks \(student\., teacher\.\)"):
        within(twins, ("head.cls.weight",), "it")


def test_a_training_programs_bookkeeping_is_not_read(tmp_path):
    extra = dict(args=argparse.Namespace(lr=0.1, out=pathlib.Path("/x")), when=datetime.datetime(2020, 1, 1),
                 counts=collections.Counter([1]), scalar=np.float64(3.5), log=np.arange(3))  # fmt: skip
    for options in ({}, dict(_use_new_zipfile_serialization=False)):
        assert_state(read(tmp_path, saved(dict(model=STATE, **extra), **options)))


class Payload:
    """Unpickling it naively would create the file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("write", [saved, pickled, lambda c: saved(c, _use_new_zipfile_serialization=False)])
def test_a_malicious_pickle_is_refused_without_running(tmp_path, write):
    content = write(dict(state_dict={}, extra=Payload(tmp_path / "trace")))
    with pytest.raises(ValueError, match=r"m\.pth.*refused.*posix\.system") as error:
        read(tmp_path, content)
    assert not (tmp_path / "trace").exists() and "weights_only" not in str(error.value)  # no advice to run it
    if write is pickled:
        pickle.loads(content)
        assert (tmp_path / "trace").exists()  # the payload is a real one


def an_array(dtype: bytes = b"f4", state: str = "(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t",
             shape: bytes = b"K\x01K\x04\x86", data: bytes = bytes(16), tail: bytes = b"") -> bytes:  # fmt: skip
    """The pickle of {"model": {"x": array}}, part by part."""
    head = b"\x80\x03}X\x05\x00\x00\x00model}X\x01\x00\x00\x00xcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
    kind = (
        b"cnumpy\ndtype\nX" + struct.pack("<I", len(dtype)) + dtype + b"\x89\x88\x87R" + state.encode("latin1") + b"b"
    )
    array = b"(K\x01" + shape + kind + b"\x89B" + struct.pack("<I", len(data)) + data + b"tb"
    return head + b"K\x00\x85C\x01b\x87R" + array + tail + b"ss."


HOSTILE = dict(
    objects=an_array(b"O8", data=struct.pack("<Q", 0x4141414141414140) * 4),
    object_state=an_array(state="(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ft"),
    fields=an_array(b"V16", state="(K\x03X\x01\x00\x00\x00|NX\x01\x00\x00\x00x}K\x10K\x01K\x00t"),
    too_few_bytes=an_array(data=bytes(15)),
    too_large=an_array(shape=b"\x8a\x06" + bytes(5) + b"\x7fK\x04\x86"),
    negative=an_array(shape=b"J\xff\xff\xff\xffJ\xfc\xff\xff\xff\x86"),
    text=pickled({"model": {"x": np.array(["a", "b"])}}),
    list_of_objects=pickled({"model": {"x": np.array([None, {}], dtype=object)}}),
    memo=b"\x80\x02}r\xf0\xff\xff\xff.",
    deep=b"\x80\x02}" + b")" + b"\x85" * 1_000_000 + b"Ns.",
    patch=b"\x80\x02}X\x01\x00\x00\x00xcnumpy\nndarray\nN}X\x05\x00\x00\x00arrayK\x01s\x86bs.",
    torch_objects=saved({"a": torch.ones(1), "b": np.array([None, 1], dtype=object)}),
    torch_nested=saved({"a": torch.nested.nested_tensor([torch.ones(1)])}),
    torch_sparse=saved({"a": torch.ones(2, 2).to_sparse()}),
    torch_quantised=saved({"a": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)}),
    torch_complex=saved({"a": torch.ones(2, dtype=torch.complex64)}),
    torch_meta=saved({"a": torch.ones(2, device="meta")}),
    torch_expanded=saved({"a": torch.ones(1).expand(10**12)}),
)


def in_archive(data: bytes) -> bytes:
    """torch.save's archive with another pickle in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(STATE))) as old, zipfile.ZipFile(file, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, data if entry.filename.endswith("data.pkl") else old.read(entry))
    return file.getvalue()


@pytest.mark.parametrize("wrap", [bytes, in_archive])
@pytest.mark.parametrize("kind", [k for k in HOSTILE if not k.startswith("torch")])
def test_no_pickle_reaches_memory_that_is_not_its_own(tmp_path, kind, wrap):
    """In a process of its own: most of these ended it, or took all memory, before."""
    (tmp_path / "m.pkl").write_bytes(wrap(HOSTILE[kind]))
    script = ("import sys; from fastrcnn.checkpoints.read import read_tensors\n"
              "try: print(read_tensors(sys.argv[1]))\nexcept ValueError as e: print('refused', e)")  # fmt: skip
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path / "m.pkl")], capture_output=True, text=True)
    assert (run.returncode, run.stdout[:7]) == (0, "refused"), run.stdout + run.stderr


@pytest.mark.parametrize("kind", [k for k in HOSTILE if k.startswith("torch")])
def test_only_plain_tensors_of_numbers_are_read(tmp_path, kind):
    with pytest.raises(ValueError, match=r"m\.pth: "):
        read(tmp_path, HOSTILE[kind])


def test_an_archive_is_no_larger_than_it_is(tmp_path):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("m/data.pkl", bytes(50_000_000))
    with pytest.raises(ValueError, match="more than its size"):
        read(tmp_path, file.getvalue())


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x80\x02.", b"\x80\x02}", b"\x80\x02K\x01K\x02s.", b"\x80\x02h\x01.",
                                  bytes(range(7, 256)), b"PK\x03\x04", bytes(8) + b"{"])  # fmt: skip
@pytest.mark.parametrize("name", ["m.pth", "m.pkl", "m.safetensors"])
def test_a_few_bytes_are_called_damaged(tmp_path, name, data):
    with pytest.raises(ValueError, match=f"{name}: not a readable|{name}: expected a dict"):
        read(tmp_path, data, name)


@pytest.mark.parametrize("kind", ["archive", "old", "safetensors", "pickle4"])
def test_half_a_file_is_called_damaged(tmp_path, kind):
    with pytest.raises(ValueError, match=r"m\.pth: ") as error:
        read(tmp_path, KINDS[kind][: len(KINDS[kind]) // 2])
    assert "run code" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        ({3: np.zeros(2)}, "names as the keys of tensors, got 3"),
        ({LOGITS: np.array(1.0)}, f"rows of weights in {LOGITS}, got the shape \\[\\]"),
        ({LOGITS: np.zeros((0, 8, 1, 1))}, f"rows of weights in {LOGITS}, got the shape"),
        ({LOGITS: np.full((3, 8, 1, 1), np.nan)}, "NaN or infinite weights in rpn_head.rpn_cls.weight"),
        ({LOGITS: np.ones((3, 8, 1, 1)), "pixel_std": np.array([1, np.inf, 1])}, "std: not understood"),
    ],
)
def test_what_is_no_weight_is_named(tmp_path, content, message):
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(dict(model=content)))
    with pytest.raises(ValueError, match=rf"model\.pkl: .*{message}"):
        load_checkpoint(tmp_path / "model.pkl")


def test_parameters_and_versions_do_not_matter(tmp_path):
    module = nn.Linear(3, 2)
    for content in (module.state_dict(), dict(module.named_parameters())):
        found = read(tmp_path, saved(content))
        assert set(found) == {"weight", "bias"} and not any(v.requires_grad for v in found.values())
