"""Runs of `detect` that meet an earlier one in their folder: gone on with, put aside, never mixed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastrcnn import Detections
from fastrcnn.inference.output import write_detections

ROOT = Path(__file__).resolve().parent.parent


class Finder:
    """In the place of a detector: one object in every picture; counts what it looked at."""

    class_names, category_ids = ["cell", "blob"], [7, 9]

    def __init__(self, score=0.5):
        self.seen, self.score = [], score

    def stream(self, images, batch_size=None):
        for index, source in enumerate(images):
            self.seen.append(Path(source).name)
            image = torch.from_numpy(np.array(Image.open(source))).permute(2, 0, 1)
            box = torch.tensor([[1.0, 2, 11, 22]])
            label = torch.tensor([index % 2])
            yield index, image, Detections(box, torch.tensor([self.score]), label, ["cell", "blob"], [7, 9])


def content(out) -> dict:
    return json.loads((out / "detections.json").read_text())


def names(out) -> list[str]:
    return sorted(p.name for p in out.iterdir())


@pytest.mark.parametrize("finished", [False, True])
def test_resume_does_nothing_twice(sources, tmp_path, finished):
    out, first = tmp_path / "out", Finder()
    run = write_detections(first, sources[: 3 if finished else 6], out)
    for _ in range(3):
        next(run)
    if finished:
        assert list(run) == []
    else:
        lines = (out / "detections.jsonl").read_text()
        run.close()  # and the file of lines as a kill would leave it, its last line torn
        (out / "detections.jsonl").write_text(lines + '{"image": {"id": 4, "file_')
    second = Finder()
    found = list(write_detections(second, sources, out, resume=True))
    assert first.seen == ["0.jpg", "1.jpg", "2.jpg"] and second.seen == ["3.jpg", "4.jpg", "5.jpg"] and len(found) == 3
    assert [i["id"] for i in content(out)["images"]] == [1, 2, 3, 4, 5, 6]
    assert [a["image_id"] for a in content(out)["annotations"]] == [1, 2, 3, 4, 5, 6]
    assert names(out) == [*(f"{i}.jpg" for i in range(6)), "detections.json"]
    assert list(write_detections(third := Finder(), sources, out, resume=True)) == [] and third.seen == []
    assert len(content(out)["images"]) == 6


def test_a_killed_process_is_gone_on_with(sources, tmp_path):
    """SIGKILL in the middle of the fourth picture."""
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_resume import Finder
from fastrcnn.inference.output import write_detections
out = Path({str(tmp_path / "out")!r})
for n, found in enumerate(write_detections(Finder(), {sources!r}, out, formats=("csv", "yolo"))):
    if n == 2:
        os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    out, finder = tmp_path / "out", Finder()
    assert (out / "detections.jsonl").is_file() and not (out / "detections.csv").exists()
    list(write_detections(finder, sources, out, formats=("csv", "yolo"), resume=True))
    assert finder.seen == ["3.jpg", "4.jpg", "5.jpg"]
    assert len((out / "detections.csv").read_text().splitlines()) == 7 and len(list((out / "labels").iterdir())) == 6


def test_other_settings_are_not_gone_on_with(sources, tmp_path):
    out = tmp_path / "out"
    list(write_detections(Finder(), sources[:2], out, settings=dict(score=0.5, weights="a")))
    with pytest.raises(ValueError, match=r"resume: .*score 0\.5, now 0\.3"):
        list(write_detections(Finder(), sources, out, resume=True, settings=dict(score=0.3, weights="a")))
    assert len(content(out)["images"]) == 2


def test_new_sources_get_numbers_of_their_own(sources, tmp_path):
    out = tmp_path / "out"
    list(write_detections(Finder(), sources[2:4], out))
    list(write_detections(Finder(), sources[:3], out, resume=True))
    found = {Path(i["file_name"]).name: i["id"] for i in content(out)["images"]}
    assert found == {"2.jpg": 1, "3.jpg": 2, "0.jpg": 3, "1.jpg": 4}


def test_a_second_run_puts_the_first_aside_and_says_so(sources, tmp_path):
    out, said = tmp_path / "out", []
    every = ("json", "csv", "yolo", "crops")
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    list(write_detections(Finder(), sources[:3], out, formats=every, say=said.append))
    before = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "notes.txt"}
    assert said == [] and "crops/blob/1_1.jpg" in before and "labels/0.txt" in before
    list(write_detections(Finder(0.25), sources[4:], out, say=said.append))
    assert names(out) == ["4.jpg", "5.jpg", "detections.json", "earlier-1", "notes.txt"]
    aside = out / "earlier-1"
    assert {str(p.relative_to(aside)): p.read_bytes() for p in aside.rglob("*") if p.is_file()} == before
    assert len(said) == 1 and str(aside) in said[0]
    list(write_detections(Finder(), sources[:1], out, overwrite=True, say=said.append))
    assert names(out) == ["0.jpg", "detections.json", "earlier-1", "notes.txt"] and len(said) == 1
    list(write_detections(Finder(), sources[:1], out))
    assert names(out) == ["0.jpg", "detections.json", "earlier-1", "earlier-2", "notes.txt"]


def test_a_dataset_of_somebody_elses_is_not_written_into(sources, tmp_path):
    out = tmp_path / "out"
    (out / "labels").mkdir(parents=True)
    (out / "labels" / "0.txt").write_text("0 0.5 0.5 1 1\n")
    with pytest.raises(OSError, match="labels: is there already"):
        list(write_detections(Finder(), sources, out, formats=("yolo",)))
    assert (out / "labels" / "0.txt").read_text() == "0 0.5 0.5 1 1\n"
    (out / "detections.json").write_text(json.dumps(dict(images=[dict(picture="../in/0.jpg")], info=dict(settings={}))))
    list(write_detections(Finder(), sources[:1], out))
    assert Path(sources[0]).is_file()  # a name that leads out of the folder is none of a run's
