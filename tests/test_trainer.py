import pytest
import torch
from conftest import tiny_options
from torch import nn

from fastrcnn.models import faster_rcnn
from fastrcnn.models.build import merge
from fastrcnn.training import train
from fastrcnn.training.demo import RenderedCells


@pytest.fixture(scope="module")
def cells():
    return RenderedCells(4, first_seed=0)


def tiny():
    torch.manual_seed(0)
    training = dict(backbone=dict(frozen_stages=-1, norm_eval=False))
    return faster_rcnn("r18_fpn", 3, **merge(tiny_options(), training))


def total_loss(line: str) -> float:
    words = line.split()
    return sum(float(value) for name, value in zip(words, words[1:]) if name.startswith("loss"))


def test_two_epochs_lower_the_loss(cells):
    model, lines = tiny(), []
    before = {k: v.clone() for k, v in model.state_dict().items()}
    mean = train(model, cells, epochs=2, batch_size=1, lr=0.01, warmup=2, log=lines.append)
    assert lines[0] == f"4 images, {sum(len(t['labels']) for _, t in cells)} objects"
    assert len(lines) == 3 and lines[1].startswith("epoch 1/2")
    assert total_loss(lines[2]) < 0.95 * total_loss(lines[1])
    # `model` itself was trained, and what comes back is another module, its average, ready to predict.
    assert mean is not model and not mean.training and model.training
    key = "rpn_head.rpn_conv.weight"
    moved, averaged = (m.state_dict()[key] - before[key] for m in (model, mean))
    assert 0 < averaged.norm() < moved.norm()
    assert mean.state_dict()["backbone.bn1.num_batches_tracked"] == 8


def test_the_same_seed_gives_the_same_weights(cells):
    first, second, third = (train(tiny(), cells, 1, 2, seed=seed, log=lambda line: None) for seed in (5, 5, 6))
    key = "roi_head.bbox_head.fc_cls.weight"
    assert torch.equal(first.state_dict()[key], second.state_dict()[key])
    assert not torch.equal(first.state_dict()[key], third.state_dict()[key])


class Scripted(nn.Module):
    """Gives the losses it is told, and remembers the weight decay's trace on its parameters."""

    reads_labels, outside = False, staticmethod(lambda targets: targets)

    def __init__(self, losses):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
        self.losses, self.step = losses, 0

    def forward(self, images, targets):
        value = self.losses[self.step]
        self.step += 1
        return dict(loss_a=self.weight.sum() * 0 + self.bias.sum() * 0 + value, loss_b=self.weight.sum() * 0)


IMAGES = [(torch.zeros(3, 8, 8), dict(labels=torch.zeros(1, dtype=torch.int64)))] * 5


class Torn:
    """The last two of its five pictures are gone."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        if index > 2:
            raise ValueError(f"no picture {index}")
        return IMAGES[index]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_training_and_names_the_step(value):
    model = Scripted([1.0, 1.0, value, 1.0])
    with pytest.raises(FloatingPointError, match=f"step 2.*{value}.*loss_a"):
        train(model, IMAGES, epochs=1, batch_size=1, log=lambda line: None)
    assert model.step == 3


def test_norms_and_biases_do_not_decay():
    model = Scripted([1.0] * 10)
    train(model, IMAGES, epochs=2, batch_size=1, lr=0.1, weight_decay=0.1, warmup=0, log=lambda line: None)
    assert (model.weight < 1).all() and (model.bias == 1).all()


def test_a_last_batch_that_is_too_small_is_left_out():
    model = Scripted([1.0] * 10)
    train(model, IMAGES, epochs=3, batch_size=2, log=lambda line: None)
    assert model.step == 6


@pytest.mark.parametrize("arguments, message", [
    (dict(batch_size=9), "batch_size: 9 is more than the 5 images"),
    (dict(batch_size=0), "batch_size: .* got 0"),
    (dict(epochs=0), "epochs: expected a whole number from 1 up, got 0"),
    (dict(epochs=-3), "epochs: .* got -3"),
    (dict(lr=0.0), "lr: .* got 0"),
    (dict(lr=float("nan")), "lr: .* got nan"),
    (dict(dataset=[(torch.zeros(3, 8, 8), dict(labels=torch.zeros(0, dtype=torch.int64)))] * 5), "no object"),
    (dict(dataset=IMAGES[:4] + [(torch.zeros(3, 8, 8), dict(labels=torch.tensor([7, 2, 1])))]), "in 0..1, got \\[2, 7\\]"),
    (dict(dataset=Torn()), "no picture 3; no picture 4 \\(2 of 5 pictures\\)"),
])  # fmt: skip
def test_what_would_end_a_run_later_is_found_before_its_first_step(arguments, message):
    model = Scripted([1.0] * 10)
    model.reads_labels, model.num_classes = True, 2
    with pytest.raises(ValueError, match=message):
        train(model, **{**dict(dataset=IMAGES, epochs=1, batch_size=1), **arguments}, log=lambda line: None)
    assert model.step == 0


def test_the_average_is_handed_out_after_every_epoch():
    model, kept = Scripted([1.0] * 9 + [float("nan")]), []
    with pytest.raises(FloatingPointError):
        train(model, IMAGES, 2, 1, warmup=0, log=lambda line: None, keep=lambda mean: kept.append((model.step, mean)))
    assert [step for step, _ in kept] == [5] and kept[0][1] is not model


class Recorder(nn.Module):
    """A gradient of one, always: the weight tells the sum of the learning rates."""

    reads_labels, outside = False, staticmethod(lambda targets: targets)

    def __init__(self):
        super().__init__()
        self.bias, self.trace = nn.Parameter(torch.zeros(1, dtype=torch.float64)), []

    def forward(self, images, targets):
        self.trace.append(self.bias.item())
        return dict(loss=self.bias.sum())


def test_the_learning_rate_warms_up_and_decays_along_a_cosine():
    model = Recorder()
    train(model, IMAGES * 4, epochs=1, batch_size=1, lr=0.4, momentum=0.0, warmup=4, log=lambda line: None)
    rates = [a - b for a, b in zip(model.trace, [*model.trace[1:], model.bias.item()])]
    assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert rates[12] == pytest.approx(0.2)  # half way from step 4 to step 20
    assert all(a >= b for a, b in zip(rates[4:], rates[5:])) and rates[19] < 0.01


def test_gradients_are_clipped():
    class Steep(Recorder):
        def forward(self, images, targets):
            return dict(loss=1000 * self.bias.sum())

    model = Steep()
    train(model, IMAGES, epochs=1, batch_size=5, lr=1.0, momentum=0.0, warmup=0, clip_norm=2.0, log=lambda line: None)
    assert model.bias.item() == pytest.approx(-2.0, abs=1e-3)
