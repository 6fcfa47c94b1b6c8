from contextlib import contextmanager

import pytest
import torch
from conftest import picture as pixels
from conftest import tiny_options, wake_norms
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, fasterrcnn_resnet50_fpn_v2

from fastrcnn.checkpoints import torchvision as torchvision_weights
from fastrcnn.models import faster_rcnn
from fastrcnn.models.profiles import PROFILES

CLASSES = 10
PROFILE_NAMES = ("mmdet", "torchvision", "detectron2")


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """A rendered picture with structure, float [3, H, W] in 0..1."""
    return pixels(height, width, seed) / 255.0


@torch.no_grad()
def randomise(model: nn.Module, images: list[torch.Tensor]) -> nn.Module:
    """Norms that are not the identity, and scores and deltas that vary as a trained model's do: with plain random heads
    all scores would be alike and nothing would be found."""
    wake_norms(model)
    head, box = model.rpn.head, model.roi_heads.box_predictor
    first, second = {head.cls_logits: 2.0, head.bbox_pred: 0.2}, {box.cls_score: 1.5, box.bbox_pred: 0.7}
    for stage in (first, second):
        for layer, deviation in stage.items():
            layer.weight.normal_()
            layer.bias.normal_(std=0.1)
            seen = []
            hook = layer.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out.flatten()))
            stage[layer] = deviation, seen, hook
        model(images)
        for layer, (deviation, seen, hook) in stage.items():
            hook.remove()
            layer.weight.mul_(deviation / torch.cat(seen).std())
    return model


def build_pair(make, name: str):
    """torchvision's model and ours with the same weights."""
    torch.manual_seed(0)
    sizes = dict(min_size=128, max_size=192)
    options = dict(weights=None, weights_backbone=None, num_classes=CLASSES + 1, rpn_post_nms_top_n_test=200, **sizes)
    theirs = randomise(make(**options), [picture(150, 200, seed=9)])
    ours = faster_rcnn(name, CLASSES, "torchvision", test_cfg=dict(rpn=dict(max_per_img=200)), **sizes).eval()
    ours.load_state_dict(torchvision_weights.convert(theirs.state_dict()), strict=True)
    return theirs, ours


@pytest.fixture(scope="module")
def v1():
    return build_pair(fasterrcnn_resnet50_fpn, "r50_fpn")


@pytest.fixture(scope="module")
def v2():
    return build_pair(fasterrcnn_resnet50_fpn_v2, "r50_fpn_v2")


@contextmanager
def float64(*models: nn.Module):
    """In float64 no pair of boxes lies on a threshold's edge; in float32 a last digit decides which one survives."""
    try:
        yield [model.double() for model in models]
    finally:
        for model in models:
            model.float()


def without_partner(ours: dict, theirs: dict, least: int = 20) -> int:
    """How many boxes of either set have no partner of the same label within 0.01 pixels and 1e-3 of score."""
    assert min(len(ours["boxes"]), len(theirs["boxes"])) > least
    same = torch.cdist(ours["boxes"].double(), theirs["boxes"].double(), p=torch.inf) < 0.01
    if "scores" in theirs:
        same &= (ours["scores"][:, None] - theirs["scores"][None]).abs() < 1e-3
        same &= ours["labels"][:, None] == theirs["labels"][None]
    return int((~same.any(1)).sum() + (~same.any(0)).sum())


def torchvisions_results(model, images):
    """(RPN logits and deltas of each level, proposals, class logits and deltas of each proposal, detections)."""
    seen = {}
    hooks = [
        module.register_forward_hook(lambda m, inputs, out, key=key: seen.update({key: out}))
        for key, module in dict(maps=model.rpn.head, rpn=model.rpn, said=model.roi_heads.box_predictor).items()
    ]
    with torch.no_grad():
        found = model(images)
    for hook in hooks:
        hook.remove()
    logits, deltas = seen["said"]
    said = torch.cat([logits[:, 1:], logits[:, :1]], 1), deltas[:, 4:]  # our background is last and has no deltas
    return [x for level in seen["maps"] for x in level], seen["rpn"][0], said, found


def our_results(model, images, their_proposals):
    """The same of ours, the second stage asked about their proposals."""
    batch, sizes, _ = model.data_preprocessor(images, images[0].dtype)
    rois = torch.cat([torch.nn.functional.pad(b, (1, 0), value=i) for i, b in enumerate(their_proposals)])
    with torch.no_grad():
        feats = model.extract_feat(batch)
        maps, said = model.rpn_head(feats), model.roi_head(feats, rois.to(batch.dtype))
    return [x for level in maps for x in level], [b for b, _ in model.proposals(batch, sizes)], said, model(images)


@pytest.mark.parametrize("version, sizes", [("v1", [(240, 170), (150, 333)]), ("v2", [(301, 130)])])
def test_proposals_and_detections_equal_torchvision(version, sizes, request):
    theirs, ours = request.getfixturevalue(version)
    images = [picture(h, w, seed=i) for i, (h, w) in enumerate(sizes)]
    exact = [image.double() for image in images]
    with float64(theirs, ours):
        expected = torchvisions_results(theirs, exact)
        found = our_results(ours, exact, expected[1])
    for i in range(len(images)):
        assert without_partner(dict(boxes=found[1][i]), dict(boxes=expected[1][i]), 100) == 0
        assert without_partner(found[3][i], expected[3][i]) == 0
    # In float32 what they choose from is compared.
    found = our_results(ours, images, expected[1])
    for ours32, theirs64 in zip((*found[0], *found[2]), (*expected[0], *expected[2]), strict=True):
        tolerance = 1e-4 * theirs64.abs().max().item()
        torch.testing.assert_close(ours32, theirs64.float(), rtol=0, atol=tolerance)
    for one in found[3]:
        assert (one["scores"][:-1] >= one["scores"][1:]).all()


def test_a_batch_finds_what_single_images_find(v1):
    images = [picture(192, 256, seed=i).double() for i in (1, 2)]
    with float64(v1[1]) as (ours,):
        for alone, together in zip([ours([image])[0] for image in images], ours(images)):
            assert without_partner(together, alone) == 0


def test_channels_last_batches_and_the_gradient_mode_change_nothing(v1):
    with float64(v1[1]) as (ours,):
        batch, sizes, _ = ours.data_preprocessor([picture(192, 256).double()], torch.float64)
        a, b = ours.predict(batch, sizes)[0], ours.predict(batch.contiguous(), sizes)[0]
        assert without_partner(b, a) == 0
        with torch.no_grad():
            c = ours.predict(batch, sizes)[0]
        assert torch.equal(a["boxes"], c["boxes"]) and not a["boxes"].requires_grad


def tiny(profile="mmdet", **more):
    """As it is born, for training and for what is decided before any score."""
    torch.manual_seed(1)
    return faster_rcnn("r18_fpn", 3, profile, **tiny_options(), **more)


def targets_of(profile: str, n: int = 2) -> list[dict]:
    first = PROFILES[profile].label_offset
    one = dict(
        boxes=torch.tensor([[5.0, 8.0, 40.0, 50.0], [30.0, 10.0, 80.0, 60.0]]), labels=torch.tensor([0, 2]) + first
    )
    return [one] * n


@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_training_gives_the_profiles_losses_and_finite_gradients(profile):
    model = tiny(profile).train()
    losses = model([picture(64, 90), picture(70, 96)], targets_of(profile))
    assert set(losses) == set(PROFILES[profile].losses)
    assert all(v.dim() == 0 and torch.isfinite(v) and v > 0 for v in losses.values())
    sum(losses.values()).backward()
    for name, p in model.named_parameters():
        fixed = name.startswith(("backbone.conv1", "backbone.bn1", "backbone.layer1"))
        # torchvision's and Detectron2's frozen norms have constants where MMDetection trains scales and offsets.
        fixed |= profile != "mmdet" and name.startswith("backbone") and (".bn" in name or "downsample.1" in name)
        assert p.requires_grad is not fixed, name
        assert p.grad is None if fixed else torch.isfinite(p.grad).all(), name
    assert model.rpn_head.rpn_reg.weight.grad.abs().sum() > 0
    assert model.roi_head.bbox_head.fc_reg.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_images_without_objects_train(profile):
    model = tiny(profile).train()
    empty = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    for targets in ([empty, empty], [targets_of(profile)[0], empty]):
        model.zero_grad()
        losses = model([picture(64, 90), picture(64, 90)], targets)
        assert all(torch.isfinite(v) for v in losses.values())
        sum(losses.values()).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        without = targets[0] is empty
        rpn_boxes, roi_boxes = (losses[PROFILES[profile].losses[i]].item() for i in (1, 3))
        assert (rpn_boxes == 0) == without and (roi_boxes == 0) == without


def test_targets_are_scaled_with_the_image_and_not_changed():
    model = tiny().train()
    seen = {}
    original = model.losses
    model.losses = lambda batch, frame, targets: seen.update(targets=targets) or original(batch, frame, targets)
    targets = targets_of("mmdet", 1)
    targets[0] = dict(targets[0], ignore_boxes=torch.tensor([[0.0, 0.0, 10.0, 20.0]]))
    before = targets[0]["boxes"].clone()
    model([picture(128, 160)], targets)  # 128 x 160 becomes 64 x 80
    torch.testing.assert_close(seen["targets"][0]["boxes"], before / 2)
    torch.testing.assert_close(seen["targets"][0]["ignore_boxes"], torch.tensor([[0.0, 0.0, 5.0, 10.0]]))
    assert torch.equal(targets[0]["boxes"], before)


BOX = torch.tensor([[5.0, 8.0, 40.0, 50.0]])
BAD_TARGETS = [
    (dict(boxes=torch.tensor([[5.0, 8.0, 5.0, 50.0]]), labels=torch.tensor([1])), r"targets\[1\].*x2 > x1"),
    (dict(boxes=torch.tensor([[5.0, 8.0, 9.0, 3.0]]), labels=torch.tensor([1])), r"targets\[1\].*x2 > x1"),
    (dict(boxes=torch.tensor([[5.0, 8.0, float("nan"), 30.0]]), labels=torch.tensor([1])), r"targets\[1\]"),
    (dict(boxes=BOX, labels=torch.tensor([7])), r"targets\[1\].*labels.*7"),
    (dict(boxes=BOX, labels=torch.tensor([-1])), r"targets\[1\].*labels.*-1"),
    (dict(boxes=BOX, labels=torch.tensor([1, 1])), r"targets\[1\].*1 boxes but 2 labels"),
    (dict(boxes=BOX), r"targets\[1\].*labels"),
    (dict(boxes=BOX, labels=torch.tensor([1.7])), r"targets\[1\].*integer labels"),
    (dict(boxes=torch.tensor([[5.0, 8.0, float("inf"), 50.0]]), labels=torch.tensor([1])), r"targets\[1\].*finite"),
    (dict(boxes=BOX[0], labels=torch.tensor([1])), r"targets\[1\].*\[N, 4\]"),
]


@pytest.mark.parametrize("target, message", BAD_TARGETS)
@pytest.mark.parametrize("profile", ["mmdet", "torchvision"])
def test_a_bad_target_is_named(target, message, profile):
    model = tiny(profile).train()
    with pytest.raises((TypeError, ValueError), match=message):
        model([picture(64, 90)] * 2, [targets_of(profile)[0], target])
    with pytest.raises(ValueError, match="one for each of the 1 images, got 2"):  # none is dropped
        model([picture(64, 90)], [targets_of(profile)[0]] * 2)


@pytest.mark.parametrize("profile, wrong", [("mmdet", 3), ("torchvision", 0)])
def test_labels_are_counted_from_the_profiles_first(profile, wrong):
    model = tiny(profile).train()
    with pytest.raises(ValueError, match="labels"):
        model([picture(64, 90)], [dict(boxes=BOX, labels=torch.tensor([wrong]))])


@pytest.mark.parametrize("targets", [None, [], targets_of("mmdet", 1)])
def test_missing_targets_are_an_error(targets):
    with pytest.raises(ValueError, match="targets"):
        tiny().train()([picture(64, 90)] * 2, targets)


def test_predict_and_proposals_shapes():
    model = tiny(test_cfg=dict(rcnn=dict(score_thr=0.0))).eval()
    batch, sizes, factors = model.data_preprocessor([picture(128, 160), picture(96, 96)])
    for (boxes, scores), (height, width) in zip(model.proposals(batch, sizes), sizes.tolist()):
        assert boxes.shape == (len(scores), 4) and 0 < len(scores) <= 1000
        assert boxes.dtype == scores.dtype == torch.float32
        assert boxes.min() >= 0 and boxes[:, 2].max() <= width and boxes[:, 3].max() <= height
    small, large = model.predict(batch, sizes), model.predict(batch, sizes, factors)
    for s, o, (height, width) in zip(small, large, ((128, 160), (96, 96))):
        assert o["boxes"].shape == (100, 4) and o["scores"].shape == o["labels"].shape == (100,)
        assert o["labels"].dtype == torch.int64 and o["labels"].min() >= 0 and o["labels"].max() <= 2
        assert o["boxes"][:, 2].max() <= width + 1e-3 and o["boxes"][:, 3].max() <= height + 1e-3
        assert s["boxes"].max() < o["boxes"].max()
    assert len(model.predict(batch, sizes.tolist(), factors.tolist())) == 2
    with pytest.raises(ValueError, match="image_sizes"):
        model.predict(batch, sizes[:1])


def test_nothing_found_is_an_empty_result():
    model = tiny(test_cfg=dict(rcnn=dict(score_thr=1.0))).eval()
    (found,) = model([picture(64, 90)])
    assert found["boxes"].shape == (0, 4) and found["scores"].shape == found["labels"].shape == (0,)


def test_no_proposals_at_all_is_an_empty_result():
    model = tiny(test_cfg=dict(rpn=dict(min_bbox_size=10_000))).eval()
    (found,) = model([picture(64, 90)])
    assert found["boxes"].shape == (0, 4)


@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_evaluation_leaves_the_model_and_the_images_alone(profile):
    model = tiny(profile).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    image = picture(64, 90)
    kept = image.clone()
    first, second = model([image])[0], model([image])[0]
    assert torch.equal(first["boxes"], second["boxes"]) and torch.equal(first["scores"], second["scores"])
    assert torch.equal(image, kept)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_training_under_autocast_gives_nearly_the_same_losses():
    model = tiny().train()
    # Two: torch's bfloat16 gradient of narrow convolutions overruns its memory with one on CPUs without AMX.
    images, targets = [picture(64, 90), picture(64, 90, seed=1)], targets_of("mmdet", 2)
    torch.manual_seed(3)
    exact = model(images, targets)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(images, targets)
    for name in ("loss_rpn_cls", "loss_rpn_bbox", "loss_cls"):
        assert low[name].item() == pytest.approx(exact[name].item(), rel=0.05), name
    sum(low.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_what_training_proposals_leave_unsaid():
    rpn = dict(nms_pre=70, max_per_img=60, min_bbox_size=9)
    keys = ("nms_pre", "max_per_img", "min_bbox_size")

    def proposing(**train_cfg):
        model = tiny(test_cfg=dict(rpn=rpn), train_cfg=dict(rpn_proposal=None, **train_cfg))
        return [model.rpn_proposal[key] for key in keys]

    assert proposing() == [70, 60, 9]  # as in testing
    tiny_model = tiny(test_cfg=dict(rpn=rpn), train_cfg=dict(rpn_proposal=dict(_delete_=True, max_per_img=40)))
    assert [tiny_model.rpn_proposal[key] for key in keys] == [-1, 40, -1]  # all of them, whatever their size
