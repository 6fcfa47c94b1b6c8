"""The model that a training begins with, where an MMDetection config describes it."""

import pytest
import torch
from conftest import tiny_model, tiny_options
from torch import nn

from fastrcnn.checkpoints.pretrained import SHORT_NAMES
from fastrcnn.models.build import merge
from fastrcnn.weights import model_to_train, save
from fastrcnn.zoo.recipes import model_config

NAMES = ["a", "b"]


@pytest.fixture
def config(tmp_path):
    """A small Faster R-CNN of 80 classes whose first stage is frozen; it names nothing to start from."""
    options = {k: v for k, v in tiny_options().items() if k not in ("min_size", "max_size")}
    model = merge(model_config("r18_fpn"), options)
    path = tmp_path / "config.py"
    path.write_text(f"model = dict(type='FasterRCNN', **{model!r})\n")
    return str(path)


def frozen(model) -> list[str]:
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.training]
    return norms + [n for n, p in model.named_parameters() if not p.requires_grad]


def test_nothing_random_stays_frozen(config):
    assert frozen(model_to_train(config, None, NAMES).train()) == []


def test_a_detector_of_other_classes_is_taken_but_for_its_last_layers(config, tmp_path):
    start = tiny_model(num_classes=5)
    model = model_to_train(config, save(start, tmp_path / "start.safetensors"), NAMES)
    own, theirs = model.state_dict(), start.state_dict()
    fresh = [k for k in own if own[k].shape != theirs[k].shape]
    assert fresh and all(".fc_cls." in k or ".fc_reg." in k for k in fresh)
    assert all(torch.equal(own[k], theirs[k]) for k in own if k not in fresh)
    assert frozen(model.train()) != []  # the first stage, as the config says


def test_a_classifier_is_taken_for_the_backbone(config, tmp_path):
    start = tiny_model().backbone.state_dict()
    torch.save({**start, "fc.weight": torch.zeros(3, 64), "fc.bias": torch.zeros(3)}, tmp_path / "classifier.pth")
    model = model_to_train(config, tmp_path / "classifier.pth", NAMES)
    assert all(torch.equal(v, start[k]) for k, v in model.backbone.state_dict().items())


def test_a_named_model_starts_from_a_short_name(tmp_path, monkeypatch):
    start = tiny_model().backbone.state_dict()
    torch.save({**start, "fc.weight": torch.zeros(3, 64), "fc.bias": torch.zeros(3)}, tmp_path / "classifier.pth")
    monkeypatch.setitem(SHORT_NAMES, "torchvision://resnet18", str(tmp_path / "classifier.pth"))
    model = model_to_train("r18_fpn", "torchvision://resnet18", NAMES, **tiny_options())
    assert all(torch.equal(v, start[k]) for k, v in model.backbone.state_dict().items())
    for other in ("torchvision://resnet51", "open-mmlab://detectron/resnet50_caffe"):
        with pytest.raises(ValueError, match=f"{other}: expected a file or an https address"):
            model_to_train("r18_fpn", other, NAMES)


def test_every_override_counts(config):
    model = model_to_train(config, None, NAMES, max_size=321, neck=dict(out_channels=16, num_outs=5),
                           train_cfg=dict(rpn_proposal=dict(max_per_img=7)))  # fmt: skip
    assert model.data_preprocessor.max_size == 321 and model.rpn_proposal["max_per_img"] == 7
    assert model.num_classes == 2 and model.config["model"]["type"] == "FasterRCNN"


def test_published_weights_are_a_named_models(config):
    with pytest.raises(ValueError, match="weights: 'coco' are a named model's, expected a file or an address"):
        model_to_train(config, "coco", NAMES)
