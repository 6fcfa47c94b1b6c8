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
