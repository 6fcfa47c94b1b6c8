"""benchmarks/gpu_check.sh without a GPU: its commands are fakes, of which some fail and one hangs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_check.sh"
ROW = dict.fromkeys(("op", "shape", "dtype", "device", "ours_ms", "rival", "rival_ms", "speedup", "floor_ms"), "x")
FAKES = {
    "nvidia-smi": "echo 'NVIDIA H100 80GB HBM3, 580.1, 81559 MiB'",
    # Every limit is 5 s, that of the one that hangs half a second, and what does not heed its signal is killed soon.
    "timeout": f"""options=()
while [[ $1 == -* ]]; do options+=("${{1/--kill-after=5/--kill-after=0.2}}"); shift; done
limit=5; [[ $* != */nms_bench.py* ]] || limit=0.5
exec {shutil.which("timeout")} ${{options[@]+"${{options[@]}}"}} $limit "${{@:2}}" """,
    "compute-sanitizer": 'echo "sanitizer: $*"; [[ $* != *racecheck* ]] || exit 9',
    "python": rf"""case "$*" in
  *-m\ pytest*--co*) printf 'tests/test_nms.py::a\ntests/test_nms.py::b\ntests/test_roi_align.py::c\n' ;;
  *-m\ pytest*) echo '1 failed'; exit 1 ;;
  */nms_bench.py*) trap '' INT; setsid sleep 90 & sleep 90; sleep 90 ;;  # leaves a process with our output open
  *_bench.py*) echo '{json.dumps({"machine": {"gpu": "H100"}, "rows": [{**ROW, "max_error": 0}]})}' >"${{@: -1}}" ;;
  *collect.py*) exec {sys.executable} "$@" ;;
esac""",
}


@pytest.mark.skipif(os.name != "posix" or shutil.which("timeout") is None, reason="a bash script")
def test_no_step_stops_the_others(tmp_path):
    for name, text in FAKES.items():
        fake = tmp_path / "bin" / name
        fake.parent.mkdir(exist_ok=True)
        fake.write_text(f"#!/usr/bin/env bash\n{text}\n")
        fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": "python", "OUT": str(tmp_path / "out")}
    environment = {**os.environ, **environment}
    run = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    written = {p.name.partition(".")[2]: p.read_text() for p in (tmp_path / "out").glob("h100_*")}
    assert written.keys() == {"log", "steps.md", "json", "md"}
    status = dict(line.strip("| ").split(" | ")[:2] for line in written["steps.md"].splitlines()[2:])
    assert {step: result for step, result in status.items() if result != "ok"} == {
        "tests": "FAILED (1)",
        "bench nms": "OUT OF TIME",
        "racecheck": "FAILED (9)",
    }
    benches = [f"bench {p.stem.removesuffix('_bench')}" for p in sorted(SCRIPT.parent.glob("*_bench.py"))]
    sanitizers = ["memcheck", "racecheck", "synccheck", "initcheck"]
    assert list(status) == ["build", "every op has a kernel", "tests", *benches, *sanitizers]
    assert written["steps.md"] in run.stdout
    assert len(json.loads(written["json"])["rows"]) == len(benches) - 1
    for tool in sanitizers:
        line = next(one for one in written["log"].splitlines() if one.startswith(f"sanitizer: --tool {tool}"))
        assert line.endswith("tests/test_nms.py::b")  # one test of every kernel comes first
