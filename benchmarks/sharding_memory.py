"""What each of several processes has in memory for a model that trains, whole or in shards (`--shard`):

    torchrun --nproc-per-node 2 benchmarks/sharding_memory.py x101_64x4d_fpn [--shard]

Bytes of parameters, gradients, optimizer states and averaged weights behind one step on one small picture a process, and
the largest resident memory of the process; on the CPU.
"""

import argparse
import resource

import torch

from fastrcnn.models import faster_rcnn
from fastrcnn.training import distributed, get_recipe
from fastrcnn.training.ema import averaged_copy
from fastrcnn.training.schedule import build_optimizer
from fastrcnn.training.state import Losses, State


def size(tensors) -> int:
    own = [x.to_local() if hasattr(x, "to_local") else x for x in tensors]
    return sum(x.numel() * x.element_size() for x in own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--side", type=int, default=128)
    given = parser.parse_args()
    torch.manual_seed(0)
    with distributed.process_group(torch.device("cpu")) as (rank, world):
        model, recipe = faster_rcnn(given.name, 80).train(), get_recipe(optimizer="SGD", shard=given.shard)
        losses = distributed.parallel(Losses(model), world, given.shard)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        state = State(model, averaged_copy(model), build_optimizer(model, recipe, 0.01), scaler, given.shard)
        target = dict(boxes=torch.tensor([[8.0, 8.0, 64.0, 64.0]]), labels=torch.tensor([rank]))
        side = (given.side, given.side)
        found = losses([torch.rand(3, *side)], [target], [side], side)
        sum(found.values()).backward()
        state.update(recipe, 0.01)
        parameters = list(model.parameters())
        parts = dict(
            parameters=size(parameters),
            gradients=size(p.grad for p in parameters if p.grad is not None),
            optimizer=size(v for s in state.optimizer.state.values() for v in s.values() if torch.is_tensor(v)),
            average=size(state.mean.parameters()),
        )
        parts |= dict(together=sum(parts.values()), largest=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        for other, row in enumerate(distributed.gathered(parts, world)):
            if rank == 0:
                print(f"process {other}: " + ", ".join(f"{k} {v / 1e6:.1f} MB" for k, v in row.items()))


if __name__ == "__main__":
    main()
