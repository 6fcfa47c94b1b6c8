"""training/auto_batch.py, where no GPU is to be had: what is measured, what is made of it, and what it leaves behind."""

import dataclasses
import json

import pytest
import torch
from training_stubs import PLAIN, Scripted, cells, pictures, tiny

from fastrcnn.data import open_dataset
from fastrcnn.models import FasterRCNN
from fastrcnn.training import auto_batch as module
from fastrcnn.training import distributed, get_recipe, loop, train
from fastrcnn.training.auto_batch import auto_batch, fitting, kept_bytes, largest_sizes

MB = 2**20


class Sized(list):
    """A dataset of so many pictures of these sizes."""

    def __init__(self, sizes, count=1000):
        super().__init__([None] * count)
        self.sizes = torch.tensor(sizes).numpy()


@pytest.fixture
def card(monkeypatch):
    """A GPU of 1000 MB, 100 of them taken by others and 50 held by torch; one picture and two need `peaks` MB."""
    peaks, asked = {1: 120.0, 2: 140.0}, []
    monkeypatch.setattr(module, "check_auto", lambda *a: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (850 * MB, 1000 * MB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50 * MB)

    def peak(model, recipe, dataset, count, device):
        asked.append(count)
        if count not in peaks:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return int(peaks[count] * MB)

    monkeypatch.setattr(module, "_peak", peak)
    return peaks, asked


def test_how_many_pictures_fit():
    assert [fitting(3, 5, room) for room in (1, 3, 20.9, 21, 1e6)] == [1, 1, 9, 10, 256]


def test_the_memory_that_is_free_is_filled(card):
    """85 % of 900 MB, less what a run keeps: 120 + 20 (n - 1)."""
    model, recipe, many = Scripted(), dataclasses.replace(PLAIN, ema=None), Sized([[8, 8]])
    assert auto_batch(model, recipe, many) == 33
    assert auto_batch(model, recipe, Sized([[8, 8]], 7)) == 7  # there are no more
    card[0].update({1: 2000.0, 2: 3000.0})
    assert auto_batch(model, recipe, many) == 1


def test_what_does_not_fit_is_no_crash(card):
    peaks, asked = card
    del peaks[2]
    assert auto_batch(Scripted(), PLAIN, Sized([[8, 8]])) == 1 and asked == [1, 2]
    peaks.clear()
    with pytest.raises(
        torch.OutOfMemoryError, match=r"batch auto: out of memory with 1 pictures .*2 GiB\)\. Lower the"
    ):
        auto_batch(Scripted(), PLAIN, Sized([[8, 8]]))


def test_what_a_run_keeps(monkeypatch):
    model = torch.nn.Linear(10, 10, bias=False)  # 400 bytes
    assert kept_bytes(model, dataclasses.replace(PLAIN, optimizer="SGD")) == 400
    assert kept_bytes(model, dataclasses.replace(PLAIN, optimizer="AdamW", ema=0.9)) == 1200
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test"), monkeypatch.setenv("WORLD_SIZE", "2")
    assert kept_bytes(model, PLAIN) == 800


def test_the_largest_batch_is_that_of_the_pictures():
    model = tiny(min_size=80, max_size=160)
    wide, both = Sized([[300, 400], [100, 400], [0, 0]]), Sized([[300, 400], [400, 300]])
    assert largest_sizes(model, PLAIN, wide) == ((300, 400), (80, 160))  # 80 x 107 and 40 x 160
    assert largest_sizes(model, PLAIN, both) == ((300, 400), (107, 107))
    scaled = dataclasses.replace(PLAIN, multi_scale=(0.5, 1.5))
    assert largest_sizes(model, scaled, wide)[1] == (120, 240)
    assert largest_sizes(model, dataclasses.replace(PLAIN, min_crop_size=0.3), wide) == ((300, 400), (160, 160))
    assert largest_sizes(model, dataclasses.replace(PLAIN, lsj=(0.1, 2.0), crop=96), wide) == ((96, 96), (96, 96))
    assert largest_sizes(model, PLAIN, pictures()) == ((160, 160), (160, 160))  # sizes that nobody knows


def test_a_look_leaves_no_trace(tmp_path, monkeypatch):
    """Of pictures as large as they come, with the model's channels, in training mode."""
    data, shapes, losses = open_dataset(cells(tmp_path)), [], FasterRCNN.losses
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    monkeypatch.setattr(
        FasterRCNN, "losses", lambda self, x, *a: shapes.append((self.training, *x.shape)) or losses(self, x, *a)
    )
    options = dict(backbone=dict(in_channels=1), data_preprocessor=dict(mean=[0.0], std=[1.0], bgr_to_rgb=False))
    model = tiny(min_size=64, max_size=96, **options).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert module._peak(model, get_recipe(multi_scale=(0.5, 2.0)), data, 2, torch.device("cpu")) == 7
    assert shapes == [(True, 2, 1, 128, 192)] and not model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_run_takes_the_least_of_all_processes_and_keeps_it(card, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "report", lambda *a: None)
    monkeypatch.setattr(loop, "save", lambda model, path: path.touch())
    monkeypatch.setattr(loop, "described", lambda model: {})
    monkeypatch.setattr(distributed, "gathered", lambda value, world: [value, 2] if value in (3, 4) else [value])
    out, recipe, few = tmp_path / "run", dataclasses.replace(PLAIN, epochs=1), pictures(3)
    train(Scripted(), few, recipe, out, batch_size="auto", log=lambda line: None)
    assert json.loads((out / "config.json").read_text())["recipe"]["batch_size"] == 2
    asked = len(card[1])
    for name in (out, tmp_path / "run.safetensors"):
        assert auto_batch(Scripted(), recipe, few, name) == 2
    train(Scripted(), few, recipe, out, resume=True, batch_size="auto", log=lambda line: None)
    assert len(card[1]) == asked == 2


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="batch: auto measures a GPU's memory, and the model is on cpu"):
        train(tiny(), pictures(), batch_size="auto")
    with pytest.raises(ValueError, match="batch: auto measures a whole model"):
        module.check_auto(get_recipe(shard=True), torch.device("cuda"))
