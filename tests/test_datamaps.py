"Data maps: confidence and variability against plain loops, what is always wrong, one seed refused, texts where the data is."
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import spearmanr

from distilrepro.config import UserError, load_settings
from distilrepro.datamaps import (
    always_wrong,
    data_map,
    data_maps,
    datamap_sentences,
    map_figure,
    shared_difficulty,
    shared_failures,
    texts_of,
)
from distilrepro.fidelity import SeedRuns
from distilrepro.records import create_run
from distilrepro.sources import load_split


def drawn(students=3, teachers=3, n=50, classes=3, seed=0):
    "Answers by chance; ids that are not positions."
    rng = np.random.default_rng(seed)
    logits = {m: rng.normal(size=(k, n, classes)) for m, k in (("student", students), ("teacher", teachers))}
    seeds = {m: list(range(1, len(v) + 1)) for m, v in logits.items()}
    return SeedRuns("made", 100 + np.arange(n), rng.integers(0, classes, n), seeds, logits)


def test_a_map_is_that_of_a_loop_over_runs_and_examples():
    a = drawn(4, 2)
    for model in ("student", "teacher"):
        found = data_map(a, model)
        for i, row in enumerate(found.itertuples()):
            p = [softmax(run[i])[a.label[i]] for run in a.logits[model]]
            mu = sum(p) / len(p)
            assert row.confidence == pytest.approx(mu)
            assert row.variability == pytest.approx((sum((v - mu) ** 2 for v in p) / len(p)) ** 0.5), "divided by S, as the paper has it"
            assert row.right == sum(run[i].argmax() == a.label[i] for run in a.logits[model])
        assert found.id.tolist() == a.ids.tolist() and found.label.tolist() == a.label.tolist()


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_no_point_lies_beyond_the_arc(seed, seeds):
    found = data_map(drawn(seeds, 2, 20, seed=seed), "student")
    assert (found.variability <= np.sqrt(found.confidence * (1 - found.confidence)) + 1e-12).all()
    assert found.right.between(0, seeds).all()


@pytest.mark.parametrize("students, teachers, who", [(1, 3, "student"), (3, 1, "teacher"), (1, 1, "teacher")])
def test_one_seed_is_refused_and_said_in_words(students, teachers, who):
    a = drawn(students, teachers)
    with pytest.raises(UserError, match=f"the {who} was fine-tuned on made with one seed.*needs two or more"):
        data_maps(a)
    assert len(datamap_sentences(a)) == 1 and datamap_sentences(a)[0].startswith(f"No data map: the {who}")


def test_always_wrong_means_every_run_of_both_the_surest_first():
    a = drawn(2, 2, 200, 2)
    listed = always_wrong(data_maps(a))
    expected = [i for i, y, *said in zip(a.ids, a.label, *a.said("student"), *a.said("teacher"), strict=True) if y not in said]
    assert sorted(listed.id) == expected and 0 < len(expected) < 40
    total = (listed.teacher + listed.student).tolist()
    assert total == sorted(total) and listed.index.tolist() == list(range(len(listed)))


def test_overlap_by_chance_is_met_by_unrelated_models():
    counts = shared_failures(data_maps(drawn(2, 2, 4000, 2)))
    assert counts["expected"] == pytest.approx(counts["teacher"] * counts["student"] / 4000)
    assert counts["both"] == pytest.approx(counts["expected"], rel=0.2)


def test_shared_difficulty_is_the_rank_correlation():
    a = drawn()
    maps = data_maps(a)
    value, low, high = shared_difficulty(maps, 400)
    assert value == pytest.approx(spearmanr(maps["teacher"].confidence, maps["student"].confidence)[0])
    assert low < value < high and low < 0 < high
    same = dict.fromkeys(maps, maps["teacher"])
    assert shared_difficulty(same, 50) == pytest.approx((1, 1, 1))


def test_the_picture_holds_every_example_once_and_its_legend_counts_them():
    a = drawn(3, 2, 80)
    fig = map_figure(a)
    for ax, (model, found) in zip(fig.axes, data_maps(a).items(), strict=True):
        assert sum(len(c.get_offsets()) for c in ax.collections) == 80
        runs = len(a.seeds[model])
        expected = [f"{k} of {runs} right: {(found.right == k).sum()}" for k in range(runs + 1)]
        assert [t.get_text() for t in ax.get_legend().get_texts()] == expected and f"{runs} seeds" in ax.get_title()
    assert "of made" in fig.get_label()


def test_words_and_pictures_hold_when_nobody_is_ever_wrong():
    a = drawn(2, 2, 30)
    sure = {m: np.tile(9.0 * np.eye(3)[a.label], (2, 1, 1)) for m in a.logits}
    a = SeedRuns(a.task, a.ids, a.label, a.seeds, sure)
    assert always_wrong(data_maps(a)).empty and "always right on 30 of 30" in datamap_sentences(a)[0]
    assert len(map_figure(a).axes) == 2


def test_texts_come_from_the_data_of_the_run_or_not_at_all(tmp_path):
    run = create_run(tmp_path / "toy", load_settings("quick", "smoke"), tmp_path)
    rows = load_split(run.settings.data, "mrpc", "validation").to_list()
    assert texts_of(run, "mrpc", [3, 1]) == [f"{rows[i]['sentence1']} / {rows[i]['sentence2']}" for i in (3, 1)]
    short = texts_of(run, "mrpc", [3], most=10)
    assert len(short[0]) == 10 and short[0].endswith("…")
    away = create_run(tmp_path / "away", load_settings("quick", "smoke", ("data.source=local", "data.dir=nowhere")), tmp_path)
    assert texts_of(away, "mrpc", [3, 1]) is None
