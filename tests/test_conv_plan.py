"""The plan that says which convolution answers on CUDA, with a clock that tells what the test wants; and the function that
is registered for CUDA, on CPU tensors, with each candidate as the fastest."""

import importlib
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from typer.testing import CliRunner

from fastrcnn import Detector, save
from fastrcnn.cli import app
from fastrcnn.ops import conv_bn_relu_reference, conv_plan
from fastrcnn.ops.conv_plan import PLAN, choose, load_plan, plan_beside, save_plan
from fastrcnn.ops.conv_tile import FLOAT_TILES, TILES

op_module = importlib.import_module("fastrcnn.ops.conv_bn_relu")
cuda_module = importlib.import_module("fastrcnn.ops.conv_cuda")
ANSWERS = {
    "cudnn": torch.tensor([1.0, -2.0]),
    "close": torch.tensor([1.0, -2.00001]),
    "slow": torch.tensor([1.0, -2.0]),
}
ANSWERS |= {"wrong": torch.tensor([1.0, -2.1]), "nan": torch.tensor([1.0, torch.nan])}
TIMES = {"cudnn": 3.0, "close": 2.0, "slow": 5.0, "wrong": 1.0, "nan": 0.5}


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """How often each candidate was timed; its time is what TIMES says."""
    timed = dict.fromkeys(TIMES, 0)

    def milliseconds(call):
        name = call.args[0]
        timed[name] = timed.get(name, 0) + 1
        return TIMES.get(name, 1e3)

    monkeypatch.setattr(conv_plan, "milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    PLAN.clear()
    yield timed
    PLAN.clear()


def run(name: str) -> torch.Tensor:
    if name == "refused":
        raise ValueError("tile takes smaller kernels")
    if name == "large":
        raise torch.OutOfMemoryError("CUDA out of memory")
    return ANSWERS[name]


def test_the_fastest_that_agrees_is_measured_once(clock):
    names = ["cudnn", "slow", "wrong", "refused", "large", "close", "nan"]
    assert [choose("kind", names, run) for _ in range(3)] == ["close"] * 3
    assert clock == {"cudnn": 1, "close": 1, "slow": 1, "wrong": 0, "nan": 0}
    assert list(PLAN["kind"].items()) == [("close", 2.0), ("cudnn", 3.0), ("slow", 5.0)]
    assert choose("kind", ["cudnn", "slow"], run) == "cudnn"  # the winner is not built here


@pytest.mark.parametrize(
    "owner, name, value",
    [
        (torch.cuda, "is_current_stream_capturing", lambda: True),
        (torch, "are_deterministic_algorithms_enabled", lambda: True),
        (torch.backends.cudnn, "deterministic", True),
    ],
)
def test_what_may_not_be_measured_is_the_first(clock, monkeypatch, owner, name, value):
    monkeypatch.setattr(owner, name, value)
    assert choose("kind", ["cudnn", "close"], run) == "cudnn"
    assert not PLAN and not any(clock.values())
    PLAN["kind"] = {"close": 2.0, "cudnn": 3.0}
    assert choose("kind", ["cudnn", "close"], run) == "close"  # as planned before


def test_a_plan_is_saved_and_loaded(tmp_path):
    choose("kind", ["cudnn", "close"], run)
    save_plan(tmp_path / "plan.json")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    PLAN.clear()
    (tmp_path / "plain").touch()
    assert (tmp_path / "plan.json").stat().st_mode == (tmp_path / "plain").stat().st_mode  # others may read it
    assert load_plan(tmp_path / "plan.json") == PLAN == {"kind": {"close": 2.0, "cudnn": 3.0}}
    (tmp_path / "plan.json").write_text('{"kind": {"slow": 3, "cudnn": 2}}')
    assert list(load_plan(tmp_path / "plan.json")["kind"]) == ["cudnn", "slow"]
    assert choose("kind", ["cudnn", "slow"], run) == "cudnn"


NO_PLANS = ["{", "[1]", '{"kind": []}', '{"kind": {}}', '{"kind": {"cudnn": "1"}}', "[" * 9999]
NO_PLANS += [f'{{"kind": {{"cudnn": {time}}}}}' for time in ("NaN", "-1", "1" + "0" * 400, "1" + "0" * 5000)]


@pytest.mark.parametrize("text", NO_PLANS)
def test_a_file_that_is_no_plan_is_named(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{path}: "):
        load_plan(path)
    assert not PLAN


def test_info_shows_a_plan(tmp_path):
    choose("[H100] kind", ["cudnn", "close", "slow"], run)
    save_plan(tmp_path / "plan.json")
    shown = CliRunner().invoke(app, ["info", "--plan", str(tmp_path / "plan.json")])
    assert shown.output.strip() == "[H100] kind: close 2 ms, cudnn 3 ms, slow 5 ms"
    shown = CliRunner().invoke(app, ["info", "--json", "--plan", str(tmp_path / "plan.json")])
    assert json.loads(shown.output) == PLAN
    missing = CliRunner().invoke(app, ["info", "--plan", str(tmp_path / "none.json")])
    assert missing.exit_code == 1 and "none.json" in missing.output


def test_a_detector_loads_the_plan_beside_its_weights(tmp_path):
    path = tmp_path / "mine.safetensors"
    save(tiny_model(), path)
    Detector(path)
    assert not PLAN
    choose("kind", ["cudnn", "close"], run)
    save_plan(plan_beside(path))
    measured = dict(PLAN)
    for arguments in ((path,), ("r18_fpn", str(path))):
        PLAN.clear()
        Detector(*arguments)
        assert measured == PLAN
    plan_beside(path).write_text("[]")
    with pytest.raises(ValueError, match=r"mine.safetensors.plan.json: expected an object of kinds"):
        Detector(path)


def cudnn(x, w, bias, *where):
    return F.relu(F.conv2d(x, w, bias, *where))


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch, "cudnn_convolution_relu", cudnn)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu",
                        lambda x, w, z, alpha, bias, *where: F.relu(F.conv2d(x, w, bias, *where) + z))  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")

    def call(*tensors, **kwargs):
        return op_module._checked(cuda_module._cuda, *tensors, **kwargs)

    return call


@pytest.mark.parametrize("dtype, groups", [(torch.bfloat16, 1), (torch.float32, 1), (torch.float16, 4)])
@pytest.mark.parametrize("half", [False, True])
def test_whichever_is_planned_answers(device, need_cuda_kernel, monkeypatch, on_cpu, dtype, groups, half):
    """All of a call's candidates are timed, and each gives the reference's answer where it is the fastest."""
    need_cuda_kernel("_conv_tile", device)
    if device != "cpu":
        pytest.skip("on CPU tensors, with --emulate-cuda")
    x, w = torch.randn(2, 32, 5, 7).to(dtype), (torch.randn(32, 32 // groups, 3, 3) / (288 / groups) ** 0.5).to(dtype)
    bn = [torch.rand(32) + 0.5, torch.randn(32), torch.randn(32), torch.rand(32) + 0.5]
    residual = torch.randn(2, 32, *((3, 4) if half else (5, 7))).to(dtype)
    rest = dict(padding=1, groups=groups, residual=residual, upsample_residual=half)
    candidates = ["cudnn", *(FLOAT_TILES if dtype == torch.float32 else TILES[:-1] if groups == 1 else ["groups"])]
    right = conv_bn_relu_reference(x.double(), w.double(), *bn, **{**rest, "residual": residual.double()})
    asked, kernel = [], cuda_module.conv_tile
    monkeypatch.setattr(cuda_module, "conv_tile", lambda *a: asked.append(TILES[a[-1]]) or kernel(*a))
    for fastest in candidates:
        PLAN.clear()
        monkeypatch.setitem(TIMES, fastest, 0.1)
        on_cpu(x, w, *bn, **rest)
        (times,) = PLAN.values()
        assert sorted(times) == sorted(candidates)
        asked.clear()
        out = on_cpu(x, w, *bn, **rest)
        assert asked == [fastest] * (fastest != "cudnn")
        roundings = 32 if dtype == torch.float32 else 4
        assert (out.double() - right).abs().max() <= roundings * torch.finfo(dtype).eps * right.abs().max()
        monkeypatch.delitem(TIMES, fastest)
    half_kind = " + half residual" if half else " + residual"
    assert list(PLAN) == [
        f"H100, {str(dtype)[6:]}, 32->32 3x3 /1 p1 d1 g{groups}, 2^6.25 pixels + bias{half_kind}, relu"
    ]


@pytest.mark.parametrize("tf32", [False, True])
def test_what_no_tile_of_ours_may_answer(device, need_cuda_kernel, monkeypatch, on_cpu, tf32):
    """TF32, and narrow groups whose channels are not read 16 bytes at a time."""
    need_cuda_kernel("_conv_tile", device)
    if device != "cpu":
        pytest.skip("on CPU tensors, with --emulate-cuda")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    x, w = torch.randn(1, 16, 5, 6), torch.randn(16, 16, 1, 1)
    on_cpu(x, w, None, None, None, None)
    assert bool(PLAN) is not tf32
    PLAN.clear()
    lines = torch.randn(1, 5, 6, 17).bfloat16()
    for x, planned in ((lines[..., :16], False), (lines[..., :16].contiguous(), True), (lines[..., 1:13], False)):
        off = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)  # 2 bytes beside a multiple of 16
        for one, expected in ((x.contiguous(), planned or x.shape[3] == 16), (off, False)):
            PLAN.clear()
            channels = one.shape[3]
            on_cpu(one.permute(0, 3, 1, 2), torch.randn(channels, 4, 1, 1).bfloat16(), None, None, None, None,
                   groups=channels // 4)  # fmt: skip
            assert bool(PLAN) is expected


def test_kinds_tell_apart_what_matters():
    base = dict(device="H100", dtype=torch.bfloat16, weight=(64, 32, 3, 3), pixels=1000, where=((1, 1), (1, 1), (1, 1), 1),
                epilogue="")  # fmt: skip
    changes = [{}, dict(device="A100"), dict(dtype=torch.float16), dict(weight=(64, 32, 1, 3)), dict(pixels=2000)]
    changes += [
        dict(where=((2, 1), (1, 1), (1, 1), 1)),
        dict(where=((1, 1), (1, 1), (1, 1), 2)),
        dict(epilogue=", relu"),
    ]
    assert len({conv_plan.kind_of(**base | change) for change in changes}) == len(changes)
    assert conv_plan.kind_of(**base) == conv_plan.kind_of(**base | dict(pixels=1050))
    assert conv_plan.kind_of(**base) == "H100, bfloat16, 32->64 3x3 /1 p1 d1 g1, 2^10 pixels"
