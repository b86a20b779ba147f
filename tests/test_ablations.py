"Table 4 from hand-made records: what was changed is read from settings, deltas and macros against arithmetic, holes named."
from itertools import product

import numpy as np
import pandas as pd
import pytest

from distilrepro.ablations import (
    REFERENCE,
    ablation_figure,
    ablation_findings,
    ablation_table,
    budget,
    deltas,
    held_out,
    holes,
    published_delta,
    variants,
)
from distilrepro.config import load_settings
from distilrepro.records import create_run, write_predictions, write_records
from distilrepro.tables import published

N = 200
STUDENTS = ("{triple: {}, x: {loss: {w_ce: 0}}, y: {loss: {w_cos: 0}}, z: {loss: {w_mlm: 0}}, r: {student: {init: random}}, "
            "hot: {loss: {w_ce: 0, temperature: 4}}, both: {loss: {w_ce: 0}, student: {init: random}}}")
CONTROL = "{triple: {}, copied: {distil: {epochs: 0, min_updates: 0}}, long: {distil: {epochs: 7}}}"


def answers(run, name, task, seed, wrong):
    "Write predictions of RTE, the first `wrong` of them wrong, and their accuracy."
    label = np.arange(N) % 2
    said = np.where(np.arange(N) < wrong, 1 - label, label)
    common = dict(stage="finetune", model=name, task=task, seed=seed, split="validation", n=N)
    score = [dict(metric="score", value=1 - wrong / N), dict(metric="floor", value=0.5)]
    write_records(run, f"finetune-{name}-{task}-{seed}", score, **common)
    write_predictions(run, f"finetune-{name}-{task}-{seed}", pd.DataFrame(dict(id=range(N), label=label, prediction=said)))


def made_up(folder, updates=None):
    "Three seeds of two tasks measured in accuracy; `z` lacks a task, `r` everything."
    sets = (f"ablation={{students: {STUDENTS}, tasks: [rte, qnli], seeds: [1, 2, 3]}}", "grid.tasks=[rte,qnli]")
    run = create_run(folder, load_settings("sanh2019", "smoke", sets), folder)
    wrong = dict(triple=(40, 50, 45), x=(80, 90, 100), y=(44, 46, 48), hot=(10, 20, 30), both=(70, 70, 70))
    for (name, by_seed), task in product(wrong.items(), ("rte", "qnli")):
        for seed, k in enumerate(by_seed, 1):
            answers(run, name, task, seed, k + 4 * (task == "qnli"))
    answers(run, "z", "rte", 1, 40)
    for name in ("triple", *wrong):
        rows = [dict(metric=m, value=v / (1 + step), step=step) for step in (0, (updates or {}).get(name, 30))
                for m, v in dict(mlm_loss=62, kl=31).items()]
        write_records(run, f"distil-{name}", rows, stage="distil", model=name, task="mlm", split="heldout", n=500)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_up(tmp_path_factory.mktemp("ablation") / "made")


def test_what_was_changed_comes_from_the_settings(run):
    who = variants(run)
    assert who.losses["x"] == ("mlm", "cos") and who.losses["y"] == ("ce", "mlm") and who.init["r"] == "random"
    assert who.other.to_dict() == dict.fromkeys(who.index, "") | dict(hot="loss.temperature 4.0")


def test_a_published_delta_stands_only_beside_the_student_it_is_about(run):
    shown = variants(run).published.dropna().to_dict()
    assert shown == dict(x=-2.96, y=-1.46, z=-0.31, r=-3.69), "not `hot`, whose temperature differs, nor `both`"
    assert published_delta(("ce",), "teacher") != published_delta(("ce",), "teacher"), "NaN"
    cells = {row[0].split("\n")[1]: row[-1] for row in ablation_table(run).blocks[0][1]}
    assert sorted(c for c in cells.values() if c != "–") == sorted(f"{d}" for d in published("ablation_delta_macro").delta)
    assert published("ablation_delta_macro").source.unique().tolist() == ["S3"]


def test_macro_and_delta_against_hand_computation(run):
    m = deltas(run)
    assert m.macro["triple"] == pytest.approx(1 - (45 + 49) / 2 / N) and m.macro["x"] == pytest.approx(1 - (90 + 94) / 2 / N)
    assert m.delta["x"] == pytest.approx(-45 / N) and m.delta["y"] == pytest.approx(-1 / N) and m.delta[REFERENCE] == 0
    assert m.delta["hot"] == pytest.approx(25 / N) and set(m.index) == {"triple", "x", "y", "hot", "both"}
    def name(label): return label.split("(")[1].split(")")[0] if "(" in label else label.split("\n")[1]
    text = {name(row[0]): row[5].split("\n")[0] for row in ablation_table(run).blocks[0][1]}
    assert text == dict(triple="0", x="-22.50", y="-0.50", z="missing", r="missing", hot="12.50", both="-12.50")


def test_deltas_are_judged_together_and_read_by_rule(run):
    m = deltas(run)
    assert m.reads.to_dict() == dict(triple="", x="lower", y="not told apart", hot="higher", both="lower")
    assert ((m.delta_low <= m.delta) & (m.delta <= m.delta_high))[1:].all() and np.isnan(m.p[REFERENCE])
    said = ablation_findings(run).sentences
    assert any(s.startswith("Lower, against triple: MLM + cosine (-22.50)") for s in said)
    assert "Of 2 published deltas 1 are told apart from 0 here, with the same sign." in said


def test_intervals_are_of_paired_draws(tmp_path):
    "With one seed and the same answers there is no difference in any draw, whatever the examples."
    sets = ("ablation={students: {triple: {}, x: {loss: {w_ce: 0}}}, tasks: [rte], seeds: [1]}", "grid.tasks=[rte]")
    run = create_run(tmp_path / "twins", load_settings("sanh2019", "smoke", sets), tmp_path)
    for name in ("triple", "x"):
        answers(run, name, "rte", 1, 50)
    m = deltas(run).loc["x"]
    assert (m.delta_low, m.delta_high, m.p, m.reads) == (0, 0, 1, "not told apart") and m.macro_low < m.macro_high
    assert any(n.startswith("One seed") for n in ablation_table(run).notes)


def test_holes_are_named_with_the_command_that_fills_them(run):
    assert set(holes(run)) == {
        "distillation of z", "distillation of r", "z on RTE (1 of 3 seeds)", "z on QNLI (0 of 3 seeds)", "r on RTE (0 of 3 seeds)",
        "r on QNLI (0 of 3 seeds)"}
    table = ablation_table(run)
    row = next(r for r in table.blocks[0][1] if "\nr" in r[0])
    assert row[2:] == ["missing"] * 6 + ["-3.69"] and "distilrepro reproduce --preset sanh2019" in table.notes[-1]


def test_without_the_reference_there_is_no_delta(tmp_path):
    sets = ("ablation={students: {x: {loss: {w_ce: 0}}}, tasks: [rte], seeds: [1]}", "grid.tasks=[rte]")
    run = create_run(tmp_path / "alone", load_settings("sanh2019", "smoke", sets), tmp_path)
    answers(run, "x", "rte", 1, 50)
    assert deltas(run).macro["x"] == 0.75 and np.isnan(deltas(run).delta["x"])
    assert ablation_table(run).blocks[0][1][0][5:8] == ["–"] * 3


def test_a_run_without_ablation_shows_the_papers_variants_as_missing(tmp_path):
    run = create_run(tmp_path / "bare", load_settings("sanh2019", "smoke"), tmp_path)
    table = ablation_table(run)
    assert [row[2:] for row in table.blocks[0][1]] == [["missing"] * 6 + [f"{d}"] for d in published("ablation_delta_macro").delta]
    assert table.notes[-1].endswith("distilrepro reproduce --preset ablation") == ablation_findings(run).sentences[0].endswith("ablation")
    assert not table.toy and "published -2.96" in ablation_figure(run).get_label()


def test_budget_is_counted_and_unequal_budgets_are_said(run, tmp_path):
    assert held_out(run).loc["x", ["mlm_loss", "kl", "step"]].tolist() == [2, 1, 30]
    assert "5 of 7 students; the same text for all, 960 sequences up to 64 tokens, in 30 updates." in budget(run)
    said = budget(made_up(tmp_path / "uneven", dict(x=61)))
    assert "NOT the same text, 960 to 1,952 sequences" in said and "30 updates (x: 61)" in said


@pytest.mark.parametrize("tiny, same", [(27, True), (26, False), (435, False)])
def test_the_same_text_in_fewer_updates_is_told_from_less_text(tmp_path, tiny, same):
    "435 micro-batches of 16 are 27 updates of 256 sequences and a rest that is not full."
    students = "{triple: {distil: {batch: 16, accumulation: 1}}, tiny: {distil: {batch: 16, accumulation: 16}}}"
    run = create_run(tmp_path / "run", load_settings("sanh2019", "smoke", (f"ablation={{students: {students}}}",)), tmp_path)
    for name, step in dict(triple=435, tiny=tiny).items():
        rows = [dict(metric="kl", value=1.0, step=step)]
        write_records(run, f"distil-{name}", rows, stage="distil", model=name, task="mlm", split="heldout", n=500)
    assert ("the same text for all, 6,960 sequences" in budget(run)) == same and ("NOT the same text" in budget(run)) != same
    assert (f"435 updates (tiny: {tiny})" in budget(run)) == (tiny != 435)


def test_a_control_without_training_is_said_and_not_counted(tmp_path):
    settings = load_settings("sanh2019", "smoke", (f"ablation={{students: {CONTROL}, distil: {{epochs: 2}}}}",))
    run = create_run(tmp_path / "run", settings, tmp_path)
    assert variants(run).other.to_dict() == dict(triple="", copied="no training", long="distil.epochs 7.0")
    assert not variants(run).published.notna().any(), "the paper has no such student"
    for name, step in dict(triple=30, copied=0, long=30).items():
        rows = [dict(metric="kl", value=1.0, step=k) for k in {0, step}]
        write_records(run, f"distil-{name}", rows, stage="distil", model=name, task="mlm", split="heldout", n=500)
    assert "the same text for all" in budget(run) and budget(run).endswith("in 30 updates. Without any training: copied.")


def test_the_picture_has_a_row_for_every_student_but_the_reference(run):
    fig = ablation_figure(run)
    labels = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert len(labels) == 6 and labels[-1] == "MLM + cosine" and "MLM + cosine -22.50 (published -2.96)" in fig.get_label()
