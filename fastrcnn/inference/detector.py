"""Images in, objects out: reading, batching by shape, precision, names."""

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from fastrcnn.data.images import ImageError, as_image
from fastrcnn.inference.detections import Detections
from fastrcnn.layers import fold_batch_norm
from fastrcnn.models.base_detector import BaseDetector
from fastrcnn.models.preprocess import resized_size
from fastrcnn.models.rpn import RPN
from fastrcnn.weights import coco_address, infer_model
from fastrcnn.weights.named import named_model
from fastrcnn.zoo.recipes import NAMES, RPNS

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
READERS = 2  # threads that decode ahead of the model


def _coco_names() -> tuple[list[str], list[str]]:
    """COCO's names by id 1..90 (torchvision's labels, with "N/A" gaps) and the 80 in use (MMDetection's, Detectron2's)."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    by_id = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:]
    return by_id, [name for name in by_id if name != "N/A"]


def _names_and_ids(model: BaseDetector) -> tuple[list[str], list[int]]:
    """Class names and COCO category ids by label: the checkpoint's own names, COCO's by their number, or numbers."""
    by_id, in_use = _coco_names()
    names = model.class_names
    if names is None:
        names = {90: by_id, 80: in_use, 91: ["N/A", *by_id]}.get(model.num_classes)
        names = names or (["object"] if isinstance(model, RPN) else [f"class {i}" for i in range(model.num_classes)])
    if list(names) == in_use:
        return list(names), [by_id.index(name) + 1 for name in in_use]
    if list(names) == ["N/A", *by_id]:  # torchvision's RetinaNet, which counts from an unused 0
        return list(names), list(range(len(names)))
    return list(names), list(range(1, len(names) + 1))


def as_device(device: str | torch.device) -> torch.device:
    """The device that a name stands for; "auto" is CUDA where there is one. Raises ValueError where there is none."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {device} was asked for, but torch sees no CUDA device")
    return device


class Detector:
    """Finds objects: `Detector("r50_fpn", weights="coco")("street.jpg")[0].boxes`.

    model_or_name: a FasterRCNN, RetinaNet or RPN (copied, not changed), a name from `fastrcnn models`, or a checkpoint
    file or address from which the model is inferred. weights: a checkpoint of MMDetection, torchvision or Detectron2,
    "coco" for published ones, or None. device: "auto", "cpu", "cuda", "cuda:1"... precision: "fp32", "bf16", "fp16";
    "auto" is fp32 on a CPU, so that a checkpoint gives its old numbers, and bf16 on CUDA. Objects below score_threshold
    are left out.
    """

    def __init__(
        self,
        model_or_name: BaseDetector | str,
        weights: str | None = None,
        device: str | torch.device = "auto",
        precision: str = "auto",
        score_threshold: float = 0.05,
    ):
        if not 0.0 <= score_threshold <= 1.0:
            raise ValueError(f"score_threshold: expected a number in [0, 1], got {score_threshold}")
        self.device = as_device(device)
        if precision == "auto":
            precision = "bf16" if self.device.type == "cuda" else "fp32"
        if precision == "fp8":
            raise ValueError("precision: fp8 needs a convolution kernel that this version does not have; use bf16")
        if precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of auto, {', '.join(PRECISIONS)}, got {precision!r}")
        self.precision = precision
        model = self._model(model_or_name, weights).eval()
        model.requires_grad_(False)
        self.score_threshold = score_threshold
        for name in ("roi_head", "bbox_head"):  # of two stages, of one; an RPN alone has neither
            if hasattr(model, name):
                head = getattr(model, name)
                head.test_cfg = {**head.test_cfg, "score_thr": score_threshold}
        self.class_names, self.category_ids = _names_and_ids(model)
        # Batch norms are folded in float32, before the weights are rounded.
        self.model = fold_batch_norm(model.float()).to(self.device, PRECISIONS[precision])
        for m in self.model.modules():
            if type(m) is nn.Conv2d:  # the layout that the fused convolution reads, once instead of at every call
                m.to(memory_format=torch.channels_last)

    @staticmethod
    def _model(model_or_name: BaseDetector | str, weights: str | None) -> BaseDetector:
        if isinstance(model_or_name, BaseDetector):
            if weights is not None:
                raise ValueError("weights: expected None beside a model; load them with fastrcnn.load_weights first")
            return copy.deepcopy(model_or_name)
        name = str(model_or_name)
        if name not in (*NAMES, *RPNS):
            if weights is not None:
                raise ValueError(f"model_or_name: unknown model {name!r}, expected one of {', '.join((*NAMES, *RPNS))}")
            return infer_model(name)
        if weights is None:
            return named_model(name)
        return infer_model(coco_address(name) if weights == "coco" else weights, name)

    def __call__(self, images, batch_size: int | None = None) -> list[Detections]:
        """Objects of each image, in order. images: one or a list of paths, addresses, PIL images, arrays ([H, W, 3]) and
        tensors ([3, H, W]); uint8, or floats in 0..1.

        Raises ImageError for an image that cannot be read, before any is looked at; `stream` goes on instead.
        """
        single = not isinstance(images, Sequence | Iterable) or isinstance(images, str) or hasattr(images, "shape")
        read = [as_image(image, f"images[{i}]") for i, image in enumerate([images] if single else images)]
        results = {i: found for i, _, found in self.stream(read, batch_size)}
        return [results[i] for i in range(len(read))]

    def stream(
        self, images: Iterable, batch_size: int | None = None
    ) -> Iterator[tuple[int, Tensor | None, Detections | Exception]]:
        """(index, image uint8 [3, H, W], Detections), or (index, None, the error) for an image that cannot be read, as they
        are done: images of one shape wait for each other until there are `batch_size` (default 8 on CUDA, 1 on a CPU,
        where a batch gains nothing). Reading runs ahead in threads.
        """
        batch_size = batch_size or (8 if self.device.type == "cuda" else 1)
        waiting: dict[tuple, list[tuple[int, Tensor]]] = {}
        for index, image in self._read_ahead(images, batch_size):
            if isinstance(image, Exception):
                yield index, None, image
                continue
            p = self.model.data_preprocessor
            shape = resized_size(*image.shape[1:], p.min_size, p.max_size, p.profile.resize)
            group = waiting.setdefault(shape, [])
            group.append((index, image))
            if len(group) == batch_size:
                yield from self._detect(waiting.pop(shape))
        for group in waiting.values():
            yield from self._detect(group)

    @staticmethod
    def _read_ahead(images: Iterable, batch_size: int) -> Iterator[tuple[int, Tensor | Exception]]:
        def read(image) -> Tensor | Exception:
            try:
                return as_image(image)
            except (ImageError, TypeError, ValueError) as error:
                return error

        pending: deque[tuple[int, Future]] = deque()
        with ThreadPoolExecutor(READERS) as pool:
            for index, image in enumerate(images):
                pending.append((index, pool.submit(read, image)))
                if len(pending) > READERS + batch_size:
                    first, future = pending.popleft()
                    yield first, future.result()
            for index, future in pending:
                yield index, future.result()

    @torch.inference_mode()
    def _detect(self, group: list[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor, Detections]]:
        images = [image for _, image in group]
        if self.device.type == "cuda":  # from pinned memory a copy does not make the host wait
            images = [image.pin_memory() for image in images]
        results = self.model.detect(*self.model.prepare([image.to(self.device, non_blocking=True) for image in images]))
        counts = [len(r["scores"]) for r in results]
        keys = ("boxes", "scores", "labels")
        columns = (torch.cat([r[key] for r in results]).cpu().split(counts) for key in keys)
        for (index, image), boxes, scores, labels in zip(group, *columns):
            kept = scores > self.score_threshold
            found = boxes[kept].float(), scores[kept].float(), labels[kept]
            yield index, image, Detections(*found, self.class_names, self.category_ids)
