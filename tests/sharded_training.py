"""What one of several processes does in tests/test_sharding.py: `python sharded_training.py FOLDER`, under torchrun's
environment."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from data_parallel import BATCH, RECIPE, WORLD, run
from torch.distributed.tensor import DTensor
from training_stubs import tiny

from fastrcnn.training import distributed, loop
from fastrcnn.training.schedule import build_optimizer
from fastrcnn.training.state import Losses, State

SHARED = dataclasses.replace(RECIPE, shard=True)
# Whatever else a recipe may say of gradients: waited for, none for a stem and a stage, computed twice. No average, so that
# what is kept is the model itself.
OTHER = dataclasses.replace(RECIPE, optimizer="AdamW", accumulate=2, frozen_stages=1, with_cp=True, ema=None)
OTHER_LR = 1e-3


def resumed(folder: Path, name: str, recipe, rank: int, **options) -> None:
    """The run `name` once more, from its state after the first epoch on."""
    again = folder / f"{name}_again"
    if rank == 0:
        (again / "states").mkdir(parents=True)
        shutil.copy(min((folder / name / "states").iterdir()), again / "states")
        for file in ("log.jsonl", "results.csv", "best.safetensors"):
            shutil.copy(folder / name / file, again)
    dist.barrier()
    run(folder, again, BATCH // WORLD, recipe, resume=True, **options)


def elements(tensors) -> int:
    """Of this process."""
    return sum((x.to_local() if isinstance(x, DTensor) else x).numel() for x in tensors)


def counted(folder: Path, rank: int) -> None:
    """How many elements of parameters, gradients, optimizer and average this process has after each step, and in all."""
    update, rows = State.update, []

    def counting(self, *args):
        parameters = list(self.model.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = update(self, *args)
        states = [
            v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor) and v.dim()
        ]
        kinds = dict(parameters=parameters, gradients=gradients, states=states, average=list(self.mean.parameters()))
        rows.append({k: dict(own=elements(v), all=sum(x.numel() for x in v)) for k, v in kinds.items()})
        return norm

    State.update = counting
    try:
        run(folder, folder / "sharded", BATCH // WORLD, SHARED, keep=9, save_every=rank * 1e9)
    finally:
        State.update = update
    (folder / f"elements_{rank}.json").write_text(json.dumps(rows))


def overflown(rank: int) -> dict:
    """What becomes of a step of fp16 where one element of one process's shards is not finite."""
    model, recipe = tiny(), dataclasses.replace(SHARED, precision="fp16", ema=None)
    distributed.parallel(Losses(model), WORLD, shard=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    state = State(model, None, build_optimizer(model, recipe, 0.1), scaler, sharded=True)
    same = []
    for broken in (False, True):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        scaler.scale(torch.zeros(1))
        if broken and rank == WORLD - 1:
            next(p.grad.to_local() for p in model.parameters() if p.to_local().numel())[0] = torch.inf
        before = [p.to_local().clone() for p in model.parameters()]
        state.update(recipe, 0.1)
        same.append(all(torch.equal(a, p.to_local()) for a, p in zip(before, model.parameters())))
    return dict(same=same, scale=scaler.get_scale())


def main() -> None:
    folder = Path(sys.argv[1])
    loop.report = lambda *a: None
    with distributed.process_group(torch.device("cpu")) as (rank, world):
        counted(folder, rank)
        resumed(folder, "sharded", SHARED, rank)
        other = dataclasses.replace(OTHER, shard=True)
        run(folder, folder / "other", BATCH // world, other, lr=OTHER_LR, keep=9)
        resumed(folder, "other", other, rank, lr=OTHER_LR)
        for name, recipe in dict(half_whole=RECIPE, half_sharded=SHARED).items():
            recipe = dataclasses.replace(recipe, precision="bf16")
            run(folder, folder / name, BATCH // world, recipe, torch.float32, epochs=1)
        (folder / f"overflown_{rank}.json").write_text(json.dumps(overflown(rank)))


if __name__ == "__main__":
    main()
