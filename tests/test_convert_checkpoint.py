"""weights/convert.py: a peer's checkpoint as another's, whose own model then computes the same features."""

import json

import pytest
import torch
from conftest import picture, tiny_model
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from typer.testing import CliRunner

from fastrcnn import load_weights
from fastrcnn.cli import app
from fastrcnn.models.profiles import PROFILES
from fastrcnn.weights import export_weights, infer_model, load_checkpoint, save
from fastrcnn.weights.convert import become, convert_checkpoint
from fastrcnn.weights.named import named_model

PEERS = list(PROFILES)
NAMES = ["red", "white", "platelet"]


def features(model, image):
    """Of a picture that no peer resizes: the rules of resizing differ."""
    return model.extract_feat(model.prepare([image])[0])


@pytest.mark.parametrize("name", ["r18_fpn", "r50_fpn"])
@pytest.mark.parametrize("own", PEERS)
@pytest.mark.parametrize("other", PEERS)
def test_the_features_stay_what_they_were(own, other, name):
    model, image = tiny_model(name, own), picture(64, 96)
    for norm in model._norms():  # as torchvision's published weights have 0; large enough to be seen
        norm.eps = 0.05
    if name == "r50_fpn" and own == "detectron2" and other == "torchvision":
        with pytest.raises(ValueError, match="3x3"):
            become(model, other)
        return
    before, offset = features(model, image), model.label_offset
    notes = become(model, other)
    state = export_weights(model, other)
    fresh = load_weights(tiny_model(name, other, seed=1), state)
    assert fresh.profile.name == other and fresh.peer_options.norm_eps == 1e-5
    fresh.backbone.set_style(before_style(own, name))
    for expected, found in zip(before, features(fresh, image)):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert offset == PROFILES[own].label_offset and (own == other or any("does otherwise" in note for note in notes))


def before_style(own: str, name: str) -> str:
    return tiny_model(name, own).backbone.style


def test_torchvisions_own_model_takes_what_came_from_detectron2(tmp_path):
    torch.manual_seed(0)
    model = named_model("r18_fpn", 3, "detectron2", min_size=64, max_size=96)
    for p in model.backbone.parameters():  # features of one size in every stage
        torch.nn.init.normal_(p, 0, 0.05) if p.dim() > 1 else None
    save(model.eval(), tmp_path / "a.safetensors")
    notes = convert_checkpoint(tmp_path / "a.safetensors", "torchvision", tmp_path / "b.pth")
    theirs = FasterRCNN(resnet_fpn_backbone(backbone_name="resnet18", weights=None), 4, min_size=64, max_size=96).eval()
    theirs.load_state_dict(torch.load(tmp_path / "b.pth", weights_only=True))
    image = picture(64, 96).float() / 255
    with torch.no_grad():
        found = theirs.backbone(theirs.transform([image])[0].tensors)
        expected = features(model, picture(64, 96))
    for a, b in zip(found.values(), expected):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
    assert any("does otherwise than detectron2" in note for note in notes)


def test_what_lies_in_the_file_of_each_peer(tmp_path):
    model = tiny_model()
    model.class_names = NAMES
    save(model, tmp_path / "a.safetensors")
    for to, part in (("mmdet", "state_dict"), ("detectron2", "model"), ("torchvision", None)):
        said = CliRunner().invoke(app, ["convert", str(tmp_path / "a.safetensors"), "--to", to, "--out",
                                        str(tmp_path / f"{to}.pth"), "--json"])  # fmt: skip
        assert said.exit_code == 0, said.output
        assert json.loads(said.stdout)["to"] == to
        content = torch.load(tmp_path / f"{to}.pth", weights_only=True)
        assert all(isinstance(v, torch.Tensor) for v in (content[part] if part else content).values())
        assert load_checkpoint(tmp_path / f"{to}.pth").peer == to
    names, _ = load_checkpoint(tmp_path / "mmdet.pth").categories()
    assert names == NAMES
    convert_checkpoint(tmp_path / "a.safetensors", "fastrcnn", tmp_path / "own.safetensors")
    assert infer_model(tmp_path / "own.safetensors").class_names == NAMES


@pytest.mark.parametrize("to, out, message", [("mmdet4", "a.pth", "one of .*mmdet"), ("mmdet", "b.safetensors", r"\.pth"),
                                              ("mmdet", "a.onnx", "expected a name")])  # fmt: skip
def test_what_cannot_be_written_is_said_before(tmp_path, to, out, message):
    save(tiny_model(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "a.safetensors", to, tmp_path / out)
    assert not (tmp_path / out).exists()
