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
from distilrepro.records import create_run, write_atomic, write_predictions, write_records
from distilrepro.report import show_output, summary, summary_markdown, write_report
from distilrepro.stats import headline
from distilrepro.tables import TASKS, Table, coverage, faster, lacking, latency_table, number, published, results, save_table, speed_table

N = 120


def made_up(folder: Path, source="synthetic", tasks=("cola", "mrpc", "stsb", "wnli", "imdb"), skip=()):
    "A run with drawn predictions; `skip` names units to leave out."
    sets = (f"grid.tasks=[{','.join(tasks)}]", "grid.seeds=[1,2]", f"data.source={source}")
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
    student = dict(zip([*("Model", "Score", "Macro", "w/o"), *TASKS], table.blocks[0][1][1], strict=True))
    assert student["mrpc"] == "missing" and student["rte"] == "–" and student["cola"][0].isdigit()
    assert lacking(run) == ["student on CoLA (1 of 2 seeds)", "student on MRPC (0 of 2 seeds)"]
    assert "own part: 120 of 1043" in "".join(table.columns) and not table.toy
    assert any("--preset sanh2019 --scale smoke --run runs/real" in n for n in table.notes)
    assert any("not comparable digit for digit: CoLA 120 of 1043" in n for n in table.notes)
    assert [row[1:] for row in coverage(run).blocks[0][1]] == [["2 of 2", "2 of 2"], ["1 of 2", "0 of 2"]]


def test_an_empty_run_gives_a_table_of_holes_and_clear_errors(tmp_path):
    run = create_run(tmp_path / "empty", load_settings("cornell", "smoke"), tmp_path)
    assert "missing" in glue_table(run).blocks[0][1][0] and retained(run, []) == {}
    assert glue_findings(run).sentences and difference_table(run).to_html() and retention_table(run).to_markdown()
    for call in (tasks_figure, parameters_figure, learning_curves, speed_table, write_report):
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


def test_speed_blocks_and_ratios(tmp_path):
    run = create_run(tmp_path / "fast", load_settings("sanh2019", "smoke"), tmp_path)
    rows = [dict(model=m, metric="parameters", value=v) for m, v in dict(teacher=100e6, student=60e6).items()]
    rows += [dict(model=m, metric="pass_s", value=v, seed=k, n=20) for m, vs in dict(teacher=[4, 6, 5], student=[2, 2, 2]).items()
             for k, v in enumerate(vs)]
    write_records(run, "speed", rows, stage="speed")
    table = speed_table(run)
    ratio = table.blocks[0][1][2]
    assert ratio[1] == "0.600" and ratio[6] == "2.50\n2.00 to 3.00" and table.blocks[0][1][1][6] == "2.50x\n60 % less time"
    assert len(table.blocks) == 3 and faster(0.5) == "0.50x\n100 % more time"
    assert latency_table().blocks[0][1][2][1:4] == ["1.98x", "1.96x", "3.85x"]


def test_figures_describe_themselves_and_are_files(run):
    picture = save_figure(run, "f4_tasks", tasks_figure(run))
    assert "each seed a dot" in picture.alt and {p.suffix for p in (run.folder / "tables").glob("f4_tasks.*")} == {".svg", ".png"}
    assert picture.svg == save_figure(run, "f4_tasks", tasks_figure(run)).svg, "same run, same bytes"


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
