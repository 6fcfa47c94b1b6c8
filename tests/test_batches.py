"""data/batches.py: the same bits whatever the workers and wherever the run begins, every picture once, and nothing ends
it."""

import json
import os
import random
import signal
import time
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.tv_tensors import Image as Image_

from fastrcnn.data import batches, open_dataset, steps_per_epoch
from fastrcnn.data.batches import _share, plan
from fastrcnn.data.transforms import multi_scale, photometric


class Sizes:
    """A dataset that is nothing but sizes: what a plan looks at."""

    def __init__(self, count: int, wide: float = 0.7, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.sizes = np.where(rng.random(count)[:, None] < wide, [30, 40], [40, 30]).astype(np.int32)
        self.objects = rng.integers(0, 3, count).astype(np.int32)

    def __len__(self):
        return len(self.sizes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eleven pictures, wide and high."""
    folder = tmp_path_factory.mktemp("set")
    (folder / "images").mkdir()
    rng, images, annotations = np.random.default_rng(0), [], []
    for i in range(11):
        height, width = (40, 60) if i % 3 else (60, 40)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
        images.append(dict(id=i, file_name=f"{i}.png", width=width, height=height))
        annotations += [dict(id=9 * i + k, image_id=i, category_id=1, bbox=[k, 2 * k, 20, 15]) for k in range(i % 4)]
    (folder / "a.json").write_text(
        json.dumps(dict(images=images, annotations=annotations, categories=[dict(id=1, name="cat")]))
    )
    return folder


@pytest.fixture
def dataset(folder):
    return open_dataset(folder)


class Rolled(v2.Transform):
    """A user's own transform, which draws from the other generators."""

    def transform(self, inpt, params):
        return inpt.roll(random.randrange(9) + np.random.randint(9), -1) if isinstance(inpt, Image_) else inpt


HOW = v2.Compose([v2.RandomHorizontalFlip(), multi_scale([25, 30, 37], 70), photometric(), Rolled()])


def same(ours, others) -> bool:
    return len(ours) == len(others) and all(
        a[2] == b[2]
        and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
        and all(torch.equal(x["boxes"], y["boxes"]) for x, y in zip(a[1], b[1], strict=True))
        for a, b in zip(ours, others)
    )


def epoch_of(dataset, epoch=3, seed=1, **how):
    return list(batches(dataset, 2, seed=seed, epoch=epoch, transforms=HOW, **how))


def test_workers_and_the_beginning_change_no_bit(dataset):
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    here = epoch_of(dataset)
    assert len(here) == steps_per_epoch(dataset, 2) == 6
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == np.random.get_state()[1].tolist()
    torch.manual_seed(6)
    assert same(here, epoch_of(dataset, workers=2))
    assert same(here[4:], epoch_of(dataset, workers=1, start=4)) and same(here[2:], epoch_of(dataset, start=2))
    assert not same(here, epoch_of(dataset, epoch=4)) and not same(here, epoch_of(dataset, seed=2))
    sizes = {tuple(image.shape) for images, _, _ in here for image in images}
    assert len(sizes) > 2  # the scales are drawn
    for images, targets, indices in here:
        for image, target, index in zip(images, targets, indices, strict=True):
            assert image.dtype == torch.uint8 and image.shape[0] == 3 and target["image_id"] == index
            assert len(target["boxes"]) == index % 4


def test_a_picture_is_changed_alike_in_any_batch(dataset):
    alone = {i: image for images, _, at in batches(dataset, 1, seed=1, epoch=3, transforms=HOW, group=False)
             for image, i in zip(images, at)}  # fmt: skip
    assert all(torch.equal(image, alone[i]) for images, _, at in epoch_of(dataset) for image, i in zip(images, at))


@pytest.mark.parametrize("count, batch_size, world", [(11, 2, 1), (1000, 3, 7), (1001, 1, 256), (257, 16, 16), (5, 8, 4),
                                                      (100, 4, 5)])  # fmt: skip
@pytest.mark.parametrize("group", [True, False])
def test_every_picture_once_over_all_processes(count, batch_size, world, group):
    data = Sizes(count)
    order, ends = plan(data, batch_size, seed=0, epoch=1, world=world, group=group)
    steps = np.split(order, ends[:-1])
    assert len(steps) == steps_per_epoch(data, batch_size, world) and sorted(order.tolist()) == list(range(count))
    shares = [[_share(step, rank, world) for step in steps] for rank in range(world)]
    assert sorted(i for rank in shares for step in rank for i in step) == list(range(count))
    assert all(0 < len(step) <= batch_size + 1 for rank in shares for step in rank)
    mixed = sum(len({tuple(data.sizes[i]) for i in step}) > 1 for step in steps)
    assert mixed <= 3 if group else mixed == len(steps) or batch_size * world < 12
    assert not np.array_equal(order, plan(data, batch_size, seed=0, epoch=2, world=world, group=group)[0])


def test_processes_together_see_what_one_sees():
    """Two with batches of 3 and one with batches of 6 take the same steps."""
    data = Sizes(100)
    one, two = (plan(data, size, seed=4, epoch=0, world=world) for size, world in ((6, 1), (3, 2)))
    assert all(np.array_equal(a, b) for a, b in zip(one, two))
    step = one[0][:6]
    assert _share(step, 0, 2) + _share(step, 1, 2) == step.tolist()


def test_pictures_without_objects_may_be_left_out():
    data = Sizes(300)
    order, _ = plan(data, 4, seed=0, epoch=0, drop_empty=True)
    assert sorted(order.tolist()) == np.flatnonzero(data.objects).tolist()
    assert steps_per_epoch(data, 4, drop_empty=True) == len(order) // 4 + (len(order) % 4 > 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_cannot_be_read_is_left_out_and_named(dataset, workers, monkeypatch):
    bad = dataset.folder / "gone.png"
    monkeypatch.setattr(dataset, "picture", lambda i: bad if i == 4 else dataset.folder / f"{i}.png")
    given = batches(dataset, 2, seed=1, epoch=3, workers=workers)
    with pytest.warns(UserWarning, match=r"picture 4 is left out: .*gone\.png"):
        found = [i for _, _, indices in given for i in indices]
    assert sorted(found) == [i for i in range(11) if i != 4] and list(given.skipped) == [4]
    # Where a batch would be empty, another picture stands in: a process without one would leave the others waiting.
    with pytest.warns(UserWarning):
        alone = [indices for _, _, indices in batches(dataset, 1, seed=1, epoch=3)]
    assert len(alone) == 11 and all(alone) and [5] in alone and alone.count([5]) == 2


def test_nothing_to_read_ends_with_the_reason(dataset, monkeypatch):
    monkeypatch.setattr(dataset, "picture", lambda i: dataset.folder / "gone.png")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"no picture can be read: .*gone\.png"):
        next(batches(dataset, 2, seed=1, epoch=3))


@pytest.mark.filterwarnings("ignore:a worker process ended")
def test_a_worker_that_is_killed_is_begun_again(dataset):
    expected, found = epoch_of(dataset), []
    given = batches(dataset, 2, seed=1, epoch=3, transforms=HOW, workers=2)
    for batch in given:
        found.append(batch)
        if len(found) == 2:
            os.kill(next(iter(given._pool._processes)), signal.SIGKILL)
    assert same(found, expected) and given.deaths >= 1


@pytest.mark.filterwarnings("ignore:a worker process ended")
def test_a_batch_handed_to_a_broken_pool_is_not_lost(dataset):
    expected, found = epoch_of(dataset), []
    given = batches(dataset, 2, seed=1, epoch=3, transforms=HOW, workers=1)
    for batch in given:
        found.append(batch)
        if len(found) == 2:
            for _, work in given._ahead:  # are done: the next batch is there, and then another one is handed in
                work.result(60)
            (process,) = given._pool._processes.values()
            process.kill()
            with pytest.raises(BrokenProcessPool):
                given._pool.submit(int).result(60)
    assert same(found, expected) and given.deaths == 1


class Deadly(Sizes):
    def __getitem__(self, index):
        os._exit(9)


@pytest.mark.filterwarnings("ignore:a worker process ended")
def test_a_batch_that_kills_every_worker_is_named():
    with pytest.raises(OSError, match=r"ended 3 times over the pictures \[\d"):
        next(batches(Deadly(4), 2, seed=0, epoch=0, workers=1))


def test_workers_leave_with_an_iterator_that_is_let_go(dataset):
    given = batches(dataset, 1, seed=0, epoch=0, workers=2)
    next(given)
    processes = list(given._pool._processes.values())
    del given
    end = time.monotonic() + 20
    while any(p.is_alive() for p in processes) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(p.is_alive() for p in processes)


@pytest.mark.parametrize("given, message", [
    (dict(batch_size=0), "batch_size: .* from 1 up, got 0"), (dict(start=-1), "start: "), (dict(workers=1.5), "workers: "),
    (dict(world=2, rank=2), r"rank: expected one of 0\.\.1"),
    (dict(world=12), "11 pictures are less than one for each of 12"),
])  # fmt: skip
def test_arguments_out_of_range(dataset, given, message):
    with pytest.raises(ValueError, match=message):
        batches(dataset, **{**dict(batch_size=2, seed=0, epoch=0), **given})
    with pytest.raises(ValueError, match="drop_empty"):
        batches([1, 2, 3], 1, seed=0, epoch=0, drop_empty=True)
