"Comparisons and verdicts against published examples, closed forms, SciPy and simulations."
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as sp

from distilrepro.comparisons import (
    bca_interval,
    compare,
    leave_one_out,
    majority_p,
    mcnemar,
    permutation_p,
    seed_intervals,
    swapped_differences,
)
from distilrepro.stats import METRICS, TaskResult, accuracy, headline, holm, interval, matthews, spearman, two_way_bootstrap
from distilrepro.verdicts import failed_runs, fault_of, floor_noise, retains


def discordant(only_student, only_teacher, both=5):
    "Right and wrong of two models with given counts."
    rows = [(1, 0)] * only_student + [(0, 1)] * only_teacher + [(1, 1)] * both
    return np.array(rows, bool).T


# McNemar

@pytest.mark.parametrize("b, c, p", [(1, 7, 0.0703), (9, 2, 0.0654)])
def test_mcnemar_on_published_examples(b, c, p):
    "Fagerland, Lydersen and Laake 2013, Table 1 (exact p 0.070); the vignette of R's exact2x2 (9 and 2 discordant pairs)."
    assert mcnemar(*discordant(b, c)) == pytest.approx(p, abs=5e-5)


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_of_one_pair_is_the_binomial_test(b, c):
    expected = sp.binomtest(b, b + c, 0.5).pvalue if b + c else 1
    assert mcnemar(*discordant(b, c)) == pytest.approx(expected, abs=1e-12)


def test_pairs_of_runs_that_contradict_each_other_do_not_add_up():
    good, bad = discordant(30, 2)
    assert mcnemar(good, bad) < 1e-4
    assert mcnemar(np.stack([good, bad]), np.stack([bad, good])) == 1


@settings(max_examples=50)
@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=9))
def test_a_majority_must_be_small(p):
    combined = majority_p(p)
    assert min(p) <= combined <= 1 and majority_p(p[::-1]) == combined
    assert combined >= np.median(p) - 1e-12
    assert majority_p([p[0]] * 3) == pytest.approx(min(1, 1.5 * p[0]))


@pytest.mark.parametrize("shared", [0, 0.5, 1])
def test_the_majority_rule_keeps_its_level_whatever_the_dependence(shared):
    rng = np.random.default_rng(0)
    z = np.sqrt(shared) * rng.normal(size=(20000, 1)) + np.sqrt(1 - shared) * rng.normal(size=(20000, 3))
    level = np.mean([majority_p(p) <= 0.05 for p in sp.norm.sf(z)])
    assert level < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 20000)


# permutation

@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews_correlation", "pearson", "spearmanr", "mean"])
def test_swapping_by_weights_is_swapping_by_hand(name, monkeypatch):
    rng = np.random.default_rng(1)
    continuous = name in {"pearson", "spearmanr", "mean"}
    label = rng.normal(size=5) if continuous else np.array([0, 1, 1, 0, 1])
    s, t = (rng.normal(size=(2, 5)) if continuous else rng.integers(0, 2, (2, 5)) for _ in range(2))
    def median(rows): return np.median([METRICS[name](label, r, np.ones((1, 5)))[0] for r in rows])
    swaps = np.array(list(np.ndindex(*[2] * 5)), bool)
    every = np.array([median(np.where(w, t, s)) - median(np.where(w, s, t)) for w in swaps])
    monkeypatch.setattr("distilrepro.stats.CHUNK", 10 * 33)
    found = swapped_differences(METRICS[name], label, s, t, 3000)
    assert found.shape == (3001,) and found[0] == pytest.approx(every[0])
    assert {*np.round(found, 8) + 0.0} == {*np.round(every, 8) + 0.0}
    assert permutation_p(found) == pytest.approx(np.mean(np.abs(every) >= abs(every[0]) - 1e-12), abs=0.04)


def test_permutation_of_accuracy_is_mcnemar():
    right = discordant(4, 13, both=60)
    label = np.ones(right.shape[1], int)
    found = permutation_p(swapped_differences(accuracy, label, *(r.astype(int)[None] for r in right), 20000))
    assert found == pytest.approx(mcnemar(*right), abs=0.008)


def test_a_permutation_p_value_counts_the_data_themselves():
    assert permutation_p(np.array([1.0, 0.2, -0.3, 0.1])) == 0.25
    assert permutation_p(np.zeros(9)) == 1


def test_the_permutation_test_keeps_its_level():
    rng, p = np.random.default_rng(2), []
    for _ in range(250):
        truth = rng.normal(size=40)
        s, t = truth + rng.normal(size=(2, 3, 40))
        p.append(permutation_p(swapped_differences(spearman, truth, s, t, 99, int(rng.integers(2**31)))))
    assert 0.01 < np.mean(np.array(p) <= 0.05) < 0.1


# BCa

@pytest.mark.parametrize("metric, theirs", [
    (accuracy, lambda a, b, axis: (a == b).mean(axis)),
    (matthews, lambda a, b, axis: sp.pearsonr(a, b, axis=axis)[0]),
])
def test_bca_is_scipys(metric, theirs):
    rng = np.random.default_rng(3)
    label = (rng.random(250) < 0.7).astype(int)
    guess = np.where(rng.random(250) < 0.93, label, 1 - label)
    with np.errstate(all="ignore"):
        whole = sp.bootstrap((label, guess), theirs, paired=True, n_resamples=6000, method="BCa", rng=1).confidence_interval
    np.testing.assert_allclose(bca_interval(metric, label, guess, 6000), whole, atol=0.006)


def test_acceleration_of_a_mean_is_a_sixth_of_its_skewness():
    rng = np.random.default_rng(4)
    values = rng.exponential(size=200)
    without, size = leave_one_out(METRICS["mean"], np.ones(200), values)
    np.testing.assert_allclose(np.sort(without), np.sort((values.sum() - values) / 199))
    apart = np.average(without, weights=size) - without
    a = (apart**3).sum() / (6 * (apart**2).sum() ** 1.5)
    assert a == pytest.approx(sp.skew(values) / (6 * np.sqrt(200)))


def test_bca_of_a_perfect_run_is_a_point():
    label = np.arange(30) % 2
    assert bca_interval(accuracy, label, label) == (1, 1)


def test_percentile_and_bca_cover_accuracy():
    rng, hits = np.random.default_rng(5), np.zeros(2)
    for _ in range(400):
        guess = (rng.random(200) < 0.85).astype(int)
        label, seed = np.ones(200, int), int(rng.integers(2**31))
        plain = interval(two_way_bootstrap(accuracy, label, dict(m=guess[None]), 500, seed)["m"])
        better = bca_interval(accuracy, label, guess, 500, seed=seed)
        hits += [low <= 0.85 <= high for low, high in (plain, better)]
    assert (abs(hits / 400 - 0.95) < 0.035).all()


# one row a task

def made(task, label, **runs):
    "A task's result from predictions, seeds counted from 1."
    score = headline(task)
    scores = {m: pd.Series([score(label, p, np.ones((1, len(label))))[0] for p in ps], range(1, len(ps) + 1)) for m, ps in runs.items()}
    return TaskResult(task, "validation", len(label), 0.0, scores, two_way_bootstrap(score, label, runs), label, runs)


def test_compare_finds_what_is_there():
    rng = np.random.default_rng(6)
    label = rng.integers(0, 2, 400)
    def runs(skill, seeds): return np.stack([np.where(rng.random(400) < skill, label, 1 - label) for _ in range(seeds)])
    alike = runs(0.8, 3)
    found = dict(sst2=made("sst2", label, teacher=runs(0.95, 3), student=runs(0.75, 2)))
    found["rte"] = made("rte", label, teacher=alike, student=alike)
    found["wnli"] = TaskResult("wnli", "validation", 71, 0.56, dict(student=pd.Series([0.5], [1])), {})
    table = compare(found)
    assert table.index.tolist() == ["sst2", "rte"]
    assert (table.loc["sst2", ["mcnemar", "permutation", "bootstrap", "holm"]] < 0.01).all() and table.high["sst2"] < 0
    assert table.loc["rte", "effect"] == 0 and table.loc["rte", "permutation"] == 1 and table.seeds.tolist() == [2, 3]
    np.testing.assert_allclose(table.holm, holm(table.bootstrap.to_numpy()))
    flipped = compare(found, "teacher", "student")
    np.testing.assert_allclose(flipped.effect, -table.effect)
    assert compare(found, "nobody").empty


def test_no_right_and_wrong_where_there_is_none():
    rng = np.random.default_rng(7)
    gold = rng.random(100)
    for task, label in dict(stsb=gold, squad=np.ones(100)).items():
        row = compare({task: made(task, label, teacher=rng.random((2, 100)), student=rng.random((2, 100)))}).iloc[0]
        assert np.isnan(row.mcnemar) and 0 < row.permutation <= 1 and 0 < row.bootstrap <= 1


def test_runs_without_predictions_have_no_interval():
    bare = TaskResult("rte", "validation", 277, 0.53, dict(student=pd.Series([0.6, 0.7], [3, 4])), {})
    found = seed_intervals(bare)
    assert found.seed.tolist() == [3, 4] and found.low.isna().all()


# verdicts

def test_retains_on_normal_data_is_its_closed_form():
    quantiles = sp.norm.ppf((np.arange(1999) + 0.5) / 1999)
    for estimate in np.linspace(-0.04, 0.03, 29):
        found = retains(0.97 * 0.8 + estimate + 0.01 * quantiles, np.full(1999, 0.8))
        bounds = estimate + np.array([-1, 1]) * 0.01 * sp.norm.ppf(0.95)
        np.testing.assert_allclose([found.low, found.high], bounds, atol=1e-4)
        assert found.verdict == ("shown" if bounds[0] > -0.005 else "refuted" if bounds[1] < -0.005 else "undecided")


def test_share_and_margin_are_the_users():
    student, teacher = np.full(50, 0.78), np.full(50, 0.8)  # 97.5 %
    assert retains(student, teacher).verdict == "shown" and retains(student, teacher).equivalent
    assert retains(student, teacher, share=0.99, margin=0).verdict == "refuted"
    assert retains(student, teacher, share=0.99, margin=0.02).verdict == "shown"
    assert not retains(student, teacher, share=0.9).equivalent, "keeping more is no equivalence"


def test_equivalence_at_its_edge_errs_in_five_percent():
    rng = np.random.default_rng(8)
    quantiles = sp.norm.ppf((np.arange(499) + 0.5) / 499)
    found = [retains(0.97 + rng.normal(0.02, 0.005) + 0.005 * quantiles, np.ones(499), margin=0.02) for _ in range(4000)]
    assert np.mean([f.equivalent for f in found]) == pytest.approx(0.05, abs=0.012)


def result(task, scores, n, floor):
    "A task's result from scores alone."
    return TaskResult(task, "validation", n, floor, dict(student=pd.Series(scores, range(1, len(scores) + 1), dtype=float)), {})


def test_noise_at_the_floor():
    assert floor_noise(result("rte", [], 400, 0.5)) == pytest.approx(0.025)
    assert floor_noise(result("cola", [], 1043, 0.0)) == pytest.approx(1 / np.sqrt(1042)) == floor_noise(result("stsb", [], 1043, 0.0))


@pytest.mark.parametrize("task, scores, n, floor, bad", [
    ("rte", [0.66, 0.53, 0.68], 277, 0.53, {2: "at the floor"}),
    ("cola", [0.5, 0.0, 0.48], 1043, 0.0, {2: "at the floor"}),
    ("cola", [0.5, 0.2, 0.48], 1043, 0.0, {2: "far below its siblings"}),
    ("cola", [0.5, 0.3, 0.48], 1043, 0.0, {}),  # more than half: weak, not failed
    ("cola", [0.5, 0.2], 1043, 0.0, {}),  # one sibling is no jury
    ("sst2", [0.91, 0.9, 0.905], 872, 0.51, {}),
    ("wnli", [0.6, 0.62, 0.7], 71, 0.563, {1: "at the floor", 2: "at the floor"}),
    ("stsb", [0.9, -0.6, 0.89], 1500, 0.0, {2: "at the floor"}),
])
def test_failed_runs_and_their_reasons(task, scores, n, floor, bad):
    found = failed_runs({task: result(task, scores, n, floor)})
    assert dict(zip(found.seed, found.reason, strict=True)) == bad


def test_a_run_that_knows_nothing_is_caught_in_95_of_100_cases():
    rng, coin = np.random.default_rng(9), result("rte", [], 277, 0.5)
    caught = [fault_of(coin, right / 277, []) == "at the floor" for right in rng.binomial(277, 0.5, 4000)]
    assert np.mean(caught) == pytest.approx(0.95, abs=0.015)
