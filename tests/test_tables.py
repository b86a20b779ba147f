"""Tables, figures and report from made-up runs: blocks kept apart, holes and parts named, text escaped, one self-contained page."""
import json
import re
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from distilrepro.config import UserError, load_settings
from distilrepro.figures import learning_curves, parameters_figure, save_figure, tasks_figure
from distilrepro.glue import difference_table, differences, glue_findings, glue_table, macro, retained, retention_table, shared_tasks
from distilrepro.latency import POSTER, latencies, latency_findings, latency_ratios, latency_table
from distilrepro.records import create_run, write_atomic, write_predictions, write_records
from distilrepro.report import show_output, summary, summary_markdown, write_report
from distilrepro.stats import headline
from distilrepro.tables import (
    GLUE,
    MODELS,
    OFFICIAL,
    SOURCE_OF,
    SOURCES,
    TASKS,
    Table,
    coverage,
    faster,
    lacking,
    number,
    published,
    reference,
    results,
    save_table,
    speed_table,
    speed_values,
)

N = 120


def made_up(folder: Path, source="synthetic", tasks=("cola", "mrpc", "stsb", "wnli", "imdb"), skip=()):
    "A run with drawn predictions; `skip` names units to leave out."
    sets = (f"grid.tasks=[{','.join(tasks)}]", "grid.seeds=[1,2]", f"data.source={source}", "second.tasks=[]")
    run = create_run(folder, load_settings("sanh2019", "smoke", sets), folder)
    rng = np.random.default_rng(0)
    for task in tasks:
        label = rng.uniform(0, 5, N) if task == "stsb" else (rng.random(N) < 0.6).astype(int)
        for model, seed in product(("teacher", "student"), (1, 2)):
            right = rng.random(N) < (0.95 if model == "teacher" else 0.8)
            guess = label + rng.normal(0, 1 if model == "teacher" else 3, N) if task == "stsb" else np.where(right, label, 1 - label)
            unit = f"finetune-{model}-{task}-{seed}"
            common = dict(stage="finetune", model=model, task=task, split="validation", seed=seed, n=N)
            score = float(headline(task)(label, guess, np.ones((1, N)))[0])
            if unit not in skip:
                write_records(run, unit, [dict(metric="score", value=score), dict(metric="floor", value=0.3)], **common)
                write_predictions(run, unit, pd.DataFrame(dict(id=range(N), label=label, prediction=guess)))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_up(tmp_path_factory.mktemp("runs") / "toy")


def test_own_and_published_rows_never_share_a_block(run):
    own, other = glue_table(run).blocks
    assert {row[0].split("\n")[0] for row in own[1]} == {"Teacher", "Student", "Retained, %", "Floor"}
    assert len(other[1]) == len(published("glue_dev")) and not {"Teacher", "Student"} & {row[0].split("\n")[0] for row in other[1]}
    assert "toy" in own[0] and all("toy" in row[0] for row in own[1][:2])


def test_conflicting_sources_stay_apart_with_their_label():
    rows = published("glue_dev").query("model == 'BERT-base'")
    assert rows.label.nunique() == len(rows) == 4 and rows.MNLI.nunique() == 3
    assert published("size_speed").query("model == 'BERT-base'").groupby("hardware").seconds.first().to_dict() == {
        "paper_cpu": 668, "s1_cpu_1_thread": 423.65}


def test_cells_are_medians_and_macro_is_their_mean(run):
    cola = [r for r in glue_table(run).data if r["task"] == "cola"]
    for row in cola:
        assert row["value"] == pytest.approx(np.median(results(run)["cola"].scores[row["model"]]))
        assert row["low"] <= row["value"] <= row["high"] and row["aggregation"] == "median over seeds" and row["n"] == N
    assert shared_tasks(run) == ["cola", "mrpc", "stsb", "wnli"]
    expected = np.mean([results(run)[t].median("student") for t in shared_tasks(run)])
    assert macro(run, "student", shared_tasks(run))[0] == pytest.approx(expected)


def test_a_run_of_some_tasks_has_no_nine_task_score_and_gets_published_means_over_the_same_tasks(run):
    table = glue_table(run)
    assert table.blocks[0][1][0][1] == "–"
    bert = next(r for r in table.blocks[1][1] if r[0].startswith("BERT-base\nREADME"))
    assert bert[1:4] == ["79.5", number((56.3 + 88.6 + 89.0 + 53.5) / 4), number((56.3 + 88.6 + 89.0) / 3)]


def test_holes_parts_and_absent_tasks_are_told_apart(tmp_path):
    gone = {"finetune-student-mrpc-1", "finetune-student-mrpc-2", "finetune-student-cola-2"}
    run = made_up(tmp_path / "real", "local", ("cola", "mrpc"), skip=gone)
    table = glue_table(run)
    student = dict(zip([*("Model", "Score", "Macro", "w/o"), *GLUE, "imdb"], table.blocks[0][1][1], strict=True))
    assert student["mrpc"] == "missing" and student["rte"] == "–" and student["cola"][0].isdigit()
    assert lacking(run) == ["Student on CoLA (1 of 2 seeds)", "Student on MRPC (0 of 2 seeds)"]
    assert "own part: 120 of 1043" in "".join(table.columns) and not table.toy
    assert any("--preset sanh2019 --scale smoke --run runs/real" in n for n in table.notes)
    assert any("not comparable digit for digit: CoLA 120 of 1043" in n for n in table.notes)
    assert [row[1:] for row in coverage(run).blocks[0][1]] == [["2 of 2", "2 of 2"], ["1 of 2", "0 of 2"]]


def test_an_empty_run_gives_a_table_of_holes_and_clear_errors(tmp_path):
    run = create_run(tmp_path / "empty", load_settings("cornell", "smoke"), tmp_path)
    assert "missing" in glue_table(run).blocks[0][1][0] and retained(run, []) == {}
    assert glue_findings(run).sentences and difference_table(run).to_html() and retention_table(run).to_markdown()
    for call in (tasks_figure, parameters_figure, learning_curves, speed_table, latency_table, write_report):
        with pytest.raises(UserError, match="distilrepro reproduce"):
            call(run)


def test_records_alone_give_medians_without_intervals(tmp_path):
    run = made_up(tmp_path / "bare", tasks=("cola", "mrpc"))
    for path in (run.folder / "predictions").iterdir():
        path.unlink()
    cell = glue_table(run).blocks[0][1][0][4]
    assert re.fullmatch(r"\d+\.\d", cell) and any("No interval" in n for n in glue_table(run).notes)
    assert differences(run).empty


def test_differences_read_by_rule(run):
    table = differences(run)
    assert table.loc["stsb", "reads"] == "student lower" and table.loc["stsb", "high"] < 0
    assert (table.p >= 0).all() and set(table.reads) <= {"student lower", "student higher", "not told apart", "teacher at the floor"}


def test_saved_forms_agree(run):
    table = glue_table(run)
    paths = save_table(run, "t1_glue", table)
    rows = json.loads(paths[0].read_text())["rows"]
    teacher = next(r for r in rows if r["task"] == "cola" and r["model"] == "teacher")
    assert number(teacher["value"], scale=100) in paths[1].read_text() and number(teacher["value"], scale=100) in paths[2].read_text()


def test_text_is_escaped_everywhere():
    bad = '<img src=x onerror="a()">'
    page = Table(bad, [bad], [(bad, [[bad, bad]])], [bad]).to_html()
    assert "<img" not in page and page.count("&lt;img") == 7


def test_the_nine_are_nine_and_new_tasks_have_titles_and_sizes():
    assert len(GLUE) == 9 and not {"imdb", "squad", "sst2_resplit"} & set(GLUE)
    assert [TASKS[t] for t in GLUE] == reference()["glue_columns"][1:], "the order of the published columns"
    assert (TASKS["squad"], TASKS["sst2_resplit"], OFFICIAL["squad"]) == ("SQuAD 1.1", "SST-2, re-split", 10570)


def test_every_published_row_names_one_source_that_has_a_name():
    for name in ("glue_dev", "downstream", "size_speed", "s0_table1", *SOURCE_OF):
        assert set(published(name).source) <= set(SOURCES), name
    assert published("ablation_delta_macro").source.tolist() == ["S3"] * 4 and published("s0_latency_ms").source.unique().tolist() == ["S0"]


def second_run(folder: Path):
    "Seeds by task, and a second distillation: refused on CoLA, half refused on MRPC, absent on RTE, not asked for on IMDb."
    sets = ("grid.tasks=[cola,mrpc,rte,imdb]", "grid.seeds=[1,2]", "grid.task_seeds={imdb: [7]}", "second.tasks=[cola,mrpc,rte]")
    run = create_run(folder, load_settings("sanh2019", "smoke", sets), folder)
    score, no = dict(metric="score", value=0.5), dict(metric="refused", value=0.3)
    units = [(m, t, s, score) for m, t in product(("teacher", "student"), ("cola", "mrpc", "rte")) for s in (1, 2)]
    units += [("student", "imdb", 7, score), ("student_d", "cola", 1, no), ("student_d", "cola", 2, no), ("student_d", "mrpc", 1, no),
              ("student_d", "mrpc", 2, score)]
    for model, task, seed, row in units:
        common = dict(stage="finetune", model=model, task=task, split="validation", seed=seed, n=100)
        write_records(run, f"finetune-{model}-{task}-{seed}", [row, dict(metric="floor", value=0.3)], **common)
    return run


def test_a_refused_second_distillation_is_an_answer_and_an_absent_one_a_hole(tmp_path):
    run = second_run(tmp_path / "second")
    assert lacking(run) == ["Student (D) on RTE (0 of 2 seeds)", "Teacher on IMDb (0 of 1 seeds)"]
    table = coverage(run)
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.blocks[0][1]}
    assert list(rows) == list(MODELS.values())
    assert [rows["Student (D)"][TASKS[t]] for t in ("cola", "mrpc", "rte", "imdb")] == ["refused", "1 of 2\n1 refused", "0 of 2", "–"]
    assert (rows["Teacher"]["IMDb"], rows["Student"]["IMDb"]) == ("0 of 1", "1 of 1") and "refused" in table.notes[0].lower()


def test_a_run_without_second_distillation_has_no_row_for_it(run):
    assert [row[0] for row in coverage(run).blocks[0][1]] == ["Teacher", "Student"] and lacking(run) == []


def timed(folder: Path, tasks: dict[str, dict], sets=()):
    "A run with latencies: task -> model -> mean of each repeat."
    run = create_run(folder, load_settings("sanh2019", "smoke", sets), folder)
    kinds = dict(latency_mean_ms=1, latency_p50_ms=0.8, latency_p95_ms=3, pass_s=0.02)
    rows = [dict(model=m, task=t, metric=k, value=v * f, seed=r, n=20, split="test") for t, models in tasks.items()
            for m, vs in models.items() for r, v in enumerate(vs) for k, f in kinds.items()]
    sizes = [dict(model=m, metric="parameters", value=v) for m, v in dict(teacher=100e6, student=60e6).items()]
    write_records(run, "speed", rows + sizes, stage="speed")
    return run


def test_speed_blocks_and_ratios_of_the_first_task_only(tmp_path):
    times = dict(stsb=dict(teacher=[200, 300, 250], student=[100, 100, 100]), cola=dict(teacher=[900, 900, 900], student=[1, 1, 1]))
    run = timed(tmp_path / "fast", times, ("speed.tasks=[stsb,cola]",))
    table = speed_table(run)
    ratio = table.blocks[0][1][2]
    assert ratio[1] == "0.600" and ratio[6] == "2.50\n2.00 to 3.00" and table.blocks[0][1][1][6] == "2.50x\n60 % less time"
    assert len(table.blocks) == 3 and faster(0.5) == "0.50x\n100 % more time" and "20 examples of STS-B" in table.notes[0]
    assert speed_values(run, "cola").loc[("teacher", "pass_s"), 0] == 18 and ("teacher", "parameters") in speed_values(run, "cola").index


def test_latency_headline_is_the_mean_of_three_ratios_with_and_without_each(tmp_path):
    times = dict(imdb=dict(teacher=[8, 12], student=[4, 4]), cola=dict(teacher=[4, 4], student=[2, 2]),
                 mrpc=dict(teacher=[50, 50], student=[10, 5]), stsb=dict(teacher=[3, 3], student=[1, 1]))
    run = timed(tmp_path / "late", times)
    ratios = latency_ratios(latencies(run))
    assert ratios["all"].tolist() == pytest.approx([(2 + 2 + 5) / 3, (3 + 2 + 10) / 3]), "STS-B is not of the poster's three"
    assert ratios["without mrpc"].tolist() == [2, 2.5] and ratios["without imdb"].tolist() == [3.5, 6]
    own, other = (rows for _, rows in latency_table(run).blocks)
    assert own[-1][1:6] == ["2.50\n2.00 to 3.00", "2.00\n2.00 to 2.00", "7.50\n5.00 to 10.00", "3.00\n3.00 to 3.00", "4.00\n3.00 to 5.00"]
    assert other[-1][1:] == ["1.98", "1.96", "3.85", "–", "2.60", "2.91", "2.92", "1.97"] and len(other) == 3
    assert "MRPC moves it most: without it, 1.97x" in latency_findings(run).sentences[0]


def test_latencies_that_are_not_there_are_holes_and_no_headline(tmp_path):
    run = timed(tmp_path / "part", dict(cola=dict(teacher=[4], student=[2])), ("speed.tasks=[cola,imdb]",))
    own = latency_table(run).blocks[0][1]
    assert own[0][1:5] == ["missing", "4.00", "–", "–"] and own[-1][1:] == ["missing", "2.00", *["–"] * 5]
    assert "IMDb, MRPC" in latency_findings(run).sentences[1]
    full = timed(tmp_path / "none", {})
    assert {c for row in latency_table(full).blocks[0][1] for c in row[1:]} == {"missing", "–"} and POSTER == ("imdb", "cola", "mrpc")


def test_figures_describe_themselves_and_are_files(run):
    picture = save_figure(run, "f4_tasks", tasks_figure(run))
    assert "each seed a dot" in picture.alt and {p.suffix for p in (run.folder / "tables").glob("f4_tasks.*")} == {".svg", ".png"}
    assert picture.svg == save_figure(run, "f4_tasks", tasks_figure(run)).svg, "same run, same bytes"


def test_the_task_figure_draws_the_runs_models_and_not_the_ablations(tmp_path):
    run = second_run(tmp_path / "figure")
    for task in ("rte", "wnli"):
        common = dict(stage="finetune", model="triple", task=task, split="validation", seed=1, n=100)
        write_records(run, f"finetune-triple-{task}-1", [dict(metric="score", value=0.9)], **common)
    fig = tasks_figure(run)
    assert [t.get_text() for t in fig.axes[0].get_legend().get_texts()] == ["Floor", *MODELS.values()]
    assert [t.get_text() for t in fig.axes[0].get_xticklabels()] == ["CoLA", "MRPC", "RTE", "IMDb"]
    assert "MRPC 50.0, 50.0, 50.0" in fig.get_label() and "90.0" not in fig.get_label()


class Page(HTMLParser):
    "Collects what a page would load, its pictures, links and ids."

    def __init__(self):
        super().__init__()
        self.loads, self.alts, self.links, self.ids = [], [], [], set()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs["id"]} if "id" in attrs else set()
        self.loads += [attrs["src"]] if "src" in attrs else []
        self.alts += [attrs.get("alt")] if tag == "img" else []
        self.links += [attrs["href"]] if tag == "a" else []
        assert tag not in {"script", "link", "iframe"}


def test_report_is_one_page_with_descriptions_and_working_links(run):
    picture = save_figure(run, "f4_tasks", tasks_figure(run))
    for name, data in {"t1_glue": {"text/html": glue_table(run).to_html()}, "f4_tasks": {"text/html": picture._repr_html_()},
                       "a1_attention": {"image/png": "iVBORw0KGgo=\n"}, "s03_finetune": {"text/html": "<b>not gathered</b>"}}.items():
        cells = [dict(cell_type="markdown", source=["# About <x>\n", "\n", "> why"]),
                 dict(cell_type="code", source="", outputs=[dict(output_type="execute_result", data=data)])]
        write_atomic(run.folder / "notebooks" / f"{name}.ipynb", json.dumps(dict(cells=cells)))
    text = write_report(run).read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert all(src.startswith("data:image/") for src in page.loads) and len(page.loads) == 2 and all(page.alts)
    assert {link[1:] for link in page.links} <= page.ids and {"t1_glue", "f4_tasks", "a1_attention", "provenance"} <= page.ids
    assert "prefers-color-scheme:dark" in text and "dr-toy" in text and "not gathered" not in text and str(run.folder.parent) not in text
    assert "About &lt;x&gt;" in text and "width=device-width" in text


@pytest.mark.parametrize("bad", ["<script>1</script>", "<SCRIPT src=x>", "<a onclick='x'>", "<iframe>"])
def test_outputs_that_run_code_are_left_out(bad):
    assert show_output({"text/html": bad}, "") is None


def test_summary_rows_share_their_columns(run):
    row = summary(run)
    lines = summary_markdown([run, run]).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert row["run"] == "toy (toy)" and row["GLUE tasks"] == "4" and row["speed"] == "–"


def test_curves_of_a_teacher_alone_have_no_empty_panel(tmp_path):
    run = create_run(tmp_path / "curves", load_settings("sanh2019", "smoke"), tmp_path)
    kinds = [("heldout", "mlm_loss"), ("train", "loss")]
    rows = [dict(model="teacher", split=s, metric=m, value=1.0 / (k + 1), step=k) for k in range(3) for s, m in kinds]
    write_records(run, "teacher", rows, stage="teacher", task="mlm")
    alone = learning_curves(run)
    assert [len(ax.lines) for ax in alone.axes] == [1, 1] and "teacher 0.33" in alone.get_label()
    write_records(run, "distil", [dict(r, model="student") for r in rows], stage="distil", task="mlm")
    assert [len(ax.lines) for ax in learning_curves(run).axes] == [2, 1]
