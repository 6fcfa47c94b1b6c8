"""What one of several processes does in tests/test_distributed.py: `python data_parallel.py FOLDER`, under torchrun's
environment. How many there are: FASTRCNN_TEST_PROCESSES, or two."""

import csv
import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from training_stubs import tiny

from fastrcnn.data import open_dataset
from fastrcnn.layers.sync_batch_norm import SyncBatchNorm2d
from fastrcnn.training import Recipe, distributed, get_recipe, loop, train

WORLD = int(os.environ.get("FASTRCNN_TEST_PROCESSES", "2"))
BATCH, PICTURES = 2 * WORLD, 4 * WORLD - 1  # of all processes together; the last batch is smaller by one
# The box head's norms train, too, which is where a process may have no RoI.
HEAD = dict(roi_head=dict(bbox_head=dict(type="Shared4Conv1FCBBoxHead", norm_cfg=dict(type="BN"))))
RECIPE = dataclasses.replace(
    get_recipe(optimizer="SGD", weight_decay=1e-4), sync_bn=True, warmup=0, colour_jitter=None, clip_norm=1.0
)


def launch(script: str, folder: Path) -> None:
    """Runs a script beside this one in WORLD processes, as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = dict(WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TORCHELASTIC_RUN_ID="test",
                    OMP_NUM_THREADS="1")  # fmt: skip
    command = [sys.executable, str(Path(__file__).with_name(script)), str(folder)]
    started = [subprocess.Popen(command, env={**os.environ, **torchrun, "RANK": str(r), "LOCAL_RANK": str(r)},
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
               for r in range(WORLD)]  # fmt: skip
    try:
        said = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:  # of processes that wait for each other none would end
            process.kill()
    assert [process.returncode for process in started] == [0] * WORLD, "\n".join(said)


def run(folder: Path, out: Path, batch_size: int, recipe: Recipe = RECIPE, dtype=torch.float64, **options) -> None:
    """Trains on PICTURES, one of which has no object; in float64, in which a hundred RoIs do not change places over the
    last bit."""
    data = open_dataset(folder / "all.json")
    options = dict(val=data, epochs=2, lr=0.05) | options
    model = tiny(**HEAD).to(dtype)
    model = train(model, data, recipe, out, batch_size=batch_size, log=lambda line: None, **options)
    torch.save(model.state_dict(), out / f"weights_{distributed_rank()}.pt")


def log_of(out: Path) -> list[dict]:
    """The losses of each step, and the norm of its gradients."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: row[k] for k in row if "loss" in k or k == "grad_norm"} for row in rows]


def same_training(alone: Path, together: Path) -> int:
    """Asserts that several processes did what one did on the joined batch. Returns how many steps that were."""
    logs = log_of(alone), log_of(together)
    assert len(logs[0]) == len(logs[1]) > 0
    for one, two in zip(*logs):
        assert len(one) == 6 and two == pytest.approx(one, rel=1e-7)
    tables = [list(csv.DictReader((out / "results.csv").open())) for out in (alone, together)]
    assert float(tables[0][-1]["val_loss"]) == pytest.approx(float(tables[1][-1]["val_loss"]), rel=1e-6)
    files = alone / "weights_0.pt", together / "weights_0.pt", together / f"weights_{WORLD - 1}.pt"
    weights = [torch.load(file) for file in files]
    for key, value in weights[0].items():
        if value.is_floating_point():
            torch.testing.assert_close(weights[1][key], value, rtol=1e-6, atol=1e-8, msg=key)
            assert torch.equal(weights[1][key], weights[2][key]), key
    return len(logs[0])


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
        loop.LOOK, loop.report = 1, lambda *a: None
        # A state is due when the first process says so, whatever the clocks of the others say.
        run(folder, folder / "parallel", BATCH // world, save_every=rank * 1e9)


if __name__ == "__main__":
    main()
