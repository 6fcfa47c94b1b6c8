"""Data parallel training under torchrun, on NCCL or gloo: a process has its share of every batch, and losses are divided by
the counts of all processes (`models.losses.avg_factor`), so that the step is that of one process on the joined batch."""

import datetime
import functools
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastrcnn.training.sharding import sharded

PATIENCE = datetime.timedelta(hours=2)  # others wait while the first process evaluates


def own_device(device: torch.device) -> torch.device:
    """Under torchrun, of several CUDA devices the one of this process."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def is_first() -> bool:
    """Whether this is torchrun's first process, or no process of torchrun's: the one that speaks and writes."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """How many torchrun started; 1 where it is not at work."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


@contextmanager
def process_group(device: torch.device) -> Iterator[tuple[int, int]]:
    """(rank, number of processes): of torchrun's processes, or of a group that is there already; else (0, 1)."""
    started = "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized()
    if started:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    finally:
        if started:
            host_group.cache_clear()
            dist.destroy_process_group()


def check_shards(shard: bool, world: int) -> None:
    """Raises ValueError where there is nobody to share a model with."""
    if shard and world == 1:
        raise ValueError("shard: parameters are shared by the processes of torchrun, and this one is alone: "
                         "torchrun --nproc-per-node N -m fastrcnn.cli train ... --shard")  # fmt: skip


def parallel(losses: nn.Module, world: int, shard: bool = False) -> nn.Module:
    """`losses` whose gradients, after backward, are the mean of all processes'; shard: see `sharding.sharded`."""
    if shard:
        return sharded(losses, world)
    if world == 1 or not any(p.requires_grad for p in losses.parameters()):
        return losses
    # Weights of 1 x 1 are channels-last and not at once; which is no matter.
    warnings.filterwarnings("ignore", message="Grad strides do not match")
    return DistributedDataParallel(losses, gradient_as_bucket_view=True)


def mean_of_all(x: Tensor, world: int) -> Tensor:
    if world > 1:
        dist.all_reduce(x)
    return x / world


def largest(sizes: Sequence[tuple[int, int]], world: int) -> tuple[int, int]:
    """The largest height and width of all processes' pictures: padded alike, they are one batch."""
    most = [max(sides) for sides in zip(*sizes)]
    if world > 1:
        shared = torch.tensor(most)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=host_group())
        most = shared.tolist()
    height, width = most
    return height, width


@functools.cache
def host_group() -> dist.ProcessGroup | None:
    """What processes say to each other about numbers on the host, for which no device is waited."""
    return dist.new_group(backend="gloo", timeout=PATIENCE) if dist.get_backend() != "gloo" else None


def gathered(value: Any, world: int) -> list[Any]:
    """What every process says, in the order of their ranks."""
    if world == 1:
        return [value]
    found: list[Any] = [None] * world
    dist.all_gather_object(found, value, group=host_group())
    return found


def wait(world: int) -> None:
    if world > 1:
        dist.barrier()
