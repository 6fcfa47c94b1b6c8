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
