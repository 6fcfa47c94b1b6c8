"""training/distributed.py: two processes on gloo (or FASTRCNN_TEST_PROCESSES) do what one does on the joined batch."""

import pytest
import torch
from data_parallel import BATCH, PICTURES, WORLD, launch, run, same_training
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
    launch("data_parallel.py", folder)
    return folder


def test_processes_train_as_one_on_the_joined_batch(folder):
    run(folder, folder / "alone", BATCH)
    assert same_training(folder / "alone", folder / "parallel") == 4


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
