"""training/loop.py: what a step does, in what order, and how a run ends."""

import contextlib
import csv
import dataclasses
import json
import math
import warnings

import pytest
import torch
from conftest import tiny_options
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_stubs import PLAIN, Scripted, cells, pictures, tiny

from fastrcnn.data import open_dataset
from fastrcnn.models import FasterRCNN, retinanet
from fastrcnn.training import get_recipe, loop, train
from fastrcnn.training.state import Losses
from fastrcnn.training.validate import validation_loss
from fastrcnn.weights import infer_model


def quiet(line):
    pass


def plain(**changes):
    return dataclasses.replace(PLAIN, **changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_dataset(cells(tmp_path_factory.mktemp("cells")))


def rows_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.charts
def test_a_run_leaves_its_folder(data, tmp_path):
    out, lines = tmp_path / "run", []
    mean = train(tiny(), data, out=out, val=data, epochs=2, batch_size=2, log=lines.append)
    names = {"best.safetensors", "last.safetensors", "results.csv", "log.jsonl", "config.json", "metrics.json"}
    assert names | {"report.html", "curves.png"} <= {p.name for p in out.iterdir()}
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert list(rows[0]) == ["epoch", "loss", "val_loss", "AP", "AP50", "AP75", "lr"]
    assert [row["epoch"] for row in rows] == ["1", "2"] and all(float(row["val_loss"]) > 0 for row in rows)
    steps = rows_of(out)
    assert [row["step"] for row in steps] == list(range(6)) and [row["epoch"] for row in steps] == [1, 1, 1, 2, 2, 2]
    assert float(rows[0]["loss"]) == pytest.approx(sum(row["loss"] for row in steps[:3]) / 3)
    config = json.loads((out / "config.json").read_text())
    assert config["recipe"] == json.loads(json.dumps(dataclasses.asdict(get_recipe(epochs=2, batch_size=2))))
    assert config["steps"] == 6 and config["lr"] == pytest.approx(0.002 * (2 / 16) ** 0.5)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["last"]["epoch"] == 2 and {"AP", "APs", "AR100", "val_loss"} <= set(metrics["best"])
    assert len(list((out / "samples").glob("*.jpg"))) == 2
    evaluation = json.loads((out / "evaluation/metrics.json").read_text())
    assert evaluation["AP"] == pytest.approx(metrics["best"]["AP"])
    kept = infer_model(out / "last.safetensors")
    assert all(map(torch.equal, kept.state_dict().values(), mean.state_dict().values()))
    said = " ".join(lines)
    numbers = {k: v for k, v in dataclasses.asdict(get_recipe(epochs=2, batch_size=2)).items() if v is not None}
    assert all(f"{k} {v}" in said for k, v in numbers.items() if k != "name") and "full rate 0.000707107" in said
    assert lines[0].startswith("6 images") and not mean.training and kept.class_names == data.class_names


def test_a_validation_set_may_count_its_classes_otherwise(data, tmp_path):
    path = cells(tmp_path)
    content = json.loads(path.read_text())
    last = 1 + max(row["id"] for row in content["categories"])
    for row, key in [(row, "id") for row in content["categories"]] + [
        (row, "category_id") for row in content["annotations"]
    ]:
        row[key] = last - row[key]
    path.write_text(json.dumps(content))
    other, losses = open_dataset(path), Losses(tiny())
    assert other.class_names == data.class_names[::-1]
    assert validation_loss(losses, other, 2, 0, 0, 1) == validation_loss(losses, data, 2, 0, 0, 1)


def test_training_lowers_the_loss_and_averages_the_weights(data):
    model, lines = tiny(), []
    before = {k: v.clone() for k, v in model.state_dict().items()}
    mean = train(model, data, get_recipe(colour_jitter=None, multi_scale=None, warmup=2), epochs=3, batch_size=1, lr=0.01,
                 log=lines.append)  # fmt: skip
    losses = [float(line.split()[3]) for line in lines if line.startswith("epoch")]
    assert losses[-1] < 0.9 * losses[0]
    assert mean is not model and not mean.training and model.training
    key = "rpn_head.rpn_conv.weight"
    moved, averaged = (m.state_dict()[key] - before[key] for m in (model, mean))
    assert 0 < averaged.norm() < moved.norm()
    assert mean.state_dict()["backbone.bn1.num_batches_tracked"] == 18


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_same_seed_gives_the_same_weights(data, deterministic):
    first, second, third = (
        train(tiny(), data, epochs=1, batch_size=2, seed=seed, deterministic=deterministic, log=quiet).state_dict()
        for seed in (5, 5, 6)
    )
    assert all(map(torch.equal, first.values(), second.values()))
    assert not torch.equal(first["rpn_head.rpn_conv.weight"], third["rpn_head.rpn_conv.weight"])
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_training(value):
    model = Scripted([1.0, 1.0, value, *[1.0] * 7])
    with pytest.raises(FloatingPointError, match=rf"step 2: the loss is {value}, from loss_a.*, on picture \d"):
        train(model, pictures(), plain(epochs=2), log=quiet)
    assert len(model.trace) <= 5


def test_gradients_that_are_not_finite_stop_training_before_they_are_saved(tmp_path, monkeypatch):
    class Broken(Scripted):
        def losses(self, *args):
            found = super().losses(*args)
            root = (self.weight.sum() - self.weight.detach().sum()).sqrt() * 0  # its gradient at 0 is not a number
            return {**found, "loss_b": root} if len(self.trace) == 3 else found

    monkeypatch.setattr(loop, "save", lambda model, path: path.touch())
    monkeypatch.setattr(loop, "described", lambda model: {})
    with pytest.raises(FloatingPointError, match=r"step 2: .*the norm of the gradients nan"):
        train(Broken(), pictures(), plain(epochs=2), tmp_path, save_every=0.0, log=quiet)
    assert not (tmp_path / "states").exists()


def test_out_of_memory_says_what_to_lower(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nand so on")

    model = Scripted()
    monkeypatch.setattr(model, "losses", full)
    message = r"step 0: out of memory with 1 pictures a step on cpu \(CUDA out of memory.* 20 GiB\)\. Lower the batch"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        train(model, pictures(), plain(), log=quiet)


def test_what_a_dataset_raises_reaches_the_caller_as_it_is():
    class Failing(list):
        asked = 0

        def __getitem__(self, index):
            self.asked += 1
            if self.asked > len(self):  # each was read once before the first step
                raise RuntimeError("a transform of the user's")
            return super().__getitem__(index)

    with pytest.raises(RuntimeError, match="a transform of the user's"):
        train(Scripted(), Failing(pictures()), PLAIN, log=quiet)


def test_a_diverged_run_names_its_pictures_and_keeps_the_good_state(data, tmp_path, monkeypatch):
    forward, steps = Losses.forward, []

    def diverging(self, *batch):
        steps.append(1)
        return {k: v * (math.nan if len(steps) == 8 else 1) for k, v in forward(self, *batch).items()}

    monkeypatch.setattr(Losses, "forward", diverging)
    with pytest.raises(
        FloatingPointError, match=r"step 7: the loss is nan.*images/\d.png.*step_000000006.pt is the last"
    ):
        train(tiny(), data, out=tmp_path, epochs=3, batch_size=1, log=quiet)
    assert all(v.isfinite().all() for v in infer_model(tmp_path / "last.safetensors").state_dict().values())
    steps[:] = [0] * 100
    train(tiny(), data, out=tmp_path, resume=True, epochs=3, batch_size=1, log=quiet)
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(18))


def test_every_picture_is_taken_once_an_epoch_and_the_last_batch_may_be_small():
    sizes = []

    class Counting(Scripted):
        def losses(self, batch, frame, targets):
            sizes.append(batch[:, 0, 0, 0].tolist())
            return super().losses(batch, frame, targets)

    train(Counting(), pictures(5), plain(epochs=2, batch_size=2), log=quiet)
    assert [len(s) for s in sizes] == [2, 2, 1, 2, 2, 1]
    assert sizes[:3] != sizes[3:]
    assert all(sorted(i for s in half for i in s) == [0, 1, 2, 3, 4] for half in (sizes[:3], sizes[3:]))


def test_the_rate_of_each_step_is_the_schedules():
    model = Scripted()
    recipe = plain(epochs=3, warmup=4, warmup_factor=0.2, milestones=(2,), base_batch=2)
    train(model, pictures(5), recipe, log=quiet)
    trace = [*model.trace, model.bias.item()]
    rates = [a - b for a, b in zip(trace, trace[1:])]
    full = 0.05  # 0.1 for two pictures a step
    assert rates == pytest.approx([full * f for f in (0.2, 0.4, 0.6, 0.8, *[1.0] * 6, *[0.1] * 5)])
    model = Scripted()
    train(model, pictures(5), recipe, lr=0.3, epochs=1, log=quiet)  # as it is
    assert model.trace[1] == pytest.approx(-0.3 * 0.2)


def test_norms_and_biases_decay_as_the_recipe_says():
    class Flat(Scripted):
        def losses(self, batch, frame, targets):
            return dict(loss=(self.weight.sum() + self.bias.sum()) * 0)

    for bias_decay, left in ((0.0, 1.0), (1.0, 0.99)):
        model = Flat()
        nn.init.ones_(model.weight), nn.init.ones_(model.bias)
        train(model, pictures(1), plain(weight_decay=0.1, bias_decay=bias_decay), log=quiet)
        assert model.weight.item() == pytest.approx(0.99) and model.bias.item() == pytest.approx(left)


def test_gradients_are_clipped_together():
    model = Scripted()
    train(model, pictures(5), plain(batch_size=5, clip_norm=1.0, lr=0.2, base_batch=5), log=quiet)
    assert model.bias.item() == model.weight.item() == pytest.approx(-0.2 / math.sqrt(2), abs=1e-5)


def test_accumulation_is_one_step_of_the_mean():
    model = Scripted()
    train(model, pictures(5), plain(accumulate=2, base_batch=2), log=quiet)
    assert model.trace == pytest.approx([0, 0, -0.1, -0.1, -0.2])  # 2, 2 and what is left
    assert model.bias.item() == pytest.approx(-0.25)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_trains(data, precision):
    recipe = dataclasses.replace(get_recipe(), precision=precision, ema=None, warmup=0)
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train(model, data, recipe, epochs=1, batch_size=2, log=quiet)
    key = "rpn_head.rpn_conv.weight"
    assert model.state_dict()[key].dtype == torch.float32 and not torch.equal(model.state_dict()[key], before[key])


def test_what_a_recipe_says_of_the_model(data):
    recipe = dataclasses.replace(get_recipe(), frozen_stages=1, with_cp=True, channels_last=True, ema=None)
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train(model, data, recipe, epochs=1, batch_size=2, log=quiet)
    same = {k for k, v in model.state_dict().items() if torch.equal(v, before[k])}
    assert {"backbone.conv1.weight", "backbone.layer1.0.conv1.weight"} <= same
    assert "backbone.layer2.0.conv1.weight" not in same
    assert model.neck.fpn_convs[0].conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(block.with_cp for block in model.backbone.layer2)


def test_cuda_graphs_meet_the_same_shape_every_time(data, monkeypatch):
    """What reaches torch on a machine without a card: the mode, a mark in front of each batch, and equal batches."""
    modes, marks, shapes, losses = [], [], [], FasterRCNN.losses
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: modes.append(options))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(len(shapes)))
    monkeypatch.setattr(loop, "check_machine", lambda *a: None)
    monkeypatch.setattr(FasterRCNN, "losses", lambda self, x, *a: shapes.append(tuple(x.shape)) or losses(self, x, *a))
    for mode, expected in (("reduce-overhead", "reduce-overhead"), (True, None)):
        recipe = dataclasses.replace(get_recipe("lsj-100e"), compile=mode, crop=160, lsj=(0.3, 0.8))
        train(tiny(), data, recipe, epochs=1, batch_size=2, log=quiet)
        assert modes == [dict(mode=expected)] * 4  # backbone, neck and two heads
        assert marks == ([0, 1, 2] if expected else []) and len(shapes) == 3
        assert (set(shapes) == {(2, 3, 160, 160)}) == (expected is not None)
        modes.clear(), marks.clear(), shapes.clear()


@pytest.mark.parametrize("changes, message", [
    (dict(compile="fast"), r'compile: expected False, True or "reduce-overhead", got \'fast\''),
    (dict(compile="reduce-overhead", multi_scale=(0.8, 1.2)), r"compile: .*multi_scale None .* got \(0.8, 1.2\) and 1"),
    (dict(compile="reduce-overhead", accumulate=2), r"compile: .* and accumulate 1, .* got None and 2"),
])  # fmt: skip
def test_what_cannot_be_compiled_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        plain(**changes)


def test_a_picture_that_is_lost_on_the_way_ends_no_run(tmp_path):
    data, lines, filters = open_dataset(cells(tmp_path)), [], list(warnings.filters)
    out = tmp_path / "run"

    def say(line):
        lines.append(line)
        if line.startswith("epoch 1/2"):
            (tmp_path / "images" / "2.png").unlink()

    train(tiny(), data, out=out, val=data, epochs=2, batch_size=2, log=say)
    assert any(line.startswith("left out:") and "2.png" in line for line in lines)
    assert any(line.startswith("AP could not be measured") and "2.png" in line for line in lines)
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert rows[0]["AP"] != "" and rows[1]["AP"] == "" and float(rows[1]["val_loss"]) > 0
    assert json.loads((out / "metrics.json").read_text())["skipped"] == 1
    assert warnings.filters == filters  # or the caller's own reading of the pictures would be silent


def test_early_stopping_keeps_the_best(data, tmp_path, monkeypatch):
    scores = iter([10.0, 30.0, 20.0, 25.0, 90.0])
    monkeypatch.setattr(
        "fastrcnn.training.loop.measured", lambda *a: (dict.fromkeys(("AP", "AP50", "AP75"), next(scores)), None)
    )
    lines = []
    train(tiny(), data, out=tmp_path, val=data, epochs=9, batch_size=6, patience=2, log=lines.append)
    assert "stopped: no better AP for 2 epochs" in lines[-1]
    assert len(list(csv.DictReader((tmp_path / "results.csv").open()))) == 4
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["best"]["AP"] == 30 and metrics["best"]["epoch"] == 2 and metrics["last"]["epoch"] == 4
    best, last = (infer_model(tmp_path / f"{name}.safetensors").state_dict() for name in ("best", "last"))
    assert not torch.equal(best["rpn_head.rpn_conv.weight"], last["rpn_head.rpn_conv.weight"])


class Torn:
    """The last two of its five pictures are gone."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        if index > 2:
            raise ValueError(f"no picture {index}")
        return pictures()[index]


@pytest.mark.parametrize("arguments, message", [
    (dict(batch_size=0), "batch_size: .* got 0"),
    (dict(epochs=0), "epochs: expected a whole number from 1 up, got 0"),
    (dict(epochs=-3), "epochs: .* got -3"),
    (dict(lr=0.0), "lr: .* got 0"),
    (dict(lr=float("nan")), "lr: .* got nan"),
    (dict(recipe="4x"), "recipe: expected one of 1x, .*finetune, got '4x'"),
    (dict(recipe="config"), "came with no configuration"),
    (dict(recipe=plain(compile="reduce-overhead")), "compile: .*CUDA graphs, and the model is on cpu: expected True"),
    (dict(out="weights.pth"), "out: expected a folder, .* the name of a file: weights.pth; try weights"),
    (dict(dataset=pictures(5, ())), "no object"),
    (dict(dataset=[*pictures(4), *pictures(1, (7, 2, 1))]), "in 0..1, got \\[2, 7\\]"),
    (dict(dataset=Torn()), "no picture 3; no picture 4 \\(2 of 5 pictures\\)"),
])  # fmt: skip
def test_what_would_end_a_run_later_is_found_before_its_first_step(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Scripted()
    model.reads_labels, model.num_classes = True, 2
    with pytest.raises(ValueError, match=message):
        train(model, **{**dict(dataset=pictures(), recipe=PLAIN), **arguments}, log=quiet)
    assert not model.trace and not list(tmp_path.iterdir())


def test_a_model_that_no_file_can_hold_is_refused_before_its_first_step(tmp_path):
    with pytest.raises(ValueError, match="got a Scripted of its own"):
        train(model := Scripted(), pictures(), PLAIN, tmp_path / "run", log=quiet)
    assert not model.trace


class Waits(TorchDispatchMode):
    """Notes what makes the host wait for a device: values read, sizes that depend on values."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if masks or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_consecutive",
                             "unique_dim", "item"):  # fmt: skip
            self.found.append(name)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("name, profile", [
    ("r18_fpn", "mmdet"), ("r18_fpn", "torchvision"), ("r18_fpn", "detectron2"), ("retinanet_r18_fpn", "mmdet"),
])  # fmt: skip
def test_a_step_never_waits_for_the_device(data, monkeypatch, name, profile):
    step, modes = loop.Run.step, []

    def watched(self, *args):
        lists = pytest.MonkeyPatch()
        with Waits() as mode, contextlib.closing(contextlib.ExitStack()) as stack:
            stack.callback(lists.undo)
            for reader in ("tolist", "numpy", "__array__"):
                lists.setattr(torch.Tensor, reader, lambda *a, reader=reader: mode.found.append(reader))
            found = step(self, *args)
        modes.append(mode)
        return found

    monkeypatch.setattr(loop.Run, "step", watched)
    build = retinanet if name.startswith("retinanet") else None
    model = build(name, 3, profile, **tiny_options(name)) if build else tiny(name, profile=profile)
    train(model, data, dataclasses.replace(get_recipe(), clip_norm=1.0), epochs=1, batch_size=2, log=quiet)
    assert len(modes) == 3 and [mode.found for mode in modes] == [[], [], []]
    with Waits() as mode:  # the watch itself sees them
        x = torch.ones(3)
        bool(x.sum() > 0), x[x > 0], x.nonzero()
    assert len(mode.found) >= 3
