"""Images in, objects out: reading, batching by shape, precision, names."""

import copy
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrcnn.data.images import ImageError, as_image
from fastrcnn.inference.captured import Captured, pack, unpack
from fastrcnn.inference.detections import Detections
from fastrcnn.inference.features import find_with_features
from fastrcnn.layers import fold_batch_norm, prepare_convolutions
from fastrcnn.models.base_detector import BaseDetector, unwrapped
from fastrcnn.models.faster_rcnn import FasterRCNN
from fastrcnn.models.padded import Padded
from fastrcnn.models.rpn import RPN
from fastrcnn.ops.conv_plan import load_plan, plan_beside
from fastrcnn.weights.load import coco_address, infer_model, load_weights
from fastrcnn.weights.named import named_model
from fastrcnn.weights.start import is_config
from fastrcnn.zoo.mmdet_config import from_mmdet_config
from fastrcnn.zoo.recipes import NAMES, RPNS

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
READERS = 2  # threads that decode ahead of the model
Source = str | os.PathLike[str]
State = Mapping[str, Any]
Answer = tuple[int, Tensor | None, Detections | Exception]
WAITING = 4  # full batches' worth of images that wait for others of their shape


def _coco_names() -> tuple[list[str], list[str]]:
    """COCO's names by id 1..90 (torchvision's labels, with "N/A" gaps) and the 80 in use (MMDetection's,
    Detectron2's)."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    by_id = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:]
    return by_id, [name for name in by_id if name != "N/A"]


def _names_and_ids(model: Any) -> tuple[list[str], list[int]]:
    """Class names and COCO category ids by label: the checkpoint's own names, COCO's by their number, or numbers."""
    by_id, in_use = _coco_names()
    names = model.class_names
    if names is None:
        names = {90: by_id, 80: in_use, 91: ["N/A", *by_id]}.get(model.num_classes)
        names = names or (["object"] if isinstance(model, RPN) else [f"class {i}" for i in range(model.num_classes)])
    if model.category_ids is not None:
        return list(names), list(model.category_ids)
    if list(names) == in_use:
        return list(names), [by_id.index(name) + 1 for name in in_use]
    if list(names) == ["N/A", *by_id]:  # torchvision's RetinaNet, which counts from an unused 0
        return list(names), list(range(len(names)))
    return list(names), list(range(1, len(names) + 1))


def as_device(device: str | torch.device) -> torch.device:
    """The device that a name stands for; "auto" is CUDA where there is one. Raises ValueError where there is none of
    it."""
    if isinstance(device, str) and device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {device!r}") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {found} was asked for, but torch sees no CUDA device")
    try:
        usable = found.type != "meta" and torch.empty(1, device=found) is not None
        why = ""
    except Exception as error:  # each backend has its own way to say that it is not there
        usable, why = False, " (" + (str(error).splitlines() or [type(error).__name__])[0] + ")"
    if not usable:
        raise ValueError(f"device: {found} was asked for, but torch cannot use it here{why}")
    return found


def _test_cfg(
    cfg: dict[str, Any], score_thr: float, max_per_img: int | None, iou_threshold: float | None
) -> dict[str, Any]:
    """A head's test_cfg with a caller's numbers; an RPN's has no score_thr. Raises ValueError naming the argument."""
    if max_per_img is not None and (not isinstance(max_per_img, int) or max_per_img < 1):
        raise ValueError(f"max_per_img: expected a whole number above 0, got {max_per_img!r}")
    if iou_threshold is not None and not (isinstance(iou_threshold, int | float) and 0 <= iou_threshold <= 1):
        raise ValueError(f"iou_threshold: expected a number in [0, 1], got {iou_threshold!r}")
    cfg = {**cfg, **({"score_thr": score_thr} if "score_thr" in cfg else {})}
    cfg |= {} if max_per_img is None else {"max_per_img": max_per_img}
    return cfg if iou_threshold is None else cfg | {"nms": {**cfg["nms"], "iou_threshold": iou_threshold}}


class _Picture(NamedTuple):
    index: int  # type: ignore[assignment]  # a tuple has a method of this name, which nobody asks
    name: str  # for messages
    image: Any  # uint8 [C, H, W], or the Exception why it cannot be read


def _read(index: int, source: Any, channels: int) -> _Picture:
    name = os.fsdecode(source) if isinstance(source, str | os.PathLike) else f"images[{index}]"
    try:
        return _Picture(index, name, as_image(source, name, channels))
    except Exception as error:  # whatever is wrong with one image, the others are looked at
        return _Picture(index, name, error)


def _failure(error: Exception, picture: _Picture) -> Exception:
    """What torch says in one line that names the picture; an error that a caller may look for keeps its kind."""
    height, width = picture.image.shape[1:]
    kept = (MemoryError, FloatingPointError, torch.OutOfMemoryError)
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    said = f"{picture.name}: no detection in {width} x {height} pixels ({reason})"
    failure = type(error)(said) if type(error) in kept else ImageError(said)
    failure.__cause__ = error  # it need not be the picture's fault
    return failure


class Detector:
    """Finds objects: `Detector("r50_fpn", weights="coco")("street.jpg")[0].boxes`.

    model_or_name: a FasterRCNN, RetinaNet or RPN (copied, not changed; also as torch.compile or DataParallel wraps it), a
    name from `fastrcnn models`, with weights a config file of MMDetection's, or a checkpoint (file, address or state dict)
    from which the model is inferred. weights: a checkpoint of MMDetection, torchvision or Detectron2, "coco" for published
    ones, or None. device: "auto", "cpu", "cuda", "cuda:1"...
    precision: "fp32", "bf16", "fp16"; "auto" is fp32 on a CPU, so that a checkpoint
    gives its old numbers, and bf16 on CUDA. On a CPU bf16 pays with AMX; without AVX-512 it is computed in fp32 and
    rounded, and gains nothing. Objects below score_threshold are left out. compile: the whole way from pixels to
    detections goes through torch.compile, once for each batch size, which takes minutes for a large network.
    features: of a Faster R-CNN, Detections have class_scores and features, of the proposal that each object was made from.
    max_per_img, iou_threshold (of NMS), min_size and max_size (pixels of the short side, and of the long side at most, that
    pictures are resized to): the model's own where they are None, as are class_names, by label.

    On CUDA the way from bytes to detections is one CUDA graph a shape (`captured`). A shape's first call measures which
    convolutions are the fastest, on a CPU Winograd's or oneDNN's of the 3x3 in fp32 (with compile always Winograd's;
    what `fastrcnn export` writes has neither). `fastrcnn.ops.conv_plan.save_plan` keeps that; a plan that lies beside the
    weights, under their name and `.plan.json`, is loaded with them.
    """

    def __init__(
        self,
        model_or_name: nn.Module | Source | State,
        weights: Source | State | None = None,
        device: str | torch.device = "auto",
        precision: str = "auto",
        score_threshold: float = 0.05,
        compile: bool = False,
        features: bool = False,
        max_per_img: int | None = None,
        iou_threshold: float | None = None,
        min_size: int | None = None,
        max_size: int | None = None,
        class_names: Sequence[str] | None = None,
    ):
        if not isinstance(score_threshold, int | float) or not 0.0 <= score_threshold <= 1.0:
            raise ValueError(f"score_threshold: expected a number in [0, 1], got {score_threshold!r}")
        self.device = as_device(device)
        if precision == "auto":
            precision = "bf16" if self.device.type == "cuda" else "fp32"
        if precision == "fp8":
            raise ValueError("precision: fp8 needs a convolution kernel that this version does not have; use bf16")
        if precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of auto, {', '.join(PRECISIONS)}, got {precision!r}")
        self.precision = precision
        for source in (model_or_name, weights):
            if isinstance(source, str | os.PathLike) and plan_beside(source).is_file():
                load_plan(plan_beside(source))
        model = self._model(model_or_name, weights).eval()
        model.data_preprocessor.resize_to(min_size, max_size)
        if class_names is not None:
            model.name_classes(class_names)
        model.requires_grad_(False)
        if features and (compile or not isinstance(model, FasterRCNN)):
            raise ValueError("features: expected a Faster R-CNN without compile, " + ("got compile" if compile else
                             f"got a {type(model).__name__}, which has no second stage"))  # fmt: skip
        self.score_threshold, self.features = score_threshold, features
        for name in ("roi_head", "bbox_head", "rpn_head"):  # of two stages, of one, of an RPN alone
            if hasattr(model, name):
                head = getattr(model, name)
                head.test_cfg = _test_cfg(head.test_cfg, score_threshold, max_per_img, iou_threshold)
                self.iou_threshold = head.test_cfg["nms"].get("iou_threshold", 0.5)
                break
        self.class_names, self.category_ids = _names_and_ids(model)
        # Batch norms are folded in float32, before the weights are rounded.
        folded = fold_batch_norm(model.float()).to(self.device, PRECISIONS[precision])
        self.model: Any = prepare_convolutions(folded)
        self._program = torch.compile(self._found, fullgraph=True) if compile else self._found
        self._captured = Captured(self._packed)

    def _found(self, images: Sequence[Tensor]) -> tuple[Padded, Tensor]:
        """Images [3, H, W] uint8 on the detector's device -> what is found there."""
        found: tuple[Padded, Tensor] = self.model.find(*self.model.prepare(images))
        return found

    def _packed(self, images: Tensor) -> Tensor:
        """The same for a batch [B, 3, H, W], in one tensor: what is captured."""
        return pack(*self._program(images.unbind(0)))

    @staticmethod
    def _model(model_or_name: Any, weights: Any) -> Any:
        model = unwrapped(model_or_name)
        if isinstance(model, BaseDetector):
            if weights is not None:
                raise ValueError("weights: expected None beside a model; load them with fastrcnn.load_weights first")
            return copy.deepcopy(model)
        if isinstance(model_or_name, Mapping) and weights is None:
            return infer_model(model_or_name)
        if not isinstance(model_or_name, str | os.PathLike):
            expected = "a FasterRCNN, RetinaNet or RPN of fastrcnn, a model's name, or a checkpoint"
            kind, hint = type(model_or_name), ""
            if isinstance(model_or_name, nn.Module):
                hint = f" of {kind.__module__}: if it is torchvision's or another peer's, hand over its state_dict()"
            raise TypeError(f"model_or_name: expected {expected}, got a {kind.__name__}{hint}")
        if not isinstance(weights, str | os.PathLike | Mapping | None):
            raise TypeError(f"weights: expected a path, an address or a state dict, got {type(weights).__name__}")
        if isinstance(weights, os.PathLike):
            weights = os.fsdecode(weights)
        name = str(model_or_name)
        if weights is not None and is_config(name):
            return load_weights(from_mmdet_config(name), weights)
        if name not in (*NAMES, *RPNS):
            if weights is not None:
                raise ValueError(f"model_or_name: unknown model {name!r}, expected one of {', '.join((*NAMES, *RPNS))}")
            return infer_model(name)
        if weights is None:
            return named_model(name)
        return infer_model(coco_address(name) if weights == "coco" else weights, name)

    def __call__(self, images: Any, batch_size: int | None = None) -> list[Detections]:
        """Objects of each image, in order. images: one or a list of paths, addresses, PIL images, arrays [H, W, 3] and
        tensors [3, H, W], both with the colours in the order red, green, blue (turn cv2's arrays: `array[..., ::-1]`);
        uint8, or floats in 0..1. PIL images are turned as their EXIF orientation says, as files are; an alpha channel
        is dropped. A model of other channels than three takes them as `fastrcnn.data.as_image` reads them.

        Raises ImageError for an image that cannot be read, before any is looked at, and for one that the model fails on,
        with what it said as the cause; `stream` goes on instead.
        """
        single = not isinstance(images, Iterable) or isinstance(images, str | bytes) or hasattr(images, "shape")
        read, sources = [], [images] if single else list(images)
        for index, image in enumerate(sources):
            read.append(_read(index, image, self.channels))
            if isinstance(read[-1].image, Exception):
                raise read[-1].image
        results: list[Any] = [None] * len(read)
        for index, _, found in self._detect_all(read, self._batch_size(batch_size)):
            if isinstance(found, Exception):
                raise found
            found.source = sources[index]
            results[index] = found
        return results

    def stream(self, images: Iterable[Any], batch_size: int | None = None) -> Iterator[Answer]:
        """(index, image uint8 [3, H, W], Detections), or (index, None, the error) for an image that cannot be read or
        looked at, as they are done: images of one shape wait for each other until there are `batch_size` (default 8 on
        CUDA, 1 on a CPU, where a batch gains nothing), or too many wait. Reading runs ahead in threads.
        """
        size = self._batch_size(batch_size)
        return self._detect_all(self._read_ahead(images, size), size)

    def _batch_size(self, batch_size: int | None) -> int:
        if batch_size is None:
            return 8 if self.device.type == "cuda" else 1
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: expected a whole number above 0, got {batch_size!r}")
        return batch_size

    @property
    def channels(self) -> int:
        """Of the images that the model takes; 3 are RGB."""
        return int(self.model.data_preprocessor.in_channels)

    def _read_ahead(self, images: Iterable[Any], batch_size: int) -> Iterator[_Picture]:
        pending: deque[Future[_Picture]] = deque()
        pool = ThreadPoolExecutor(READERS)
        try:
            for index, image in enumerate(images):
                pending.append(pool.submit(_read, index, image, self.channels))
                if len(pending) > READERS + batch_size:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _detect_all(self, pictures: Iterable[_Picture], batch_size: int) -> Iterator[Answer]:
        ahead = 1 if self.device.type == "cuda" else 0  # batches that are begun before one is waited for
        begun: deque[Any] = deque()
        for group in self._groups(pictures, batch_size):
            if isinstance(group, tuple):
                yield group
                continue
            begun.append((group, self._try(self._start, [picture.image for picture in group])))
            while len(begun) > ahead:
                yield from self._answers(*begun.popleft())
        while begun:
            yield from self._answers(*begun.popleft())

    @staticmethod
    def _groups(pictures: Iterable[_Picture], batch_size: int) -> Iterator[list[_Picture] | Answer]:
        """Pictures of one shape and dtype, and the answers of those that cannot be read."""
        waiting: dict[tuple[Any, ...], list[_Picture]] = {}
        for picture in pictures:
            if isinstance(picture.image, Exception):
                yield picture.index, None, picture.image
                continue
            kind = *picture.image.shape, picture.image.dtype
            group = waiting.setdefault(kind, [])
            group.append(picture)
            if len(group) == batch_size:
                yield waiting.pop(kind)
            elif sum(map(len, waiting.values())) > WAITING * batch_size:
                yield waiting.pop(next(iter(waiting)))
        yield from waiting.values()

    @staticmethod
    def _try(function: Callable[..., Any], *arguments: Any) -> Any:
        """What it gives, or its error."""
        try:
            return function(*arguments)
        except (RuntimeError, ValueError, MemoryError, FloatingPointError) as error:
            return error

    def _answers(self, group: list[_Picture], begun: Any) -> Iterator[Answer]:
        """Those of a group; one by one where it fails together, so that each picture answers for itself."""
        results = begun if isinstance(begun, Exception) else self._try(begun)
        if not isinstance(results, Exception):
            yield from ((picture.index, picture.image, found) for picture, found in zip(group, results))
        elif len(group) == 1:
            yield group[0].index, None, _failure(results, group[0])
        else:
            for picture in group:
                yield from self._answers([picture], self._try(self._start, [picture.image]))

    @torch.inference_mode()
    def _start(self, images: list[Tensor]) -> Callable[[], list[Detections]]:
        """Begins with images of one shape: on CUDA the host goes on, and the next batch is read and copied meanwhile."""
        if self.features:
            batch, frame = self.model.prepare([image.to(self.device) for image in images])
            found, lost, *more = find_with_features(self.model, batch, frame)
            return lambda: self._results(Padded(*(t.cpu() for t in found)), lost.cpu(), *more)
        if self.device.type != "cuda":
            found, lost = self._program([image.to(self.device) for image in images])
            return lambda: self._results(Padded(*(t.cpu() for t in found)), lost.cpu())
        with torch.cuda.device(self.device):
            answer = self._captured.start(images)
        return lambda: self._results(*unpack(answer()))

    def _results(self, found: Padded, lost: Tensor, *more: list[Tensor]) -> list[Detections]:
        rows = found.lists(lost)
        return [self._above_threshold(**row, more=[part[i] for part in more]) for i, row in enumerate(rows)]

    def _above_threshold(self, boxes: Tensor, labels: Tensor, scores: Tensor, more: list[Tensor]) -> Detections:
        kept = scores > self.score_threshold
        boxes, scores = boxes[kept].float(), scores[kept].float()
        if not bool(boxes.isfinite().all() and scores.isfinite().all()):
            raise FloatingPointError(f"the model gives boxes that are no numbers, in {self.precision}")
        extra = [part.cpu()[kept] for part in more]
        return Detections(boxes, scores, labels[kept], self.class_names, self.category_ids, *extra)
