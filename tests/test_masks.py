"""data/masks.py: the box round a segmentation, against pycocotools."""

import numpy as np
import pytest
from pycocotools import mask

from fastrcnn.data.masks import box_of_segmentation


def test_the_box_of_a_segmentation_is_pycocotools():
    rng = np.random.default_rng(1)
    for _ in range(30):
        dots = np.zeros((9, 13), np.uint8, order="F")
        top, left = rng.integers(0, 7), rng.integers(0, 11)
        dots[top : top + rng.integers(1, 4), left : left + rng.integers(1, 4)] = rng.random() < 0.9
        dots[rng.integers(9), rng.integers(13)] = 1
        if rng.random() < 0.5:  # a run goes on in the next column
            dots[5:, 4] = dots[:3, 5] = 1
        packed = mask.encode(dots)
        expected_box = mask.toBbox(packed).tolist()
        counts, last, run = [], 0, 0
        for value in dots.T.ravel().tolist():
            if value != last:
                counts.append(run)
                last, run = value, 0
            run += 1
        counts.append(run)
        for given in (packed["counts"].decode(), counts):
            assert box_of_segmentation(dict(size=[9, 13], counts=given)) == expected_box
    for wrong in ([], [[1, 2]], [[1, 2, "3", 4]], dict(size=[9, 13], counts="zz"), dict(size=[9, 13], counts=[1]), "x"):
        with pytest.raises(ValueError, match="segmentation"):
            box_of_segmentation(wrong)
