"""The room `export`: what it refuses, what it compares, and the forms of one small model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import picture, tiny_model, tiny_options
from test_cli import run

from fastrcnn import Detector, save
from fastrcnn.export import compare, export, onnx, pt2, triton
from fastrcnn.export.program import OUTPUTS
from fastrcnn.models.build import merge
from fastrcnn.weights.named import named_model

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ["red", "white", "platelet"]


@pytest.fixture(scope="module")
def model():
    model = tiny_model()
    model.class_names = CLASSES
    return model


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """(what the command printed, the ONNX file it wrote)."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("export")
    weights = save(model, folder / "tiny.safetensors")
    return run("export", weights, "--to", "onnx", "--out", folder / "tiny.onnx"), folder / "tiny.onnx"


def test_the_command_says_what_it_compared(exported):
    printed, path = exported
    objects, pictures, pixels = re.search(r"(\d+) objects in (\d+) pictures.* ([\d.e-]+) px", printed).groups()
    assert int(objects) > 100 and pictures == "4" and float(pixels) < 0.05 and str(path) in printed
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


def test_onnx_file(exported, model):
    """Standard operators, the contract's names and types, metadata, and other sizes and batches than it was tried with."""
    import onnx as package

    proto = package.load(exported[1])
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 18)]
    assert {node.domain for node in proto.graph.node} == {""} and not proto.functions
    assert {"RoiAlign", "NonMaxSuppression", "TopK"} <= {node.op_type for node in proto.graph.node}
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*proto.graph.input, *proto.graph.output)}
    numbers = package.TensorProto
    assert kinds == dict(
        images=numbers.UINT8, boxes=numbers.FLOAT, scores=numbers.FLOAT, labels=numbers.INT64, counts=numbers.INT64
    )
    texts = {p.key: p.value for p in proto.metadata_props}
    assert json.loads(texts["class_names"]) == CLASSES and texts["profile"] == "mmdet"
    assert json.loads(texts["preprocessing"])["mean"] == [123.675, 116.28, 103.53]
    session = onnx.session(exported[1])
    images = torch.stack([picture(150, 210, seed) for seed in range(3)])
    boxes, scores, labels, counts = session.run(list(OUTPUTS), dict(images=images.numpy()))
    assert boxes.shape == (3, 100, 4)
    for i, expected in enumerate(model(list(images))):
        n = counts[i]
        torch.testing.assert_close(torch.from_numpy(boxes[i, :n]), expected["boxes"], rtol=0, atol=0.05)
        torch.testing.assert_close(torch.from_numpy(scores[i, :n]), expected["scores"], rtol=0, atol=1e-3)
        assert labels[i, :n].tolist() == expected["labels"].tolist()
        assert not boxes[i, n:].any() and not scores[i, n:].any() and not labels[i, n:].any()


def test_openvino(exported, model, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    import onnx as package

    monkeypatch.setattr(onnx, "build", lambda *_: package.load(exported[1]))
    found = export(model, tmp_path / "tiny.xml", to="openvino")
    assert found.objects > 100 and sorted(p.name for p in tmp_path.iterdir()) == ["tiny.bin", "tiny.xml"]
    assert "class_names" in (tmp_path / "tiny.xml").read_text()


def test_triton(exported, model, tmp_path, monkeypatch):
    import onnx as package

    monkeypatch.setattr(onnx, "build", lambda *_: package.load(exported[1]))
    folder = tmp_path / "repository" / "cells.v2"
    export(model, folder, to="triton")
    assert (folder / "1" / "model.onnx").read_bytes() == exported[1].read_bytes()
    config = (folder / "config.pbtxt").read_text()
    assert 'input { name: "images" data_type: TYPE_UINT8 dims: [3, -1, -1] }' in config
    assert 'output { name: "counts" data_type: TYPE_INT64 dims: [1] reshape: { shape: [ ] } }' in config
    assert config.count("{") == config.count("}") and r"[\"red\", \"white\"" in config
    monkeypatch.setattr(compare, "PIXELS", -1.0)
    with pytest.raises(ValueError, match="it lacks"):
        export(model, tmp_path / "repository" / "other", to="triton")
    assert [p.name for p in (tmp_path / "repository").iterdir()] == ["cells.v2"]


def test_a_file_that_differs_is_not_left(model, tmp_path, monkeypatch):
    """Not for a good one, and the file of before stays."""
    helper = pytest.importorskip("onnx").helper
    pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    kinds = dict(boxes=(1, [4, 100, 4]), scores=(1, [4, 100]), labels=(7, [4, 100]), counts=(7, [4]))
    nodes, outputs = [], []
    for name, (kind, shape) in kinds.items():
        value = helper.make_tensor("v", kind, [1], [0])
        nodes += [helper.make_node("Constant", [], [f"{name}_shape"], value_ints=shape)]
        nodes += [helper.make_node("ConstantOfShape", [f"{name}_shape"], [name], value=value)]
        outputs.append(helper.make_tensor_value_info(name, kind, shape))
    images = helper.make_tensor_value_info("images", 2, ["b", 3, "h", "w"])
    graph = helper.make_graph(nodes, "empty", [images], outputs)
    empty = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    monkeypatch.setattr(onnx, "build", lambda *_: empty)
    (tmp_path / "tiny.onnx").write_text("of before")
    with pytest.raises(ValueError, match=r"picture 0 of 1, 640 x 480 pixels: it lacks label \d"):
        export(model, tmp_path / "tiny.onnx")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["of before"]


def found_in(image, model) -> dict:
    (found,) = model([image])
    return found


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda f: f["boxes"][3].add_(0.06), "lacks"),
        (lambda f: f["scores"].sub_(2e-3), "lacks"),
        (lambda f: f["labels"][0].add_(1), "lacks"),
        (lambda f: f.update({k: v.flip(0) for k, v in f.items()}), "descending"),
        (lambda f: f.update({k: v[1:] for k, v in f.items()}), "lacks"),
        (lambda f: f["boxes"][1].copy_(f["boxes"][0]), "lacks"),
        (lambda f: f["scores"][2:].fill_(torch.nan), "no finite"),
        (lambda f: f["boxes"][2].fill_(torch.inf), "no finite"),
    ],
)
def test_what_counts_as_a_difference(model, change, said):
    expected = found_in(picture(80, 120), model)
    same = {k: v.clone() for k, v in expected.items()}
    assert compare.difference(same, expected, 0.05, 100)[1:] == (99, 0.0, 0.0)  # the last of 100 is excused
    change(same)
    with pytest.raises(ValueError, match=said):
        compare.difference(same, expected, 0.05, 100)
    if said == "lacks":
        with pytest.raises(ValueError, match=r"lacks|has besides"):
            compare.difference(expected, same, 0.05, 100)
    if said == "no finite":
        with pytest.raises(ValueError, match="the model's boxes or scores are no finite"):
            compare.difference(expected, same, 0.05, 100)


def test_the_largest_of_both_directions_is_told():
    boxes = torch.tensor([[0.0, 0, 9, 9], [20, 20, 40, 40]])
    expected = dict(boxes=boxes, scores=torch.tensor([0.9, 0.8]), labels=torch.tensor([0, 1]))
    found = {k: torch.cat([v, v[1:]]) for k, v in expected.items()}
    found["boxes"][1] += 0.02  # and a third that is the second
    assert compare.difference(expected, found, 0.05, 100).pixels == pytest.approx(0.02, abs=1e-5)
    assert compare.difference(found, expected, 0.05, 100).pixels == pytest.approx(0.02, abs=1e-5)


def test_nothing_to_compare_is_said(model):
    empty = [torch.zeros(1, 3, *end) for end in ((4,), (), ())]
    detector = Detector(model, device="cpu", score_threshold=1.0)
    with pytest.warns(UserWarning, match="finds no object in the pictures rendered to compare in"):
        found = compare.compare(lambda images: (*empty, torch.tensor([0])), detector, "fp32", compare.CASES[:1])
    assert found == (1, 0, 0.0, 0.0)


def test_limits_excuse_what_the_last_digit_decides():
    """An object at the score threshold, or at the last place."""
    boxes = torch.tensor([[0.0, 0, 9, 9], [20, 20, 40, 40]])
    both = dict(boxes=boxes, scores=torch.tensor([0.9, 0.0505]), labels=torch.tensor([0, 1]))
    one = {k: v[:1] for k, v in both.items()}
    assert compare.difference(one, both, 0.05, 100).objects == 1
    assert compare.difference(one, both, 0.0, 2).objects == 1
    with pytest.raises(ValueError, match="lacks label 1"):
        compare.difference(one, both, 0.0, 100)


@pytest.mark.parametrize(
    "options, error, said",
    [
        (dict(to="coreml"), ValueError, "to: expected one of pt2, onnx, openvino, triton, got 'coreml'"),
        (dict(path="model.pt2"), ValueError, r"path: expected a name that ends in .onnx, got"),
        (dict(path="model.onnx", to="triton"), ValueError, "path: expected a folder's name"),
        (dict(precision="bf16"), ValueError, "precision: onnx has fp32, fp16, got 'bf16'"),
        (dict(path="folder.onnx"), OSError, "is no file"),
        (dict(path="file/model.onnx"), OSError, "cannot be written"),
    ],
)
def test_what_is_refused(model, tmp_path, options, error, said):
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "file").touch()
    path = tmp_path / options.pop("path", "model.onnx")
    with pytest.raises(error, match=said):
        export(model, path, **options)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_model_of_other_channels_is_refused(tmp_path):
    model = named_model("r18_fpn", 3, **merge(tiny_options(), dict(backbone=dict(in_channels=4))))
    with pytest.raises(ValueError, match="model_or_detector: programs read RGB, expected a model of 3 channels, got 4"):
        export(model, tmp_path / "model.onnx")


def test_what_onnx_cannot_say_is_named(tmp_path):
    soft = tiny_model(test_cfg=dict(rcnn=dict(nms=dict(type="soft_nms", iou_threshold=0.5))))
    dcn = tiny_model("r50_fpn", backbone=dict(dcn=dict(type="DCNv2"), stage_with_dcn=(False, True, False, False)))
    for model, said in (
        (soft, "roi_head test_cfg nms: ONNX has no soft_nms"),
        (dcn, r"layer2\.0\.conv2: ONNX of opset"),
    ):
        with pytest.raises(ValueError, match=said):
            export(model, tmp_path / "model.onnx")


def test_an_absent_package_is_named_with_its_extra(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"onnxscript: pip install 'fastrcnn\[export\]'"):
        export(model, tmp_path / "model.onnx")


def test_the_command_refuses_in_one_sentence(model, tmp_path):
    weights = save(model, tmp_path / "tiny.safetensors")
    assert "--to: expected one of" in run("export", weights, "--to", "coreml", status=1)
    assert "precision: onnx has" in run("export", weights, "--precision", "int8", status=1)
    assert "no_such" in run("export", tmp_path / "no_such.pth", status=1)


def test_precisions_and_thresholds_are_the_detectors(model):
    assert compare.score_threshold(Detector(model, device="cpu", score_threshold=0.3).model) == 0.3
    assert compare.score_threshold(tiny_model("rpn_r50_fpn")) == 0.0
    assert "bf16" in pt2.PRECISIONS and triton.PRECISIONS == onnx.PRECISIONS


def test_pt2_runs_in_a_fresh_process(model, tmp_path):
    """With torch and the operators alone: neither the model's classes nor the exporter."""
    path = tmp_path / "tiny.pt2"
    found = export(model, path, to="pt2")
    assert found.objects > 100 and found.pixels < 1e-3
    images = torch.stack([picture(70, 100, seed) for seed in range(3)])
    torch.save(images, tmp_path / "images.pt")
    script = f"""
import json, torch, fastrcnn.ops
model = torch._inductor.aoti_load_package({str(path)!r})
torch.save(model(torch.load({str(tmp_path / "images.pt")!r})), {str(tmp_path / "found.pt")!r})
assert json.loads(model.get_metadata()["class_names"]) == {CLASSES!r}
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
    boxes, scores, labels, counts = torch.load(tmp_path / "found.pt")
    for i, expected in enumerate(model(list(images))):
        n = int(counts[i])
        torch.testing.assert_close(boxes[i, :n], expected["boxes"], rtol=0, atol=1e-3)
        torch.testing.assert_close(scores[i, :n], expected["scores"], rtol=0, atol=1e-5)
        assert labels[i, :n].tolist() == expected["labels"].tolist()


PROGRAMS_ALONE = {"match_boxes", "nms", "batched_nms", "soft_nms", "batched_soft_nms", "preprocess"}


def test_cpp_declares_the_operators_as_python_does():
    """csrc/operators.cpp has every operator that an exported program calls, with the same schema."""
    from fastrcnn._extension import operators

    text = (ROOT / "csrc" / "operators.cpp").read_text(encoding="utf-8")
    calls = re.findall(r"m\.def\(((?:\s*\"[^\"]*\")+)\)", text)
    declared = ["".join(re.findall(r'"([^"]*)"', call)) for call in calls]
    wanted = [o for o in operators() if o not in PROGRAMS_ALONE]
    assert declared == [str(getattr(torch.ops.fastrcnn, o).default._schema).removeprefix("fastrcnn::") for o in wanted]
