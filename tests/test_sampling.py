import pytest
import torch

from fastrcnn.models.sampling import sample


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
