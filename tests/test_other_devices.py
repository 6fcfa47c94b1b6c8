"""Where there are no kernels: the references find the same without float64, and `info` says who answers."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import picture, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastrcnn import Detector, _extension
from fastrcnn.weights import save

ROOT = Path(__file__).resolve().parent.parent
MODELS = [("r18_fpn", "mmdet"), ("r18_fpn", "torchvision"), ("r18_fpn", "detectron2"), ("retinanet_r18_fpn", "mmdet")]
SCRIPT = """
import sys
import torch
import fastrcnn
from fastrcnn._extension import CPU_REASON, kernel_table
sys.path.insert(0, sys.argv.pop(1))
from test_other_devices import NoDoubles
assert CPU_REASON.endswith("is not built") and kernel_table()["nms_padded"]["cpu"] == "reference"
images = torch.load("images.pt")
for weights in sys.argv[1:]:
    detector = fastrcnn.Detector(weights, device="cpu", score_threshold=0.2)
    with NoDoubles():
        found = detector(images)
    torch.save([(d.boxes, d.scores, d.labels) for d in found], f"{weights}.found")
"""


class NoDoubles(TorchDispatchMode):
    """A device without float64, as MPS is one: every tensor that an operator makes is looked at."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64 and x.dim():
                raise TypeError(f"{function}: a tensor in float64, which MPS does not have")
        return made


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The package as FASTRCNN_BUILD=none installs it."""
    place = tmp_path_factory.mktemp("bare")
    shutil.copytree(ROOT / "fastrcnn", place / "fastrcnn", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return place


@pytest.fixture(scope="module")
def found_bare(bare, tmp_path_factory):
    """A folder with the weights of each of MODELS, two pictures, and what the bare package found in them."""
    place = tmp_path_factory.mktemp("found")
    files = [save(tiny_model(*model), place / f"{'_'.join(model)}.safetensors") for model in MODELS]
    torch.save([picture(64, 96, 1), picture(80, 60, 2)], place / "images.pt")
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, ROOT / "tests", *files]
    done = subprocess.run([str(word) for word in command], cwd=place, env={"PYTHONPATH": str(bare), "PATH": ""},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return place


@pytest.mark.parametrize("name, profile", MODELS)
def test_references_alone_find_what_kernels_find_without_float64(name, profile, found_bare):
    weights = found_bare / f"{name}_{profile}.safetensors"
    found = torch.load(f"{weights}.found")
    expected = Detector(weights, device="cpu", score_threshold=0.2)(torch.load(found_bare / "images.pt"))
    assert sum(map(len, expected)) > 10
    for (boxes, scores, labels), wanted in zip(found, expected):
        ours = torch.cat([boxes, 1e3 * labels[:, None], 1e2 * scores[:, None]], 1)
        theirs = torch.cat([wanted.boxes, 1e3 * wanted.labels[:, None], 1e2 * wanted.scores[:, None]], 1)
        apart = torch.cdist(
            ours.double(), theirs.double(), compute_mode="donot_use_mm_for_euclid_dist"
        )  # scores that are nearly equal may change places
        assert len(ours) == len(theirs) and apart.amin(0).max() < 0.02 and apart.amin(1).max() < 0.02


def test_devices_without_kernels_are_named_as_such(monkeypatch):
    there = SimpleNamespace(is_available=lambda: True, device_count=lambda: 2)
    monkeypatch.setattr(torch, "xpu", there)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "MI300X")
    said = _extension.devices()
    assert said[0].startswith("cpu (")
    alone = "no kernels, the references answer)"
    assert said[1:] == [f"cuda:0 (MI300X by ROCm: {alone}", f"xpu:0 ({alone}", f"xpu:1 ({alone}"]
    assert "a ROCm build, for which there are no kernels" in _extension._cuda_reason()
