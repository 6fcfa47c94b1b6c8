"""What MMDetection's checkpoints say about themselves: their configuration's text, lone RPNs, models without a name."""

import pytest
import torch

from fastrcnn.checkpoints import mmdet
from fastrcnn.checkpoints.peer_options import PeerOptions
from fastrcnn.models import RPN, faster_rcnn, from_mmdet_config
from fastrcnn.weights import export_weights, infer_model, load_checkpoint, load_weights, pretrained_model

CAFFE_INPUT = dict(mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), bgr_to_rgb=False)
RGB = dict(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), bgr_to_rgb=True)
BGR123 = dict(mean=(1, 2, 3), std=(4, 5, 6), bgr_to_rgb=False)
RGB123 = dict(BGR123, bgr_to_rgb=True)
DIVIDED = dict(mean=(103.53, 116.28, 123.675), std=(57.375, 57.12, 58.395), bgr_to_rgb=False)
CAFFE, TORCH = "backbone=dict(type='ResNet', style='caffe')", "backbone=dict(type='ResNet', style='pytorch')"
V2 = "img_norm_cfg = dict(\n    mean=[103.53, 116.28, 123.675], std=[{}], to_rgb=False)\ntrain_pipeline = []\n"
V3 = """model = dict(
    data_preprocessor=dict(
        batch_augments=[dict(size=(1024, 1024), type='BatchFixedSizePad')],
        bgr_to_rgb={},
        mean=[
            {},
        ],
        pad_size_divisor=32,
        std=[
            {},
        ],
        type='DetDataPreprocessor'),
    """


def read(text: str) -> PeerOptions:
    return mmdet.profile_options({}, dict(cfg=text))


@pytest.mark.parametrize(
    "text, style, pixels",
    [
        (f"model = dict({CAFFE})\n" + V2.format("1.0, 1.0, 1.0"), "caffe", CAFFE_INPUT),
        (f"model = dict({TORCH})\n" + V2.format("57.375, 57.12, 58.395"), "pytorch", DIVIDED),
        (
            V3.format(True, "123.675, 116.28, 103.53", "58.395, 57.12, 57.375") + CAFFE,
            "caffe",
            RGB,
        ),  # one of them is so
        (V3.format(False, "103.53,\n 116.28,\n 123.675", "1.0, 1.0, 1.0") + CAFFE, "caffe", CAFFE_INPUT),
        ("model=dict(data_preprocessor=dict(mean=[1, 2, 3], std=[4, 5, 6]))", None, BGR123),
        ("img_norm_cfg = dict(mean=[1, 2, 3], std=[4, 5, 6])", None, RGB123),
        ("{'img_norm_cfg': {'mean': (1, 2, 3), 'std': (4, 5, 6), 'to_rgb': False}}", None, BGR123),
        (CAFFE, "caffe", CAFFE_INPUT),
        (TORCH, "pytorch", None),
        ("", None, None),
    ],
)
def test_style_and_statistics_are_read_from_the_text(text, style, pixels):
    assert read(text) == PeerOptions(style=style, **(pixels or {}))


@pytest.mark.parametrize(
    "part",
    [
        "mean=norm_mean, std=[1, 1, 1]",
        "mean=[__import__('os').getcwd(), 1, 2], std=[1, 1, 1]",
        "mean=[1, 2], std=[1, 1]",
        "mean=['a', 'b', 'c'], std=[1, 1, 1]",
        "mean=None, std=None",
        "type='DetDataPreprocessor'",
        "mean=[1, 2, 3",
        "mean=(" + "-" * 100_000 + "1), std=(1, 1, 1)",
        "mean=[" * 10_000 + "}" * 10_000,
        "mean=[1, 2, 3" + " " * 100_000 + "x",
    ],
    ids=range(10),
)
def test_what_is_not_three_numbers_is_not_taken(part):
    assert read(f"data_preprocessor=dict({part})") == PeerOptions()
    assert read(f"data_preprocessor=dict({part})\n{CAFFE}") == PeerOptions(style="caffe", **CAFFE_INPUT)


def test_the_statistics_of_a_box_coder_are_not_the_inputs():
    coder = "bbox_coder=dict(target_means=[0, 0, 0], target_stds=[1, 1, 1]), mean=[1, 2, 3], std=[4, 5, 6]"
    assert read(coder) == PeerOptions()


def small(**options):
    neck = dict(in_channels=[4, 8, 16, 32], out_channels=8)
    roi_head = dict(bbox_roi_extractor=dict(out_channels=8), bbox_head=dict(in_channels=8))
    body = dict(backbone=dict(base_channels=4), neck=neck, rpn_head=dict(in_channels=8), roi_head=roi_head)
    return faster_rcnn("r18_fpn", 3, **body, **options)


def test_the_model_takes_them_over():
    text = V3.format(False, "103.53, 116.28, 123.675", "57.375, 57.12, 58.395") + TORCH
    model = load_weights(small(), dict(state_dict=small().state_dict(), meta=dict(cfg=text)))
    p = model.data_preprocessor
    assert (p.mean, p.std, p.bgr) == (DIVIDED["mean"], DIVIDED["std"], True) and model.backbone.style == "pytorch"


def test_early_offsets_are_found_beside_the_convolution():
    old = {"rpn_head.rpn_cls.weight": torch.zeros(3, 8, 1, 1), "backbone.layer2.0.conv2_offset.weight": torch.ones(1)}
    checkpoint = load_checkpoint(old)
    assert checkpoint.peer == "mmdet" and set(checkpoint.state) == {
        "rpn_head.rpn_cls.weight",
        "backbone.layer2.0.conv2.conv_offset.weight",
    }


def of_1x(agnostic: bool, classes: int) -> dict:
    """MMDetection 1.x's keys of a box head, with a row for the background."""
    shapes = dict(fc_cls=classes + 1, fc_reg=4 if agnostic else 4 * (classes + 1))
    return {f"bbox_head.{k}.weight": torch.zeros(rows, 8) for k, rows in shapes.items()}


@pytest.mark.parametrize("version", [{}, dict(mmdet_version="1.2.0+abc")])
@pytest.mark.parametrize("agnostic, classes", [(False, 3), (True, 3), (False, 1), (True, 1)])
def test_weights_of_mmdetection_1_are_refused(tmp_path, version, agnostic, classes):
    torch.save(dict(meta=version, state_dict=of_1x(agnostic, classes)), tmp_path / "old.pth")
    with pytest.raises(ValueError, match=r"old\.pth: expected weights of MMDetection 2 or 3.*background is class 0.*"):
        load_weights(small(), tmp_path / "old.pth")


def test_so_are_those_with_the_new_names_alone_and_older_ones():
    new_names = {f"roi_head.{k}": v for k, v in of_1x(agnostic=False, classes=3).items()}
    with pytest.raises(ValueError, match=r"the state dict: .*mmdet_version not given"):
        load_checkpoint(new_names)
    with pytest.raises(ValueError, match=r"background is class 0.*mmdet_version 0\.6\.0"):
        load_checkpoint(dict(state_dict=small().state_dict(), meta=dict(mmdet_version="0.6.0")))


def test_weights_published_for_2_whose_training_was_numbered_1_are_read():
    meta = dict(mmdet_version="1.0rc1+5f9f470")
    assert load_weights(small(), dict(state_dict=small().state_dict(), meta=meta)).profile.name == "mmdet"


RPN_CONFIG = dict(
    type="RPN",
    data_preprocessor=dict(type="DetDataPreprocessor", **RGB),
    backbone=dict(type="ResNet", depth=18, base_channels=4),
    neck=dict(type="FPN", in_channels=[4, 8, 16, 32], out_channels=8, num_outs=5),
    rpn_head=dict(type="RPNHead", in_channels=8, feat_channels=8),
)


def test_a_lone_rpn_is_loaded_into_its_configurations_model():
    source, image = from_mmdet_config(RPN_CONFIG).eval(), [torch.rand(3, 64, 64)]
    meta = dict(dataset_meta=dict(CLASSES=("cell",)), cfg=V2.format("1.0, 1.0, 1.0") + CAFFE)
    model = load_weights(from_mmdet_config(RPN_CONFIG).eval(), dict(meta=meta, state_dict=source.state_dict()))
    assert isinstance(model, RPN) and model.class_names == ["cell"] and model.data_preprocessor.std == (1.0, 1.0, 1.0)
    model = load_weights(model, source.state_dict())
    source.data_preprocessor.min_size = model.data_preprocessor.min_size = 64
    for key, value in source(image)[0].items():
        assert torch.equal(value, model(image)[0][key])
    exported = export_weights(model, "mmdet")
    assert all(torch.equal(v, exported[k]) for k, v in source.state_dict().items())


def test_a_lone_rpn_names_no_model():
    state = from_mmdet_config(RPN_CONFIG).state_dict()
    for build in (infer_model, lambda s: pretrained_model(s, 3)):
        with pytest.raises(ValueError, match=r"'rpn_r18_fpn', which is no named.*from_mmdet_config.*load_weights"):
            build(state)
    with pytest.raises(ValueError, match=r"missing keys: roi_head\."):
        load_weights(small(), state)


def test_a_configurations_detector_has_no_name_and_needs_none():
    head = dict(type="RetinaHead", num_classes=2, in_channels=8, feat_channels=8, stacked_convs=1)
    neck = RPN_CONFIG["neck"] | dict(start_level=1, add_extra_convs="on_input")
    config = dict(type="RetinaNet", backbone=RPN_CONFIG["backbone"], neck=neck, bbox_head=head)
    source, model = from_mmdet_config(config), from_mmdet_config(config)
    load_weights(model, export_weights(source, "mmdet"))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in source.state_dict().items())
