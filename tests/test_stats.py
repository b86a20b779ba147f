"""Statistics against independent references: scikit-learn and SciPy on resamples written out, closed forms, hand cases."""
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats as sp
from sklearn import metrics as sk

from distilrepro.config import load_settings
from distilrepro.records import create_run, write_predictions, write_records
from distilrepro.stats import (
    METRICS,
    accuracy,
    chunks,
    draw_counts,
    group_examples,
    headline,
    holm,
    interval,
    matthews,
    p_value,
    pearson,
    retention,
    spearman,
    task_results,
    two_way_bootstrap,
    weighted_ranks,
)

MODELS = ("teacher", "student", "student_d")
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


def test_interval_of_a_full_test_set_is_the_binomial_one():
    rng = np.random.default_rng(4)
    label = rng.integers(0, 2, 25000)
    guess = np.where(rng.random(25000) < 0.9, label, 1 - label)
    low, high = interval(two_way_bootstrap(accuracy, label, dict(student=guess[None]))["student"])
    right = (guess == label).mean()
    assert high - low == pytest.approx(2 * 1.96 * (right * (1 - right) / 25000) ** 0.5, rel=0.15)


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


# groups of equal examples

@settings(max_examples=60, deadline=None)
@given(hnp.arrays(int, (4, 30), elements=st.integers(-1, 1)))
def test_groups_are_the_distinct_columns(table):
    group, one = group_examples(table[0], table[1:])
    columns = [tuple(c) for c in table.T]
    assert len(one) == len(set(columns)) and sorted(set(group)) == list(range(len(one)))
    assert all(columns[one[g]] == c for g, c in zip(group, columns, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_every_metric_is_the_same_on_groups_and_on_examples(seed):
    rng = np.random.default_rng(seed)
    label, guess = rng.integers(0, 2, 60), rng.integers(0, 2, 60)
    group, one = group_examples(label, guess)
    alone = draw_counts(60, 5, rng)
    summed = alone @ np.eye(len(one))[group]
    for metric in METRICS.values():
        np.testing.assert_allclose(metric(label[one], guess[one], summed), metric(label, guess, alone), atol=1e-10)


@pytest.mark.parametrize("groups", [3, 20])  # by a multinomial, and by drawing examples
def test_counts_of_groups_have_the_moments_of_a_multinomial(groups):
    rng = np.random.default_rng(groups)
    group = np.concatenate([np.arange(groups), rng.integers(0, groups, 90 - groups)])
    size, drawn = np.bincount(group), draw_counts(90, 20000, rng, group)
    assert drawn.shape == (20000, groups) and (drawn.sum(1) == 90).all()
    np.testing.assert_allclose(drawn.mean(0), size, atol=5 * np.sqrt(size.max() / 20000))
    np.testing.assert_allclose(np.cov(drawn.T), np.diag(size) - np.outer(size, size) / 90, atol=0.06 * size.max())


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews_correlation"])
def test_the_bootstrap_has_the_distribution_of_naive_resampling(name):
    rng = np.random.default_rng(7)
    label = rng.integers(0, 2, 150)
    guess = np.where(rng.random(150) < 0.8, label, 1 - label)
    rows = [rng.integers(0, 150, 150) for _ in range(4000)]
    naive = [METRICS[name](label[r], guess[r], np.ones((1, 150)))[0] for r in rows]
    drawn = two_way_bootstrap(METRICS[name], label, dict(m=guess[None]), 4000)["m"]
    assert drawn.mean() == pytest.approx(np.mean(naive), abs=5 * np.std(naive) / np.sqrt(2000))
    assert drawn.std() == pytest.approx(np.std(naive), rel=0.08)
    assert sp.ks_2samp(drawn, naive).pvalue > 1e-3


def test_accuracy_of_one_seed_has_the_binomial_variance():
    label, guess = np.ones(400, int), (np.arange(400) < 300).astype(int)
    drawn = two_way_bootstrap(accuracy, label, dict(m=guess[None]), 20000)["m"]
    assert drawn.std() == pytest.approx(np.sqrt(0.75 * 0.25 / 400), rel=0.03)


@given(st.integers(0, 5000), st.integers(1, 10**7))
def test_chunks_add_up(rows, width):
    parts = chunks(rows, width)
    assert sum(parts) == rows and all(p == 1 or 0 < p * width <= 2**21 for p in parts)


def test_pearson_is_zero_for_a_resample_that_drew_a_constant():
    x, y = np.array([0.1, 0.1, 0.9, 4.0]), np.array([1.0, 2.0, 3.0, 5.0])
    assert pearson(x, y, np.array([[2.0, 2, 0, 0], [0, 0, 0, 4], [1, 1, 1, 1]])).tolist()[:2] == [0, 0]


# from a run folder

@pytest.fixture
def folder(tmp_path):
    return create_run(tmp_path / "demo", load_settings("cornell", "smoke"), tmp_path)


def store(run, model, task, seed, score, table, floor=0.5):
    "Write one unit as the fine-tuning stage does."
    common = dict(stage="finetune", model=model, task=task, split="validation", seed=seed, n=len(table))
    unit = f"finetune-{model}-{task}-{seed}"
    write_records(run, unit, [dict(metric="score", value=score), dict(metric="floor", value=floor)], **common)
    write_predictions(run, unit, pd.DataFrame(table))


def squad(f1):
    "Stored predictions of SQuAD."
    n = len(f1)
    answers = [json.dumps([f"gold {i}"]) for i in range(n)]
    return pd.DataFrame(dict(id=[f"q{i}" for i in range(n)], label=answers, prediction=["text"] * n, exact_match=np.floor(f1), f1=f1))


def test_squad_is_the_mean_of_its_questions(folder):
    rng = np.random.default_rng(0)
    for model, seeds in dict(teacher=(1, 2, 3), student=(1, 2)).items():
        for seed in seeds:
            f1 = rng.choice([0, 0.5, 2 / 3, 1], 200)
            store(folder, model, "squad", seed, f1.mean(), squad(f1).sample(frac=1, random_state=seed), 0.0)
    found = task_results(folder, MODELS)["squad"]
    assert {m: p.shape for m, p in found.predictions.items()} == dict(student=(2, 200), teacher=(3, 200))
    np.testing.assert_allclose(found.predictions["teacher"].mean(1), found.scores["teacher"])
    low, high = found.interval("student")
    assert low < found.median("student") < high


def answers(rng, label):
    "A guess that is mostly right."
    return np.where(rng.random(len(label)) < 0.8, label, 1 - label)


def test_only_the_models_asked_for_are_compared_and_refused_units_left_out(folder):
    rng, label = np.random.default_rng(1), np.arange(100) % 2
    for model, seeds in dict(teacher=(1, 2), student=(1, 2), student_d=(2,), no_cos=(1, 2, 3)).items():
        for seed in seeds:
            guess = answers(rng, label)
            store(folder, model, "sst2_resplit", seed, (guess == label).mean(), dict(id=range(100), label=label, prediction=guess))
    refused = dict(stage="finetune", model="student_d", split="validation", seed=1, n=100)
    for task in ("sst2_resplit", "wnli"):
        rows = [dict(metric=k, value=v) for k, v in dict(refused=0.5, floor=0.5).items()]
        write_records(folder, f"finetune-student_d-{task}-1", rows, **refused, task=task)
    found = task_results(folder, MODELS)
    assert list(found) == ["sst2_resplit"]
    assert {m: list(s.index) for m, s in found["sst2_resplit"].scores.items()} == dict(student=[1, 2], student_d=[2], teacher=[1, 2])
    assert {m: list(s.index) for m, s in task_results(folder, ["no_cos"])["sst2_resplit"].scores.items()} == dict(no_cos=[1, 2, 3])
    assert found["sst2_resplit"].samples.keys() == found["sst2_resplit"].predictions.keys() == found["sst2_resplit"].scores.keys()
    np.testing.assert_array_equal(found["sst2_resplit"].label, label)


def test_predictions_for_other_examples_are_refused(folder):
    rng, label = np.random.default_rng(2), np.arange(60) % 2
    for model, ids in dict(student=range(60), teacher=range(1, 61)).items():
        guess = answers(rng, label)
        store(folder, model, "rte", 1, (guess == label).mean(), dict(id=ids, label=label, prediction=guess))
    with pytest.raises(RuntimeError, match="other examples .* fine-tune rte again"):
        task_results(folder, MODELS)
