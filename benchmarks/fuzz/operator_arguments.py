"""Random and hostile arguments of every operator but conv_bn_relu (convolution.py), for operators.py."""

import math
import random

import torch

INF, NAN = math.inf, math.nan
ODD = [NAN, INF, -INF, 0.0, -0.0, 1e-45, 1e-30, 1e19, -1e19, 1e30, 65504.0, 16777217.0, -1.0, 0.5]
DTYPES = [torch.float32, torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]


class Source:
    """Arguments from a seeded generator: plain ones, and in a hostile call now and then odd ones. A call has n boxes, or a
    batch of as many, or maps [batch, channels, height, width]."""

    def __init__(self, name: str, number: int):
        self.pick = random.Random(f"{name}:{number}")
        torch.manual_seed(self.pick.getrandbits(48))
        self.hostile = self.pick.random() < 0.6
        self.dtype = self.pick.choice(DTYPES)
        self.n, self.batch, self.channels = self.count(), self.count(3), self.count(9)
        self.height, self.width = self.count(12), self.count(12)

    def count(self, most: int = 40) -> int:
        return self.pick.choice([0, 1, 2, 3, 7, 17, most]) if self.hostile else self.pick.randint(1, most)

    def choice(self, *values):
        return self.pick.choice(values)

    def number(self, plain: float, *odd) -> float:
        return self.pick.choice([*odd, *ODD]) if self.hostile and self.pick.random() < 0.2 else plain

    def whole(self, plain: int, *odd: int) -> int:
        return self.pick.choice([*odd, 0, -1, 2**31, 2**32 + 1, -(2**40)]) if self.rare() else plain

    def rare(self) -> bool:
        return self.hostile and self.pick.random() < 0.15

    def tensor(self, value: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Some numbers odd, another layout, another dtype."""
        value = value.to(dtype or self.dtype)
        if self.hostile and value.numel() and self.pick.random() < 0.5:
            for _ in range(self.pick.randint(1, 4)):
                value.view(-1)[self.pick.randrange(value.numel())] = self.pick.choice(ODD)
        if value.dim() == 4 and self.pick.random() < 0.5:
            value = value.contiguous(memory_format=torch.channels_last)
        elif value.dim() and self.rare():
            value = torch.stack([value, value], -1)[..., 0]
        return value

    def boxes(self, *shape: int, size: float = 100) -> torch.Tensor:
        low, extent = torch.rand(*shape, 2) * size, torch.rand(*shape, 2) * size / 2
        grid = self.pick.random() < 0.3  # ties of IoU and of scores
        boxes = torch.cat([low, low + extent], -1)
        return self.tensor(boxes.round() if grid else boxes)

    def scores(self, *shape: int) -> torch.Tensor:
        scores = torch.rand(shape)
        return self.tensor((scores * 8).round() / 8 if self.pick.random() < 0.4 else scores)

    def ids(self, *shape: int, most: int = 4) -> torch.Tensor:
        return torch.randint(-1, most, shape).to(self.choice(torch.int64, torch.int32, torch.uint8))

    def rois(self, k: int, batch: int, size: float) -> torch.Tensor:
        index = torch.randint(-1, max(batch, 1), (k, 1)).float()
        rois = torch.cat([index, self.boxes(k, size=size).float()], 1)
        return self.tensor(rois, self.choice(torch.float32, torch.float32, torch.float64, torch.float16))

    def map(self, batch: int, channels: int, height: int, width: int) -> torch.Tensor:
        return self.tensor(torch.randn(batch, channels, height, width))


def nms(s: Source) -> dict:
    return dict(boxes=s.boxes(s.n), scores=s.scores(s.n), iou_threshold=s.number(s.pick.random()))


def soft_nms(s: Source) -> dict:
    rules = dict(sigma=s.number(s.pick.random() + 0.01, 1e-50, 1e300), min_score=s.number(s.choice(0.001, 0.2), 1e-50))
    return dict(nms(s), method=s.choice("naive", "linear", "gaussian"), **rules)


def sampled(s: Source) -> dict:
    size = s.choice(s.pick.randint(1, 7), (s.pick.randint(1, 5), s.whole(s.pick.randint(1, 5))))
    return dict(output_size=size, sampling_ratio=s.whole(s.pick.randint(0, 4), 3000, 300))


def coder(s: Source) -> dict:
    means, stds = [s.number(0.1) for _ in range(4)], [s.number(0.5) for _ in range(4)]
    return dict(
        means=means, stds=stds, wh_ratio_clip=s.number(0.016, 1e-300, 1e300), symmetric_clip=s.choice(True, False)
    )


def batched_nms(s: Source) -> dict:
    return dict(nms(s), idxs=s.ids(s.n), max_output=s.choice(None, s.whole(s.pick.randint(0, 9))))


def nms_padded(s: Source) -> dict:
    counts = s.choice(None, s.ids(s.batch, most=s.n + 3))
    return dict(
        boxes=s.boxes(s.batch, s.n),
        scores=s.scores(s.batch, s.n),
        groups=s.choice(None, s.ids(s.batch, s.n)),
        iou_threshold=s.number(s.pick.random()),
        max_output=s.choice(0, 3, s.n),
        counts=counts,
    )


def batched_soft_nms(s: Source) -> dict:
    return dict(soft_nms(s), idxs=s.ids(s.n), max_output=s.choice(None, s.pick.randint(0, 9)))


def soft_nms_padded(s: Source) -> dict:
    rules = {k: v for k, v in soft_nms(s).items() if k not in ("boxes", "scores")}
    return dict(
        rules,
        boxes=s.boxes(s.batch, s.n),
        scores=s.scores(s.batch, s.n),
        groups=s.choice(None, s.ids(s.batch, s.n)),
        max_output=s.choice(0, 3, s.n),
        counts=s.choice(None, s.ids(s.batch, most=s.n + 3)),
    )


def select_candidates(s: Source) -> dict:
    return dict(scores=s.scores(s.batch, s.n), threshold=s.number(0.3), max_candidates=s.choice(0, 3, s.n, s.n + 5))


def roi_align(s: Source) -> dict:
    return dict(
        input=s.map(s.batch, s.channels, s.height, s.width),
        rois=s.rois(s.n, s.batch, 60),
        **sampled(s),
        spatial_scale=s.number(0.25),
        aligned=s.choice(True, False),
    )


def multilevel_roi_align(s: Source) -> dict:
    maps = [
        s.map(s.batch, s.channels, max(s.height >> i, 1), max(s.width >> i, 1)) for i in range(s.pick.randint(1, 4))
    ]
    return dict(
        features=maps,
        rois=s.rois(s.n, s.batch, 60),
        **sampled(s),
        finest_scale=s.number(8),
        strides=[s.number(4 << i) for i in range(len(maps))],
        aligned=s.choice(True, False),
        profile=s.choice("mmdet", "torchvision", "detectron2"),
    )


def deform_roi_pool(s: Source) -> dict:
    args = dict(sampled(s), gamma=s.number(0.1), spatial_scale=s.number(0.25))
    pooled = args["output_size"] if isinstance(args["output_size"], tuple) else (args["output_size"],) * 2
    offset = s.tensor(torch.randn(s.n, 2, *(min(max(p, 1), 9) for p in pooled))) if s.choice(0, 1) else None
    return dict(
        input=s.map(s.batch, s.channels, s.height, s.width), rois=s.rois(s.n, s.batch, 60), offset=offset, **args
    )


def decode_boxes(s: Source) -> dict:
    lead, classes = s.choice((s.n,), (s.batch, s.n)), s.count(3)
    sizes = torch.tensor([80.0, 90]) if len(lead) == 1 else torch.rand(s.batch, 2) * 100
    limit = s.choice(None, (80, s.number(90)), s.tensor(sizes, torch.float32), sizes.long())
    return dict(anchors=s.boxes(*lead), deltas=s.tensor(torch.randn(*lead, 4 * classes)), max_shape=limit, **coder(s))


def decode_proposals(s: Source) -> dict:
    levels = [(s.count(4), s.count(7), s.count(7)) for _ in range(s.pick.randint(1, 3))]
    logits = [s.tensor(torch.randn(s.batch, *level) * s.choice(1, 40)) for level in levels]
    deltas = [s.tensor(torch.randn(s.batch, 4 * a, h, w)) for a, h, w in levels]
    bases = [s.boxes(a, size=20) - 10 for a, _, _ in levels]
    sizes = s.tensor(torch.rand(s.batch, 2) * 60, torch.float32)
    return dict(
        cls_logits=logits,
        bbox_deltas=deltas,
        base_anchors=bases,
        **s.choice(dict(strides=[s.number(8) for _ in levels]), dict(strides=None, batch_shape=(s.whole(50), 60))),
        image_sizes=s.choice(sizes, torch.full((s.batch, 2), 50)),
        nms_pre=s.whole(s.pick.randint(0, 20)),
        min_size=s.number(s.choice(0.0, 3.0)),
        topk_on=s.choice("sigmoid", "logits"),
        score=s.choice("sigmoid", "logits"),
        **coder(s),
    )


def match_boxes(s: Source) -> dict:
    m, regions = s.count(6), s.count(3)
    ignore = s.choice(None, s.boxes(s.batch, regions))
    return dict(
        boxes=s.choice(s.boxes(s.n), s.boxes(s.batch, s.n)),
        gt_boxes=s.boxes(s.batch, m),
        ignore_boxes=ignore,
        gt_counts=s.choice(None, s.ids(s.batch, most=m + 2)),
        ignore_iof_thr=s.number(s.choice(-1.0, 0.4)),
        pos_iou_thr=s.number(0.5),
        neg_iou_thr=s.number(0.4),
        min_pos_iou=s.number(s.choice(0.0, 0.3)),
        match_low_quality=s.choice(True, False),
        low_quality=s.choice("last_gt", "argmax"),
        iou_eps=s.number(s.choice(0.0, 1e-6)),
    )


def deform_conv2d(s: Source) -> dict:
    share, groups = s.choice(1, 2, 4), s.choice(1, 2)
    offset_groups, (kh, kw) = s.choice(1, groups), (s.pick.randint(1, 3), s.pick.randint(1, 3))
    stride, padding, dilation = ([s.whole(s.pick.randint(low, 2)) for _ in range(2)] for low in (1, 0, 1))
    try:
        size = [
            max((h + 2 * p - d * (k - 1) - 1) // t + 1, 0)
            for h, k, t, p, d in zip((s.height, s.width), (kh, kw), stride, padding, dilation)
        ]
    except ZeroDivisionError:
        size = [1, 1]
    size = size if max(size) < 40 else [1, 1]
    taps = offset_groups * kh * kw
    return dict(
        input=s.map(s.batch, share * groups, s.height, s.width),
        weight=s.map(2 * groups, share, kh, kw),
        offset=s.map(s.batch, 2 * taps, *size),
        mask=s.choice(None, s.map(s.batch, taps, *size)),
        bias=s.choice(None, s.tensor(torch.randn(2 * groups))),
        stride=stride,
        padding=padding,
        dilation=dilation,
    )


def preprocess(s: Source) -> dict:
    resize = s.choice("opencv", "interpolate", "pillow")
    images = [
        torch.rand(3, s.count(30), s.count(30)).to(s.choice(torch.float32, torch.float64, torch.float16))
        for _ in range(s.pick.randint(1, 3))
    ]
    if resize != "interpolate":  # where the last bit of a place decides which neighbour has weight 0
        images = [s.tensor(i, i.dtype) for i in images]
    images = [(i * 255).to(torch.uint8) if s.choice(0, 1) and i.isfinite().all() else i for i in images]
    return dict(images=images, sizes=[(s.whole(s.pick.randint(1, 40)), s.pick.randint(1, 40)) for _ in images],
                batch_size=(40, s.whole(40)), mean=[s.number(0.4) for _ in range(3)], std=[s.number(0.3) for _ in range(3)],
                resize=resize, bgr=s.choice(True, False), dtype=s.dtype)  # fmt: skip


OPERATORS = {f.__name__: f for f in (nms, batched_nms, nms_padded, soft_nms, batched_soft_nms, soft_nms_padded,
                                     select_candidates, roi_align, multilevel_roi_align, deform_roi_pool, decode_boxes,
                                     decode_proposals, match_boxes, deform_conv2d, preprocess)}  # fmt: skip


def make(name: str, number: int) -> dict:
    """The keyword arguments of call `number` of an operator, the same each time."""
    return OPERATORS[name](Source(name, number))
