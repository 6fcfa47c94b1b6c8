"""What a user's type checker sees of the package: annotations that mypy takes strictly, and the file that says so."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
USE = """
from fastrcnn import Detections, Detector, load_weights, models

detector = Detector("r18_fpn", device="cpu", max_per_img=3)
found: list[Detections] = detector("a.jpg")
best: float = found[0].filter(0.5, ["person"]).scores[0].item()
lines: list[str] = found[0].to_yolo((480, 640))
for index, image, result in detector.stream(["a.jpg"]):
    if isinstance(result, Detections):
        reveal_type(result[:2].names)
wrong: int = found[0].names
"""


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    pytest.importorskip("mypy")
    return subprocess.run([sys.executable, "-m", "mypy", *arguments], capture_output=True, text=True, cwd=cwd)


def test_the_public_modules_are_typed_strictly():
    done = run("--config-file", str(ROOT / "pyproject.toml"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_users_checker_sees_the_types(tmp_path):
    assert (ROOT / "fastrcnn" / "py.typed").is_file()
    (tmp_path / "use.py").write_text(USE)
    done = run("--follow-imports=silent", str(tmp_path / "use.py"))
    errors = [line for line in done.stdout.splitlines() if "use.py" in line and ": error:" in line]
    assert len(errors) == 1 and 'expression has type "list[str]", variable has type "int"' in errors[0], done.stdout
    assert 'Revealed type is "list[str]"' in done.stdout
