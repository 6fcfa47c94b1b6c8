"""Weights handed back to a peer: the same keys it writes itself, and the same detections in it."""

import pytest
import torch
from torchvision.models import detection

from fastrcnn.models import faster_rcnn
from fastrcnn.weights import export_weights, infer_model, load_weights

CONSTRUCTORS = [detection.fasterrcnn_resnet50_fpn, detection.fasterrcnn_resnet50_fpn_v2]


@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_torchvision_takes_its_own_weights_back_unchanged(constructor):
    theirs = constructor(weights=None, weights_backbone=None, num_classes=5)
    state = theirs.state_dict()
    back = export_weights(infer_model(state), "torchvision")
    assert set(back) == set(state)
    theirs.load_state_dict(back, strict=True)
    unread = "roi_heads.box_predictor.bbox_pred"
    for key, value in state.items():
        kept = slice(4, None) if key.startswith(unread) else slice(None)
        expected = value if value.dim() == 0 else value[kept]
        assert torch.equal(back[key] if value.dim() == 0 else back[key][kept], expected), key


@pytest.mark.parametrize("peer", ["mmdet", "detectron2"])
def test_exported_weights_load_here_again(peer):
    model = faster_rcnn("r50_fpn", 3, peer)
    again = load_weights(faster_rcnn("r50_fpn", 3), export_weights(model, peer))
    assert again.profile.name == peer
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_another_profile_and_an_unknown_peer_are_refused():
    model = faster_rcnn("r18_fpn", 3, "mmdet")
    with pytest.raises(ValueError, match="follows the profile 'mmdet'"):
        export_weights(model, "torchvision")
    with pytest.raises(ValueError, match="peer"):
        export_weights(model, "yolo")


def test_a_layer_that_the_peer_does_not_have_is_named():
    head = dict(type="ConvFCBBoxHead", num_shared_fcs=1, num_cls_fcs=1)
    model = faster_rcnn("r18_fpn", 3, "torchvision", roi_head=dict(bbox_head=head))
    with pytest.raises(ValueError, match="cls_fcs"):
        export_weights(model, "torchvision")
