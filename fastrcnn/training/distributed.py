"""Data parallel training under torchrun, on NCCL or gloo: a process has its share of every batch, and losses are divided by
the counts of all processes (`models.losses.avg_factor`), so that the step is that of one process on the joined batch."""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

PATIENCE = datetime.timedelta(hours=2)  # others wait while the first process evaluates


def own_device(device: torch.device) -> torch.device:
    """Under torchrun, of several CUDA devices the one of this process."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


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
            dist.destroy_process_group()


def parallel(losses: nn.Module, world: int) -> nn.Module:
    """`losses` whose gradients, after backward, are the mean of all processes'."""
    if world == 1 or not any(p.requires_grad for p in losses.parameters()):
        return losses
    return DistributedDataParallel(losses, gradient_as_bucket_view=True)


def mean_of_all(x: Tensor, world: int) -> Tensor:
    if world > 1:
        dist.all_reduce(x)
    return x / world


def gathered(value, world: int) -> list:
    """What every process says, in the order of their ranks."""
    if world == 1:
        return [value]
    found: list = [None] * world
    dist.all_gather_object(found, value)
    return found


def wait(world: int) -> None:
    if world > 1:
        dist.barrier()
