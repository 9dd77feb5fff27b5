import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from companion import Estimate, accuracy
from companion.errors import EmptyLoader
from companion.evaluation import estimates
from companion.evaluation.estimates import (
    Scores,
    bootstrap,
    paired,
    predict,
    proportion,
    resamples,
)


class Table(nn.Module):
    """Gives every input, an index, the class that stands in a table."""

    def __init__(self, classes):
        super().__init__()
        self.scores = nn.functional.one_hot(torch.tensor(classes), 10).float()

    def forward(self, x):
        return self.scores[x]


def batches(labels, size=7):
    index, labels = torch.arange(len(labels)), torch.tensor(labels)
    return list(zip(index.split(size), labels.split(size), strict=True))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=60))
@settings(max_examples=40, deadline=None)
def test_accuracy_counts_and_its_interval_holds_it(pairs):
    predicted, labels = map(list, zip(*pairs, strict=True))
    estimate = accuracy(Table(predicted), batches(labels))
    assert estimate.value == pytest.approx(np.mean(np.array(predicted) == np.array(labels)))
    assert estimate.n == len(pairs)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.high - estimate.low > 0


@pytest.mark.parametrize("n", range(1, 61))
def test_wilson_ends_at_the_ends(n):
    assert proportion(np.zeros(n, bool)).low == 0.0
    assert proportion(np.ones(n, bool)).high == 1.0


def test_wilson_interval_by_its_formula():
    z, n, p = 1.959963984540054, 50, 0.9
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    estimate = proportion(np.arange(n) < 45)
    assert estimate.low == pytest.approx(centre - half)
    assert estimate.high == pytest.approx(centre + half)
    assert estimate.method == "Wilson"


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for make in (proportion, lambda hits: bootstrap(hits.astype(float))):
        covered = [
            e.low <= 0.8 <= e.high for e in (make(rng.random(200) < 0.8) for _ in range(300))
        ]
        assert 0.91 < np.mean(covered) < 0.98


def test_strata_keep_their_sizes_and_small_ones_are_one():
    strata = ["a"] * 20 + ["b"] * 12 + ["c"] * 2 + ["d"]
    counts = np.concatenate([*resamples(35, strata=strata)])
    assert counts.shape == (10_000, 35)
    assert (counts[:, :20].sum(1) == 20).all()
    assert (counts[:, 20:32].sum(1) == 12).all()
    assert (counts[:, 32:].sum(1) == 3).all()
    assert set(counts[:, 34]) == {0, 1, 2, 3}  # the single one of its stratum varies, too
    assert abs(counts.mean(0) - 1).max() < 0.05


def test_predict_leaves_the_mode_as_it_was():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Identity())
    x = torch.eye(3)
    for mode in (True, False):
        model.train(mode)
        predictions, labels = predict(model, [(x, torch.arange(3))])
        assert model.training is mode
        assert (predictions == labels).all()  # no dropout while predicting


def test_paired_counts_disagreements():
    labels = np.zeros(100, int)
    first = np.r_[np.ones(10, int), np.zeros(90, int)]  # wrong on the first ten
    second = np.r_[np.zeros(5, int), np.full(30, 2), np.zeros(65, int)]  # wrong on 5 to 34
    result = paired(first, second, labels)
    assert (result.only_first, result.only_second) == (25, 5)
    assert result.difference.value == pytest.approx(0.2)
    assert result.agreement == pytest.approx(0.65)
    assert not result.tie
    assert paired(first, first, labels).tie
    assert paired(first, first, labels).difference == Estimate(0, 0, 0, 100, "bootstrap")


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(1)
    easy = rng.random(500) < 0.7
    first, second = np.where(easy, 0, 1), np.where(easy | (rng.random(500) < 0.1), 0, 1)
    result = paired(second, first, np.zeros(500, int))
    width = proportion(first == 0).high - proportion(first == 0).low
    assert result.difference.high - result.difference.low < 0.6 * width


def test_bootstrap_agrees_with_scipy():
    from scipy import stats

    values = np.random.default_rng(2).integers(-1, 2, 300).astype(float)
    ours = bootstrap(values)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", rng=0).confidence_interval
    assert ours.value == values.mean()
    assert ours.low == pytest.approx(theirs.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.high, abs=0.01)
    assert bootstrap(values) == ours  # seeded


@pytest.mark.parametrize("kept", [0, 4000])
@pytest.mark.parametrize("n", [1, 7, 191, 600])
def test_resamples_are_the_draws_that_published_intervals_rest_on(n, kept, monkeypatch):
    """In parts, kept small or not kept at all, they are those of one large array."""
    monkeypatch.setattr(estimates, "KEPT", kept)
    rng = np.random.default_rng(n)
    total, weight = rng.normal(2.0, 0.3, n), rng.integers(1, 60, n)
    whole = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), 10_000)
    assert all(
        np.array_equal(part, whole[start : start + len(part)])
        for start, part in zip(range(0, 10_000, max(1, 2**19 // n)), resamples(n), strict=False)
    )
    ours = Scores(total, weight).resampled()
    # float64 sums of up to 600 terms of one sign, in another order: 2 * 600 * 1.1e-16
    assert ours == pytest.approx((whole @ total) / (whole @ weight), rel=2e-13)
    values, counts = np.unique(np.round(total, 1), return_counts=True)
    draws = np.random.default_rng(0).multinomial(n, counts / n, 10_000) @ values / n
    low, high = np.quantile(draws, [(1 - 0.95) / 2, (1 + 0.95) / 2])
    found = bootstrap(np.round(total, 1))
    assert (found.low, found.high) == (
        pytest.approx(low, rel=2e-13),
        pytest.approx(high, rel=2e-13),
    )


def test_resampling_takes_little_memory():
    """One array of all counts would take 80 MB for each thousand examples."""
    scores, values = Scores(np.ones(2000), np.ones(2000)), np.random.default_rng(0).random(2000)
    tracemalloc.start()
    scores.resampled()
    bootstrap(values)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 25e6
    assert peak < 50e6


def test_empty_loader_is_an_error():
    with pytest.raises(EmptyLoader, match="no batch"):
        accuracy(nn.Identity(), [])
