"""Every block of README.md and docs/*.md runs as it is written, on a small copy of the data it names."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import tiny_model
from PIL import Image
from typer.testing import CliRunner

from fastrcnn.cli import app
from fastrcnn.data.rendered_cells import render_cells
from fastrcnn.weights import infer_model, save

CLASS_NAMES = ["RBC", "WBC", "Platelets"]
ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = {"--epochs": "1", "--batch": "2", "--min-size": "64", "--max-size": "96", "--workers": "0", "--device": "cpu"}
BLOCK = re.compile(r"(?:<!-- not run: (?P<why>[^\n]+?) -->\n)?^```(?P<kind>\w+)\n(?P<code>.*?)^```$", re.M | re.S)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with what the pages take for granted: photos/train and photos/valid, runs/mine, and a
    detector in the place of the published one."""
    for split, seeds in (("train", range(6)), ("valid", range(6, 9))):
        folder, images, annotations = tmp_path / "photos" / split, [], []
        folder.mkdir(parents=True)
        for n in seeds:
            picture, boxes, labels = render_cells(n, 64, 96)
            Image.fromarray(picture).save(folder / f"{n}.jpg")
            images.append(dict(id=n, file_name=f"{n}.jpg", width=96, height=64))
            for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist()):
                row = dict(bbox=[x1, y1, x2 - x1, y2 - y1], area=(x2 - x1) * (y2 - y1), iscrowd=0)
                annotations.append(dict(row, id=len(annotations), image_id=n, category_id=label + 1))
        categories = [dict(id=i + 1, name=name) for i, name in enumerate(CLASS_NAMES)]
        content = dict(images=images, annotations=annotations, categories=categories)
        (folder / "_annotations.coco.json").write_text(json.dumps(content))
    model = tiny_model()
    model.class_names = list(CLASS_NAMES)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    for name in ("coco.safetensors", "model.safetensors", "runs/mine/best.safetensors"):
        save(model, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words_of(command: str) -> list[str]:
    """The arguments of a `fastrcnn` line, its training made small."""
    words = shlex.split(command)[1:]
    if words[:1] == ["train"]:
        for option, value in SMALL.items():
            if option in words:
                words[words.index(option) + 1] = value
            else:
                words += [option, value]
    return ["coco.safetensors" if before == "--weights" and word == "coco" else word
            for before, word in zip(["", *words], words)]  # fmt: skip


def run_shell(code: str) -> None:
    for line in re.sub(r"\\\n\s*", " ", code).splitlines():
        command, _, target = re.sub(r"(^|\s)#.*", "", line).strip().partition(" > ")
        command = re.sub(
            r"^torchrun .*?fastrcnn(\.cli)? ", "fastrcnn ", command
        )  # tests/test_distributed.py has processes
        if command.startswith("fastrcnn "):
            if command.startswith("fastrcnn train") and "--resume" not in command:
                shutil.rmtree("runs/mine", ignore_errors=True)  # a run begins in an empty folder
            done = CliRunner().invoke(app, words_of(command))
            assert done.exit_code == 0, f"{line}\n{done.output}{done.exception!r}"
            if target:
                Path(target.strip()).write_text(done.stdout)
        elif command and not command.startswith(("pip install", "cd ")):
            subprocess.run(["bash", "-c", command], check=True, timeout=120)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_a_page_runs(page, place):
    text, run = page.read_text("utf-8"), 0
    names = {"__name__": "docs", "model_or_detector": infer_model("model.safetensors")}
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("\n```") // 2
    for block in blocks:
        kind, code = block["kind"], block["code"]
        line = text[: block.start("code")].count("\n")
        if block["why"] or kind not in ("bash", "python"):
            continue
        run += 1
        if kind == "bash":
            run_shell(code)
        else:
            exec(compile("\n" * line + code, str(page), "exec"), names)
    if not run:
        pytest.skip(f"no block of it runs here: {'; '.join(sorted({block['why'] for block in blocks}))}")
    if page.name == "train.md":
        assert names["accelerator"].num_processes == 1 and names["trainer"].global_step == 3  # six pictures by two
    if page.name == "evaluate.md":
        assert json.loads(Path("numbers.json").read_text())["AP"] is not None
        assert (place / "runs" / "mine" / "evaluation" / "report.html").stat().st_size > 10_000


def test_training_is_made_small_and_nothing_else():
    assert words_of("fastrcnn train 'my photos' --epochs 50 --weights coco")[1:6] == [
        "my photos", "--epochs", "1", "--weights", "coco.safetensors"]  # fmt: skip
    assert words_of("fastrcnn eval a --weights b.pth --out c") == ["eval", "a", "--weights", "b.pth", "--out", "c"]


def test_blocks_are_found():
    text = "a\n```bash\nls\n```\n<!-- not run: needs a GPU -->\n```bash\nnvidia-smi\n```\n"
    assert [(b["kind"], b["code"], b["why"]) for b in BLOCK.finditer(text)] == [
        ("bash", "ls\n", None), ("bash", "nvidia-smi\n", "needs a GPU")]  # fmt: skip


def test_every_link_within_the_project_leads_somewhere():
    pages = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"))]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text("utf-8"))]
    assert len(links) > 30
    assert not [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()]
