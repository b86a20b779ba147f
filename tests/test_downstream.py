"""Tables 1 and 2, the reproductions' tables and the worked examples, against medians taken by hand from the records."""
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering, BertForSequenceClassification

from distilrepro.config import UserError, load_settings
from distilrepro.downstream import (
    NOT_ABOVE,
    TABLE_2,
    cornell_retention,
    cornell_table,
    downstream_table,
    measured,
    tiny_downstream_table,
    tiny_glue_table,
    tiny_speed_table,
)
from distilrepro.examples import examples_table, outputs, reported
from distilrepro.glue import (
    REFUSED,
    SHOWN,
    compared_models,
    differences,
    final_and_best,
    glue_findings,
    glue_table,
    how_to_read,
    second_table,
    selection_table,
    training_part,
)
from distilrepro.records import create_run, write_predictions, write_records
from distilrepro.sources import load_tokenizer
from distilrepro.stages import save_model, tuned_folder
from distilrepro.tables import GLUE, published

N, SEEDS = 90, {"cola": (1, 2, 3), "squad": (4, 5)}
METRICS = dict(cola=["matthews_correlation"], mrpc=["accuracy", "f1"], imdb=["accuracy"], squad=["exact_match", "f1"],
               sst2_resplit=["accuracy"])
SKILL = dict(teacher=0.9, student=0.75, student_d=0.8, no_ce=0.6)


def by_hand(metric, table):
    "A metric written out, without the package."
    y, p = table.label.to_numpy(), table.prediction.to_numpy()
    if metric in table:
        return float(table[metric].mean())
    if metric == "accuracy":
        return float(np.mean(y == p))
    hits, wrong, lost, rest = (int(np.sum((y == a) & (p == b))) for a, b in ((1, 1), (0, 1), (1, 0), (0, 0)))
    if metric == "f1":
        return 2 * hits / (2 * hits + wrong + lost)
    return (hits * rest - wrong * lost) / np.sqrt((hits + wrong) * (hits + lost) * (rest + wrong) * (rest + lost))


def one_unit(run, model, task, seed):
    "A fine-tuning with drawn answers and official metrics computed by hand."
    rng = np.random.default_rng([seed, sorted(METRICS).index(task), list(SKILL).index(model)])
    label, right = (np.arange(N) % 3 > 0).astype(int), rng.random(N) < SKILL[model]
    table = pd.DataFrame(dict(id=range(N), label=label, prediction=np.where(right, label, 1 - label)))
    if task == "squad":
        table = table.assign(id=[f"q{i}" for i in range(N)], label=json.dumps(["a"]), prediction="a", exact_match=right * 1.0)
        table["f1"] = np.maximum(table.exact_match, rng.random(N) * 0.7)
    values = {m: by_hand(m, table) for m in METRICS[task]}
    values["score"] = values["f1"] if task == "squad" else float(np.mean(list(values.values())))
    values |= dict(floor=0.2, score_final=values["score"], score_best=values["score"] + 0.02, best_step=7)
    split = dict(imdb="test", sst2_resplit="test").get(task, "validation")
    common = dict(stage="finetune", model=model, task=task, split=split, seed=seed, n=N)
    write_records(run, f"finetune-{model}-{task}-{seed}", [dict(metric=k, value=v) for k, v in values.items()], **common)
    write_predictions(run, f"finetune-{model}-{task}-{seed}", table)
    return values


def made_up(folder: Path, preset="sanh2019", source="local"):
    "A run with D on CoLA and SQuAD, refused on MRPC, an ablation's student, and a task of another table; with its values by hand."
    sets = ("grid.tasks=[cola,mrpc,rte,imdb,squad,sst2_resplit]", "grid.seeds=[1,2]", "grid.task_seeds={cola: [1,2,3], squad: [4,5]}",
            "second.tasks=[cola,mrpc,squad,rte]", f"data.source={source}")
    run, values = create_run(folder, load_settings(preset, "full", sets), folder), {}
    for model, tasks in dict(teacher=METRICS, student=METRICS, student_d=("cola", "squad"), no_ce=("cola",)).items():
        for task in tasks:
            for seed in SEEDS.get(task, (1, 2)):
                values[model, task, seed] = one_unit(run, model, task, seed)
    for seed in (1, 2):
        why = [dict(metric="refused", value=0.2), dict(metric="floor", value=0.2)]
        write_records(run, f"finetune-student_d-mrpc-{seed}", why, stage="finetune", model="student_d", task="mrpc", seed=seed)
    return run, values


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return made_up(tmp_path_factory.mktemp("runs") / "real")


@pytest.fixture
def run(both):
    return both[0]


def median(values, model, task, metric):
    "The median over seeds, taken from what was written."
    return np.median([v[metric] for (m, t, _), v in values.items() if (m, t) == (model, task)])


def first_lines(rows):
    "Names of rows."
    return [row[0].split("\n")[0] for row in rows]


def test_cells_of_table_2_are_the_medians_of_the_records(both):
    run, values = both
    rows = dict(zip(("teacher", "student", "student_d"), downstream_table(run).blocks[0][1], strict=False))
    for model, row in rows.items():
        for cell, (task, metric) in zip(row[1:], TABLE_2, strict=True):
            if (model, task) != ("student_d", "imdb"):
                assert cell.split("\n")[0] == f"{100 * median(values, model, task, metric):.1f}"
    assert rows["student_d"][1] == "–"
    low, high = measured(run, "squad", "exact_match").interval("student")
    drawn = np.median([values["student", "squad", s]["exact_match"] for s in (4, 5)])
    assert low < drawn < high and high - low < 2 * 1.96 * 2 * np.sqrt(drawn * (1 - drawn) / N), "an interval of the width of a binomial"


def test_the_second_distillation_stands_below_its_student_and_nowhere_else(run):
    for table in (glue_table(run), downstream_table(run), cornell_table(run), tiny_downstream_table(run)):
        own = next(rows for title, rows in table.blocks if title.startswith("This run"))
        names = first_lines(own)
        assert names[:3] == ["Teacher", "Student", "Student (D)"]
        assert not any(n in name for name in names for n in ("no_ce", "No_ce", "SST-2, re-split"))
    assert compared_models(run, ("imdb",)) == ["teacher", "student"]


def test_table_1_holds_glue_and_imdb_only_with_refusals_and_holes_told_apart(both):
    run, values = both
    table = glue_table(run)
    assert {d["task"] for d in table.data} == {"cola", "mrpc", "imdb"}
    assert {d["model"] for d in table.data} == {"teacher", "student", "student_d"}
    student, with_d = (dict(zip(SHOWN, row[4:], strict=True)) for row in table.blocks[0][1][1:3])
    assert [with_d[t] for t in ("mrpc", "rte", "qnli", "imdb")] == [REFUSED, "missing", "–", "–"] and student["rte"] == "missing"
    assert with_d["cola"].split("\n")[0] == f"{100 * median(values, 'student_d', 'cola', 'score'):.1f}"
    assert table.blocks[0][1][2][2] == "–", "no macro over fewer tasks than the rows above it"
    assert any("refused on MRPC" in n for n in table.notes) and any("2 seeds an interval covers at most 50 %" in n for n in table.notes)
    assert "3 seeds" in table.blocks[0][1][0][0], "seeds of single tasks are told"


def test_d_is_compared_with_the_same_student(both):
    run, values = both
    rows = {name: row for name, row in zip(first_lines(second_table(run).blocks[0][1]), second_table(run).blocks[0][1], strict=True)}
    gain = median(values, "student_d", "cola", "score") - median(values, "student", "cola", "score")
    assert rows["CoLA"][3].split("\n")[0] == f"{100 * gain:.1f}" and rows["MRPC"][2:] == [REFUSED, *["–"] * 6]
    assert rows["RTE"][1:3] == ["missing", "missing"] and "Mean" not in rows, "a mean of one task is no mean"
    assert differences(run, "student_d", "student").loc["cola", "value"] == pytest.approx(gain)
    squad = downstream_table(run).blocks[0][1][-1]
    gain = median(values, "student_d", "squad", "f1") - median(values, "student", "squad", "f1")
    assert squad[0].startswith("D adds") and squad[3].split("\n")[0] == f"{100 * gain:.1f}"


def test_final_and_best_are_both_there(run):
    table = selection_table(run)
    assert np.allclose(final_and_best(run).optimism, 0.02) and first_lines(table.blocks[0][1]) == ["CoLA", "MRPC", "IMDb"]
    assert table.blocks[0][1][0][3] == "2.0" and "at the end of training" in table.notes[0]


def test_a_cell_states_all_that_places_it(run):
    rows = {row[0]: row[1:] for row in how_to_read(run, (*SHOWN, "squad")).blocks[0][1]}
    assert rows["CoLA"][:5] == ["validation", "Matthews", "median over seeds", "3, 3, 3", f"{N} of 1043"]
    assert rows["SQuAD 1.1"][3:5] == ["2, 2, 2", f"{N} of 10570"] and rows["IMDb"][0] == "test" and rows["RTE"][4] == "missing"
    assert all(row[5] == "weights at the end of training" and row[6].startswith("local files") for row in rows.values())
    assert training_part(run, "squad", 3000) == ", at most 3000 of 87599 training examples" and training_part(run, "squad", 0) == ""


def test_published_rows_keep_their_source_and_never_meet_own_ones(run):
    for table in (downstream_table(run), tiny_downstream_table(run), cornell_table(run), tiny_glue_table(run)):
        for title, rows in table.blocks:
            assert all(len(row) == len(table.columns) for row in rows)
            if "Published" in title:
                assert "median of" not in "".join(row[0] for row in rows)
    source = {title.removeprefix("Published: "): set(first_lines(rows)) for title, rows in downstream_table(run).blocks[1:]}
    assert source["TU Wien re-run"] == {"BERT-base", "DistilBERT"} and "TinyDistilBERT (D)" not in source["slides on the paper"]


def test_the_poster_keeps_its_unknown_metric_and_both_retentions(both):
    run, values = both
    table = cornell_table(run)
    teacher = table.blocks[0][1][0]
    expected = [median(values, "teacher", t, m) for t, m in (("imdb", "accuracy"), ("cola", "matthews_correlation"), ("mrpc", "accuracy"),
                                                            ("mrpc", "f1"), ("mrpc", "score"))]
    assert [c.split("\n")[0] for c in teacher[1:6]] == [f"{100 * v:.1f}" for v in expected] and teacher[6] == "–"
    ours, printed = (rows for _, rows in cornell_retention(run).blocks)
    assert printed[0][1:] == ["95.57", "94.35", "94.35"] and printed[1][3] == "97"
    columns = (("imdb", "accuracy"), ("cola", "score"), ("mrpc", "f1"))
    pairs = [(median(values, "student", t, m), median(values, "teacher", t, m)) for t, m in columns]
    by_f1 = next(row for row in ours if "MRPC by F1" in row[0])
    assert by_f1[1].split("\n")[0] == f"{100 * sum(s for s, _ in pairs) / sum(t for _, t in pairs):.2f}"
    assert by_f1[2].split("\n")[0] == f"{100 * np.mean([s / t for s, t in pairs]):.2f}"


def test_the_report_is_printed_as_it_is_with_its_runs_and_floors(run):
    as_printed, computed, own = (rows for _, rows in tiny_glue_table(run).blocks)
    tiny = next(row for row in as_printed if row[0].startswith("TinyDistilBERT"))
    source = published("glue_dev").query("model == 'TinyDistilBERT'").iloc[0]
    assert tiny[1] == str(source.score) and [c.split("\n")[0] for c in tiny[3:]] == [str(source[t]) for t in
        ("CoLA", "MNLI", "MRPC", "QNLI", "QQP", "RTE", "SST-2", "STS-B", "WNLI")]
    assert [t for t, c in zip(GLUE, tiny[3:], strict=True) if NOT_ABOVE in c] == ["mrpc", "rte", "wnli"]
    assert [row[2] for row in computed[:2]] == ["54.81", "54.90"] and first_lines(own)[-1] == "Floor"
    assert any("in two ways" in n for n in tiny_glue_table(run).notes)


@pytest.mark.parametrize("preset, says", [
    ("tinydistilbert", "as it was run"), ("tinydistilbert_repaired", "repaired"), ("cornell", "another recipe")])
def test_the_heading_says_whether_the_recipe_is_the_reports(tmp_path, preset, says):
    empty = create_run(tmp_path / "empty", load_settings(preset, "full", ("data.source=local",)), tmp_path)
    assert says in tiny_glue_table(empty).blocks[2][0] and says in tiny_downstream_table(empty).blocks[1][0]


def test_the_copied_time_stands_alone_and_gives_no_ratio(tmp_path):
    run = create_run(tmp_path / "fast", load_settings("sanh2019", "full", ("data.source=local",)), tmp_path)
    assert [row[2] for row in tiny_speed_table(run).blocks[2][1]] == ["missing", "missing"]
    task = run.settings.speed.tasks[0]
    rows = [dict(model=m, metric="pass_s", value=v, seed=k, n=9, task=task) for m, vs in dict(teacher=[4, 6], student=[2, 2]).items()
            for k, v in enumerate(vs)]
    write_records(run, "speed", [*rows, dict(model="teacher", metric="parameters", value=5e6)], stage="speed")
    report, copied, own = (rows for _, rows in tiny_speed_table(run).blocks)
    assert first_lines(copied) == ["ELMo"] and copied[0][3] == "–" and "copied" in copied[0][0]
    assert report[2][3].startswith("1.96x") and own[1][2:] == ["2.00", "2.50x\n60 % less time"] and own[0][1] == "5.00"


def test_an_empty_run_is_told_as_missing_everywhere(tmp_path):
    run = create_run(tmp_path / "empty", load_settings("cornell", "full", ("data.source=local",)), tmp_path)
    for table in (downstream_table(run), cornell_table(run), cornell_retention(run), tiny_glue_table(run), selection_table(run)):
        page = table.to_html() + table.to_markdown() + table.to_json()
        assert "nan" not in re.sub(r"[a-zA-Z]nan|nan[a-zA-Z]", "", page) and "distilrepro reproduce" in page
    assert glue_findings(run).sentences and second_table(run).to_html()


def test_text_of_a_run_is_escaped(tmp_path):
    run = create_run(tmp_path / "<b>x", load_settings("cornell", "full", ("data.source=local",)), tmp_path)
    for table in (downstream_table(run), cornell_table(run), examples_table(run, "cola")):
        assert "<b>x" not in table.to_html() and "&lt;b&gt;x" in table.to_html()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    "A toy run with random stand-ins for its fine-tuned teacher."
    folder = tmp_path_factory.mktemp("runs") / "toy"
    run = create_run(folder, load_settings("quick", "smoke"), folder)
    tokenizer = load_tokenizer(run.settings.data)
    for task, kind, labels in (("cola", BertForSequenceClassification, 2), ("stsb", BertForSequenceClassification, 1),
                               ("squad", BertForQuestionAnswering, 2)):
        torch.manual_seed(1)
        shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, initializer_range=0.5)
        model = kind(BertConfig(vocab_size=len(tokenizer), num_labels=labels, **shape)).eval()
        save_model(model, tokenizer, tuned_folder(run, "teacher", task))
    return run


def test_examples_are_answered_as_stock_transformers_answers(toy):
    table = examples_table(toy, "cola")
    folder = tuned_folder(toy, "teacher", "cola")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        p = [model(**tokenizer(row["sentence"], return_tensors="pt")).logits.softmax(1)[0, 1].item() for row in reported()["cola"]]
    assert [row[3].split("\n")[0] for row in table.blocks[0][1]] == [f"{v:.2f}" for v in p]
    assert [row[4] for row in table.blocks[0][1]] == ["missing"] * 2 and any("distilrepro reproduce" in n for n in table.notes)
    assert table.toy and table.blocks[1][0].startswith("Toy") and [d["model"] for d in table.data] == ["teacher"] * 4
    pair = reported()["stsb"][0]
    folder = tuned_folder(toy, "teacher", "stsb")
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        score = model(**tokenizer(pair["sentence1"], pair["sentence2"], return_tensors="pt")).logits.item()
    assert examples_table(toy, "stsb").data[0]["said"] == pytest.approx(score, abs=1e-4)


def test_a_span_is_cut_from_its_context(toy):
    said = [d for d in examples_table(toy, "squad").data]
    assert len(said) == 2 and all(d["said"] and d["said"] in d["example"][1] for d in said)
    with pytest.raises(UserError, match="no worked examples for qqp"):
        outputs(tuned_folder(toy, "teacher", "cola"), "qqp", [], 32)
