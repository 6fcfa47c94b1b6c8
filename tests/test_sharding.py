"""training/sharding.py: what two processes (or FASTRCNN_TEST_PROCESSES) that share a model do is what one does."""

import json

import pytest
import torch
from data_parallel import BATCH, HEAD, PICTURES, RECIPE, WORLD, launch, log_of, run, same_training
from sharded_training import OTHER, OTHER_LR, SHARED
from training_stubs import cells, tiny
from typer.testing import CliRunner

from fastrcnn.cli import app
from fastrcnn.training import checkpoint, get_recipe, train
from fastrcnn.weights import infer_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the processes of sharded_training.py left."""
    folder = tmp_path_factory.mktemp("sharded")
    cells(folder, PICTURES)
    launch("sharded_training.py", folder)
    return folder


def test_processes_that_share_a_model_train_as_one_on_the_joined_batch(folder):
    run(folder, folder / "alone", BATCH)
    assert same_training(folder / "alone", folder / "sharded") == 4


def test_so_they_do_with_waiting_gradients_frozen_stages_and_no_average(folder):
    run(folder, folder / "other_alone", BATCH, OTHER, lr=OTHER_LR)
    assert same_training(folder / "other_alone", folder / "other") == 2


@pytest.mark.parametrize("name, steps", [("sharded", 4), ("other", 2)])
def test_a_run_goes_on_bit_for_bit(folder, name, steps):
    whole, again = folder / name, folder / f"{name}_again"
    assert len(log_of(again)) == steps and log_of(again) == log_of(whole)
    assert (again / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()
    weights = [torch.load(out / "weights_0.pt") for out in (whole, again)]
    assert all(map(torch.equal, weights[0].values(), weights[1].values()))
    states = [checkpoint.load_state(out, print) for out in (whole, again)]
    assert states[0].keys() == states[1].keys() and states[0]["step"] == steps
    for part in ("model", "optimizer"):
        assert same(states[0][part], states[1][part])


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


def test_what_is_saved_is_whole(folder):
    state, model = checkpoint.load_state(folder / "sharded", print), tiny(**HEAD).double()
    for part in ("model", "mean"):
        assert type(next(iter(state[part].values()))) is torch.Tensor
        model.load_state_dict(state[part])
    shapes = [p.shape for p in model.parameters()]
    momenta = [values["momentum_buffer"].shape for values in state["optimizer"]["state"].values()]
    assert sorted(momenta) == sorted(shapes)
    for name in ("best", "last"):
        found = infer_model(folder / "sharded" / f"{name}.safetensors")
        assert {k: v.shape for k, v in found.state_dict().items()} == {
            k: v.shape for k, v in model.state_dict().items()
        }
    kept = torch.load(folder / "sharded" / "weights_0.pt")
    assert all(torch.equal(v, kept[k].to(v.dtype)) for k, v in found.state_dict().items())


def test_each_process_has_its_own_share_of_everything(folder):
    processes = [json.loads((folder / f"elements_{r}.json").read_text()) for r in range(WORLD)]
    for rows in zip(*processes, strict=True):
        for kind in ("parameters", "gradients", "states", "average"):
            own = [row[kind]["own"] for row in rows]
            assert sum(own) == rows[0][kind]["all"] > 10_000
            assert max(own) < 1.3 * sum(own) / WORLD  # rows of a weight are not divided


def test_half_precision_is_that_of_whole_models(folder):
    for one, two in zip(log_of(folder / "half_whole"), log_of(folder / "half_sharded"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_a_step_of_fp16_is_left_out_by_all_or_none(folder):
    for rank in range(WORLD):
        assert json.loads((folder / f"overflown_{rank}.json").read_text()) == dict(same=[False, True], scale=4.0)


def test_one_process_has_nobody_to_share_with(tmp_path):
    with pytest.raises(ValueError, match=r"shard: .* this one is alone: torchrun --nproc-per-node"):
        train(tiny(), [], SHARED, tmp_path)
    done = CliRunner().invoke(app, ["train", "nowhere", "--out", str(tmp_path / "run"), "--shard"])
    assert done.exit_code == 1 and "torchrun --nproc-per-node" in " ".join(done.output.split())
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_shared_is_refused():
    for change in (dict(channels_last=True), dict(compile=True)):
        with pytest.raises(ValueError, match=r"shard: expected channels_last False .* and compile False"):
            get_recipe(RECIPE, shard=True, **change)
