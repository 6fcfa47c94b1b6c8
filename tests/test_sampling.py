import pytest
import torch

from fastrcnn.models import sampling
from fastrcnn.models.sampling import build_sampler, sample_batch, sample_images


def sample(matches, rules, *args):
    return sampling.sample(matches, build_sampler(rules), *args)


def matches_of(positives: int, negatives: int, ignored: int = 0) -> torch.Tensor:
    """Shuffled matches: ground truth 0 for positives, -1 for background, -2 for ignored boxes."""
    values = [0] * positives + [-1] * negatives + [-2] * ignored
    return torch.tensor(values)[torch.randperm(len(values))]


def test_everything_is_taken_where_there_is_room():
    matches = torch.tensor([-1, 2, -2, -1, 0, -2])
    positives, negatives = sample(matches, dict(num=10, pos_fraction=0.5))
    assert positives.tolist() == [1, 4]
    assert negatives.tolist() == [0, 3]


@pytest.mark.parametrize(
    "positives, negatives, expected",
    [
        (100, 1000, (64, 192)),  # at most a quarter is positive
        (10, 1000, (10, 246)),  # negatives fill up
        (100, 50, (64, 50)),
        (0, 1000, (0, 256)),
        (100, 0, (64, 0)),
        (0, 0, (0, 0)),
    ],
)
def test_counts(positives, negatives, expected):
    matches = matches_of(positives, negatives, ignored=30)
    pos, neg = sample(matches, dict(num=256, pos_fraction=0.25))
    assert (len(pos), len(neg)) == expected
    assert (matches[pos] >= 0).all() and (matches[neg] == -1).all()
    for chosen in (pos, neg):
        assert torch.equal(chosen, chosen.unique())  # ascending, none twice


def test_the_fraction_is_rounded_down():
    pos, neg = sample(matches_of(50, 50), dict(num=5, pos_fraction=0.5))
    assert (len(pos), len(neg)) == (2, 3)


@pytest.mark.parametrize("positives, most", [(4, 12), (1, 3), (0, 3)])
def test_negatives_can_be_limited_by_the_positives(positives, most):
    pos, neg = sample(matches_of(positives, 500), dict(num=100, pos_fraction=0.5, neg_pos_ub=3))
    assert (len(pos), len(neg)) == (positives, most)


def test_every_box_can_be_chosen_and_the_choice_varies():
    matches = torch.zeros(20, dtype=torch.int64)
    draws = [sample(matches, dict(num=4, pos_fraction=1.0))[0] for _ in range(200)]
    counts = torch.stack(draws).flatten().bincount(minlength=20)
    assert counts.min() > 15 and counts.max() < 75  # 40 each on average
    torch.manual_seed(7)
    first = sample(matches, dict(num=4, pos_fraction=1.0))[0]
    torch.manual_seed(7)
    assert torch.equal(first, sample(matches, dict(num=4, pos_fraction=1.0))[0])


@pytest.mark.parametrize("sampler", [dict(type="OHEMSampler"), dict(number=3)])
def test_an_unknown_sampler_is_refused(sampler):
    with pytest.raises(ValueError, match="sampler"):
        sample(torch.zeros(3, dtype=torch.int64), sampler)


def test_hard_mining_takes_the_highest_losses_of_each_side():
    matches = torch.tensor([0, 0, 1, -1, -1, -1, -1, -2])
    losses = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.8, 0.2, 0.7, 9.0])
    rules = dict(type="OHEMSampler", num=4, pos_fraction=0.5)
    pos, neg = sample(matches, rules, None, lambda i: losses[i])
    assert pos.tolist() == [1, 2] and neg.tolist() == [4, 6]
    with pytest.raises(ValueError, match="OHEM"):
        sample(matches, rules)


def test_instance_balanced_positives_come_from_every_ground_truth_box():
    matches = torch.tensor([0] * 40 + [1] * 3 + [2] * 2 + [-1] * 10)
    rules = dict(type="InstanceBalancedPosSampler", num=18, pos_fraction=0.5)
    for _ in range(20):
        pos, neg = sample(matches, rules)
        assert len(pos) == 9 and len(pos.unique()) == 9 and len(neg) == 9
        assert {1, 2} <= set(matches[pos].tolist())


def test_iou_balanced_negatives_fill_the_bins_evenly():
    matches = torch.full((96,), -1)
    max_iou = torch.cat([torch.full((90,), 0.05), torch.full((3,), 0.25), torch.full((3,), 0.4)])
    rules = dict(type="IoUBalancedNegSampler", num=9, pos_fraction=0.0, num_bins=3, floor_thr=-1)
    for _ in range(20):
        _, neg = sample(matches, rules, max_iou)
        assert len(neg) == 9 and len(neg.unique()) == 9
        # Bins of width 0.4 / 3 from 0: three of the many, three of 0.25; 0.4 itself is outside the last half-open bin.
        assert int((max_iou[neg] == 0.25).sum()) == 3
    _, floored = sample(matches, {**rules, "floor_thr": 0.1, "floor_fraction": 1.0}, max_iou)
    assert (max_iou[floored] == 0.05).all()


def test_a_combined_sampler_uses_one_for_each_side():
    matches = torch.tensor([0] * 40 + [1] * 2 + [-1] * 50)
    max_iou = torch.cat([torch.ones(42), torch.full((48,), 0.05), torch.full((2,), 0.3)])
    rules = dict(type="CombinedSampler", num=16, pos_fraction=0.25, pos_sampler=dict(type="InstanceBalancedPosSampler"),
                 neg_sampler=dict(type="IoUBalancedNegSampler", num_bins=3))  # fmt: skip
    pos, neg = sample(matches, rules, max_iou)
    assert len(pos) == 4 and 1 in matches[pos] and len(neg) == 12


# Of each image: positives, negatives, ignored.
IMAGES = [(100, 1000, 0), (10, 1060, 30), (100, 50, 950), (0, 1000, 100), (100, 0, 1000), (0, 0, 1100), (1, 900, 199)]


@pytest.mark.parametrize("num", [1, 5, 256, 1100, 10**9])
@pytest.mark.parametrize("pos_fraction", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("neg_pos_ub", [-1, 0, 3, 2.5])
def test_a_batch_has_as_many_of_each_side_as_its_images_alone(num, pos_fraction, neg_pos_ub):
    matches = torch.stack([matches_of(*image) for image in IMAGES])
    rules = dict(num=num, pos_fraction=pos_fraction, neg_pos_ub=neg_pos_ub)
    indices, counts = sample_batch(matches, **rules)
    assert indices.shape == (len(IMAGES), min(num, 1100)) and indices.dtype == counts.dtype == torch.int64
    for row, found, (p, n) in zip(matches, indices, counts.tolist()):
        assert [p, n] == [len(side) for side in sample(row, rules)]
        pos, neg, rest = found[:p], found[p : p + n], found[p + n :]
        assert (row[pos] >= 0).all() and (row[neg] == -1).all() and (rest == -1).all()
        for chosen in (pos, neg):
            assert torch.equal(chosen, chosen.unique())  # ascending, none twice


def test_a_batch_draws_every_subset_equally_often():
    matches = torch.tensor([[0, -1, 3, -2, 1, -1, -1, -1]]).repeat(6000, 1)
    indices, counts = sample_batch(matches, 4, 0.5)  # 2 of 3 positives, 2 of 4 negatives
    assert (counts == 2).all()
    _, pairs = indices.view(-1, 2, 2)[:, 0].unique(dim=0, return_counts=True)
    assert len(pairs) == 3 and (pairs - 2000).abs().max() < 200  # five standard deviations
    _, both = indices.unique(dim=0, return_counts=True)
    assert len(both) == 18 and (both - 6000 / 18).abs().max() < 95


def test_a_batch_repeats_under_a_fixed_seed_and_its_images_differ():
    matches = torch.full((2, 500), -1)
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(sample_batch(matches, 20, 0.5)[0])
    assert torch.equal(*draws)
    assert not torch.equal(draws[0][0], draws[0][1])


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_a_batch_of_nothing(shape):
    indices, counts = sample_batch(torch.zeros(shape, dtype=torch.int64), 4, 0.5)
    assert indices.shape == (shape[0], min(4, shape[1])) and counts.tolist() == [[min(2, shape[1]), 0]] * shape[0]


def test_images_are_sampled_as_one_by_one():
    matches = torch.stack([matches_of(*image) for image in IMAGES])
    max_iou, losses = torch.rand(2, *matches.shape)
    everything = dict(num=10**9, pos_fraction=1.0)
    hard = dict(type="OHEMSampler", num=64, pos_fraction=0.25)
    for rules in (everything, hard):
        found = sample_images(matches, build_sampler(rules), max_iou, lambda image, indices: losses[image, indices])
        for row, iou, loss, indices, counts in zip(matches, max_iou, losses, found[0], found[1].tolist()):
            sides = *indices[: sum(counts)].split(counts), indices[sum(counts) :]
            alone = sample(row, rules, iou, lambda indices, loss=loss: loss[indices])
            assert all(map(torch.equal, sides, (*alone, torch.full_like(sides[2], -1))))
    with pytest.raises(ValueError, match="OHEM"):
        sample_images(matches, build_sampler(hard), max_iou)


@pytest.mark.gpu
def test_a_batch_is_drawn_without_waiting_for_the_device():
    matches = torch.stack([matches_of(*image) for image in IMAGES]).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        indices, counts = sample_batch(matches, 256, 0.25, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for row, found, (p, n) in zip(matches, indices, counts.tolist()):
        assert (row[found[:p]] >= 0).all() and (row[found[p : p + n]] == -1).all() and (found[p + n :] == -1).all()
