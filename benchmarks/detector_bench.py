"""The whole detector, R50-FPN at 800 x 1344, against torchvision's fasterrcnn_resnet50_fpn with the same weights.

On a CPU one image in fp32 and bf16; on CUDA 8 and 16 images in bf16, too, and what bf16 takes as a CUDA graph. Both sides
start from decoded images and end at detections in the original image's pixels. The weights are random, with norm statistics
that are not the identity and last layers scaled up so that scores spread; both load the same state dict. In fp32 ours must
find torchvision's detections again: same label, within 0.01 px and 1e-3 of score. Random weights decide nothing clearly,
so bf16 is held against fp32 with trained weights, those of the demo, on rendered pictures: how many of the 20 best objects
come within 2 px. max_error is the share of detections not found again. --rivals, on a CPU: in fp32 also against torchvision
compiled, ONNX Runtime and OpenVINO with the same weights (rivals.py; `pip install 'fastrcnn[export]'`).
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

import rivals
import timing
import torch
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from fastrcnn import Detector
from fastrcnn.cli.demo import ASSETS
from fastrcnn.data.rendered_cells import render_cells
from fastrcnn.inference.captured import Captured, unpack
from fastrcnn.training.demo import HELD_OUT_SEED
from fastrcnn.weights import infer_model


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=g) * 0.1)
            m.running_var.copy_(torch.rand(m.running_var.shape, generator=g) + 0.5)
            m.weight.copy_(torch.rand(m.weight.shape, generator=g) * 0.5 + 0.3)
            m.bias.copy_(torch.randn(m.bias.shape, generator=g) * 0.1)
    for layer, gain in ((model.rpn.head.cls_logits, 8), (model.roi_heads.box_predictor.cls_score, 60)):
        layer.weight.mul_(gain)


def matched(found: dict, expected: dict, pixels: float, score: float, best: int | None = None) -> tuple[int, int]:
    """How many of the `best` expected detections have a partner: same label, box within `pixels`, score within `score`."""
    boxes, scores, labels = (expected[k][:best] for k in ("boxes", "scores", "labels"))
    same = found["labels"][None] == labels[:, None]
    same &= (found["boxes"][None] - boxes[:, None]).abs().amax(-1) <= pixels
    same &= (found["scores"][None] - scores[:, None]).abs() <= score
    return int(same.any(1).sum()), len(boxes)


def agreement(device: str, pictures: int) -> tuple[int, int]:
    """How many of fp32's 20 best objects bf16 finds within 2 px, with the demo's trained weights."""
    weights = str(ASSETS / "demo.safetensors")
    exact, rounded = (Detector(weights, device=device, precision=p) for p in ("fp32", "bf16"))
    images = [render_cells(HELD_OUT_SEED + i)[0] for i in range(pictures)]
    counts = [matched(vars(b), vars(a), 2.0, 1.0, 20) for a, b in zip(exact(images), rounded(images))]
    return sum(hits for hits, _ in counts), sum(of for _, of in counts)


def main() -> None:
    with_rivals = "--rivals" in sys.argv
    if with_rivals:
        sys.argv.remove("--rivals")
        rivals.require()
    args = timing.arguments(__doc__)
    for op in ("conv_bn_relu", "decode_proposals", "nms_padded", "multilevel_roi_align"):
        timing.require_kernel(op, args.device)
    rates = timing.Rates(args.device)
    cuda = torch.device(args.device).type == "cuda"
    size = dict(min_size=128, max_size=224) if args.quick else dict(min_size=800, max_size=1344)
    torch.manual_seed(0)
    rival_model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, **size).eval()
    randomise(rival_model)
    rival_model = rival_model.to(args.device)
    ours_model = infer_model(dict(rival_model.state_dict()), min_size=size["min_size"], max_size=size["max_size"])
    cases = [("fp32", 1), ("bf16", 1)] + ([("bf16", 8), ("bf16", 16)] if cuda and not args.quick else [])
    pictures = [render_cells(7 + i, size["min_size"], size["max_size"])[0] for i in range(cases[-1][1])]
    images = [torch.from_numpy(p).permute(2, 0, 1).contiguous().float().to(args.device) / 255 for p in pictures]
    rows = []
    for precision, batch in cases:
        detector = Detector(ours_model, device=args.device, precision=precision)
        # torchvision's best: on a CPU autocast gains nothing, on CUDA it runs the convolutions in bf16, channels-last.
        autocast = cuda and precision == "bf16"
        if autocast:
            rival_model.to(memory_format=torch.channels_last)

        @torch.inference_mode()
        def rival(batch=batch, autocast=autocast):
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                return rival_model(images[:batch])

        @torch.inference_mode()
        def ours(batch=batch, model=detector.model):
            return model(images[:batch])

        if precision == "fp32":
            found, expected = ({k: v.cpu() for k, v in side()[0].items()} for side in (ours, rival))
            hits, of = matched(found, expected, 0.01, 1e-3)
            timing.check("detections of torchvision not found again", of - hits, 0.02 * of)
        elif batch == 1:  # the weights, not the batch, decide what bf16 finds
            hits, of = agreement(args.device, 2 if args.quick else 10)
        ways = {"": ours}
        if autocast:  # from bytes, as Detector runs it; the second call captures
            graph, pixels = Captured(detector._packed), torch.stack(images[:batch]).mul(255).to(torch.uint8)
            ways[", captured"] = captured = torch.inference_mode()(partial(graph, pixels))
            for _ in range(3):  # as it is, captured, replayed
                found, _ = unpack(captured().cpu())
            with torch.inference_mode():
                eager = detector.model(list(pixels))
            rows_of = zip(*found._replace(labels=found.labels + detector.model.label_offset), eager)
            again = [
                matched(
                    dict(boxes=b[:n], scores=s[:n], labels=k[:n]), {key: v.cpu() for key, v in e.items()}, 2.0, 0.05
                )
                for b, s, k, n, e in rows_of
            ]
            same, of_eager = (sum(column) for column in zip(*again))
            timing.check("detections of eager that the graph lacks", of_eager - same, 0.02 * of_eager)
        flop = 432e9 * batch if not args.quick else 0.0
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        floor = rates.floor_ms(timing.count_bytes(*detector.model.parameters()), flop, dtype)
        name = f"B={batch} {size['min_size']}x{size['max_size']}, {hits}/{of} found again"
        rival_name = "torchvision bf16 autocast, channels-last" if autocast else "torchvision fp32"
        for way, call in ways.items():
            times = timing.paired(call, rival, args.device, args.quick, budget_s=30.0)
            rows.append(
                timing.row("detector r50_fpn", name + way, dtype, args.device, times[0], rival_name, times[1], floor,
                           1 - hits / max(of, 1))
            )  # fmt: skip
        if precision == "fp32" and with_rivals:
            with tempfile.TemporaryDirectory() as folder:
                picture = torch.from_numpy(pictures[0]).permute(2, 0, 1).contiguous()
                for rival_name, other in rivals.programs(ours_model, rival_model, picture, Path(folder)):
                    expected = {k: v.cpu() for k, v in rival()[0].items()}
                    hits, of = matched(other()[0], expected, 0.05, 1e-3)
                    timing.check(f"detections of torchvision not found again by {rival_name}", of - hits, 0.02 * of)
                    name = f"B=1 {size['min_size']}x{size['max_size']}, {hits}/{of} found again"
                    times = timing.paired(ours, other, args.device, args.quick, budget_s=30.0)
                    rows.append(
                        timing.row("detector r50_fpn", name, dtype, args.device, times[0], rival_name, times[1], floor,
                                   1 - hits / max(of, 1))
                    )  # fmt: skip
    timing.report(rows, args)


if __name__ == "__main__":
    main()
