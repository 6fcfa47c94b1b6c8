"""Videos in, annotated videos out; needs torchcodec and FFmpeg."""

import json
import sys

import pytest
import torch

from fastrcnn import Detections
from fastrcnn.data import ImageError
from fastrcnn.inference import video
from fastrcnn.inference.output import Video, write_detections
from fastrcnn.inference.video import is_video, open_video, video_writer

try:
    from torchcodec.encoders import Encoder  # noqa: F401
except (ImportError, RuntimeError) as error:
    pytest.skip(f"no torchcodec: {str(error).splitlines()[0]}", allow_module_level=True)


class Finder:
    """Finds the white square that `frames` moves from left to right."""

    class_names, category_ids = ["square"], [1]

    def stream(self, images, batch_size=None):
        for index, image in enumerate(images):
            ys, xs = torch.nonzero(image[0] > 128, as_tuple=True)
            box = torch.tensor([[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]]).float()
            yield index, image, Detections(box, torch.ones(1), torch.zeros(1, dtype=torch.int64), ["square"], [1])


def frames(count: int, height=64, width=98):
    for n in range(count):
        frame = torch.zeros(3, height, width, dtype=torch.uint8)
        frame[:, 16:32, 2 * n : 2 * n + 16] = 255
        yield frame


def stop():
    raise KeyboardInterrupt


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.mp4"
    with video_writer(path, (64, 98), 10.0) as write:
        for frame in frames(20):
            write(frame)
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
    return str(path)


def test_frames_come_as_they_were_written(clip):
    found = open_video(clip)
    assert (found.size, found.rate) == ((64, 98), 10.0)
    for frame, wanted in zip(found.read, frames(20), strict=True):
        assert frame.shape == (3, 64, 98) and frame.dtype == torch.uint8
        assert (frame.float() - wanted.float()).abs().mean() < 4  # H.264 is lossy


def test_every_frame_has_its_line_and_the_video_its_boxes(clip, tmp_path):
    out = tmp_path / "out"
    (done,) = write_detections(Finder(), [clip], out, formats=("csv", "yolo"))
    assert done == Video(clip, 20, {"square": 20})
    content = json.loads((out / "detections.json").read_text())
    assert [i["frame"] for i in content["images"]] == list(range(20)) and content["images"][7]["seconds"] == 0.7
    assert len({i["id"] for i in content["images"]}) == 20 and {i["file_name"] for i in content["images"]} == {clip}
    lefts = [a["bbox"][0] for a in content["annotations"]]
    assert all(abs(left - 2 * n) <= 1 for n, left in enumerate(lefts))
    assert sorted(p.name for p in (out / "labels").iterdir())[7] == "clip_000007.txt"
    drawn = list(open_video(str(out / "clip.mp4")).read)
    assert len(drawn) == 20
    plain = list(open_video(clip).read)
    for n, (a, b) in enumerate(zip(drawn, plain)):  # the box's colour around the square, and nowhere far from it
        changed = (a.float() - b.float()).abs().amax(0) > 60
        assert changed[:, max(2 * n - 3, 0) : 2 * n + 20].any() and not changed[40:].any()


def test_resume_leaves_out_a_video_that_is_done_and_does_a_torn_one_again(clip, tmp_path):
    out = tmp_path / "out"
    list(write_detections(Finder(), [clip], out))
    assert list(write_detections(Finder(), [clip], out, resume=True)) == []
    whole = json.loads((out / "detections.json").read_text())
    rows = [dict(image=i, annotations=[]) for i in whole["images"][:5]]  # as a kill in the sixth frame leaves them
    (out / "detections.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [v.frames for v in write_detections(Finder(), [clip], out, resume=True)] == [20]
    again = json.loads((out / "detections.json").read_text())
    stopped = Finder()
    stopped.stream = lambda images, batch_size=None: (item if n < 7 else stop() for n, item in
                                                      enumerate(Finder().stream(images)))  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        list(write_detections(stopped, [clip], out, overwrite=True))
    assert len(json.loads((out / "detections.json").read_text())["images"]) == 7
    assert [v.frames for v in write_detections(Finder(), [clip], out, resume=True)] == [20]
    assert again["images"] == json.loads((out / "detections.json").read_text())["images"]
    assert [i["frame"] for i in again["images"]] == list(range(20)) and len(again["annotations"]) == 20


def test_few_frames_are_held_at_a_time(tmp_path, monkeypatch):
    """Those of one piece, however long the video: what was given out and dropped is gone."""
    path = tmp_path / "long.mp4"
    with video_writer(path, (64, 98), 10.0) as write:
        for _ in range(10):
            for frame in frames(40):
                write(frame)
    asked = []
    decoder = video._torchcodec().decoders.VideoDecoder
    original = decoder.get_frames_in_range
    monkeypatch.setattr(decoder, "get_frames_in_range",
                        lambda self, start, stop: asked.append((start, stop)) or original(self, start, stop))  # fmt: skip
    for n, _ in enumerate(open_video(str(path)).read):
        assert asked[-1][0] <= n < asked[-1][1] <= n + video.PIECE
    assert n == 399


def test_an_odd_size_loses_its_last_row_and_what_is_written_is_kept(tmp_path):
    path = tmp_path / "odd.mp4"
    with video_writer(path, (65, 97), 5.0) as write:
        for frame in frames(3, 65, 97):
            write(frame)
    assert open_video(str(path)).size == (64, 96)
    with pytest.raises(KeyboardInterrupt), video_writer(tmp_path / "b.mp4", (64, 98), 5.0) as write:
        write(next(frames(1)))
        raise KeyboardInterrupt
    assert len(list(open_video(str(tmp_path / "b.mp4")).read)) == 1
    with pytest.raises(KeyboardInterrupt), video_writer(tmp_path / "c.mp4", (64, 98), 5.0):
        raise KeyboardInterrupt
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.mp4", "odd.mp4"]


def test_a_camera_is_read_until_it_ends(tmp_path, monkeypatch):
    """FFmpeg's own test picture in the place of a camera: what opens it and reads frames is the same."""
    pytest.importorskip("av")
    monkeypatch.setitem(video.CAMERAS, sys.platform, ("testsrc=duration=1:size=98x64:rate=1{}", "lavfi"))
    (done,) = write_detections(Finder(), ["camera:0"], tmp_path / "out")
    assert done.frames == 10 and done.source == "camera:0"
    assert len(list(open_video(str(tmp_path / "out" / "camera_0.mp4")).read)) == 10
    monkeypatch.setitem(video.CAMERAS, sys.platform, (str(tmp_path / "no{}"), "v4l2"))
    (found,) = write_detections(Finder(), ["/dev/video9"], tmp_path / "none")
    assert isinstance(found, ImageError) and "no picture comes from this camera" in str(found)


def test_what_is_no_video_is_one_answer(tmp_path):
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(ImageError, match=r"a\.mp4: cannot be read as a video"):
        open_video(str(tmp_path / "a.mp4"))
    found = list(write_detections(Finder(), [str(tmp_path / "a.mp4")], tmp_path / "out"))
    assert len(found) == 1 and isinstance(found[0], ImageError)
    assert json.loads((tmp_path / "out" / "detections.json").read_text())["images"] == []


VIDEOS = "a.MP4", "https://example.com/v/a.webm?x=1", "x/b.mov", "camera:0", "/dev/video3", "rtsp://10.0.0.2/live"


@pytest.mark.parametrize("name", [*VIDEOS, "a.mp4/b.jpg", "camera", "/dev/video", "video.jpg"])
def test_videos_are_told_by_their_names(name):
    assert is_video(name) is (name in VIDEOS)
