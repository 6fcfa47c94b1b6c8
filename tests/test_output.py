"""What `detect` leaves on the disk, whatever happens to it."""

import json
import os
import resource
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from fastrcnn import Detections, cli
from fastrcnn.cli.common import printable
from fastrcnn.inference.output import check_folder, picture_path, write_detections


class Finder:
    """In the place of a detector: one object in every picture."""

    class_names, category_ids = ["cell"], [7]

    def stream(self, images, batch_size=None):
        for index, source in enumerate(images):
            image = torch.from_numpy(np.array(Image.open(source))).permute(2, 0, 1)
            box = torch.tensor([[1.0, 2, 11, 22]])
            yield index, image, Detections(box, torch.tensor([0.5]), torch.tensor([0]), ["cell"], [7])


def ids(out) -> list[int]:
    return [image["id"] for image in json.loads((out / "detections.json").read_text())["images"]]


def test_every_image_that_is_done_is_on_the_disk(sources, tmp_path):
    out = tmp_path / "out"
    run = write_detections(Finder(), sources, out)
    for done in range(1, 6):
        next(run)  # and if it were killed here
        rows = [json.loads(line) for line in (out / "detections.jsonl").read_text().splitlines()]
        assert [row["image"]["id"] for row in rows] == list(range(1, done + 1))
        assert rows[-1]["annotations"][0]["bbox"] == [1.0, 2.0, 10.0, 20.0]
        assert ids(out) == list(range(1, {1: 1, 2: 2, 3: 2, 4: 4, 5: 4}[done] + 1))
    run.close()
    assert ids(out) == [1, 2, 3, 4, 5]
    assert sorted(p.name for p in out.iterdir()) == [*(f"{i}.jpg" for i in range(5)), "detections.json"]


def test_two_runs_do_not_write_to_one_folder(sources, tmp_path):
    out = tmp_path / "out"
    first = write_detections(Finder(), sources, out)
    next(first)
    with pytest.raises(OSError, match="another process"):
        next(write_detections(Finder(), sources[:1], out))
    assert len(list(first)) == 5 and ids(out) == [1, 2, 3, 4, 5, 6]
    assert len(list(write_detections(Finder(), sources[:2], out))) == 2 and ids(out) == [1, 2]


def test_a_picture_that_cannot_be_written_is_said_and_its_objects_are_kept(sources, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    os.mkfifo(tmp_path / "pipe")
    (out / "1.jpg").symlink_to(tmp_path / "pipe")
    results = list(write_detections(Finder(), sources, out))
    assert [isinstance(found, OSError) for found in results] == [False, True, False, False, False, False]
    assert "cannot be written" in str(results[1]) and ids(out) == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_leaves_the_earlier_results_whole(sources, tmp_path):
    out = tmp_path / "out"
    list(write_detections(Finder(), sources, out))
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    list(write_detections(Finder(), [], out))  # puts them aside
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(OSError, match=r"detections\.json.*cannot be written"):
            list(write_detections(Finder(), sources, out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_bytes() for p in (out / "earlier-1").iterdir()} == before


def test_a_folder_that_cannot_be_written_to_is_known_before(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(OSError, match="no folder"):
            check_folder(folder)
    check_folder(tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_names_that_are_hard_to_write(sources, tmp_path):
    long = "a" * 251 + ".jpg"
    names = [os.fsdecode(b"m\xff.jpg"), "\x1b[31m.jpg", "what?.jpg", f"x/{long}", f"y/{long}"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        shutil.copy(sources[0], path)
    out = tmp_path / "out"
    found = list(write_detections(Finder(), [str(tmp_path / name) for name in names], out))
    assert all(isinstance(f, Detections) for f in found)
    images = json.loads((out / "detections.json").read_text())["images"]
    assert [image["file_name"] for image in images] == [str(tmp_path / name) for name in names]
    assert (out / "what?.jpg").is_file() and len(list(out.glob("aaa*.jpg"))) == 2
    paths = [picture_path(out, f"https://example.com/{end}", set()) for end in ("s/a.jpe?w=1#2", "", "..")]
    assert paths[0] == out / "a.jpg" and all(p.parent == out for p in paths)


def test_nothing_that_a_terminal_obeys_is_printed():
    assert printable("ä 猫\x1b]0;t\x07\r\n\udcff\u202e") == "ä 猫\\x1b]0;t\\x07\\r\\n\\udcff\\u202e"


def test_a_signal_to_end_lets_the_command_finish_what_it_writes(monkeypatch):
    monkeypatch.setattr(cli, "app", lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
    try:
        with pytest.raises(SystemExit) as end:
            cli.main()
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGHUP), before):
            signal.signal(number, handler)
    assert end.value.code == 128 + signal.SIGTERM
