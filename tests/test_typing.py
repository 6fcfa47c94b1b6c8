"""What a user's type checker sees of the package: annotations that mypy takes strictly, and the file that says so."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DETECTS = """
from fastrcnn import Detections, Detector

detector = Detector("r18_fpn", device="cpu", max_per_img=3)
found: list[Detections] = detector("a.jpg")
best: float = found[0].filter(0.5, ["person"]).scores[0].item()
lines: list[str] = found[0].to_yolo((480, 640))
for index, image, result in detector.stream(["a.jpg"]):
    if isinstance(result, Detections):
        reveal_type(result[:2].names)
wrong: int = found[0].names
"""

TRAINS = """
import torch

import fastrcnn
from fastrcnn import Detections, Detector, models, ops
from fastrcnn.data import check, open_dataset
from fastrcnn.evaluation import evaluate, measure, predict
from fastrcnn.export import export
from fastrcnn.training import get_recipe, train
from fastrcnn.weights import infer_model, pretrained_model

keep: torch.Tensor = ops.nms(torch.rand(3, 4), torch.rand(3), 0.5)
pooled: torch.Tensor = ops.roi_align(torch.rand(1, 2, 8, 8), torch.rand(3, 5), 7)
batched: torch.Tensor = ops.batched_nms(torch.rand(3, 4), torch.rand(3), torch.zeros(3), 0.5)
model = models.faster_rcnn("r18_fpn", num_classes=3)
other = infer_model("a.pth")
third = pretrained_model("a.pth", 3)
dataset = open_dataset("photos")
names: list[str] = dataset.class_names
recipe = get_recipe("finetune", epochs=1)
trained = train(model, dataset, recipe, out="runs/a", val=dataset)
scores: dict[str, float] = evaluate(Detector(model), dataset)
found = predict(Detector(model), dataset)
measure(dataset, found)
export(model, "a.onnx", to="onnx")
fastrcnn.load_weights(model, "a.pth")
fastrcnn.save(model, "a.safetensors")
print(len(check("photos")))
wrong: int = keep
"""


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    pytest.importorskip("mypy")
    return subprocess.run([sys.executable, "-m", "mypy", *arguments], capture_output=True, text=True, cwd=cwd)


def test_the_public_modules_are_typed_strictly():
    done = run("--config-file", str(ROOT / "pyproject.toml"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_users_strict_checker_sees_the_types(tmp_path):
    assert (ROOT / "fastrcnn" / "py.typed").is_file()
    files = {tmp_path / "detects.py": DETECTS, tmp_path / "trains.py": TRAINS}
    for path, code in files.items():
        path.write_text(code)
    done = run("--strict", "--follow-imports=silent", *map(str, files))
    errors = sorted(line for line in done.stdout.splitlines() if ": error:" in line)
    assert len(errors) == 2, done.stdout
    for error, file, found in zip(errors, ("detects.py", "trains.py"), ("list[str]", "Tensor"), strict=True):
        assert file in error and f'expression has type "{found}", variable has type "int"' in error
    assert 'Revealed type is "list[str]"' in done.stdout
