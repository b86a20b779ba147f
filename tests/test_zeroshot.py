"The SST-2 poster's matrix from hand-made records: floors, the test against them, holes, and what is not zero-shot."
import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from distilrepro.config import load_settings
from distilrepro.records import create_run, write_predictions, write_records
from distilrepro.tables import reference
from distilrepro.zeroshot import above_floor, matrix, resplit_table, sources, zeroshot_figure, zeroshot_findings, zeroshot_table

FLOOR = dict(mrpc=0.684, qqp=0.632, sst2=0.51)


def made_up(folder, right, targets="[sst2,mrpc,qqp]", models=("teacher", "student")):
    "A run on the re-split SST-2 asked about three tasks; `right` by task."
    sets = ("grid.tasks=[sst2_resplit,stsb]", "grid.seeds=[1,2]", f"zeroshot.targets={targets}")
    run = create_run(folder, load_settings("sanh2019", "smoke", sets), folder)
    for model in models:
        rows = [dict(task=t, metric=k, value=v) for t, r in right.items() for k, v in dict(accuracy=r, score=r, floor=FLOOR[t]).items()]
        common = dict(model=model, trained_on="sst2_resplit", split="validation", seed=1, n=1000)
        write_records(run, f"zeroshot-{model}", rows, stage="zeroshot", **common)
        for seed, wrong in ((1, 10), (2, 30)):
            label = np.arange(100) % 2
            said = np.where(np.arange(100) < wrong, 1 - label, label)
            unit, common = f"finetune-{model}-sst2_resplit-{seed}", dict(task="sst2_resplit", seed=seed, n=100, split="test")
            write_records(run, unit, [dict(metric="score", value=1 - wrong / 100), dict(metric="floor", value=0.5)], stage="finetune",
                          model=model, **common)
            write_predictions(run, unit, pd.DataFrame(dict(id=range(100), label=label, prediction=said)))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_up(tmp_path_factory.mktemp("zero") / "made", dict(sst2=0.9, mrpc=0.69, qqp=0.7))


def test_the_floor_test_is_the_binomial_tail_adjusted_by_holm():
    p = above_floor([0.69, 0.7, 0.5], [1000, 1000, 10], [0.684, 0.632, 0.5])
    tails = [binom.sf(689, 1000, 0.684), binom.sf(699, 1000, 0.632), binom.sf(4, 10, 0.5)]
    assert p.tolist() == pytest.approx([2 * tails[0], 3 * tails[1], max(2 * tails[0], tails[2])])


def test_above_the_floor_is_not_enough_to_count(run):
    cells = matrix(run).set_index(["model", "task"])
    assert cells.accuracy["student", "mrpc"] > cells.floor["student", "mrpc"] and not cells.above["student", "mrpc"]
    assert cells.above["student", "qqp"] and cells.above["teacher", "qqp"]
    table = zeroshot_table(run)
    rows = dict(zip([c.split("\n")[0] for c in table.columns], table.blocks[1][1][0], strict=True))
    assert rows["MRPC"] == "69.0\nnot above the floor" and rows["QQP"] == "70.0"


def test_own_and_seen_tasks_are_shown_but_never_count(run):
    cells = matrix(run).set_index(["model", "task"])
    assert cells.accuracy["student", "sst2_resplit"] == 0.9, "seed 1, from its predictions"
    for task, text in (("sst2_resplit", "own task"), ("sst2", "seen in training")):
        assert np.isnan(cells.p["student", task]) and not cells.above["student", task]
        assert any(text in c for c in zeroshot_table(run).blocks[1][1][0])
    assert any("not zero-shot" in n for n in zeroshot_table(run).notes) and "over 4 cells" in zeroshot_table(run).notes[1]
    said = zeroshot_findings(run).sentences[0]
    assert said.startswith("Student: 1 of 2 zero-shot cells are above the floor: SST-2, re-split to QQP (70.0")


def test_floors_and_n_stand_beside_the_cells(run):
    table = zeroshot_table(run)
    assert [b[-1][1:] for _, b in table.blocks] == [["68.4", "63.2", "51.0", "50.0"]] * 2
    assert "MRPC\nn = 1000, validation" in table.columns and "SST-2, re-split\nn = 100, test" in table.columns
    assert sources(run) == ["sst2_resplit"], "STS-B has no classes"


def test_missing_and_unasked_cells_differ(tmp_path):
    run = made_up(tmp_path / "part", dict(mrpc=0.9), models=("teacher",))
    teacher, student = (rows[0] for _, rows in zeroshot_table(run).blocks)
    assert teacher[1:] == ["90.0", "missing", "missing", "90.0\nown task"] and student[1:] == ["missing"] * 4
    assert zeroshot_table(run).notes[-1].startswith("To fill: distilrepro reproduce --preset sanh2019")
    bare = create_run(tmp_path / "bare", load_settings("sanh2019", "smoke"), tmp_path)
    assert {c for _, rows in zeroshot_table(bare).blocks for row in rows for c in row[1:]} == {"–"} and not zeroshot_table(bare).toy
    assert zeroshot_findings(bare).sentences[0].endswith("distilrepro reproduce --preset sst2_random")
    assert "No cell is filled" in zeroshot_figure(bare).get_label()


def test_the_claim_stands_in_blocks_by_data(run):
    table = resplit_table(run)
    own, poster, paper = (rows for _, rows in table.blocks)
    assert [row[1].split("\n")[0] for row in own] == ["80.0", "80.0"] and own[0][1].count("to") == 1 and own[0][2:] == ["100\ntest", "2"]
    claims = reference()["s2_claims"]
    assert poster[0][1] == claims["sst2_acc_after_one_epoch"] and paper[0][1] == f"{claims['paper_sst2']}"
    assert any("B15" in n for n in table.notes)


def test_the_picture_prints_every_number(run):
    fig = zeroshot_figure(run)
    texts = [t.get_text() for ax in fig.axes for t in ax.texts]
    assert {"69.0", "70.0", "90.0", "not above", "own task", "seen"} <= set(texts)
    assert "student, SST-2, re-split to MRPC 69.0 (floor 68.4)" in fig.get_label()
