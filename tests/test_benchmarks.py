"""Every benchmark runs, checks its results against the rival's, and writes the rows it promises. No time is judged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
COLUMNS = ["op", "shape", "dtype", "device", "ours_ms", "rival", "rival_ms", "speedup", "floor_ms", "max_error"]


def run(name: str, *args: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(FOLDER / f"{name}.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.parametrize("name", sorted(p.stem for p in FOLDER.glob("*_bench.py")))
def test_quick_run_writes_rows(name, tmp_path):
    out = tmp_path / f"{name.removesuffix('_bench')}.json"
    result = run(name, "--quick", "--device", "cpu", "--json", str(out))
    assert result.returncode == 0, result.stderr
    content = json.loads(out.read_text())
    assert content["rows"] and all(list(row) == COLUMNS for row in content["rows"])
    assert {"cpu", "torch", "commit", "date"} <= set(content["machine"])
    assert all(str(row["op"]) in result.stdout for row in content["rows"])
    joined = run("collect", str(tmp_path / "all"), str(out))
    assert joined.returncode == 0, joined.stderr
    assert len((tmp_path / "all.md").read_text().splitlines()) == len(content["rows"]) + 8
    assert json.loads((tmp_path / "all.json").read_text())["rows"] == content["rows"]


def test_a_reference_is_never_timed():
    code = "import timing; timing.has_kernel = lambda *a: False; timing.require_kernel('nms', 'cpu')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=FOLDER)
    assert result.returncode != 0 and "only the reference" in result.stderr


def test_a_wrong_result_stops_the_benchmark():
    code = "import timing; timing.check('x', float('nan'), 1.0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=FOLDER)
    assert result.returncode != 0 and "differs from the rival" in result.stderr


def test_the_layers_of_a_detector():
    """53 convolutions of a ResNet-50, 8 of the pyramid, 2 on each of the RPN's 5 levels; 202 GFLOP in all."""
    code = """if True:
        import conv_layers, json
        parts = conv_layers.layers_of("r50_fpn")
        calls = {part: sum(layers.values()) for part, layers in parts.items()}
        flop = sum(layer.flop(1) * n for layers in parts.values() for layer, n in layers.items())
        print(json.dumps([calls, flop, sorted(layer.title() for layer in parts["FPN"])]))"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=FOLDER)
    calls, flop, titles = json.loads(result.stdout)
    assert calls == {"backbone": 53, "FPN": 8, "RPN head": 10}
    assert flop == pytest.approx(2 * 201.65e9, rel=1e-3)
    assert "256->256 1x1/1 200x336 + half residual" in titles and "2048->256 1x1/1 25x42" in titles


def test_a_layer_is_checked_and_timed(tmp_path):
    code = """if True:
        import conv_layers, json, timing, torch
        from fastrcnn import ops
        layer = next(x for x in conv_layers.layers_of("r18_fpn", (64, 64))["FPN"] if x.residual == "half")
        args = timing.argparse.Namespace(device="cpu", quick=True)
        right, rates = ops.conv_bn_relu_reference, timing.Rates("cpu")
        print(json.dumps(conv_layers.rows_of(layer, 2, torch.float32, right, args, rates)))
        conv_layers.ops.conv_bn_relu = lambda *call: right(*call) + 1
        conv_layers.rows_of(layer, 2, torch.float32, right, args, rates)"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=FOLDER)
    rows = json.loads(result.stdout)
    assert [row["rival"] for row in rows] == ["cuDNN fused", "torch.compile"] and list(rows[0]) == COLUMNS
    assert result.returncode == 1 and "differs from the rival by" in result.stderr
