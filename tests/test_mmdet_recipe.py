"""training/mmdet_recipe.py: MMDetection's schedules and pipelines, of its versions 3 and 2, as recipes."""

import pytest
from training_stubs import tiny

from fastrcnn.models import from_mmdet_config
from fastrcnn.training import RECIPES, get_recipe, recipe_from_config, recipe_of

THREE = dict(
    optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.02, momentum=0.9, weight_decay=1e-4)),
    param_scheduler=[
        dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
        dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
    ],
    train_cfg=dict(type="EpochBasedTrainLoop", max_epochs=12, val_interval=1),
    auto_scale_lr=dict(enable=False, base_batch_size=16),
    train_dataloader=dict(batch_size=2, dataset=dict(type="CocoDataset", pipeline=[
        dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True),
        dict(type="Resize", scale=(1333, 800), keep_ratio=True), dict(type="RandomFlip", prob=0.5),
        dict(type="PackDetInputs")])),
)  # fmt: skip
TWO = dict(
    optimizer=dict(type="SGD", lr=0.02, momentum=0.9, weight_decay=1e-4),
    optimizer_config=dict(grad_clip=None),
    lr_config=dict(policy="step", warmup="linear", warmup_iters=500, warmup_ratio=0.001, step=[8, 11]),
    runner=dict(type="EpochBasedRunner", max_epochs=12),
    data=dict(samples_per_gpu=2, train=dict(type="CocoDataset", pipeline=[
        dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True),
        dict(type="Resize", img_scale=(1333, 800), keep_ratio=True), dict(type="RandomFlip", flip_ratio=0.5),
        dict(type="Normalize", mean=[0, 0, 0], std=[1, 1, 1], to_rgb=True), dict(type="Pad", size_divisor=32),
        dict(type="DefaultFormatBundle"), dict(type="Collect", keys=["img", "gt_bboxes", "gt_labels"])])),
)  # fmt: skip


def numbers(recipe, *left_out):
    return {k: v for k, v in vars(recipe).items() if k not in ("name", *left_out)}


def test_the_1x_schedule_of_both_versions_is_the_recipe_1x():
    three, notes = recipe_from_config(THREE)
    assert numbers(three) == numbers(RECIPES["1x"]) and not notes
    two, notes = recipe_from_config(TWO)
    # Version 2 reaches the full rate a step later.
    assert numbers(two, "warmup") == numbers(RECIPES["1x"], "warmup") and two.warmup == 500 and not notes


def pipeline(*steps, times=None, **changes):
    data = dict(type="CocoDataset", pipeline=list(steps))
    data = data if times is None else dict(type="RepeatDataset", times=times, dataset=data)
    return {**THREE, "train_dataloader": dict(batch_size=8, dataset=data), **changes}


def test_large_scale_jitter_repeated_data_and_half_precision():
    """As in faster-rcnn_r50_fpn_8xb8-amp-lsj-200e."""
    config = pipeline(
        dict(type="RandomResize", scale=(1024, 1024), ratio_range=(0.1, 2.0), keep_ratio=True),
        dict(type="RandomCrop", crop_type="absolute_range", crop_size=(1024, 1024)),
        dict(type="FilterAnnotations", min_gt_bbox_wh=(1e-2, 1e-2)), dict(type="RandomFlip", prob=0.5), times=8,
        optim_wrapper=dict(type="AmpOptimWrapper", optimizer=dict(type="SGD", lr=0.08, momentum=0.9, weight_decay=4e-5),
                           clip_grad=dict(max_norm=35), paramwise_cfg=dict(norm_decay_mult=0.0), accumulative_counts=2),
        train_cfg=dict(type="EpochBasedTrainLoop", max_epochs=25),
        param_scheduler=[dict(type="LinearLR", start_factor=0.067, by_epoch=False, begin=0, end=500),
                         dict(type="MultiStepLR", by_epoch=True, milestones=[22, 24], gamma=0.1)],
        custom_hooks=[dict(type="EMAHook", momentum=0.0002), dict(type="SyncNormHook")], auto_scale_lr=None)  # fmt: skip
    found, notes = recipe_from_config(config)
    assert (found.epochs, found.milestones, found.lsj, found.crop) == (200, (176, 192), (0.1, 2.0), 1024)
    assert (found.precision, found.clip_norm, found.norm_decay, found.accumulate) == ("fp16", 35.0, 0.0, 2)
    assert (found.batch_size, found.base_batch, found.ema) == (8, 64, pytest.approx(0.9998))
    assert notes == ["SyncNormHook: hooks are left out"]


def test_scales_and_what_cannot_be_done_is_said():
    choice = dict(type="RandomChoiceResize", scales=[(1333, s) for s in (640, 720, 800)], keep_ratio=True)
    config = pipeline(choice, dict(type="RandomFlip", prob=0.0), dict(type="PhotoMetricDistortion"), dict(type="Mosaic"),
                      train_cfg=dict(max_iters=90000),
                      param_scheduler=[dict(type="MultiStepLR", by_epoch=False, milestones=[60000, 80000])])  # fmt: skip
    found, notes = recipe_from_config(config)
    assert (found.steps, found.milestones, found.warmup) == (90000, (60000, 80000), 0)
    assert (found.multi_scale, found.flip, found.photometric) == ((0.8, 1.0), 0.0, True)
    assert len(notes) == 2 and "640 to 800 is drawn, not one of 3" in notes[0] and notes[1].startswith("Mosaic")
    ranged = dict(type="RandomResize", scale=[(1333, 640), (1333, 800)], keep_ratio=True)
    assert recipe_from_config(pipeline(ranged))[0].multi_scale == (0.8, 1.0)
    other = dict(test_pipeline=[dict(type="Resize", scale=(1333, 400), keep_ratio=True)])
    assert recipe_from_config(pipeline(ranged, **other))[0].multi_scale == (1.6, 2.0)


def test_pictures_of_one_size_are_trained_on_in_that_size():
    small = dict(type="Resize", scale=(128, 96), keep_ratio=True)
    test = dict(test_pipeline=[dict(type="Resize", scale=(256, 192), keep_ratio=True)])
    for config, factor, said in (
        (pipeline(small), None, []),
        (pipeline(small, **test), (0.5, 0.5), ["Resize: the long side"]),
    ):
        found, notes = recipe_from_config(config)
        assert found.multi_scale == factor and len(notes) == len(said) and all(map(str.startswith, notes, said))
        model = {k: v for k, v in tiny().built.arguments.items() if k not in ("profile", "min_size", "max_size")}
        pixels = from_mmdet_config(dict(config, model=model)).data_preprocessor
        assert (pixels.max_size, pixels.min_size) == ((256, 192) if said else (128, 96))


def test_crops_of_the_whole_picture():
    """One in front of the resize changes the scale of what is in it; one behind does not, which no recipe can say."""
    iou = dict(type="MinIoURandomCrop", min_ious=(0.1, 0.5), min_crop_size=0.4)
    part = dict(type="RandomCrop", crop_type="relative_range", crop_size=(0.5, 0.5))
    uneven, resize = dict(part, crop_size=(0.6, 0.8)), dict(type="Resize", scale=(1333, 800), keep_ratio=True)
    for steps, share, said in (
        ((iou, resize), 0.4, ["MinIoURandomCrop: every crop holds the middle of a box"]),
        ((part, resize), 0.5, []),
        ((uneven, resize), 0.6, ["RandomCrop: both sides keep at least 0.6, not 0.6 and 0.8"]),
        ((resize, part), None, ["RandomCrop: left out, but for one by relative_range before all resizes"]),
        ((resize, iou), None, ["MinIoURandomCrop: a transform that is left out"]),
        ((resize,), None, []),
    ):
        found, notes = recipe_from_config(pipeline(*steps))
        assert found.min_crop_size == share and found.lsj is None
        assert len(notes) == len(said) and all(map(str.startswith, notes, said))


@pytest.mark.parametrize("change, message", [
    (dict(optim_wrapper=dict(optimizer=dict(type="Lion", lr=1))), "optimizer: expected SGD or AdamW"),
    (dict(optim_wrapper=None), "this is a model alone"),
    (dict(train_cfg={}), "expected max_epochs or max_iters"),
    (dict(param_scheduler=[dict(type="PolyLR")]), "param_scheduler: cannot follow"),
])  # fmt: skip
def test_a_schedule_that_cannot_be_followed_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        recipe_from_config({**THREE, **change})


def test_a_models_own_configuration_is_asked_for_by_name():
    model, lines = tiny(), []
    model.config = pipeline(dict(type="Mosaic"))
    found = recipe_of(model, "config", lines.append, epochs=6)
    assert (found.name, found.epochs, found.milestones) == ("config", 6, (4, 5.5)) and len(lines) == 1
    assert recipe_of(model, None) == get_recipe("finetune")
