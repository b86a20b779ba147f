"""Statistics against independent references: scikit-learn and SciPy on resamples written out, closed forms, hand cases."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats as sp
from sklearn import metrics as sk

from distilrepro.stats import (
    METRICS,
    accuracy,
    draw_counts,
    headline,
    holm,
    interval,
    matthews,
    p_value,
    pearson,
    retention,
    spearman,
    two_way_bootstrap,
    weighted_ranks,
)

CASE = st.tuples(
    hnp.arrays(int, 25, elements=st.integers(0, 1)),
    hnp.arrays(int, 25, elements=st.integers(0, 1)),
    hnp.arrays(float, (3, 25), elements=st.integers(0, 3)).filter(lambda w: (w.sum(1) > 0).all()),
)


def written_out(metric, label, prediction, weights):
    "The reference on every resample, example by example."
    return [metric(np.repeat(label, w.astype(int)), np.repeat(prediction, w.astype(int))) for w in weights]


@settings(max_examples=60, deadline=None)
@given(CASE)
def test_metrics_of_counts_equal_the_references_written_out(case):
    label, prediction, weights = case
    def f1(a, b): return sk.f1_score(a, b, zero_division=0)
    def mcc(a, b): return 0 if len({*a}) == 1 or len({*b}) == 1 else sk.matthews_corrcoef(a, b)
    for name, reference in dict(accuracy=sk.accuracy_score, f1=f1, matthews_correlation=mcc).items():
        expected = written_out(reference, label, prediction, weights)
        np.testing.assert_allclose(METRICS[name](label, prediction, weights), expected, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_correlations_of_counts_equal_scipy_with_ties(seed, levels):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, levels, 40).astype(float), rng.integers(0, 4, 40) + 0.5
    weights = draw_counts(40, 4, rng)
    np.testing.assert_allclose(spearman(x, y, weights), written_out(lambda a, b: sp.spearmanr(a, b)[0], x, y, weights), atol=1e-12)
    np.testing.assert_allclose(pearson(x, y, weights), written_out(lambda a, b: sp.pearsonr(a, b)[0], x, y, weights), atol=1e-12)


def test_pearson_survives_a_large_offset():
    x = np.arange(50.0)
    assert pearson(x + 1e6, 3 * x - 1e6, np.ones((1, 50)))[0] == pytest.approx(1)


def test_ranks_of_a_resample_are_scipys():
    rng = np.random.default_rng(0)
    values, weights = rng.integers(0, 5, 30).astype(float), draw_counts(30, 5, rng)
    for ours, w in zip(weighted_ranks(values, weights), weights, strict=True):
        drawn = np.repeat(np.arange(30), w.astype(int))
        np.testing.assert_array_equal(ours[drawn], sp.rankdata(values[drawn]))


def test_matthews_of_three_classes():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 3, 60), rng.integers(0, 3, 60)
    assert matthews(a, b, np.ones((1, 60)))[0] == pytest.approx(sk.matthews_corrcoef(a, b))


def test_headline_of_every_task_is_the_mean_of_its_official_metrics():
    rng = np.random.default_rng(2)
    a, one = rng.integers(0, 2, 60), np.ones((1, 60))
    b = np.where(rng.random(60) < 0.8, a, 1 - a)
    for task in ("mrpc", "qqp"):
        assert headline(task)(a, b, one)[0] == pytest.approx((sk.accuracy_score(a, b) + sk.f1_score(a, b)) / 2)
    for task in ("sst2", "mnli", "qnli", "rte", "wnli", "imdb"):
        assert headline(task)(a, b, one)[0] == pytest.approx(sk.accuracy_score(a, b))
    x, y = rng.random(60), rng.random(60)
    assert headline("stsb")(x, y, one)[0] == pytest.approx((sp.pearsonr(x, y)[0] + sp.spearmanr(x, y)[0]) / 2)


def test_chunks_do_not_change_the_statistic(monkeypatch):
    label = np.arange(40) % 2
    guess = np.stack([np.roll(label, k) ^ (np.arange(40) < 5) for k in (0, 2, 4)])
    monkeypatch.setattr("distilrepro.stats.CHUNK", 40 * 7)
    drawn = two_way_bootstrap(accuracy, label, dict(m=guess), 500)["m"]
    assert drawn.shape == (500,) and drawn.mean() == pytest.approx(0.875, abs=0.01)


def test_models_share_the_draw_of_examples_and_not_of_seeds():
    rng = np.random.default_rng(3)
    label = np.ones(100, int)
    same = (rng.random((1, 100)) < 0.7).astype(int)
    drawn = two_way_bootstrap(accuracy, label, dict(student=same, teacher=same))
    assert (drawn["student"] == drawn["teacher"]).all()
    far = np.stack([np.ones(100, int), np.zeros(100, int), np.zeros(100, int)])
    drawn = two_way_bootstrap(accuracy, label, dict(student=far, teacher=far))
    assert (drawn["student"] != drawn["teacher"]).any()


def test_median_over_resampled_seeds_by_hand():
    "Three constant seeds 0, 0, 1: the median of three draws is 1 when at least two are 1, 7 of 27 times."
    far = np.stack([np.zeros(10, int), np.zeros(10, int), np.ones(10, int)])
    drawn = two_way_bootstrap(accuracy, np.ones(10, int), dict(m=far), 20000)["m"]
    assert set(drawn) == {0.0, 1.0} and drawn.mean() == pytest.approx(7 / 27, abs=0.01)


def test_full_size_takes_seconds():
    import time

    rng, start = np.random.default_rng(4), time.perf_counter()
    label = rng.integers(0, 2, 25000)
    models = {m: np.stack([np.where(rng.random(25000) < 0.9, label, 0) for _ in range(3)]) for m in ("student", "teacher")}
    low, high = interval(two_way_bootstrap(accuracy, label, models)["student"])
    assert high - low < 0.02 and time.perf_counter() - start < 10


def test_retention_by_hand_and_along_axes():
    out = retention(np.array([[0.5, 0.9], [0.4, 1.0]]), np.array([[0.8, 1.0], [0.8, 1.0]]), np.array([0.0, 0.5]))
    np.testing.assert_allclose(out["ratio_of_means"], [1.4 / 1.8] * 2)
    np.testing.assert_allclose(out["mean_of_ratios"], [(0.625 + 0.9) / 2, 0.75])
    np.testing.assert_allclose(out["above_floor"], [0.9 / 1.3, 0.9 / 1.3])


def test_retention_is_undefined_where_the_teacher_is_not_above_the_floor():
    out = retention([0.6, 0.6], [0.5, 0.5], [0.5, 0.5])
    assert np.isnan(out["above_floor"]) and out["ratio_of_means"] == pytest.approx(1.2)
    assert np.isnan(retention([0.1, 0.5], [-0.1, 0.9], [0, 0])["mean_of_ratios"])


def test_an_undefined_resample_makes_an_undefined_interval():
    assert np.isnan(interval(np.array([0.1, np.nan, 0.3]))).all()


def test_holm_against_its_definition():
    p = np.array([0.011, 0.02, 0.03, 0.2, 0.9])
    np.testing.assert_allclose(holm(p), [0.055, 0.08, 0.09, 0.4, 0.9])
    assert holm(np.array([])).size == 0


@given(hnp.arrays(float, st.integers(1, 60), elements=st.floats(-1, 1)))
def test_p_values_are_never_zero_nor_above_one(differences):
    assert 0 < p_value(differences) <= 1
