"""Parameters and multiply-adds of detectors, counted on shapes alone: nothing is computed."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastrcnn.zoo.published import PUBLISHED, Published
from fastrcnn.zoo.recipes import NAMES, RPNS, recipe

PROPOSALS = 1000  # that the second stage is counted with, as in MMDetection: what the RPN gives for an image
FUSED = ("conv_bn_relu", "deform_conv2d")  # our operators that convolve with an argument `weight`, where they exist


def _convolution(op) -> Callable[..., int]:
    """torch's kind of formula, which gets shapes and counts two a multiply-add."""
    position = [argument.name for argument in op.default._schema.arguments].index("weight")

    def flops(*shapes, out_shape=None, **named) -> int:
        weight = named["weight"] if "weight" in named else shapes[position]
        return 2 * math.prod(out_shape) * math.prod(weight[1:])

    return flops


class _Layers(nn.Module):
    """Every layer of a detector once, without what depends on the values of its maps: decoding and NMS."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> None:
        model = self.model
        feats = model.backbone(image)
        if model.neck is not None:
            feats = model.neck(feats)
        for name in ("rpn_head", "bbox_head"):  # of a two-stage, of a one-stage detector
            if hasattr(model, name):
                getattr(model, name)(feats)
        if hasattr(model, "roi_head"):
            self._second_stage(model.roi_head, feats, image.new_empty(PROPOSALS, 5))

    def _second_stage(self, head: nn.Module, feats: Sequence[Tensor], rois: Tensor) -> None:
        pools = getattr(head.bbox_roi_extractor, "roi_layers", None)
        if pools is None:
            head(feats, rois)
            return
        x = pools[0](feats[0], rois)  # deformable pooling has layers: every RoI passes those of one level, all alike
        head.bbox_head(x if head.shared_head is None else head.shared_head(x))


@torch.no_grad()
def complexity(model: nn.Module, height: int = 800, width: int = 1280) -> dict[str, int]:
    """dict of `parameters` and `flops`. The model is left as it is and may live on any device, "meta" included.

    flops are multiply-adds, as in the numbers that MMDetection and torchvision publish under this name: one
    multiplication with its addition is one. Counted are the convolutions and matrix products of backbone, neck and heads
    for one image [3, height, width], of a second stage with 1000 proposals. Biases, norms, activations, pooling, RoIAlign
    and NMS are not; MMDetection's counter includes some of them, less than 1 % of the sum.
    """
    ops = [getattr(torch.ops.fastrcnn, name) for name in FUSED if hasattr(torch.ops.fastrcnn, name)]
    counter = FlopCounterMode(display=False, custom_mapping={op: _convolution(op) for op in ops})
    layers, dtype = _Layers(model), next(model.parameters()).dtype
    tensors = {**dict(layers.named_parameters()), **dict(layers.named_buffers())}
    with FakeTensorMode(), counter:
        state = {name: torch.empty(t.shape, dtype=t.dtype, device="cpu") for name, t in tensors.items()}
        torch.func.functional_call(layers, state, torch.empty(1, 3, height, width, dtype=dtype, device="cpu"))
    return dict(parameters=sum(p.numel() for p in model.parameters()), flops=counter.get_total_flops() // 2)


def catalogue(name_contains: str = "") -> Iterator[dict]:
    """Every named model and every variant of it that has published weights, one after the other: dicts of `model`,
    `variant`, `parameters`, `flops` (of `complexity`, with COCO's eighty classes or the variant's few) and `published`, a
    list of dicts."""
    for name in (n for n in (*NAMES, *RPNS) if name_contains in n):
        rows = sorted((p for p in PUBLISHED if p.model == name), key=lambda p: -p.ap)
        for variant in dict.fromkeys(["-", *(p.variant for p in rows)]):
            same = [p for p in rows if p.variant == variant]
            with torch.device("meta"):
                classes = len(same[0].classes) or None if same else None
                model = recipe(name, classes, **(same[0].overrides if same else {}))
            yield dict(
                model=name, variant="" if variant == "-" else variant, **complexity(model), published=_facts(same)
            )


def _facts(rows: Sequence[Published]) -> list[dict]:
    names = "name", "profile", "metric", "ap", "licence", "licence_of", "address"
    return [{key: getattr(p, key) for key in names} for p in rows]


if __name__ == "__main__":  # what `fastrcnn models` prints, counted once: it takes half a minute and never changes
    stored = Path(__file__).parent.parent / "assets" / "models.json"
    stored.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in catalogue()) + "\n]\n", encoding="utf-8")
