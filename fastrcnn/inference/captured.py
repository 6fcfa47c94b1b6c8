"""Detection on a CUDA device: one graph a shape, from bytes to detections, and copies that nobody waits for."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastrcnn.models.padded import Padded

MOST_GRAPHS = 8  # each holds the memory of one pass through the network, which they share but for the results


def pack(found: Padded, lost: Tensor) -> Tensor:
    """All that was found in one tensor [B, N + 1, 6] float32, so that it takes one copy: a row a detection, and in the
    last the count and `lost`. Whole numbers up to 2^24 are exact."""
    rows = torch.cat([found.boxes, found.scores[..., None], found.labels[..., None]], 2).float()
    numbers = torch.stack([found.counts, lost.long(), *[torch.zeros_like(found.counts)] * 4], 1)
    return torch.cat([rows, numbers[:, None].float()], 1)


def unpack(packed: Tensor) -> tuple[Padded, Tensor]:
    rows, numbers = packed[:, :-1], packed[:, -1].long()
    return Padded(rows[..., :4], rows[..., 4], rows[..., 5].long(), numbers[:, 0]), numbers[:, 1] > 0


class Graph:
    """`program(images)` as a CUDA graph. What a call gives lies in memory that the next one writes to."""

    def __init__(self, program: Callable[[Tensor], Tensor], images: Tensor, pool):
        self.images, self.graph = images.clone(), torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # cuDNN chooses its kernels, and what is kept on the device is made
                program(self.images)
        torch.cuda.current_stream().wait_stream(side)
        # Other threads read pictures meanwhile.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.answer = program(self.images)

    def __call__(self, images: Tensor) -> Tensor:
        self.images.copy_(images, non_blocking=True)
        self.graph.replay()
        return self.answer


class Captured:
    """Runs `program`: images [B, C, H, W] on the current CUDA device -> a tensor there.

    The second batch of a shape and dtype is captured, and the graph runs all that follow; MOST_GRAPHS are kept, those used
    last.
    Where a program cannot be captured it runs as it is, and a warning says why.
    """

    def __init__(self, program: Callable[[Tensor], Tensor]):
        self.program, self.possible, self.pool, self.copies = program, True, None, None
        self.graphs: OrderedDict[tuple, Graph | None] = OrderedDict()  # None: seen once

    def __call__(self, images: Tensor) -> Tensor:
        kind = *images.shape, images.dtype
        if self.possible and kind in self.graphs:
            self.graphs.move_to_end(kind)
            if self.graphs[kind] is None:
                self.graphs[kind] = self._capture(images)
        elif self.possible:
            self.graphs[kind] = None
            if len(self.graphs) > MOST_GRAPHS:
                self.graphs.popitem(last=False)
        return (self.graphs.get(kind) or self.program)(images)

    def _capture(self, images: Tensor) -> Graph | None:
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            return Graph(self.program, images, self.pool)
        except RuntimeError as error:
            self.possible = False
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            warnings.warn(f"detection runs without CUDA graphs: {reason}", stacklevel=2)
            return None

    def start(self, images: Sequence[Tensor]) -> Callable[[], Tensor]:
        """Begins with images [C, H, W] of one shape and dtype; what is returned waits for the answer and gives it on the
        host. The copy to the device goes on while the batch before it is computed."""
        device, current = torch.device("cuda", torch.cuda.current_device()), torch.cuda.current_stream()
        self.copies = self.copies or torch.cuda.Stream()
        batch = torch.empty((len(images), *images[0].shape), dtype=images[0].dtype, pin_memory=True)
        for row, image in zip(batch, images):
            row.copy_(image)
        with torch.cuda.stream(self.copies):
            staged = batch.to(device, non_blocking=True)
        current.wait_stream(self.copies)
        staged.record_stream(current)
        answer = self(staged)
        result = torch.empty(answer.shape, dtype=answer.dtype, pin_memory=True)
        result.copy_(answer, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def wait() -> Tensor:
            done.synchronize()
            return result

        return wait
