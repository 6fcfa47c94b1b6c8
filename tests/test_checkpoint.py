"""training/checkpoint.py: what a run that ends before its time leaves, and how it goes on."""

import dataclasses
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from training_stubs import PLAIN, Scripted, cells, pictures, tiny

from fastrcnn.data import open_dataset
from fastrcnn.training import checkpoint, get_recipe, loop, train
from fastrcnn.training.state import Losses


def quiet(line):
    pass


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_dataset(cells(tmp_path_factory.mktemp("cells")))


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """A look at the losses, and so a state, every other step; no charts."""
    monkeypatch.setattr(loop, "LOOK", 2)
    monkeypatch.setattr(loop, "report", lambda *a: None)


# This sampler draws from torch's own generator, which a state must bring back.
SAMPLER = dict(train_cfg=dict(rcnn=dict(sampler=dict(type="InstanceBalancedPosSampler", num=16, pos_fraction=0.5))))
STEPS = 9  # 3 epochs of 3


def run(data, out=None, resume=False, workers=0, **changes):
    recipe = get_recipe("finetune", epochs=3, batch_size=2, **changes)
    return train(tiny(**SAMPLER), data, recipe, out, resume, seed=3, workers=workers, save_every=0.0, log=quiet)


def rows_of(out):
    keys = ("step", "loss", "lr", "grad_norm")
    return [{k: json.loads(line)[k] for k in keys} for line in (out / "log.jsonl").read_text().splitlines()]


class Killed(BaseException):
    """Nothing of ours catches it: as far as the disk is concerned, kill -9."""


def killed_at(monkeypatch, step: int):
    forward, steps = Losses.forward, []

    def dying(self, *args):
        steps.append(1)
        if len(steps) == step + 1:
            raise Killed
        return forward(self, *args)

    monkeypatch.setattr(Losses, "forward", dying)


@pytest.mark.parametrize("step, optimizer", [(2, "SGD"), (5, "SGD"), (7, "AdamW")])
def test_a_killed_run_goes_on_bit_for_bit(data, tmp_path, monkeypatch, step, optimizer):
    changes = dict(optimizer=optimizer, lr=0.02 if optimizer == "SGD" else 0.001)
    whole = run(data, tmp_path / "whole", **changes)
    with monkeypatch.context() as patch:
        killed_at(patch, step)
        with pytest.raises(Killed):
            run(data, tmp_path / "cut", **changes)
    assert len(rows_of(tmp_path / "cut")) < STEPS
    torch.rand(7), random.random(), np.random.rand()  # another process would not have drawn as much, either
    again = run(data, tmp_path / "cut", resume=True, **changes)
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole") and len(rows_of(tmp_path / "cut")) == STEPS
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert (tmp_path / "cut" / "results.csv").read_bytes() == (tmp_path / "whole" / "results.csv").read_bytes()


def test_a_run_killed_while_it_measures_goes_on_there(data, tmp_path, monkeypatch):
    scores, steps = [], []
    monkeypatch.setattr(loop, "measured", lambda *a: scores.append(1) or (dict(AP=float(len(scores))), None))
    recipe = get_recipe("finetune", steps=2, batch_size=2)  # ends within an epoch

    def begin(resume):
        return train(tiny(), data, recipe, tmp_path, resume, val=data, log=quiet)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "validation_loss", lambda *a: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            begin(False)
    forward = Losses.forward
    monkeypatch.setattr(Losses, "forward", lambda self, *a: steps.append(self.training) or forward(self, *a))
    begin(True)
    assert len(rows_of(tmp_path)) == 2 and len(scores) == 1 and len(steps) == 3  # of the validation loss alone
    assert (tmp_path / "results.csv").read_text().count("\n") == 2


def test_workers_change_nothing(data, tmp_path):
    run(data, tmp_path / "alone")
    run(data, tmp_path / "helped", workers=2)
    assert rows_of(tmp_path / "alone") == rows_of(tmp_path / "helped")


@pytest.mark.parametrize("number, error, step", [
    (signal.SIGTERM, SystemExit, 5), (signal.SIGINT, KeyboardInterrupt, 5),
    (signal.SIGTERM, SystemExit, 6), (signal.SIGTERM, SystemExit, 9),  # the last of an epoch, and of all
])  # fmt: skip
def test_a_signal_saves_before_it_ends_the_run(data, tmp_path, monkeypatch, number, error, step):
    forward, steps, before = Losses.forward, [], signal.getsignal(signal.SIGTERM)

    def interrupted(self, *args):
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), number)
        return forward(self, *args)

    monkeypatch.setattr(Losses, "forward", interrupted)
    with pytest.raises(error) as raised:
        run(data, tmp_path)
    assert error is KeyboardInterrupt or raised.value.code == 128 + number
    assert checkpoint.state_files(tmp_path)[-1].name == f"step_{step:09d}.pt" and len(steps) == step
    assert (tmp_path / "last.safetensors").exists() and signal.getsignal(signal.SIGTERM) is before
    run(data, tmp_path, resume=True)
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(STEPS))


def test_a_signal_waits_for_the_gradients_of_a_step(tmp_path, monkeypatch):
    recipe, whole = dataclasses.replace(PLAIN, accumulate=2, base_batch=2), Scripted()
    train(whole, pictures(5), recipe, log=quiet)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        losses = Scripted.losses

        def interrupted(self, *args):
            if len(self.trace) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return losses(self, *args)

        patch.setattr(Scripted, "losses", interrupted)
        patch.setattr(loop, "save", lambda model, path: path.touch())
        patch.setattr(loop, "described", lambda model: {})
        train(Scripted(), pictures(5), recipe, tmp_path, log=quiet)
    monkeypatch.setattr(loop, "save", lambda model, path: path.touch())
    monkeypatch.setattr(loop, "described", lambda model: {})
    again = Scripted()
    train(again, pictures(5), recipe, tmp_path, resume=True, log=quiet)
    assert again.bias.item() == whole.bias.item() == pytest.approx(-0.25)


def test_a_run_resumes_only_as_it_began(data, tmp_path):
    run(data, tmp_path)
    with pytest.raises(ValueError, match=r"model .*'min_size': 64.*, now .*'min_size': 48"):
        train(tiny(min_size=48), data, get_recipe("finetune", epochs=3, batch_size=2), tmp_path, resume=True, log=quiet)
    with pytest.raises(ValueError, match="holds a run: resume it"):
        run(data, tmp_path)
    with pytest.raises(ValueError, match=r"momentum 0\.9, now 0\.5"):
        run(data, tmp_path, resume=True, momentum=0.5)
    files = {p: p.stat().st_mtime_ns for p in checkpoint.state_files(tmp_path)}
    run(data, tmp_path, resume=True)  # nothing is left to do
    assert files == {p: p.stat().st_mtime_ns for p in checkpoint.state_files(tmp_path)}
    assert len(rows_of(tmp_path)) == STEPS


def test_a_state_older_than_a_number_of_the_recipe_went_by_its_default(data, tmp_path):
    run(data, tmp_path)
    newest = checkpoint.state_files(tmp_path)[-1]
    content = torch.load(newest, weights_only=True)
    del content["identity"]["recipe"]["min_crop_size"], content["identity"]["drop_empty"]
    torch.save(content, newest)
    run(data, tmp_path, resume=True)
    del content["identity"]["recipe"]["colour_jitter"]  # of which finetune has one
    torch.save(content, newest)
    with pytest.raises(ValueError, match=r"colour_jitter None, now 0\.2$"):
        run(data, tmp_path, resume=True)


def test_the_newest_states_stay_and_a_damaged_one_is_passed_over(tmp_path):
    for step in (1, 2, 10):
        checkpoint.save_state(tmp_path, dict(step=step, value=torch.tensor(step)), keep=2)
    assert [p.name for p in checkpoint.state_files(tmp_path)] == ["step_000000002.pt", "step_000000010.pt"]
    assert checkpoint.load_state(tmp_path, quiet)["value"] == 10
    newest, lines = checkpoint.state_files(tmp_path)[-1], []
    newest.write_bytes(newest.read_bytes()[:100])
    assert checkpoint.load_state(tmp_path, lines.append)["value"] == 2
    assert "step_000000010.pt: cannot be read" in lines[0]
    newest.write_bytes(b"")
    assert checkpoint.load_state(tmp_path, quiet)["value"] == 2


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path, order = tmp_path / "a.json", []
    path.write_text("old")

    def half(file):
        file.write(b"ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError):
        checkpoint.write_whole(path, half)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    monkeypatch.setattr(os, "fsync", lambda fd: order.append(path.read_text()))
    checkpoint.write_whole(path, lambda file: file.write(b"new"))
    assert order == ["old", "new"]  # on the disk before it takes the name, and then the name


@pytest.fixture
def file_limit():
    """Sets how large a file may become: what is beyond is refused, as by a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_ends_no_run(data, tmp_path, monkeypatch, file_limit):
    lines, save = [], checkpoint.save_state

    def full(out, content, keep):
        file_limit(1000 if 2 <= content["step"] < STEPS else resource.RLIM_INFINITY)
        try:
            return save(out, content, keep)
        finally:
            file_limit(resource.RLIM_INFINITY)

    monkeypatch.setattr(checkpoint, "save_state", full)
    recipe = get_recipe("finetune", epochs=3, batch_size=2)
    train(tiny(), data, recipe, tmp_path, save_every=0.0, log=lines.append)
    assert sum("File too large); training goes on" in line for line in lines) == 1
    assert [p.name for p in checkpoint.state_files(tmp_path)] == ["step_000000009.pt"]


def test_a_folder_belongs_to_one_process(tmp_path):
    code = f"""
import os, sys, time
from pathlib import Path
from fastrcnn.training.checkpoint import locked
with locked(Path({str(tmp_path)!r})):
    if not os.fork():  # a worker, who does not die with it
        time.sleep(60)
    print("has it", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True) as other:
        try:
            assert other.stdout.readline() == b"has it\n"
            with pytest.raises(OSError, match=rf"another process \({other.pid}\) trains in this folder"):
                train(Scripted(), pictures(), PLAIN, tmp_path, log=quiet)
        finally:
            other.kill()  # the lock goes with it
            other.wait()
        try:
            (tmp_path / "states").mkdir(exist_ok=True)
            left = [tmp_path / ".last.safetensors.1.part", tmp_path / "states" / ".step_000000001.pt.1.part"]
            for part in left:
                part.write_text("half")
            with checkpoint.locked(tmp_path):
                assert not any(part.exists() for part in left)  # what a killed process had begun
        finally:
            os.killpg(other.pid, signal.SIGKILL)


def test_generators_come_back():
    state = checkpoint.random_state()
    draws = [(torch.rand(3).tolist(), random.random(), np.random.rand(2).tolist(), np.random.randn())]
    checkpoint.set_random_state(state)
    draws.append((torch.rand(3).tolist(), random.random(), np.random.rand(2).tolist(), np.random.randn()))
    assert draws[0] == draws[1]
