"""`Detector(..., features=True)`: the scores of all classes and the RoI features of each object."""

import pytest
import torch
from conftest import picture, tiny_model
from torch import nn

from fastrcnn import Detector
from fastrcnn.models.roi_head import class_scores


@pytest.mark.parametrize("nms", [dict(type="nms", iou_threshold=0.5), dict(type="soft_nms", iou_threshold=0.3)])
@pytest.mark.parametrize("profile", ["mmdet", "torchvision", "detectron2"])
def test_they_are_those_that_made_the_object(profile, nms):
    model = tiny_model(profile=profile, min_size=80, max_size=110)
    model.roi_head.test_cfg["nms"] = nms
    images = [picture(64, 96, n) for n in range(2)]
    plain = Detector(model, device="cpu", score_threshold=0.1)(images, 2)
    detector = Detector(model, device="cpu", score_threshold=0.1, features=True)
    for found, expected in zip(detector(images, 2), plain):
        assert (
            len(found) > 10 and torch.equal(found.boxes, expected.boxes) and torch.equal(found.labels, expected.labels)
        )
        assert found.class_scores.shape == (len(found), 3) and expected.features is None
        own = found.class_scores.gather(1, found.labels[:, None])[:, 0]
        if nms["type"] == "nms":  # soft-NMS lowers what it keeps
            torch.testing.assert_close(own, found.scores, rtol=0, atol=0)
        assert (own >= found.scores).all()
        # The classification layer makes these scores out of these features.
        head = detector.model.roi_head.bbox_head
        torch.testing.assert_close(class_scores(head.fc_cls(found.features)), found.class_scores, rtol=1e-4, atol=1e-5)
        part = found[found.scores > 0.5]
        assert part.features.shape == (len(part), 16)


def test_a_batch_gives_what_each_picture_alone_gives():
    detector = Detector(tiny_model(), device="cpu", features=True)
    images = [picture(64, 96, n) for n in range(3)]
    for together, image in zip(detector(images, 3), images):
        (alone,) = detector(image)
        torch.testing.assert_close(together.features, alone.features, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["retinanet_r18_fpn", "rpn_r50_fpn"])
def test_a_detector_without_a_second_stage_says_so(name):
    with pytest.raises(ValueError, match="features: expected a Faster R-CNN"):
        Detector(tiny_model(name), device="cpu", features=True)


@pytest.mark.parametrize("name", ["r18_fpn", "retinanet_r18_fpn", "rpn_r50_fpn"])
def test_the_number_of_objects_and_the_overlap_can_be_chosen(name):
    model = tiny_model(name)
    few = Detector(model, device="cpu", max_per_img=5)(picture())[0]
    many = Detector(model, device="cpu")(picture())[0]
    assert len(few) == 5 < len(many) and torch.equal(few.boxes, many.boxes[:5])
    strict = Detector(model, device="cpu", iou_threshold=0.05)(picture())[0]
    assert 0 < len(strict) < len(many)
    assert isinstance(model, nn.Module) and Detector(model, device="cpu")(picture())[0] == many


@pytest.mark.parametrize("options", [dict(max_per_img=0), dict(max_per_img=2.5), dict(iou_threshold=1.5)])
def test_bad_numbers_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Detector(tiny_model(), device="cpu", **options)
