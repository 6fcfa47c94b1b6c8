"""What one of several processes does in tests/test_distributed.py: `python data_parallel.py FOLDER`, under torchrun's
environment. How many there are: FASTRCNN_TEST_PROCESSES, or two."""

import dataclasses
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from training_stubs import tiny

from fastrcnn.data import open_dataset
from fastrcnn.layers.sync_batch_norm import SyncBatchNorm2d
from fastrcnn.training import distributed, get_recipe, train

WORLD = int(os.environ.get("FASTRCNN_TEST_PROCESSES", "2"))
BATCH, PICTURES = 2 * WORLD, 4 * WORLD - 1  # of all processes together; the last batch is smaller by one
# The box head's norms train, too, which is where a process may have no RoI.
HEAD = dict(roi_head=dict(bbox_head=dict(type="Shared4Conv1FCBBoxHead", norm_cfg=dict(type="BN"))))
RECIPE = dataclasses.replace(get_recipe(), sync_bn=True, warmup=0, photometric=False, clip_norm=1.0)


def run(folder: Path, out: Path, batch_size: int) -> None:
    """Trains on PICTURES, one of which has no object; in float64, in which a hundred RoIs do not change places over the
    last bit."""
    data = open_dataset(folder / "all.json")
    model = train(
        tiny(**HEAD).double(),
        data,
        RECIPE,
        out,
        val=data,
        epochs=2,
        batch_size=batch_size,
        lr=0.05,
        log=lambda line: None,
    )
    torch.save(model.state_dict(), out / f"weights_{distributed_rank()}.pt")


def distributed_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def norm_results(rows: list[torch.Tensor], rank: int) -> dict:
    """Output, gradients and statistics of a norm of which this process has rows[rank]."""
    norm = SyncBatchNorm2d(2)
    nn.init.constant_(norm.weight, 1.5)
    x = rows[rank].clone().requires_grad_()
    out = norm(x)
    (out * torch.arange(out.numel()).view_as(out)).sum().backward()
    # As DistributedDataParallel would, but for the sum.
    for p in norm.parameters():
        dist.all_reduce(p.grad)
    return dict(out=out.detach(), x=x.grad, weight=norm.weight.grad, bias=norm.bias.grad, mean=norm.running_mean,
                var=norm.running_var)  # fmt: skip


def main() -> None:
    folder = Path(sys.argv[1])
    with distributed.process_group(torch.device("cpu")) as (rank, world):
        g = torch.Generator().manual_seed(0)
        some, none = torch.randn(5, 2, 3, 3, generator=g) * 3 + 7, torch.zeros(0, 2, 3, 3)
        found = dict(even=norm_results(some.tensor_split(world), rank),
                     one_sided=norm_results([some] + [none] * (world - 1), rank),
                     nobody=norm_results([none] * world, rank))  # fmt: skip
        torch.save(dict(rows=some, **found), folder / f"norms_{rank}.pt")
        run(folder, folder / "parallel", BATCH // world)


if __name__ == "__main__":
    main()
