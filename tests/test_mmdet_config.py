"""Models from MMDetection's configs: nothing in them is ignored, what is not supported is named."""

import pytest
import torch

from fastrcnn.models import from_mmdet_config
from fastrcnn.models.build import merge
from fastrcnn.zoo.recipes import model_config


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


BASE_MODEL = f"""
model = dict(type='FasterRCNN', **{model_config("r50_fpn")!r})
"""


def test_a_config_builds_the_model_its_input_and_its_classes(tmp_path):
    write(tmp_path, "base.py", BASE_MODEL)
    path = write(
        tmp_path,
        "config.py",
        "_base_ = 'base.py'\n"
        "model = dict(data_preprocessor=dict(type='DetDataPreprocessor', mean=[103.53, 116.28, 123.675],\n"
        "    std=[1.0, 1.0, 1.0], bgr_to_rgb=False, pad_size_divisor=64),\n"
        "  backbone=dict(depth=18, style='caffe', init_cfg=dict(type='Pretrained', checkpoint='x')),\n"
        "  neck=dict(in_channels=[64, 128, 256, 512]),\n"
        "  roi_head=dict(bbox_head=dict(num_classes=3, reg_decoded_bbox=True,\n"
        "    loss_bbox=dict(type='GIoULoss', loss_weight=10.0))),\n"
        "  train_cfg=dict(rcnn=dict(sampler=dict(type='OHEMSampler', num=512))),\n"
        "  test_cfg=dict(rcnn=dict(nms=dict(type='soft_nms', iou_threshold=0.5))))\n"
        "metainfo = dict(classes=('a', 'b', 'c'))\n"
        "test_dataloader = dict(dataset=dict(metainfo=metainfo,\n"
        "  pipeline=[dict(type='Resize', scale=(640, 400), keep_ratio=True)]))\n"
        "optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.02))\n",
    )
    with torch.device("meta"):
        model = from_mmdet_config(path)
    assert model.num_classes == 3 and model.class_names == ["a", "b", "c"]
    p = model.data_preprocessor
    assert (p.min_size, p.max_size, p.pad_size_divisor, p.bgr) == (400, 640, 64, True)
    assert p.mean == (103.53, 116.28, 123.675) and p.std == (1.0, 1.0, 1.0)
    assert type(model.roi_head.bbox_head.loss_bbox).__name__ == "GIoULoss"
    assert model.config["optim_wrapper"]["optimizer"]["lr"] == 0.02
    assert model.config["model"]["backbone"]["init_cfg"]["checkpoint"] == "x"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(backbone=dict(dcn=dict(type="DCN"), stage_with_dcn=(False, False, False, True))), "dcn"),
        (dict(backbone=dict(init_cfg=dict(type="Normal"))), "init_cfg"),
        (dict(backbone=dict(type="RegNet")), "RegNet"),
        (dict(rpn_head=dict(type="CascadeRPNHead")), "CascadeRPNHead"),
        (dict(roi_head=dict(mask_head=dict(type="X"))), "mask_head"),
        (dict(mask_head=dict(type="X")), "mask_head"),
        (dict(neck=dict(init_cfg=dict(type="Normal"))), "init_cfg"),
        (dict(type="MaskRCNN"), "MaskRCNN"),
        (dict(type="RetinaNet"), "roi_head"),
        (dict(test_cfg=dict(rcnn=dict(mask_thr_binary=0.5))), "mask_thr_binary"),
        (dict(test_cfg=dict(rpn=dict(nms_across_levels=True))), "nms_across_levels"),
        (dict(test_cfg=dict(rpn=dict(nms_post=500, max_num=1000))), "nms_post"),
        (dict(train_cfg=dict(rcn=dict())), "train_cfg.*rcn"),
        (dict(test_cfg=dict(mask=dict())), "test_cfg.*mask"),
        (dict(test_cfg=dict(rcnn=dict(nms=dict(type="nms_match", iou_threshold=0.5)))), "nms_match"),
        (dict(test_cfg=dict(rpn=dict(nms=dict(iou_thrs=0.5)))), "iou_thrs"),
        (dict(train_cfg=dict(rpn=dict(assigner=dict(type="ATSSAssigner")))), "ATSSAssigner"),
        (dict(train_cfg=dict(rcnn=dict(sampler=dict(type="ScoreHLRSampler")))), "ScoreHLRSampler"),
        (dict(backbone=dict(norm_cfg=dict(type="BN", epsilon=1))), "norm_cfg.*epsilon"),
        (
            dict(backbone=dict(plugins=[dict(cfg=dict(type="ContextBlock", ratios=1), position="after_conv3")])),
            "dcn|ratios",
        ),
        (dict(neck=dict(upsample_cfg=dict(mode="nearest", scale=2))), "upsample_cfg.*scale"),
        (dict(neck=dict(act_cfg=dict(type="ReLU", slope=2))), "act_cfg.*slope"),
        (dict(rpn_head=dict(anchor_generator=dict(sizes=3))), "anchor_generator.*sizes"),
        (dict(rpn_head=dict(loss_bbox=dict(betas=3))), "loss.*betas"),
        (dict(roi_head=dict(bbox_head=dict(bbox_coder=dict(add_ctr_clamp=True)))), "bbox_coder.*add_ctr_clamp"),
        (dict(data_preprocessor=dict(type="DetDataPreprocessor", pad_value=1)), "data_preprocessor.*pad_value"),
        (dict(data_preprocessor=dict(type="MultiBranchDataPreprocessor")), "MultiBranch"),
        (dict(train_cfg=dict(rcnn=dict(mask_size=28))), "mask_size"),
    ],
)
def test_what_is_not_supported_is_named(change, named):
    model = merge(dict(type="FasterRCNN", **model_config("r18_fpn")), change)
    with pytest.raises(ValueError, match=named), torch.device("meta"):
        from_mmdet_config(dict(model=model))


def test_an_old_style_config_takes_its_input_from_the_pipeline():
    model = dict(type="FasterRCNN", pretrained="torchvision://resnet18", **model_config("r18_fpn"))
    cfgs = {k: model.pop(k) for k in ("train_cfg", "test_cfg")}
    norm = dict(mean=[1.0, 2.0, 3.0], std=[1.0, 1.0, 1.0], to_rgb=False)
    pipeline = [dict(type="MultiScaleFlipAug", img_scale=(1000, 600), transforms=[])]
    config = dict(model=model, img_norm_cfg=norm, data=dict(test=dict(pipeline=pipeline)), **cfgs)
    with torch.device("meta"):
        built = from_mmdet_config(config)
    p = built.data_preprocessor
    assert (p.mean, p.bgr, p.min_size, p.max_size) == ((1.0, 2.0, 3.0), True, 600, 1000)


def built(model=(), **config):
    with torch.device("meta"):
        return from_mmdet_config(
            dict(model=dict(type="FasterRCNN", **merge(model_config("r18_fpn"), dict(model))), **config)
        )


NAMES = [f"c{i}" for i in range(80)]


@pytest.mark.parametrize(
    "config",
    [
        dict(metainfo=dict(classes=NAMES)),
        dict(metainfo=dict(CLASSES=tuple(NAMES))),
        dict(classes=NAMES),
        dict(train_dataloader=dict(dataset=dict(type="RepeatDataset", dataset=dict(metainfo=dict(classes=NAMES))))),
        dict(train_dataloader=dict(dataset=dict(datasets=[dict(metainfo=dict(classes=NAMES))]))),
        dict(val_dataloader=dict(dataset=dict(metainfo=dict(classes=NAMES)))),
        dict(data=dict(train=dict(classes=NAMES))),
        dict(data=dict(test=[dict(classes=NAMES)])),
    ],
)
def test_the_names_of_the_classes_are_found(config):
    assert built(**config).class_names == NAMES


def test_what_names_no_classes_and_what_no_model_has_is_named():
    assert built(metainfo=dict(classes=None)).class_names is None
    for classes in ("tree", "classes.txt", [1, 2]):
        with pytest.raises(ValueError, match="classes: expected a list or tuple of names"):
            built(metainfo=dict(classes=classes))
    with pytest.raises(ValueError, match=r"config: model roi_head bbox_head num_shared_fcs: 1000000000 is more"):
        built(dict(roi_head=dict(bbox_head=dict(num_shared_fcs=10**9))))
    deep: dict = {}
    for _ in range(5000):
        deep = dict(x=deep)
    with pytest.raises(ValueError, match="nested too deeply"):
        built(dict(backbone=deep))


def test_several_necks_are_named():
    with pytest.raises(ValueError, match=r"neck.*FPN, BFP"):
        built(dict(neck=[dict(type="FPN"), dict(type="BFP")]))


@pytest.mark.parametrize("config", [dict(model=None), dict(type=["x"]), dict(model=dict(type="FasterRCNN")), dict(a=1)])
def test_a_config_without_its_parts_is_named(config):
    with pytest.raises(ValueError, match="config"):
        from_mmdet_config(config)


def test_a_preprocessor_has_mmdetections_defaults():
    p = built(dict(data_preprocessor=dict(type="DetDataPreprocessor"))).data_preprocessor
    assert (p.mean, p.std, p.bgr, p.pad_size_divisor) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), True, 1)
    shared = built(data_preprocessor=dict(mean=[1, 2, 3], std=[4, 5, 6], bgr_to_rgb=True, pad_size_divisor=64))
    p = shared.data_preprocessor
    assert (p.mean, p.std, p.bgr, p.pad_size_divisor) == ((1, 2, 3), (4, 5, 6), False, 64)
    assert shared.rpn_head.pad_size_divisor == 64
    assert built().data_preprocessor.mean == (123.675, 116.28, 103.53)  # a model alone: its profile's
    batch = dict(type="BatchFixedSizePad", size=(1024, 1024))
    model = built(dict(data_preprocessor=dict(mean=[1, 2, 3], std=[1, 1, 1], batch_augments=[batch])))
    assert model.config["model"]["data_preprocessor"]["batch_augments"] == [batch]  # left to training


def pipeline(*transforms, **flip):
    flip = dict(type="MultiScaleFlipAug", img_scale=(1000, 600), transforms=list(transforms)) | flip
    return dict(data=dict(test=dict(type="CocoDataset", pipeline=[dict(type="LoadImageFromFile"), flip])))


def test_the_pipelines_own_normalisation_and_padding_count():
    norm = dict(type="Normalize", mean=[1.0, 2.0, 3.0], std=[1.0, 1.0, 1.0], to_rgb=False)
    other = dict(mean=[9.0, 9.0, 9.0], std=[9.0, 9.0, 9.0])
    p = built(**pipeline(norm, dict(type="Pad", size_divisor=64)), img_norm_cfg=other).data_preprocessor
    assert (p.mean, p.bgr, p.pad_size_divisor, p.max_size) == ((1.0, 2.0, 3.0), True, 64, 1000)
    assert built(**pipeline(norm)).data_preprocessor.pad_size_divisor == 1
    p = built(test_pipeline=[dict(type="mmdet.Resize", scale=640, keep_ratio=True)]).data_preprocessor
    assert (p.min_size, p.max_size) == (640, 640)


@pytest.mark.parametrize(
    "config, named",
    [
        (dict(test_pipeline=[dict(type="Resize", scale=(640, 400))]), "Resize.*keep_ratio"),
        (pipeline(dict(type="Resize", keep_ratio=False)), "keep_ratio"),
        (pipeline(dict(type="Resize", backend="pillow")), "backend"),
        (dict(test_pipeline=[dict(type="FixScaleResize", scale=(640, 400), keep_ratio=True)]), "FixScaleResize"),
        (dict(test_pipeline=[dict(type="Resize", scale_factor=2.0)]), "factor"),
        (pipeline(dict(type="Normalize", mean=[0], std=[1]), dict(type="Pad", size=(800, 800))), "fixed size"),
        (pipeline(img_scale="large"), "scale"),
    ],
)
def test_another_way_to_prepare_images_is_named(config, named):
    with pytest.raises(ValueError, match=named):
        built(**config)


def test_the_names_of_mmdetections_first_second_version():
    rpn = dict(
        _delete_=True, nms_across_levels=False, nms_pre=700, nms_post=500, max_num=500, nms_thr=0.6, min_bbox_size=0
    )
    roi_layer = dict(_delete_=True, type="RoIAlign", out_size=7, sample_num=2)
    model = built(
        dict(
            roi_head=dict(bbox_roi_extractor=dict(roi_layer=roi_layer)),
            test_cfg=dict(rpn=rpn, rcnn=dict(nms=dict(_delete_=True, type="nms", iou_thr=0.4))),
            train_cfg=dict(rpn_proposal=dict(rpn, max_num=400)),
        )
    )
    head, extractor = model.rpn_head, model.roi_head.bbox_roi_extractor
    assert (head.test_cfg["max_per_img"], head.test_cfg["nms"]["iou_threshold"], head.test_cfg["nms_pre"]) == (
        500,
        0.6,
        700,
    )
    assert model.rpn_proposal["max_per_img"] == 400
    assert (extractor.output_size, extractor.sampling_ratio) == (7, 2)
    assert model.roi_head.test_cfg["nms"]["iou_threshold"] == 0.4
