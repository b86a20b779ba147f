"Calibration: ECE by hand and on simulated truth, Brier against scikit-learn, a known temperature, halves that do not meet."
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from distilrepro.calibration import (
    BINS,
    bin_edges,
    brier_terms,
    calibration_sentences,
    calibration_table,
    ece,
    fit_temperature,
    fitting_half,
    honest_ece,
    nll,
    place_in_bins,
    reliability,
    reliability_figure,
)
from distilrepro.config import UserError
from distilrepro.fidelity import SeedRuns


def honest(n, classes=3, width=2.0, seed=0):
    "Logits, and labels drawn from exactly what they say."
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, width, (n, classes))
    return logits, (softmax(logits, -1).cumsum(-1) > rng.random((n, 1))).argmax(-1)


def answers(n=300, classes=3, scale=(1.0, 3.0), seeds=2):
    "A teacher that is honest and a student that shouts."
    runs = [honest(n, classes, seed=0)] * seeds
    logits = {m: np.stack([k * r[0] for r in runs]) for m, k in zip(("teacher", "student"), scale, strict=True)}
    return SeedRuns("made", np.arange(n), runs[0][1], {m: list(range(1, seeds + 1)) for m in logits}, logits)


def loop_ece(confidence, right, edges):
    "Guo et al. (2017), equation 3, bin by bin."
    total = 0.0
    for m, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        inside = [(low < c <= high) or (m == 0 and c == low) for c in confidence]
        if any(inside):
            acc, conf = np.mean(right[inside]), np.mean(confidence[inside])
            total += sum(inside) / len(confidence) * abs(acc - conf)
    return total


def test_ece_of_a_hand_case():
    confidence, right = np.array([0.95, 0.95, 0.55, 0.55, 0.55, 0.35]), np.array([1, 0, 1, 1, 0, 0])
    assert ece(confidence, right) == pytest.approx(2 / 6 * 0.45 + 3 / 6 * abs(2 / 3 - 0.55) + 1 / 6 * 0.35)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60), st.sampled_from(["width", "mass"]))
def test_ece_is_that_of_a_loop_and_lies_between_its_bounds(pairs, kind):
    confidence, right = (np.array(v, float) for v in zip(*pairs, strict=True))
    edges = bin_edges(confidence, kind)
    value = ece(confidence, right, kind)
    expected = abs(right.mean() - confidence.mean()) if len(edges) == 1 else loop_ece(confidence, right.astype(float), edges)
    assert value == pytest.approx(expected, abs=1e-9)
    assert abs(right.mean() - confidence.mean()) - 1e-9 <= value <= 1


def test_bins_of_equal_mass_hold_equally_many_and_never_part_equal_confidences():
    rng = np.random.default_rng(0)
    confidence = rng.random(1500)
    counts = np.bincount(place_in_bins(confidence, bin_edges(confidence, "mass")))
    assert len(counts) == BINS and counts.min() >= 99 and counts.max() <= 101
    tied = np.array([0.6] * 50 + [0.7] * 3 + [0.9] * 47)
    place = place_in_bins(tied, bin_edges(tied, "mass"))
    assert all(len(set(place[tied == v])) == 1 for v in (0.6, 0.7, 0.9))


def test_perfect_calibration_is_near_zero_and_a_shift_is_seen():
    logits, label = honest(200_000)
    chances = softmax(logits, -1)
    right = chances.argmax(-1) == label
    assert ece(chances.max(-1), right) < 0.006 and ece(chances.max(-1), right, "mass") < 0.006
    assert ece(np.clip(chances.max(-1) + 0.1, 0, 1), right) > 0.07


def test_the_honest_level_covers_honest_models_and_not_others():
    above = shouting = 0
    for seed in range(100):
        logits, label = honest(150, seed=seed)
        chances, loud = softmax(logits, -1), softmax(3 * logits, -1)
        above += ece(chances.max(-1), chances.argmax(-1) == label) > honest_ece(chances.max(-1), draws=200)[1]
        shouting += ece(loud.max(-1), loud.argmax(-1) == label) > honest_ece(loud.max(-1), draws=200)[1]
    assert above <= 14 and shouting > 90


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_brier_and_likelihood_are_those_of_scikit_learn(classes):
    logits, label = honest(200, classes)
    chances, names = softmax(logits, -1), list(range(classes))
    expected = brier_score_loss(label, chances, labels=names, scale_by_half=False)
    assert brier_terms(chances, label).mean() == pytest.approx(expected)
    assert nll(logits, label) == pytest.approx(log_loss(label, chances, labels=names))
    assert 0 <= brier_terms(chances, label).min() and brier_terms(chances, label).max() <= 2


@pytest.mark.parametrize("true", [0.4, 1.0, 2.5])
def test_a_known_temperature_is_recovered_and_no_answer_changes(true):
    logits, label = honest(30_000)
    found = fit_temperature(true * logits, label)
    assert found == pytest.approx(true, rel=0.04)
    assert (softmax(true * logits / found, -1).argmax(-1) == logits.argmax(-1)).all()


def test_a_temperature_stays_within_its_ends():
    sure, label = np.eye(2)[[0, 1, 0, 1]], np.array([0, 1, 0, 1])
    assert fit_temperature(sure, label) == pytest.approx(1 / 20, rel=0.01)
    assert fit_temperature(sure, 1 - label) == pytest.approx(20, rel=0.01)


def test_halves_depend_on_ids_alone_and_do_not_meet():
    ids = np.arange(2000)
    half = fitting_half(ids)
    assert 0.45 < half.mean() < 0.55
    order = np.random.default_rng(0).permutation(2000)
    assert (fitting_half(ids[order]) == half[order]).all() and (fitting_half(ids[:10]) == half[:10]).all()
    assert (fitting_half(ids, 1) != half).any() and abs(np.corrcoef(half, fitting_half(ids, 1))[0, 1]) < 0.1
    assert set(fitting_half(np.array(["a", "b", "c", "d", "e", "f"]))) == {True, False}
    with pytest.raises(UserError, match="1 examples cannot be split"):
        fitting_half(np.array([3]))


def test_the_table_fits_on_one_half_and_reports_the_other():
    a = answers()
    made, fit = calibration_table(a), fitting_half(a.ids)
    assert set(made.n_fit) == {fit.sum()} and set(made.n) == {(~fit).sum()} and len(made) == 8
    row = made[(made.model == "student") & made.scaled].iloc[0]
    assert row.temperature == pytest.approx(fit_temperature(a.logits["student"][0][fit], a.label[fit]))
    changed = a.label.copy()
    changed[~fit] = 0
    other = calibration_table(SeedRuns(a.task, a.ids, changed, a.seeds, a.logits))
    assert (other.temperature == made.temperature).all(), "reported labels do not reach the temperature"
    assert (other.brier != made.brier).all()


def test_scaling_helps_the_one_that_shouts_and_keeps_every_accuracy():
    made = calibration_table(answers(2000)).set_index(["model", "seed", "scaled"])
    before, after = made.loc["student", 1, False], made.loc["student", 1, True]
    assert after.temperature == pytest.approx(3, rel=0.2) and after.ece < before.ece / 2 and after.nll < before.nll
    assert before.ece > before.limit and before.accuracy == after.accuracy
    assert (made.ece <= 1).all() and (made.honest <= made.limit).all()


def test_reliability_points_are_those_of_scikit_learn():
    logits, label = honest(500, 2)
    chances = softmax(logits, -1)
    right = chances.argmax(-1) == label
    accuracy, confidence = calibration_curve(right, chances.max(-1), n_bins=BINS, strategy="uniform")
    points = reliability(chances, label)
    assert points.accuracy.tolist() == pytest.approx(accuracy.tolist()) and points.confidence.tolist() == pytest.approx(confidence.tolist())
    assert points.n.sum() == 500 and (points.low <= points.accuracy).all() and (points.accuracy <= points.high).all()


@pytest.mark.parametrize("n, scale", [(40, (1.0, 1.0)), (40, (1e-6, 1e-6)), (40, (1e4, 1e4))])
def test_pictures_and_words_hold_for_models_that_know_nothing_or_are_always_sure(n, scale):
    a = answers(n, 2, scale, seeds=1)
    fig = reliability_figure(a)
    assert len(fig.axes) == 8 and "ECE: teacher as it is" in fig.get_label()
    words = calibration_sentences(a)
    assert len(words) == 5 and "of 1 runs" in words[0] and words[1].startswith("Scaled with T =")
