"""MMDetection configs: read as data, merged as MMEngine merges them, and built; code in them is refused and never run."""

import pytest
import torch

from fastrcnn.models import from_mmdet_config
from fastrcnn.models.config import read_config
from fastrcnn.models.zoo import model_config


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


BASE_MODEL = f"""
model = dict(type='FasterRCNN', **{model_config("r50_fpn")!r})
"""


def test_bases_are_merged_and_delete_replaces(tmp_path):
    write(
        tmp_path,
        "bases/a.py",
        "size = (4, 5)\nmodel = dict(x=dict(kept=1, changed=1), gone=dict(a=1, b=2), rows=[1])\n",
    )
    write(tmp_path, "bases/b.py", "schedule = dict(lr=0.02 * 4, steps=[8, 11])\n")
    path = write(
        tmp_path,
        "child.py",
        '"""Docstring."""\n_base_ = ["bases/a.py", "./bases/b.py"]\nn = 3\n'
        "model = dict(x=dict(changed=-n, new=(n, n / 2)), gone=dict(_delete_=True, c=3), rows=[2, *[3]])\n"
        "seen = dict(size={{_base_.size}}, first=_base_.schedule.steps[0], text='{{ fileBasenameNoExtension }}')\n"
        "many = [dict(scale=s) for s in [1, 2]]\n_base_.schedule.lr = 0.5\n",
    )
    config = read_config(path)
    assert config["model"] == dict(
        x=dict(kept=1, changed=-3, new=(3, 1.5)), gone=dict(c=3), rows=[2, 3]
    )  # fmt: skip
    assert config["seen"] == dict(size=(4, 5), first=8, text="child")
    assert config["schedule"] == dict(lr=0.5, steps=[8, 11])
    assert config["many"] == [dict(scale=1), dict(scale=2)]
    assert "_base_" not in config


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "x = open('marker', 'w')",
        "x = __import__('pathlib').Path('marker').touch()",
        "x = (lambda: 1)()",
        "x = [].append(1)",
        "x = ().__class__",
        "for i in [1]:\n    x = i",
        "if True:\n    x = 1",
        "def f():\n    return 1",
        "x = 9 ** 9 ** 9",
        "x = unknown",
        "x = dict.fromkeys([1])",
    ],
)
def test_code_is_refused_with_its_line_and_not_run(tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, "config.py", f"fine = 1\n{line}\n")
    with pytest.raises(ValueError, match=r"config\.py, line 2"):
        read_config(path)
    assert not (tmp_path / "marker").exists()


def test_a_key_in_two_bases_and_a_dict_over_a_number_are_errors(tmp_path):
    write(tmp_path, "a.py", "x = 1\n")
    write(tmp_path, "b.py", "x = 2\n")
    with pytest.raises(ValueError, match="more than one of its bases"):
        read_config(write(tmp_path, "twice.py", "_base_ = ['a.py', 'b.py']\n"))
    with pytest.raises(ValueError, match="x is a dict here and int in a base"):
        read_config(write(tmp_path, "dict.py", "_base_ = 'a.py'\nx = dict(y=1)\n"))
    with pytest.raises(FileNotFoundError, match=r"missing\.py"):
        read_config(write(tmp_path, "lost.py", "_base_ = 'missing.py'\n"))


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
        (dict(train_cfg=dict(rpn_proposal=dict(nms_thr=0.7))), "nms_thr"),
        (dict(train_cfg=dict(rcnn=dict(mask_size=28))), "mask_size"),
    ],
)
def test_what_is_not_supported_is_named(change, named):
    from fastrcnn.models.zoo import merge

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
