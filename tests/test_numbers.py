"Every number that a reader meets was published, belongs to a recipe, is computed on its page, or follows from committed records."
import json
import re
import shutil
from datetime import datetime
from pathlib import Path

import matplotlib
import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from distilrepro.records import Run, read_records

ROOT = Path(__file__).resolve().parent.parent
RUNS = sorted(p.parent.name for p in ROOT.glob("results/*/predictions"))
PAGES = sorted(p for part in ("index.ipynb", "*/*.ipynb") for p in (ROOT / "nbs").glob(part)) + sorted((ROOT / "docs/pages").rglob("*.md"))
NUMBER = re.compile(r"(?<![\w.\-/#§=])\d[\d,]*(?:\.\d+)?(?=\s?(?:%|x\b|points?\b|[mM]?s\b|[MG]B\b|minutes\b|hours\b|seconds\b|million\b))"
                    r"|(?<![\w.\-/#§=])\d+\.\d+(?![\w.])")
TIME = r"about (\d+) minutes on two cores"  # has a test of its own
NO_PROSE = re.compile(TIME + r"|```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$\n]*\$|\]\([^)]*\)|https?://\S+|section \d[\d.]*|arXiv \S+", re.S)
NAMES = {"3.11": "Python", "1.1": "SQuAD", "2.2": "WCAG", "95": "level of all intervals", "99": "an example, retained", "1.63": "668 / 410",
         "39": "1 - 410 / 668", "1.645": "a normal quantile", "0.69": "nats in a bit", "11.11": "sum of three exponentials",
         "36.8": "100 less QQP's floor of 63.2", "244": "2,000 x 30,522 x 4 bytes"}


def leaves(value):
    "All numbers in a YAML file, also those inside its texts."
    if isinstance(value, dict | list):
        for v in value.values() if isinstance(value, dict) else value:
            yield from leaves(v)
    elif value is not None and not isinstance(value, bool):
        yield from map(float, re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", str(value)))


@pytest.fixture(scope="module")
def published():
    "Numbers of the sources and of the recipes, as fractions and in percent."
    files = [*(ROOT / "distilrepro/reference").glob("*.yaml"), *(ROOT / "distilrepro/presets").glob("*.yaml"), ROOT / "tests/recipes.yaml"]
    return {v * k for f in files for v in leaves(yaml.safe_load(f.read_text())) for k in (1, 100)}


def shown(notebook):
    "The texts that the cells of a notebook put out."
    outputs = [o.get("data", {"text/plain": o.get("text", "")}) for c in notebook.cells if c.cell_type == "code" for o in c.outputs
               if o.get("name") != "stderr"]
    return [str(o[k]) for o in outputs for k in ("text/plain", "text/markdown", "text/html") if k in o]


def parts(path):
    "The prose of a page, and what is computed or typed as code on it."
    if path.suffix == ".md":
        text = path.read_text()
        return [text], "\n".join(re.findall(r"```.*?```|`[^`]*`", text, re.S))
    notebook = nbformat.read(path, as_version=4)
    code = [c.source for c in notebook.cells if c.cell_type == "code"]
    return [c.source for c in notebook.cells if c.cell_type == "markdown"], "\n".join([*shown(notebook), *code])


def untraced(path, published):
    "Numbers in the prose of a page that come from nowhere, each with the words around it."
    prose, own = parts(path)
    for text in (NO_PROSE.sub(" ", p) for p in prose):
        for m in NUMBER.finditer(text):
            word = m[0].replace(",", "")
            digits = len(word.partition(".")[2])
            if word not in NAMES and not any(round(v, digits) == float(word) for v in published) \
                    and not re.search(rf"(?<![\d.]){re.escape(m[0])}(?!\d)", own):
                yield text[max(0, m.start() - 40):m.end() + 20].replace("\n", " ")


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_numbers_in_prose_come_from_somewhere(path, published):
    assert list(untraced(path, published)) == []


def test_a_number_from_nowhere_is_found(tmp_path, published):
    (tmp_path / "page.md").write_text("The student keeps 98.76 % and `12.34 %`, 2.61 times.\n\n```\nprint(0.1234)\n```\n0.1234 in all.")
    assert [re.search(r"\d+\.\d+", f)[0] for f in untraced(tmp_path / "page.md", published)] == ["98.76"]


def test_the_minutes_of_the_first_command_are_those_of_the_committed_run():
    run = Run(ROOT / "results/quick")
    times = [datetime.fromisoformat(t) for t in [run.provenance["created"], *read_records(run, "*").created]]
    minutes = (max(times) - min(times)).total_seconds() / 60
    said = int(re.search(TIME, (ROOT / "README.md").read_text())[1])
    assert said == pytest.approx(minutes, rel=0.25), "stages and speed; tables add a little"


@pytest.mark.parametrize("name", ["index.ipynb", "paper/05_results.ipynb"])
def test_pages_of_results_show_what_their_records_give(name):
    path = ROOT / "nbs" / name
    stored, fresh = (nbformat.read(path, as_version=4) for _ in range(2))
    NotebookClient(fresh, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    assert shown(fresh) == shown(stored) != []


def rows(path):
    "The numbers of a table, to nine digits: the last ones depend on the machine."
    return json.loads(path.read_text(), parse_float=lambda s: float(f"{float(s):.9g}"))["rows"]


@pytest.mark.parametrize("name", RUNS)
def test_committed_tables_follow_from_committed_records(name, tmp_path):
    copy = shutil.copytree(ROOT / "results" / name, tmp_path / name, ignore=shutil.ignore_patterns("tables", "notebooks"))
    for path in sorted((ROOT / "nbs/tables").glob("*.ipynb")):
        if path.stem == "tiny_examples":  # asks the models themselves
            continue
        space: dict = {}
        with matplotlib.rc_context({"backend": "agg"}):
            for cell in nbformat.read(path, as_version=4).cells:
                if cell.cell_type == "code":
                    exec(cell.source, space)
                    space |= {"run": str(copy)} if "parameters" in cell.metadata.get("tags", []) else {}
    made = sorted((copy / "tables").glob("*.json"))
    assert len(made) > 15
    assert [p.name for p in made if rows(p) != rows(ROOT / "results" / name / "tables" / p.name)] == []
