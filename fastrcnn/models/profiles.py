"""The three peers' semantics: what each does differently with the same weights, every item of which moves AP.

What MMDetection makes a constructor argument (losses, thresholds, RoIAlign sampling...) is an argument here, too, and a
profile gives its default; the rest is read from the profile where it matters.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    name: str
    # --- input
    mean: tuple[float, float, float]  # in the network's channel order and range (0..1 or 0..255)
    std: tuple[float, float, float]
    bgr: bool  # channel order of the network's input
    resize: str  # "opencv": uint8, fixed point; "interpolate": float, after normalising; "pillow": uint8, antialiased
    # --- backbone and neck
    resnet_style: str | None  # of plain ResNets; None: "pytorch" under a pyramid, "caffe" without one
    trains_norms: bool  # scales and offsets of a pytorch-style backbone's norms; their statistics are fixed everywhere
    neck_init: str  # the FPN's init_cfg type
    # --- anchors and deltas
    round_anchors: bool
    strides_from_grid: bool  # stride = padded size // map size, which differs on maps of odd size
    symmetric_clip: bool  # dw, dh clamped from below, too
    # --- RPN
    rpn_topk_on: str
    rpn_nms_on: str
    rpn_min_size: float  # boxes must be larger than this on both sides
    rpn_post_nms_train: int
    low_quality: str
    min_pos_iou: float
    iou_eps: float
    anchors_inside: bool  # only anchors of the image's own padded area, within allowed_border, are trained
    rpn_divisor: str  # of the losses: "floored" counts at least one of each side an image, "sampled", or "num"
    rpn_loss_bbox: dict
    # --- RetinaNet
    dense_divisor: str  # of the losses: the batch's "positives", each "image" by its own, or a "running" mean
    dense_loss_bbox: dict
    dense_drops_small: bool  # detections must be larger than test_cfg's min_bbox_size on both sides
    dense_anchors: dict
    dense_extra_convs: dict  # where P6 and P7 come from
    dense_max_per_img: int
    # --- RoI head
    sampling_ratio: int
    aligned: bool
    rescale_before_nms: bool
    min_box_size: float | None  # detections must reach this on both sides
    clip_after_rescale: bool
    gt_first: bool  # ground truth joins the proposals in front and matches itself; else at the end, matched by IoU
    roi_loss_bbox: dict
    label_offset: int  # the first foreground label outside the network
    # --- names
    losses: tuple[str, str, str, str]  # RPN classification, RPN boxes, RoI classification, RoI boxes
    dense_losses: tuple[str, str]  # RetinaNet's classification and boxes


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMOOTH_L1 = dict(type="SmoothL1Loss", beta=1.0 / 9.0, loss_weight=1.0)
L1 = dict(type="L1Loss", loss_weight=1.0)

# Three sizes an octave. torchvision cuts them to whole pixels; Detectron2 orders by size first, the others by ratio.
_OCTAVES = dict(ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32, 64, 128], octave_base_scale=4, scales_per_octave=3)
_WHOLE = [[int(size * 2 ** (i / 3)) / (size / 4) for i in range(3)] for size in (32, 64, 128, 256, 512)]

PROFILES = {
    "mmdet": Profile(
        name="mmdet",
        mean=(123.675, 116.28, 103.53),
        std=(58.395, 57.12, 57.375),
        bgr=False,
        resize="opencv",
        resnet_style=None,
        trains_norms=True,
        neck_init="Xavier",
        round_anchors=False,
        strides_from_grid=False,
        symmetric_clip=True,
        rpn_topk_on="sigmoid",
        rpn_nms_on="sigmoid",
        rpn_min_size=-1.0,  # all: its test_cfg's min_bbox_size decides alone
        rpn_post_nms_train=1000,
        low_quality="last_gt",
        min_pos_iou=0.3,
        iou_eps=1e-6,
        anchors_inside=True,
        rpn_divisor="floored",
        rpn_loss_bbox=L1,
        dense_divisor="positives",
        dense_loss_bbox=L1,
        dense_drops_small=True,
        dense_anchors=dict(_OCTAVES),
        dense_extra_convs=dict(add_extra_convs="on_input"),
        dense_max_per_img=100,
        sampling_ratio=0,
        aligned=True,
        rescale_before_nms=True,
        min_box_size=None,
        clip_after_rescale=False,
        gt_first=True,
        roi_loss_bbox=L1,
        label_offset=0,
        losses=("loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox"),
        dense_losses=("loss_cls", "loss_bbox"),
    ),
    "torchvision": Profile(
        name="torchvision",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        bgr=False,
        resize="interpolate",
        resnet_style="pytorch",
        trains_norms=False,
        neck_init="Caffe2Xavier",
        round_anchors=True,
        strides_from_grid=True,
        symmetric_clip=False,
        rpn_topk_on="logits",
        rpn_nms_on="sigmoid",
        rpn_min_size=0.0009999999310821295,  # the float just below 1e-3: torchvision keeps sizes >= 1e-3
        rpn_post_nms_train=2000,
        low_quality="argmax",
        min_pos_iou=0.0,
        iou_eps=0.0,
        anchors_inside=False,
        rpn_divisor="sampled",
        rpn_loss_bbox=SMOOTH_L1,
        dense_divisor="image",
        dense_loss_bbox=L1,
        dense_drops_small=False,
        dense_anchors=dict(ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32, 64, 128], scales=_WHOLE),
        dense_extra_convs=dict(add_extra_convs="on_output", relu_before_extra_convs=True),
        dense_max_per_img=300,
        sampling_ratio=2,
        aligned=False,
        rescale_before_nms=False,
        min_box_size=1e-2,
        clip_after_rescale=False,
        gt_first=False,
        roi_loss_bbox=SMOOTH_L1,
        label_offset=1,
        losses=("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"),
        dense_losses=("classification", "bbox_regression"),
    ),
    "detectron2": Profile(
        name="detectron2",
        mean=(103.53, 116.28, 123.675),
        std=(1.0, 1.0, 1.0),
        bgr=True,
        resize="pillow",
        resnet_style="caffe",
        trains_norms=False,
        neck_init="Caffe2Xavier",
        round_anchors=False,
        strides_from_grid=False,
        symmetric_clip=False,
        rpn_topk_on="logits",
        rpn_nms_on="logits",
        rpn_min_size=0.0,
        rpn_post_nms_train=1000,
        low_quality="argmax",
        min_pos_iou=0.0,
        iou_eps=0.0,
        anchors_inside=False,
        rpn_divisor="num",
        rpn_loss_bbox=L1,
        dense_divisor="running",
        dense_loss_bbox=dict(type="SmoothL1Loss", beta=0.1, loss_weight=1.0),
        dense_drops_small=False,
        dense_anchors=dict(_OCTAVES, scale_major=False),
        dense_extra_convs=dict(add_extra_convs="on_input", relu_before_extra_convs=True),
        dense_max_per_img=100,
        sampling_ratio=0,
        aligned=True,
        rescale_before_nms=False,
        min_box_size=None,
        clip_after_rescale=True,
        gt_first=False,
        roi_loss_bbox=L1,
        label_offset=0,
        losses=("loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"),
        dense_losses=("loss_cls", "loss_box_reg"),
    ),
}


def get_profile(name: str) -> Profile:
    if name not in PROFILES:
        raise ValueError(f"profile: expected one of {tuple(PROFILES)}, got {name!r}")
    return PROFILES[name]
