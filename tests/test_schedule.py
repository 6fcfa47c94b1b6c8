"""training/schedule.py and recipe.py: the rate of every step, the groups, and the numbers of each recipe."""

import warnings

import pytest
import torch
from torch import nn
from training_stubs import tiny

from fastrcnn.data.transforms import apply
from fastrcnn.training import RECIPES, Recipe, get_recipe
from fastrcnn.training.ema import average, averaged_copy
from fastrcnn.training.pictures import training_transforms
from fastrcnn.training.schedule import base_rate, build_optimizer, parameter_groups, rate_factor, set_rate, total_steps


def rates(recipe, epoch_steps, steps=None):
    return [rate_factor(recipe, step, epoch_steps) for step in range(steps or total_steps(recipe, epoch_steps))]


def test_torchvisions_reference_schedule():
    """Its train.py: MultiStepLR by epochs, and in the first epoch a LinearLR over min(1000, len - 1) steps."""
    for epoch_steps in (7, 1200):
        weight = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        drops = torch.optim.lr_scheduler.MultiStepLR(optimizer, [16, 22], 0.1)
        expected = []
        for epoch in range(26):
            if epoch == 0:
                warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.001, total_iters=min(1000, epoch_steps - 1))
            for _ in range(epoch_steps):
                expected.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                if epoch == 0:
                    warm.step()
            drops.step()
        assert rates(RECIPES["tv"], epoch_steps) == pytest.approx(expected, rel=1e-9)


def test_mmdetections_schedules_by_hand():
    one = rates(RECIPES["1x"], 1000)
    assert one[0] == 0.001 and one[499] == 1 and one[250] == pytest.approx(0.001 + 0.999 * 250 / 499)
    assert (
        len(one) == 12000 and one[7999] == 1 and one[8000] == pytest.approx(0.1) and one[11000] == pytest.approx(0.01)
    )
    fixed = RECIPES["90k"]
    assert total_steps(fixed, 7) == 90000
    assert [rate_factor(fixed, s, 7) for s in (59999, 60000, 80000)] == pytest.approx([1, 0.1, 0.01])
    assert {n: (r.epochs, r.milestones) for n, r in RECIPES.items() if n in ("2x", "3x", "ms-3x")} == {
        "2x": (24, (16, 22)), "3x": (36, (27, 33)), "ms-3x": (36, (27, 33))}  # fmt: skip


def test_detectron2s_new_baselines_on_coco():
    epoch_steps = 184375 / 100
    for name, times in (("lsj-100e", 1), ("lsj-200e", 2), ("lsj-400e", 4)):
        recipe = RECIPES[name]
        assert [round(m * epoch_steps) for m in recipe.milestones] == [163889 * times, 177546 * times]
        assert (recipe.epochs, recipe.lr, recipe.base_batch, recipe.weight_decay) == (100 * times, 0.1, 64, 4e-5)
        assert (recipe.warmup, recipe.warmup_factor, recipe.sync_bn, recipe.lsj) == (500, 0.067, True, (0.1, 2.0))
    second = RECIPES["tv-v2"]
    assert (second.epochs, second.milestones, second.lr, second.base_batch) == (400, (352, 384), 0.1, 64)
    assert (second.weight_decay, second.sync_bn, second.lsj) == (4e-5, True, (0.1, 2.0))


def test_a_cosine_ends_at_nothing():
    recipe = get_recipe(epochs=1, warmup=4, warmup_factor=0.2, warmup_share=1.0)
    found = rates(recipe, 20)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and found[12] == pytest.approx(0.5)
    assert all(a > b for a, b in zip(found[4:], found[5:])) and 0 < found[19] < 0.02


def test_the_rate_follows_the_batch_and_changes_keep_the_drops_in_place():
    assert base_rate(RECIPES["1x"], 16) == 0.02 and base_rate(RECIPES["1x"], 4) == 0.005
    assert base_rate(RECIPES["1x"], 4, 0.3) == 0.3
    short = get_recipe("1x", epochs=6, lr=None)
    assert short.milestones == (4, 5.5) and short.lr == 0.02
    by_epochs = get_recipe("90k", epochs=9)
    assert by_epochs.steps is None and by_epochs.milestones == pytest.approx((6, 8))
    with pytest.raises(ValueError, match="recipe: expected one of 1x"):
        get_recipe("5x")
    with pytest.raises(ValueError, match="ema: expected a decay"):
        get_recipe("1x", ema=1.0)


def test_a_rate_may_grow_with_the_root_of_the_batch():
    recipe = Recipe("root", lr=0.01, base_batch=4, scaling="sqrt")
    assert [base_rate(recipe, n) for n in (1, 4, 16, 64)] == pytest.approx([0.005, 0.01, 0.02, 0.04])
    assert base_rate(recipe, 64, 0.3) == 0.3
    default = RECIPES["finetune"]
    with pytest.warns(UserWarning, match="lr: 0.02 is 28 times what recipe finetune takes for AdamW .0.00071."):
        assert base_rate(default, 2, 0.02) == 0.02
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert base_rate(default, 2, 0.002) == 0.002 and base_rate(RECIPES["1x"], 2, 0.5) == 0.5
    with pytest.raises(ValueError, match="scaling: expected one of linear, sqrt, got 'log'"):
        get_recipe("1x", scaling="log")


@pytest.mark.parametrize("epoch_steps, epochs, steps, warmup", [
    (103, None, 103 * 36, 371),  # 205 pictures: what the recipe says
    (10, None, 1000, 100),  # 20: the least number of steps, in whole epochs
    (7, None, 7 * 143, 100), (10000, None, 360000, 500),
    (52, 13, 676, 68), (52, 3, 156, 16), (5, 3, 15, 2), (1, 1, 1, 0), (5000, 3, 15000, 500),
])  # fmt: skip
def test_the_default_fits_its_length_and_warm_up_to_the_data(epoch_steps, epochs, steps, warmup):
    recipe = get_recipe(epochs=epochs)
    found = rates(recipe, epoch_steps)
    assert len(found) == steps and found.index(max(found)) == warmup and max(found) == pytest.approx(1)
    assert all(a < b for a, b in zip(found[:warmup], found[1 : warmup + 1]))
    assert all(a > b for a, b in zip(found[warmup:], found[warmup + 1 :]))
    assert steps < 10 or found[-1] < 0.01 + 1 / steps


def test_a_length_that_the_data_decides_has_no_milestones():
    with pytest.raises(ValueError, match=r"least_steps: .*milestones"):
        get_recipe("1x", least_steps=1000)
    with pytest.raises(ValueError, match="warmup_share: expected a share from 0 to 1, got 2"):
        get_recipe(warmup_share=2)
    assert get_recipe().least_steps and get_recipe(epochs=36).least_steps is None


def test_a_recipe_says_whether_colours_change():
    image = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    target = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    assert training_transforms(Recipe("plain", flip=0.0)) is None
    jitter = training_transforms(Recipe("jitter", flip=0.0, colour_jitter=0.5))
    assert len({apply(jitter, image, target)[0][0, 0, 0].item() for _ in range(20)}) > 5


@pytest.mark.parametrize("steps", [15, 156, 676])
def test_the_default_average_forgets_the_first_weights_of_short_runs(steps):
    model, decay = nn.Linear(1, 1, bias=False, dtype=torch.float64), get_recipe().ema
    nn.init.constant_(model.weight, 1e3)
    mean = averaged_copy(model)
    for step in range(steps):
        nn.init.constant_(model.weight, step / steps)
        average(mean, model, step, decay)
    assert 0.8 < mean.weight.item() < 1  # the last tenth of the run


def test_parameters_are_grouped_by_decay_and_depth():
    model = tiny()
    recipe = get_recipe("1x", norm_decay=0.0, bias_decay=0.5, layer_decay=0.5)
    groups, names = parameter_groups(model, recipe), {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)]: (g["weight_decay"], g["scale"]) for g in groups for p in g["params"]}
    assert set(found) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert found["backbone.conv1.weight"] == (1e-4, 0.5**5) and found["backbone.bn1.bias"] == (0.0, 0.5**5)
    assert found["backbone.layer4.1.conv2.weight"] == (1e-4, 0.5) and found["backbone.layer2.0.bn1.weight"] == (
        0.0,
        0.125,
    )
    assert found["rpn_head.rpn_cls.bias"] == (0.5e-4, 1) and found["neck.fpn_convs.0.conv.weight"] == (1e-4, 1)
    optimizer = build_optimizer(model, recipe, 1.0)
    set_rate(optimizer, 0.1)
    assert sorted({g["lr"] for g in optimizer.param_groups}) == pytest.approx(
        [0.1 * 0.5**k for k in (5, 4, 3, 2, 1, 0)]
    )
    slow = get_recipe("1x", fixed_norm_mult=0.25)
    assert {g["scale"] for g in parameter_groups(model, slow)} == {1}  # norms of this one train
    model.backbone.norm_eval = True
    found = {names[id(p)]: g["scale"] for g in parameter_groups(model, slow) for p in g["params"]}
    assert found["backbone.layer2.0.conv1.weight"] == 0.25 and found["neck.fpn_convs.0.conv.weight"] == 1
    model.backbone.frozen_stages = 4
    model.train()
    assert "backbone.layer3.0.conv1.weight" not in {
        names[id(p)] for g in parameter_groups(model, recipe) for p in g["params"]}  # fmt: skip


def test_the_average_forgets_its_beginning():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    mean, expected = averaged_copy(model), model[0].weight.item()
    for step in range(30):
        nn.init.constant_(model[0].weight, float(step))
        model[1].num_batches_tracked += 1
        average(mean, model, step, 0.7)
        keep = min(0.7, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * step
        assert mean[0].weight.item() == pytest.approx(expected, rel=1e-5)
    assert mean[1].num_batches_tracked == 30 and not any(p.requires_grad for p in mean.parameters())
