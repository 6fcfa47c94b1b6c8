"""The preprocessor as an ONNX graph against the preprocessor."""

import pytest
import torch
from conftest import picture
from torch.export import Dim

from fastrcnn.models.preprocess import DataPreprocessor
from fastrcnn.models.profiles import get_profile

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from fastrcnn.export.onnx_ops import to_onnx  # noqa: E402
from fastrcnn.export.pixels import Pixels  # noqa: E402

SIZES = [(37, 61), (64, 96), (150, 96), (128, 260), (5, 90), (200, 300)]


def exported(preprocessor):
    images = torch.zeros(2, 3, 50, 70, dtype=torch.uint8)
    shapes = dict(images={0: Dim("b"), 2: Dim("h"), 3: Dim("w")})
    program = torch.export.export(Pixels(preprocessor, torch.float32), (images,), dynamic_shapes=shapes)
    return to_onnx(program, ["images"], ["batch", "image_sizes", "scale_factors"])


@pytest.mark.parametrize("profile", ["mmdet", "torchvision", "detectron2"])
def test_pixels(profile, two_threads):
    preprocessor = DataPreprocessor(get_profile(profile), 64, 96)
    model = exported(preprocessor)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for i, size in enumerate(SIZES):
        images = [picture(*size, seed=seed) for seed in range(1 + i % 2)]
        expected = preprocessor(images)
        found = [torch.from_numpy(x) for x in session.run(None, dict(images=torch.stack(images).numpy()))]
        exact = dict(rtol=0, atol=0 if profile != "torchvision" else 1e-5)
        for f, e in zip(found, expected):
            torch.testing.assert_close(f, e, **exact)


def test_pillows_bytes_are_exact_where_doubles_are_floats(tmp_path):
    """OpenVINO's CPU device computes both in float32."""
    openvino, onnx = pytest.importorskip("openvino"), pytest.importorskip("onnx")
    preprocessor = DataPreprocessor(get_profile("detectron2"), 64, 96)
    onnx.save(exported(preprocessor), tmp_path / "pixels.onnx")
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    run = openvino.Core().compile_model(openvino.convert_model(tmp_path / "pixels.onnx"), "CPU", options)
    for size in ((128, 260), (200, 300), (333, 500), (37, 61)):
        image = picture(*size, seed=1)
        found = run(dict(images=image[None].numpy()))
        for name, expected in zip(("batch", "image_sizes", "scale_factors"), preprocessor([image])):
            last_digit = 1e-6 if name == "scale_factors" else 0
            torch.testing.assert_close(torch.from_numpy(found[name]), expected, rtol=last_digit, atol=0)
