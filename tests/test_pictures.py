"""training/pictures.py: what a recipe does to the pictures of a batch."""

import dataclasses

import pytest
import torch
from training_stubs import PLAIN, cells, tiny

from fastrcnn.data import open_dataset
from fastrcnn.data.transforms import apply
from fastrcnn.training import train
from fastrcnn.training.pictures import training_transforms


def test_a_recipe_crops_in_front_of_the_jitter():
    image, target = torch.zeros(3, 40, 60, dtype=torch.uint8), dict(boxes=torch.tensor([[50.0, 30, 60, 40]]),
                                                                  labels=torch.tensor([0]))  # fmt: skip
    for changes, side in ((dict(), 60), (dict(lsj=(1.0, 1.0), crop=200), 200)):
        cut = training_transforms(dataclasses.replace(PLAIN, min_crop_size=0.5, **changes))
        found = [apply(cut, image, target) for _ in range(60)]
        shapes = {tuple(x.shape[1:]) for x, _ in found}
        assert len(shapes) > 20 and all(len(t["boxes"]) == 1 for _, t in found)
        if side == 60:
            assert all(20 <= h <= 40 and 30 <= w <= 60 for h, w in shapes)
        else:  # each part fills the jitter's square again
            assert all(max(shape) == 200 for shape in shapes)
    assert training_transforms(PLAIN) is None


def test_a_run_trains_on_parts(tmp_path):
    """And the parts are resized as whole pictures are."""
    data, seen = open_dataset(cells(tmp_path)), []
    model = tiny()
    prepare = model.prepare
    model.prepare = lambda images, *a: seen.extend(tuple(x.shape[1:]) for x in images) or prepare(images, *a)
    train(model, data, dataclasses.replace(PLAIN, min_crop_size=0.3), lr=1e-4, log=lambda line: None)
    assert len(seen) == 6 and len(set(seen)) > 3 and all(20 <= h <= 64 and 29 <= w <= 96 for h, w in seen)
    last = [target["boxes"] for _, target in data][-1]
    assert len(last) == 0 and (64, 96) in seen  # without a box nothing is cut


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match=rf"min_crop_size: expected a share above 0, at most 1, got {share}"):
        dataclasses.replace(PLAIN, min_crop_size=share)
