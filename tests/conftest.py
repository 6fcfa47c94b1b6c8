"""Shared by all tests: the devices, the guard against testing a reference with itself, the tolerance rule, and one small
model."""

import io
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from fastrcnn._extension import CUDA_REASON, has_kernel
from fastrcnn.data.rendered_cells import render_cells
from fastrcnn.evaluation import plots
from fastrcnn.models.build import merge
from fastrcnn.weights.named import named_model

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


def pytest_addoption(parser):
    parser.addoption(
        "--emulate-cuda", action="store_true", help="run the CUDA kernels, emulated, in place of the CPU's"
    )


def pytest_configure(config):
    # What a shell starts with an & ignores Ctrl-C, and so does what that starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
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


PIXEL = io.BytesIO()
Image.new("RGB", (1, 1)).save(PIXEL, "PNG")


@pytest.fixture(autouse=True)
def no_charts(request, monkeypatch):
    """A pixel in the place of each chart, which takes half a second to draw, but in tests that look at charts."""
    if "charts" not in request.keywords:
        for name in ("training_curves", "precision_recall", "confusion", "scores", "errors"):
            monkeypatch.setattr(plots, name, lambda *numbers: PIXEL.getvalue())


REFERENCE_ANSWERS = {("conv_bn_relu", "cpu", torch.float64)}  # on purpose: it never goes to oneDNN


@pytest.fixture
def need_kernel():
    """need_kernel("nms", device, dtype): fails where no kernel answers, since the test would compare the reference with
    itself; skips where none is meant to, or the package was built without CUDA kernels."""

    def check(op: str, device: str, dtype: torch.dtype = torch.float32) -> None:
        if has_kernel(op, device, dtype):
            return
        said = f"no kernel for {op} in {dtype} on {device}: the reference would be compared with itself"
        if (op, device, dtype) in REFERENCE_ANSWERS or (device == "cuda" and CUDA_REASON.endswith("is not built")):
            pytest.skip(said)
        pytest.fail(said)

    return check


@pytest.fixture
def need_cuda_kernel(need_kernel, request):
    """need_cuda_kernel("_conv_tile", device): the same for what CUDA alone has, which a CPU runs with --emulate-cuda."""

    def check(op: str, device: str) -> None:
        emulated = has_kernel(op, device) or request.config.getoption("--emulate-cuda")
        if device == "cpu" and not emulated:
            pytest.skip("the kernel is CUDA's: run on a GPU, or with --emulate-cuda")
        need_kernel(op, device)

    return check


@pytest.fixture
def sources(tmp_path):
    """Paths of six small pictures."""
    paths = [tmp_path / "in" / f"{i}.jpg" for i in range(6)]
    paths[0].parent.mkdir()
    for path in paths:
        Image.new("RGB", (40, 30), (9, 99, 200)).save(path)
    return [str(path) for path in paths]


def random_boxes(n: int, width: float = 640, height: float = 480, largest: float = 120, seed: int = 0) -> torch.Tensor:
    """[n, 4] xyxy boxes of 2..largest pixels, some of which leave the frame."""
    g = torch.Generator().manual_seed(seed)
    centre = torch.rand(n, 2, generator=g) * torch.tensor([width, height])
    half = (torch.rand(n, 2, generator=g) * (largest - 2) + 2) / 2
    return torch.cat([centre - half, centre + half], 1)


def random_rois(n: int, images: int = 2, size: float = 128, largest: float = 100, seed: int = 0) -> torch.Tensor:
    image = torch.randint(images, (n, 1), generator=torch.Generator().manual_seed(seed))
    return torch.cat([image, random_boxes(n, size, size, largest, seed)], 1)


def layout(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def assert_within_twice(actual: torch.Tensor, low_precision: torch.Tensor, exact: torch.Tensor, floor: float = 1e-6):
    """The kernel's error against the float32 twin is at most twice that of plain torch at the same low precision."""
    error = (actual.double() - exact.double()).abs().max().item()
    allowed = 2 * (low_precision.double() - exact.double()).abs().max().item() + floor * exact.abs().max().item()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def picture(height: int = 64, width: int = 96, seed: int = 0) -> torch.Tensor:
    """A rendered picture with structure, uint8 [3, height, width]."""
    return torch.from_numpy(render_cells(seed, height, width)[0]).permute(2, 0, 1).contiguous()


def tiny_options(name: str = "r18_fpn", channels: int = 8) -> dict:
    """The overrides that make a named model small: images of at most 64 x 96 pixels, `channels` in its first stage."""
    widths = [channels * 2**i * (1 if "r18" in name or "r34" in name else 4) for i in range(4)]
    options = dict(min_size=64, max_size=96, backbone=dict(base_channels=channels))
    width = 2 * channels
    if name.endswith("_dc5") or name.startswith("retinanet"):
        width = widths[-1]  # no neck; or a P6 of one shape, whichever map a profile makes it from
    if not name.endswith("_dc5"):
        options["neck"] = dict(in_channels=widths, out_channels=width)
    if name.startswith("retinanet"):
        return options | dict(bbox_head=dict(in_channels=width, feat_channels=16))
    options["rpn_head"] = dict(in_channels=width, feat_channels=16)
    if not name.startswith("rpn"):
        box = dict(in_channels=width, conv_out_channels=channels, fc_out_channels=16)
        options["roi_head"] = dict(bbox_roi_extractor=dict(out_channels=width), bbox_head=box)
    return options


def speak(layer: nn.Module, outputs: list[torch.Tensor], deviation: float, mean: float = 0.0) -> None:
    """Scales a last layer, whose `outputs` [N, C, ...] are given, so that every channel has this deviation and mean."""
    values = torch.cat([x.transpose(0, 1).flatten(1) for x in outputs], 1)
    ratio = deviation / values.std(1)
    layer.weight.mul_(ratio.reshape(-1, *[1] * (layer.weight.dim() - 1)))
    layer.bias.sub_(values.mean(1)).mul_(ratio).add_(mean)


@torch.no_grad()
def wake_norms(model: nn.Module) -> None:
    """Norms that are not the identity, in evaluation mode."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.uniform_(0.3, 0.7)  # below 1: maps that grow from block to block would drown every tolerance
            m.bias.normal_(std=0.2)
            m.running_mean.normal_(std=0.2)
            m.running_var.uniform_(0.7, 1.3)
    model.eval()


@torch.no_grad()
def lively(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, its norms off the identity, and its heads scaled so that it finds objects of all its
    classes, sure of some and not of others: with plain random heads nothing would be found."""
    wake_norms(model)
    image, one_stage = [picture(seed=7)], hasattr(model, "bbox_head")
    dense, name, mean = (model.bbox_head, "retina", -2.0) if one_stage else (model.rpn_head, "rpn", 0.0)
    scores, moves = dense(model.extract_feat(model.data_preprocessor(image)[0]))
    speak(getattr(dense, f"{name}_cls"), scores, 1.5, mean)
    speak(getattr(dense, f"{name}_reg"), moves, 0.2)
    if hasattr(model, "roi_head"):
        box, seen = model.roi_head.bbox_head, {}
        last = {box.fc_cls: 2.0, box.fc_reg: 0.5}
        hooks = [layer.register_forward_hook(lambda layer, _, out: seen.update({layer: out})) for layer in last]
        model(image)
        for hook, (layer, deviation) in zip(hooks, last.items()):
            hook.remove()
            speak(layer, [seen[layer]], deviation)
    return model


def tiny_model(name="r18_fpn", profile="mmdet", num_classes: int | None = 3, seed: int = 0, **overrides) -> nn.Module:
    """A small named model that finds things, the same for the same seed; `overrides` lie over `tiny_options`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        options = merge(tiny_options(name), overrides)
        return lively(named_model(name, None if name.startswith("rpn") else num_classes, profile, **options))
