"""training/distributed.py: two processes on gloo (or FASTRCNN_TEST_PROCESSES) do what one does on the joined batch."""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data_parallel import BATCH, PICTURES, WORLD, run
from torch import nn
from training_stubs import cells

from fastrcnn.layers.sync_batch_norm import SyncBatchNorm2d
from fastrcnn.models.sampling import sample_batch, seeded


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What WORLD processes left: weights, logs, and the results of norms."""
    folder = tmp_path_factory.mktemp("parallel")
    cells(folder, PICTURES)
    (folder / "parallel").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = dict(WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TORCHELASTIC_RUN_ID="test",
                    OMP_NUM_THREADS="1")  # fmt: skip
    command = [sys.executable, str(Path(__file__).with_name("data_parallel.py")), str(folder)]
    started = [subprocess.Popen(command, env={**os.environ, **torchrun, "RANK": str(r), "LOCAL_RANK": str(r)},
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
               for r in range(WORLD)]  # fmt: skip
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * WORLD, "\n".join(said)
    return folder


def test_processes_train_as_one_on_the_joined_batch(folder):
    run(folder, folder / "alone", BATCH)
    logs = [[json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
            for name in ("alone", "parallel")]  # fmt: skip
    assert len(logs[0]) == len(logs[1]) == 4
    for one, two in zip(*logs):
        names = [k for k in one if "loss" in k or k == "grad_norm"]
        assert len(names) == 6
        assert [two[k] for k in names] == pytest.approx([one[k] for k in names], rel=1e-7)
    tables = [list(csv.DictReader((folder / name / "results.csv").open())) for name in ("alone", "parallel")]
    assert float(tables[0][1]["val_loss"]) == pytest.approx(float(tables[1][1]["val_loss"]), rel=1e-6)
    names = "alone/weights_0.pt", "parallel/weights_0.pt", f"parallel/weights_{WORLD - 1}.pt"
    weights = [torch.load(folder / name) for name in names]
    for key, alone in weights[0].items():
        if alone.is_floating_point():
            torch.testing.assert_close(weights[1][key], alone, rtol=1e-6, atol=1e-8, msg=key)
            assert torch.equal(weights[1][key], weights[2][key]), key


@pytest.mark.parametrize("case", ["even", "one_sided"])
def test_a_norm_over_processes_is_that_of_the_joined_batch(folder, case):
    parts = [torch.load(folder / f"norms_{r}.pt") for r in range(WORLD)]
    norm = nn.BatchNorm2d(2)
    nn.init.constant_(norm.weight, 1.5)
    x = parts[0]["rows"].clone().requires_grad_()
    out = norm(x)
    sizes = [len(part[case]["out"]) for part in parts]
    assert sum(sizes) == 5 and max(sizes) - min(sizes) == (1 if case == "even" else 5)
    weights = [torch.arange(n * 18.0).view(n, 2, 3, 3) for n in sizes]
    (out * torch.cat(weights)).sum().backward()
    for name, expected in dict(out=out.detach(), x=x.grad).items():
        found = torch.cat([part[case][name] for part in parts])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    expected = dict(weight=norm.weight.grad, bias=norm.bias.grad, mean=norm.running_mean, var=norm.running_var)
    for part in parts:
        for name, value in expected.items():
            torch.testing.assert_close(part[case][name], value, rtol=1e-4, atol=1e-4)


def test_a_norm_that_nobody_has_values_for_stays(folder):
    for rank in range(WORLD):
        found = torch.load(folder / f"norms_{rank}.pt")["nobody"]
        assert found["mean"].tolist() == [0, 0] and found["var"].tolist() == [1, 1]
        assert all(v.isfinite().all() for v in found.values())


def test_alone_it_is_a_batch_norm():
    ours, theirs = SyncBatchNorm2d(3), nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 6) * 2 + 100
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_an_images_draw_is_its_own():
    """Whatever else is in the batch, and however many objects are padded in front."""
    proposals = torch.full((3, 40), -1)
    proposals[:, ::3] = 0
    rows = [torch.cat([torch.full((3, front), -2), proposals], 1) for front in (2, 5)]
    with seeded([11, 12, 13]):
        together = sample_batch(rows[0], 10, 0.3, front=2)[0] - 2
    for i, seed in enumerate([11, 12, 13]):
        with seeded([seed]):
            assert torch.equal(sample_batch(rows[1][i : i + 1], 10, 0.3, front=5)[0][0] - 5, together[i])
    assert not torch.equal(together[0], together[1])
    with seeded([1]), pytest.raises(ValueError, match="seeds: expected one for each of the 3 images, got 1"):
        sample_batch(proposals, 10, 0.3)
