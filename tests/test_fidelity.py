"Agreement, kappa, KL and churn against plain loops and scikit-learn; what is left when seeds are taken out; stored predictions."
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from distilrepro.config import UserError, load_settings
from distilrepro.fidelity import (
    PAIRS,
    SeedRuns,
    agreement_rows,
    chance_agreement,
    churn,
    divergence,
    excess_churn,
    fidelity_sentences,
    fidelity_table,
    line_up,
    read_answers,
    run_pairs,
)
from distilrepro.records import create_run, write_predictions


def drawn(students=3, teachers=3, n=60, classes=3, seed=0):
    "Answers by chance."
    rng = np.random.default_rng(seed)
    logits = {m: rng.normal(size=(k, n, classes)) for m, k in (("student", students), ("teacher", teachers))}
    return SeedRuns("made", np.arange(n), rng.integers(0, classes, n), {m: list(range(1, len(v) + 1)) for m, v in logits.items()}, logits)


def stored(label, logits, ids=None):
    "A table as `write_predictions` stores it."
    table = pd.DataFrame(dict(id=range(len(label)) if ids is None else ids, label=label, prediction=np.argmax(logits, -1)))
    return table.assign(**{f"logit_{c}": np.array(logits, "float32")[:, c] for c in range(np.shape(logits)[1])})


@pytest.fixture
def run(tmp_path):
    "A run whose models answered with some seeds; predictions of other tasks and models lie beside them."
    run, a = create_run(tmp_path / "run", load_settings("quick", "smoke"), tmp_path), drawn(2, 11, 30)
    for model, logits in a.logits.items():
        for seed, one in enumerate(logits, 1):
            write_predictions(run, f"finetune-{model}-sst2-{seed}", stored(a.label, one).sample(frac=1, random_state=seed))
    write_predictions(run, "finetune-student-sst2_resplit-1", stored([0, 1], [[0, 1], [1, 0]]))
    write_predictions(run, "finetune-student_d-sst2-1", stored([0, 1], [[0, 1], [1, 0]]))
    write_predictions(run, "finetune-student-stsb-1", pd.DataFrame(dict(id=[0], label=[2.5], prediction=[2.0], score=[2.0])))
    write_predictions(run, "finetune-teacher-stsb-1", pd.DataFrame(dict(id=[0], label=[2.5], prediction=[2.0], score=[2.0])))
    write_predictions(run, "finetune-student-cola-1", stored([0, 1], [[0, 1], [1, 0]]))
    return run, a


def test_stored_predictions_are_read_in_one_order_with_all_seeds_and_no_other_task(run):
    run, a = run
    found = read_answers(run, "sst2")
    assert found.seeds == {"student": [1, 2], "teacher": list(range(1, 12))}, "seeds as numbers, 2 before 11"
    assert (found.ids == np.arange(30)).all() and (found.label == a.label).all() and found.classes == 3
    for model, logits in a.logits.items():
        assert np.allclose(found.logits[model], logits, atol=1e-6) and (found.said(model) == logits.argmax(-1)).all()
        assert np.allclose(found.chances(model).sum(-1), 1)


@pytest.mark.parametrize("task, words", [("stsb", "no logits"), ("cola", "its teacher on cola"), ("rte", "its student on rte")])
def test_what_cannot_be_compared_is_refused_with_the_reason(run, task, words):
    with pytest.raises(UserError, match=words):
        read_answers(run[0], task)


def test_answers_to_other_examples_or_with_other_labels_are_refused():
    one = stored([0, 1], [[0, 1], [1, 0]])
    for other in (one.assign(id=[0, 5]), one.assign(label=[1, 1]), one.drop(columns="logit_1")):
        with pytest.raises(UserError, match="teacher on made answered other examples"):
            line_up("made", dict(student={1: one}, teacher={1: one, 2: other}))


def test_pairs_of_one_seed_and_of_different_seeds_are_kept_apart():
    a = drawn(2, 3)
    assert run_pairs(a, *PAIRS[0]) == [(0, 0), (1, 1)]
    assert run_pairs(a, *PAIRS[1]) == [(0, 1), (0, 2), (1, 0), (1, 2)]
    assert run_pairs(a, *PAIRS[2]) == [(0, 1)] and run_pairs(a, *PAIRS[3]) == [(0, 1), (0, 2), (1, 2)]


@pytest.mark.parametrize("pair", PAIRS)
def test_agreement_kappa_and_kl_are_those_of_a_plain_loop(pair):
    a = drawn(2, 3)
    for (i, j), row in zip(run_pairs(a, *pair), agreement_rows(a, *pair).itertuples(), strict=True):
        x, y = a.said(pair[0])[i], a.said(pair[1])[j]
        assert row.agreement == pytest.approx(sum(u == v for u, v in zip(x, y, strict=True)) / 60)
        assert row.kappa == pytest.approx(cohen_kappa_score(x, y))
        assert row.kappa == pytest.approx((row.agreement - row.chance) / (1 - row.chance))
        q, p = a.chances(pair[0])[i], a.chances(pair[1])[j]
        one_way = sum(v * math.log(v / u) for u, v in zip(q.ravel(), p.ravel(), strict=True)) / 60
        other_way = sum(u * math.log(u / v) for u, v in zip(q.ravel(), p.ravel(), strict=True)) / 60
        assert row.kl == pytest.approx((one_way + other_way) / 2 if pair[0] == pair[1] else one_way)


def test_kl_stays_finite_where_probabilities_underflow():
    logits = np.array([[[0.0, 2000.0]]])
    a = SeedRuns("made", np.array([0]), np.array([0]), dict(student=[1], teacher=[1]), dict(student=logits, teacher=-logits))
    assert divergence(a, *PAIRS[0])[0, 0] == pytest.approx(2000)


def test_chance_is_the_share_expected_of_shuffled_answers():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 3, 300), rng.integers(0, 2, 300)
    shuffled = np.mean([(x == rng.permutation(y)).mean() for _ in range(2000)])
    assert chance_agreement(x, y, 3) == pytest.approx(shuffled, abs=0.003)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(1, 20))
def test_disagreement_less_that_within_is_half_the_squared_distance(seed, classes, n):
    "Over all ordered pairs with repetition the identity is exact."
    rng = np.random.default_rng(seed)
    s, t = rng.integers(0, classes, (4, n)), rng.integers(0, classes, (5, n))
    def apart(x, y): return (x[:, None] != y[None]).mean((0, 1))
    p, q = (np.eye(classes)[v].mean(0) for v in (s, t))
    assert np.allclose(apart(s, t) - (apart(s, s) + apart(t, t)) / 2, ((p - q) ** 2).sum(-1) / 2)


def test_excess_is_the_difference_of_means_and_unbiased():
    a = drawn(3, 3, 40)
    across, own, theirs = (churn(a, *pair).mean() for pair in PAIRS[1:])
    value, low, high = excess_churn(a)
    assert value == pytest.approx(across - (own + theirs) / 2) and low <= value <= high
    assert np.mean([excess_churn(drawn(2, 2, 40, seed=s), 20)[0] for s in range(60)]) == pytest.approx(0, abs=0.02)


def test_models_that_differ_by_more_than_seeds_are_told_from_those_that_do_not():
    rng, n = np.random.default_rng(0), 200
    habit = {m: rng.normal(size=(n, 2)) for m in ("student", "teacher")}
    def runs(means): return {m: v + rng.normal(0, 0.3, (3, n, 2)) for m, v in means.items()}
    three = dict(student=[1, 2, 3], teacher=[1, 2, 3])
    apart, alike = (SeedRuns("made", np.arange(n), np.zeros(n, int), three, runs(means))
                    for means in (habit, dict.fromkeys(habit, habit["teacher"])))
    assert excess_churn(apart)[1] > 0.2 and excess_churn(alike)[1] < 0 < excess_churn(alike)[2]
    assert "more than seeds explain" in fidelity_sentences(apart)[-1] and "not shown" in fidelity_sentences(alike)[-1]


def test_a_model_against_itself_agrees_fully_and_the_interval_says_so():
    a = drawn(1, 1)
    row = fidelity_table(SeedRuns(a.task, a.ids, a.label, a.seeds, dict.fromkeys(a.logits, a.logits["student"]))).iloc[0]
    assert [row.agreement, row.agreement_low, row.agreement_high, row.kappa] == [1, 1, 1, 1] and row.kl == pytest.approx(0)


def test_one_seed_and_constant_answers_are_said_in_words():
    label, flat = np.array([0, 1, 1]), np.tile([1.0, 0.0], (1, 3, 1))
    a = SeedRuns("made", np.arange(3), label, dict(student=[1], teacher=[1]), dict(student=flat, teacher=flat))
    words = " ".join(fidelity_sentences(a))
    assert "agreement says nothing" in words and "no measure of the noise of seeds" in words
    assert np.isnan(fidelity_table(a).kappa[0]) and np.isnan(excess_churn(a)).all()


def test_one_pair_of_runs_with_undefined_kappa_makes_the_mean_undefined():
    a = drawn(2, 2, 20)
    for m in a.logits:
        a.logits[m][0] = [1, 0, 0]
    assert np.isnan(fidelity_table(a).kappa[0]) and not np.isnan(fidelity_table(a).agreement[0])
