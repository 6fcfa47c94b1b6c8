"""Shared by all tests: the devices, the guard against testing a reference with itself, and the tolerance rule."""

import tempfile
from pathlib import Path

import pytest
import torch

from fastrcnn._extension import has_kernel

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


def pytest_addoption(parser):
    parser.addoption(
        "--emulate-cuda", action="store_true", help="run the CUDA kernels, emulated, in place of the CPU's"
    )


def pytest_configure(config):
    if config.getoption("--emulate-cuda"):
        from emulated_cuda.build import build

        library = Path(tempfile.mkdtemp(prefix="emulated_cuda")) / "emulated_cuda.so"
        build(library)
        torch.ops.load_library(library)  # for a kernel registered twice the later one answers


def pytest_collection_modifyitems(config, items):
    if config.getoption("--emulate-cuda"):  # only what would run on a CUDA device, and the same as on the CPU
        items[:] = [i for i in items if "device" in i.fixturenames and not i.get_closest_marker("device_rule")]
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def fixed_seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True, scope="session")
def full_precision():
    """float32 convolutions are float32 on a GPU as well: the tolerances are for that."""
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def two_threads():
    """torch's own interpolation sums in another order where it has one thread, and its last bits change."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def need_kernel():
    """need_kernel("nms", device, dtype): skips where that dtype has no kernel on the device, since the test would compare
    the reference with itself; fails on the CPU where the operator has none at all."""

    def check(op: str, device: str, dtype: torch.dtype = torch.float32) -> None:
        if device == "cpu" and not has_kernel(op, device):
            pytest.fail(f"no CPU kernel for {op}: build the package first")
        if not has_kernel(op, device, dtype):
            pytest.skip(f"no kernel for {op} in {dtype} on {device}: the reference would be compared with itself")

    return check


def random_boxes(n: int, width: float = 640, height: float = 480, largest: float = 120, seed: int = 0) -> torch.Tensor:
    """[n, 4] xyxy boxes of 2..largest pixels, some of which leave the frame."""
    g = torch.Generator().manual_seed(seed)
    centre = torch.rand(n, 2, generator=g) * torch.tensor([width, height])
    half = (torch.rand(n, 2, generator=g) * (largest - 2) + 2) / 2
    return torch.cat([centre - half, centre + half], 1)


def assert_within_twice(actual: torch.Tensor, low_precision: torch.Tensor, exact: torch.Tensor, floor: float = 1e-6):
    """The kernel's error against the float32 twin is at most twice that of plain torch at the same low precision."""
    error = (actual.double() - exact.double()).abs().max().item()
    allowed = 2 * (low_precision.double() - exact.double()).abs().max().item() + floor * exact.abs().max().item()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
