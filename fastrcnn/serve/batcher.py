"""Pictures of many callers onto one Detector: decoded ahead in threads, those that come together in one batch."""

import io
import queue
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread

from torch import Tensor

from fastrcnn.data.decode import TooManyPixelsError, decode, size_of
from fastrcnn.data.images import ImageError
from fastrcnn.inference import Detections, Detector

READERS = 2  # threads that decode ahead of the model


@dataclass
class _Job:
    data: bytes
    answer: Future[Detections]
    image: Tensor | None = None


class Batcher:
    """`submit(bytes of a picture)` gives a Future of its Detections; a thread runs the detector.

    The model takes up to `max_batch` pictures at a time (None: 8 on CUDA, 1 on a CPU, where a batch gains nothing) and
    waits at most `max_wait` seconds for others beside the first. `max_pixels` (height x width) bounds a picture before
    it is decoded. Decoded are at most 2 max_batch + READERS pictures at a time, whatever waits. `on_batch` is told how
    many pictures each step had.

    The Future raises ImageError for bytes that are no picture or that the model fails on, TooManyPixelsError, or what
    the detector raised. One that is cancelled before the model has it is left out.
    """

    def __init__(
        self,
        detector: Detector,
        max_batch: int | None = None,
        max_wait: float = 0.005,
        max_pixels: int = 25_000_000,
        on_batch: Callable[[int], None] = lambda pictures: None,
    ):
        self.detector, self.max_wait, self.max_pixels, self.on_batch = detector, max_wait, max_pixels, on_batch
        self.max_batch = max_batch or (8 if detector.device.type == "cuda" else 1)
        self._waiting: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()  # None: there are no more
        self._decoded: queue.Queue[_Job | None] = queue.Queue(self.max_batch)
        self._readers = [Thread(target=self._read, name=f"fastrcnn-reader-{i}", daemon=True) for i in range(READERS)]
        self._model = Thread(target=self._detect, name="fastrcnn-model", daemon=True)
        for thread in (*self._readers, self._model):
            thread.start()

    def submit(self, data: bytes) -> Future[Detections]:
        """Not after `close`, and from one thread at a time with it."""
        job = _Job(data, Future())
        self._waiting.put(job)
        return job.answer

    def close(self) -> None:
        """Answers all that was submitted, then ends the threads."""
        for _ in self._readers:
            self._waiting.put(None)
        for thread in self._readers:
            thread.join()
        self._decoded.put(None)
        self._model.join()

    def _read(self) -> None:
        while (job := self._waiting.get()) is not None:
            if job.answer.cancelled():
                continue
            try:
                job.image = self._image(job.data)
            except BaseException as error:  # whatever is wrong with one picture, the thread goes on
                if job.answer.set_running_or_notify_cancel():
                    job.answer.set_exception(error)
                continue
            job.data = b""
            self._decoded.put(job)

    def _image(self, data: bytes) -> Tensor:
        try:
            height, width = size_of(io.BytesIO(data))
            if height * width > self.max_pixels:
                raise TooManyPixelsError(f"{width} x {height} pixels are more than {self.max_pixels:,}")
            return decode(data, self.detector.channels)
        except TooManyPixelsError:
            raise
        except (ValueError, TypeError) as error:
            raise ImageError(str(error)) from None

    def _batch(self) -> list[_Job]:
        """The next pictures for the model; none when there are no more."""
        first = self._decoded.get()
        if first is None:
            return []
        batch, until = [first], time.monotonic() + self.max_wait
        while len(batch) < self.max_batch:
            try:
                job = self._decoded.get(timeout=max(until - time.monotonic(), 0))
            except queue.Empty:
                break
            if job is None:  # for the next call
                self._decoded.put(None)
                break
            batch.append(job)
        return batch

    def _detect(self) -> None:
        while batch := self._batch():
            batch = [job for job in batch if job.answer.set_running_or_notify_cancel()]
            if not batch:
                continue
            self.on_batch(len(batch))
            try:
                for index, _, found in self.detector.stream([job.image for job in batch], self.max_batch):
                    if isinstance(found, Exception):
                        batch[index].answer.set_exception(found)
                    else:
                        batch[index].answer.set_result(found)
            except BaseException as error:  # every one is answered, and the thread goes on
                for job in batch:
                    if not job.answer.done():
                        job.answer.set_exception(error)
