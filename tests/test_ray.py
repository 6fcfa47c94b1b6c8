"""ray.py: what the workers of a cluster find is what one Detector finds, each picture once, whoever dies."""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
from conftest import tiny_model
from serving import encoded
from test_cli import run

import fastrcnn.ray
from fastrcnn import Detector
from fastrcnn.data.decode import decode
from fastrcnn.data.images import read_image
from fastrcnn.ray import find_pictures
from fastrcnn.weights import save

parquet = pytest.importorskip("pyarrow.parquet")
ROOT = Path(__file__).resolve().parent.parent
NAMES = ["red", "white", "platelet"]
OPTIONS = dict(score_threshold=0.2, device="cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    model = tiny_model()
    model.class_names = NAMES
    return str(save(model, tmp_path_factory.mktemp("weights") / "tiny.safetensors"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 pictures of two sizes, one damaged, in a folder and one below it."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for i in range(24):
        (folder / ("more" if i % 3 == 0 else "") / f"{i:02d}.jpg").write_bytes(encoded(i, "JPEG", 64 + 32 * (i % 2)))
    (folder / "07.jpg").write_bytes(encoded(7, "JPEG")[:300])
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def cluster():
    """A local cluster for two workers at a time."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    environ = dict(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", OMP_NUM_THREADS="1")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20,
             runtime_env=dict(env_vars=environ))  # fmt: skip
    yield ray
    ray.shutdown()


def rows_in(out) -> dict[str, dict]:
    rows = [row for path in sorted(Path(out).glob("part-*.parquet")) for row in parquet.read_table(path).to_pylist()]
    assert len({row["path"] for row in rows}) == len(rows)  # none twice
    return {row["path"]: row for row in rows}


def expected(weights, path: str) -> dict:
    try:
        (found,) = Detector(weights, **OPTIONS)([read_image(path)])
    except ValueError as error:
        return dict(boxes=[], scores=[], labels=[], names=[], error=str(error).removeprefix(f"{path}: "))
    return dict(boxes=found.boxes.tolist(), scores=found.scores.tolist(), labels=found.labels.tolist(),
                names=found.names, error=None)  # fmt: skip


def same(row: dict, wanted: dict) -> bool:
    """Equal but for the last bits, which another number of threads changes."""
    near = len(row["boxes"]) == len(wanted["boxes"]) and np.allclose(row["scores"], wanted["scores"], atol=1e-5)
    near = near and np.allclose(np.ravel(row["boxes"]), np.ravel(wanted["boxes"]), atol=1e-3)
    return near and all(list(row[k] or ()) == list(wanted[k] or ()) for k in ("labels", "names", "error"))


def check(out, pictures, weights) -> None:
    rows = rows_in(out)
    assert set(rows) == set(pictures)
    for path, row in rows.items():
        wanted = expected(weights, path.removeprefix("file://"))
        assert same(row, wanted), path


def test_a_batch_of_arrays_and_one_of_bytes_give_what_a_detector_finds(weights):
    detector, plain = fastrcnn.ray.Detector(weights, **OPTIONS), Detector(weights, **OPTIONS)
    files = [encoded(i) for i in range(4)]
    assert fastrcnn.data.as_image(files[0]).equal(decode(files[0])) and len(plain(files[0])) == 1
    arrays = np.stack([image.permute(1, 2, 0).numpy() for image in (fastrcnn.data.as_image(data) for data in files)])
    arrays.flags.writeable = False  # as Ray's are
    found = detector(dict(image=arrays, id=np.arange(4)))
    assert list(found["id"]) == [0, 1, 2, 3] and "image" not in found and found["error"] == [None] * 4
    for i, objects in enumerate(plain(files)):
        assert found["boxes"][i] == objects.boxes.tolist() and found["names"][i] == objects.names
        assert found["labels"][i] == objects.labels.tolist() and found["scores"][i] == objects.scores.tolist()
    assert sum(map(len, found["boxes"])) > 20
    mixed = detector(dict(bytes=np.array([files[0], b"hello", files[1]], dtype=object)))
    assert [error and error.partition(",")[0] for error in mixed["error"]] == [None, "not an image", None]
    assert mixed["boxes"] == [found["boxes"][0], [], found["boxes"][1]]
    with pytest.raises(ValueError, match="a column image or bytes, got id"):
        detector(dict(id=np.arange(4)))


def test_pictures_are_found_wherever_fsspec_reads(photos):
    files = fsspec.filesystem("memory")
    for name in ("a/1.jpg", "a/b/2.PNG", "a/notes.txt"):
        files.pipe_file(f"/shelf/{name}", b"x")
    assert find_pictures(["memory://shelf"]) == ["memory:///shelf/a/1.jpg", "memory:///shelf/a/b/2.PNG"]
    assert find_pictures(["memory://shelf/*/*.jpg", "memory://nothing"]) == [
        "memory:///shelf/a/1.jpg", "memory://nothing"]  # fmt: skip
    assert find_pictures([str(photos), str(photos / "01.jpg")]) == sorted(map(str, photos.glob("*.jpg")))
    assert find_pictures(["https://x.org/a.jpg"]) == ["https://x.org/a.jpg"]


@pytest.fixture(scope="module")
def first(cluster, weights, photos, tmp_path_factory):
    """A run over sixteen of the pictures, of whose two workers one was killed: its folder, pictures, parts, the dead."""
    pictures, out = find_pictures([f"file://{photos}"]), tmp_path_factory.mktemp("found") / "out"
    parts, killed = [], None
    for part in fastrcnn.ray.detect(pictures[:16], str(out), weights, workers=2, **OPTIONS):
        parts.append(part)
        if killed is None:
            killed = part["worker"]
            os.kill(killed, signal.SIGKILL)
    return out, pictures, parts, killed


def test_a_killed_worker_loses_nothing_and_nothing_is_there_twice(first, weights, photos):
    out, pictures, parts, killed = first
    check(out, pictures[:16], weights)
    workers = {part["worker"] for part in parts}
    assert killed in workers and len(workers) > 1 and sum(part["pictures"] for part in parts) == 16
    assert [failed.partition(": ")[0] for part in parts for failed in part["failed"]] == [f"file://{photos}/07.jpg"]
    assert sum(sum(part["objects"].values()) for part in parts) > 100
    assert not [p for p in out.iterdir() if p.suffix != ".parquet" and p.name != "run.json"]


def test_what_was_done_is_not_done_again(first, weights):
    out, pictures, _, _ = first
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in out.glob("part-*")}
    with pytest.raises(FileExistsError, match="results of an earlier run"):
        next(fastrcnn.ray.detect(pictures, str(out), weights, **OPTIONS))
    with pytest.raises(ValueError, match="other settings"):
        next(fastrcnn.ray.detect(pictures, str(out), weights, resume=True, score_threshold=0.3, device="cpu"))
    parts = list(fastrcnn.ray.detect(pictures, str(out), weights, workers=1, resume=True, **OPTIONS))
    assert sum(part["pictures"] for part in parts) == 24 - 16
    assert all(hashlib.sha256(path.read_bytes()).digest() == digest for path, digest in before.items())
    check(out, pictures, weights)
    assert not list(fastrcnn.ray.detect(pictures, str(out), weights, resume=True, **OPTIONS))


def test_the_command_takes_the_engine(cluster, weights, photos, tmp_path):
    words = ["detect", f"file://{photos}/more", "--weights", weights, "--engine", "ray", "--workers", 1, "--device", "cpu",
             "--score", 0.2, "--out", tmp_path / "out"]  # fmt: skip
    said = json.loads(run(*words, "--json"))
    assert said["done"] == said["sources"] == 8 and said["unreadable"] == 0 and said["objects"]
    check(tmp_path / "out", find_pictures([f"file://{photos}/more"]), weights)
    assert "results of an earlier run; resume it" in run(*words, status=1)
    assert "0 of 8 images" in (printed := run(*words, "--resume")) and "8 were done before" in printed
    assert "leave out --tile" in run(*words, "--tile", 64, status=1)
    assert "--engine: expected local or ray, got 'spark'" in run("detect", photos, "--engine", "spark", status=1)
    assert "no images found" in run("detect", tmp_path, "--engine", "ray", "--weights", weights, status=1)


def test_what_is_wrong_is_said_before_a_worker_starts(weights, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unknown blue; the model knows red, white, platelet"):
        next(fastrcnn.ray.detect(["a.jpg"], str(tmp_path / "out"), weights, classes=["red", "blue"]))
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        next(fastrcnn.ray.detect(["a.jpg"], str(tmp_path / "out"), "nothing.pth"))
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'fastrcnn\[ray\]'"):
        next(fastrcnn.ray.detect(["a.jpg"], str(tmp_path / "out"), weights))


def test_ray_itself_takes_the_class(cluster, weights, photos):
    import ray.data

    pool = ray.data.ActorPoolStrategy(size=1)
    pictures = ray.data.read_binary_files(str(photos), include_paths=True, file_extensions=["jpg"])
    found = pictures.map_batches(fastrcnn.ray.Detector, fn_constructor_args=[weights], fn_constructor_kwargs=OPTIONS,
                                 batch_size=4, compute=pool, num_cpus=1).take_all()  # fmt: skip
    assert len(found) == 24 and "bytes" not in found[0]
    for row in found:
        row["boxes"] = [list(box) for box in row["boxes"]]
        assert same(row, expected(weights, row["path"]))
