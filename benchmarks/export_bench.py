"""A detector and its exported forms side by side on the CPU: eager, compiled, .pt2, ONNX Runtime, OpenVINO.

    python benchmarks/export_bench.py [--weights FILE] [--json FILE]

One picture from uint8 pixels to padded detections, with the demo's weights or another checkpoint's. Each form must find
what eager finds before it is timed (`fastrcnn.export.compare`), and is timed in turn with eager: ours_ms is the form's,
rival_ms eager's, max_error the largest difference of a box in pixels. Files are made afresh in a temporary folder.
"""

import sys
import tempfile
from pathlib import Path

import timing
import torch

from fastrcnn import Detector
from fastrcnn.cli.demo import ASSETS
from fastrcnn.export import compare, export, onnx, openvino


def _onnx(path: Path):
    runtime = onnx.session(path)
    return lambda images: runtime.run(None, {"images": images.numpy()})


def _openvino(path: Path):
    runtime = openvino.compiled(path)
    return lambda images: list(runtime({"images": images.numpy()}).values())


FORMS = {
    "pt2": (".pt2", lambda path: torch._inductor.aoti_load_package(str(path))),
    "onnx": (".onnx", _onnx),
    "openvino": (".xml", _openvino),
}


def main() -> None:
    weights = str(ASSETS / "demo.safetensors")
    if "--weights" in sys.argv:
        at = sys.argv.index("--weights")
        weights = sys.argv[at + 1]
        del sys.argv[at : at + 2]
    args = timing.arguments(__doc__)
    if args.device != "cpu":
        raise SystemExit("exported forms are for a CPU: --device cpu")
    for op in ("conv_bn_relu", "decode_proposals", "nms_padded", "multilevel_roi_align", "select_candidates"):
        timing.require_kernel(op, "cpu")
    detector = Detector(weights, device="cpu", precision="fp32")
    model, size = detector.model, (480, 640)
    images = compare.pictures(1, *size)
    rows = []

    def eager():
        with torch.inference_mode():
            return model(list(images))

    def add(name: str, run, error: float) -> None:
        with torch.inference_mode():
            ours, rival = timing.paired(lambda: run(images), eager, "cpu", args.quick, budget_s=20.0)
        shape = f"{size[0]}x{size[1]}, min_size {model.data_preprocessor.min_size}"
        rows.append(timing.row(name, shape, torch.float32, "cpu", ours, "eager", rival, 0.0, error))
        print(name, f"{ours:.1f} ms, eager {rival:.1f} ms", flush=True)

    compiled = torch.compile(lambda x: model.predict_padded(*x))

    def whole(x: torch.Tensor):
        batch, frame = model.prepare(list(x))
        with torch.inference_mode():
            found = compiled((batch, frame.sizes, frame.factors))
        return found._replace(labels=found.labels - model.label_offset)

    if not args.quick:  # what takes a minute to compile
        add("compiled", whole, compare.compare(whole, detector, "fp32", compare.CASES[:1]).pixels)
    for to in ("onnx",) if args.quick else FORMS:
        ending, load = FORMS[to]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"detector{ending}"
            try:
                error = export(detector, path, to=to).pixels
            except ValueError as refused:
                print(f"{to}: not timed, {refused}", flush=True)
                continue
            add(to, load(path), error)
    timing.report(rows, args)


if __name__ == "__main__":
    main()
