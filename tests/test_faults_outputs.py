"""Texts that anyone may have written, in everything that shows them: they are seen, and do nothing.

What a reader opens (the report, the example browser, the site) is looked at in a real browser, which is where a mistake would act.
"""
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as drawn
from hypothesis import strategies as st
from test_site import DESK, PHONE, browser  # noqa: F401  a fixture

from distilrepro import cli, workflow
from distilrepro.attention import attention_figure, rows_figure
from distilrepro.attribution import attribution_figure
from distilrepro.browser import browser_page, save_browser
from distilrepro.config import Data, UserError, load_settings, markdown, visible
from distilrepro.corpus import build_store, load_tokenizer
from distilrepro.errors import KINDS, Answers
from distilrepro.figures import save_figure
from distilrepro.pictures import use_style
from distilrepro.records import Run, create_run, write_predictions, write_records
from distilrepro.report import acts, write_report
from distilrepro.tables import Findings, Table, command, save_table

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = {  # what it is -> a text whose effect would be seen: a dialog, an element of class `in`, a request, a change of `pwned`
    "a script": "<script class=in>window.pwned=1;alert(1)</script>",
    "an image with a handler": "<img class=in src=x onerror=alert(1)>",
    "an image from elsewhere": "<img class=in src=http://elsewhere.invalid/a.png>",
    "the end of a script": "</script><script class=in>alert(1)</script>",
    "the end of a style, a cell and a page": "</style></td></tr></table></body></html><b class=in>x</b>",
    "the end of an attribute": "\"'><b class=in onmouseover=alert(1)>x</b>",
    "the start of a comment": "before <!-- after",
    "a link of Markdown to code": "[x](javascript:alert(1)) and [y]: javascript:alert(1)",
    "an image of Markdown": "![x](http://elsewhere.invalid/b.png)",
    "bars and fences of Markdown": "a | b | c ``` {raw} html <b class=in>x</b>",
    "a directive of MyST": ":::{raw} html <b class=in>x</b> :::",
    "a formula with dollars": r"$\frac{1}{0}$ and $$\unknown",
    "a formula with a link": r"\(\href{javascript:alert(1)}{x}\) \[\class{in}{y}\]",
    "codes of a terminal": "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b2J",
    "a turn of direction": "abc\u202egnp.exe \u2066left",
    "a NUL and a bell": "a\x00b\x07",
    "half a character": "half \ud800 \udfff",
    "a token of 50 kB": "x" * 50_000,
    "a template": "{{7*7}} ${alert(1)} {x} %(y)s",
    "words that look like attributes": " one = 1 online=2 url(x) @import",
    "a turn of a table": "a\nb | c\n|---|",
}
BAD = (".in, [onerror], [onmouseover], [onclick], [href^='javascript' i], iframe, object, embed, base, form[action^='//'], "
       "form[action^='http'], mjx-container:not(.math *), svg script")
NAME = """it's "a" run; {x} ü $HOME `id` & <b class=in> ![a](b) | #1"""


def shown(*objects) -> list:
    "A code cell's outputs, as IPython would store what objects show."
    def data(o):
        if isinstance(o, str):
            return {"text/html": o}
        kinds = {"text/html": "_repr_html_", "text/markdown": "_repr_markdown_"}
        return {k: getattr(o, f)() for k, f in kinds.items() if hasattr(o, f)} | {"text/plain": f"{type(o).__name__}()"}
    return [nbformat.v4.new_output("execute_result", data(o), execution_count=1) for o in objects]


def write_notebook(run: Run, name: str, *objects) -> None:
    "An executed notebook that shows some objects."
    cells = [nbformat.v4.new_markdown_cell(f"# {name}\n\n> About it"), nbformat.v4.new_markdown_cell("## What came out\n\n$x^2$"),
             *(nbformat.v4.new_code_cell("1", outputs=[o]) for o in shown(*objects))]
    (run.folder / "notebooks").mkdir(exist_ok=True)
    text = nbformat.writes(nbformat.v4.new_notebook(cells=cells)).encode("utf-8", "replace")
    (run.folder / f"notebooks/{name}.ipynb").write_bytes(text)


def hostile_answers() -> Answers:
    "Answers of both models about the hostile texts."
    texts = list(HOSTILE.values())
    said = dict(label="positive", teacher="positive", teacher_right=True, student="negative", student_right=False, kind=KINDS[0])
    table = pd.DataFrame(dict(id=range(len(texts)), student_sure=0.9, teacher_sure=0.9, text=pd.Series(texts, dtype=object)) | said)
    return Answers("imdb", ("negative", "positive"), ("text",), ("text",), table)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Run:
    "A run whose name, recipe, data and outputs hold hostile texts; scores are drawn."
    root = tmp_path_factory.mktemp("hostile")
    note = " ".join(t for t in HOSTILE.values() if "\ud800" not in t and len(t) < 999)
    (root / "p.yaml").write_text(json.dumps(dict(extends="quick", note=note)))
    run = create_run(root / NAME, load_settings(str(root / "p.yaml"), "smoke"), root)
    for model, task, seed in [(m, t, s) for m in ("teacher", "student") for t in ("cola", "mrpc") for s in (1, 2)]:
        rows = [dict(metric="score", value=0.8), dict(metric="floor", value=0.5)]
        common = dict(stage="finetune", model=model, task=task, split="validation", seed=seed, n=9)
        write_records(run, f"finetune-{model}-{task}-{seed}", rows, **common)
    write_predictions(run, "other", pd.DataFrame(dict(id=[0])))  # what tells a run of models from a benchmark
    texts = list(HOSTILE.values())
    table = Table(texts[0], ["Model", *map(str, range(2))], [(texts[1], [[t, t, t] for t in texts])], texts)
    save_table(run, "t1_glue", table)
    name = "<b class=in>x ![a](b) `c`"
    (root / "data" / name).mkdir(parents=True)
    lines = pd.DataFrame({"text": ["the dog sleeps in the old house near the river and the cat sees it"] * 50})
    lines.to_parquet(root / "data" / name / "train.parquet")
    data = Data(source="local", dir=str(root / "data"), min_len_exclusive=2)
    store = build_store(data, load_tokenizer(Data()), [name], "train", root / "store", 0)
    use_style()
    tokens = [t[:40] for t in texts]
    weights = np.full((len(tokens), len(tokens)), 1 / len(tokens))
    names = dict.fromkeys(("teacher", "student"), [f"row {i}" for i in range(len(tokens))])
    figures = [attention_figure(weights, weights, tokens), rows_figure(weights, weights, names, tokens, "rows")]
    frame = pd.DataFrame({"": {"text": " ".join(map(visible, texts))}})  # as `pair.state_case` shows an example
    write_notebook(run, "t1_glue", table, Findings(texts), frame, "<script class=in>alert(1)</script>", "<img class=in src=http://elsewhere.invalid/c>")
    write_notebook(run, "a1_attention", *(save_figure(run, f"a1_{i}", f) for i, f in enumerate(figures)))
    write_notebook(run, "s02_distil", store)
    with pd.option_context("display.max_colwidth", None):
        page = browser_page(f"IMDb, {NAME}", hostile_answers(), pd.DataFrame({"tag": np.ones(len(texts))}), tuple(texts))
        write_notebook(run, "a4_errors", save_browser(run, "a4_imdb_browser", page), frame)
    return run


@pytest.fixture(scope="module")
def site(hostile, tmp_path_factory) -> Path:
    "The site of that run alone, as `make docs` lays it out."
    import results

    root = tmp_path_factory.mktemp("site")
    workflow.publish(hostile, root / "results" / NAME)
    (root / "stage/results").mkdir(parents=True)
    results.lay_out(root / "results", root / "stage", root / "extra", "https://example.org/repo/blob/main")
    (root / "stage/index.md").write_text("# Site\n\n```{toctree}\nresults/index\n```\n")
    words = ["-W", "--keep-going", "-q", "-b", "html", "-c", ROOT / "docs", "-D", f"html_extra_path={root / 'extra'}"]
    words += [root / "stage", root / "out"]
    done = subprocess.run([sys.executable, "-m", "sphinx", *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return root / "out"


@pytest.fixture(scope="module")
def page(browser):  # noqa: F811
    "A browser's page that remembers dialogs, and what it asks of others than the disk."
    page = browser.new_page(color_scheme="light")
    page.heard = []
    page.on("dialog", lambda d: (page.heard.append(f"dialog {d.message}"), d.dismiss()))
    page.on("request", lambda r: page.heard.append(r.url[:99]) if not r.url.startswith(("file:", "data:", "blob:")) else None)
    yield page
    page.close()


def look(page, path: Path) -> str:
    "Open a page; it must be inert and no wider than a desk or a phone. Returns its text."
    page.heard.clear()
    page.set_viewport_size(DESK)
    page.goto(path.as_uri(), wait_until="load")
    page.evaluate("window.MathJax?.startup?.promise")
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    page.wait_for_timeout(50)
    assert page.evaluate("bad => [...document.querySelectorAll(bad)].map(e => e.outerHTML.slice(0, 200))", BAD) == []
    assert page.evaluate("window.pwned === undefined")
    for size in (DESK, PHONE):
        page.set_viewport_size(size)
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], "wider than the screen"
    assert page.heard == []
    return page.evaluate("document.body.textContent")


def missing(text: str, *without: str) -> list[str]:
    "Which hostile texts a page does not show as they are."
    flat = " ".join(text.split())
    return [k for k, t in HOSTILE.items() if k not in without and " ".join(visible(t[:4000]).split()) not in flat]


def test_the_report_shows_texts_and_obeys_none(hostile, page, fault):
    path = write_report(hostile)
    with fault("outputs", "hostile texts in report.html, in a browser"):
        text = look(page, path)
        assert missing(text, "half a character") == []
        assert page.title() == visible(f"distilrepro: {NAME}") and page.locator("h1").inner_text() == page.title()
        assert page.locator("img").count() == 2 and page.evaluate("[...document.images].every(i => i.naturalWidth > 99)")


def test_the_example_browser_shows_texts_and_obeys_none(hostile, page, fault):
    with fault("outputs", "hostile texts in the example browser, in a browser"):
        text = look(page, hostile.folder / "tables/a4_imdb_browser.html")
        assert missing(text) == []
        assert page.locator("tbody tr").count() == len(HOSTILE)
        page.fill("#find", "onerror")
        assert page.locator("tbody tr:visible").count() == 1


def test_the_site_shows_texts_and_obeys_none(site, page, fault):
    (folder,) = [p for p in (site / "results").iterdir() if p.is_dir()]
    told = {}
    for path in sorted(site.glob("results/**/*.html")):
        with fault("outputs", "hostile texts on pages of the site, in a browser"):
            told[path.relative_to(folder.parent).as_posix().removeprefix(f"{folder.name}/")] = look(page, path)
            assert "notebooks" not in path.parts or page.locator(".math svg").count() == 1, "MathJax is there and sets formulas"
    assert missing(told["notebooks/t1_glue.html"], "half a character") == []
    assert NAME in " ".join(told["index.html"].split()) and "![a](b)" in told["notebooks/s02_distil.html"]
    assert HOSTILE["a directive of MyST"] in told["index.html"] and "alert(1)" in told["tables/a4_imdb_browser.html"]


@pytest.mark.parametrize("bad", [
    "<script>1</script>", "<img src=//a.org/x.png>", "<a href=' java\tscript:1'>x</a>", "<svg onload=1>", "<p style='background:url(//a)'>",
    "<p style='background:u\\72l(//a)'>", "<style>@import '//a'</style>", "<meta http-equiv=refresh content='0;//a'>", "<!--", "<p <",
    "<iframe>",
    "<form action=//a><input>", "<math><mi xlink:href='javascript:1'>", "<a href='//a.org'>x</a>", "<a href='../../../etc/passwd'>x</a>"])
def test_html_that_could_act_is_left_out_of_a_report(bad, fault):
    with fault("outputs", "an output of a notebook that could act"):
        assert acts(bad) and acts(f"<p>fine</p>{bad}")


@drawn(max_examples=100)
@given(st.text(max_size=80))
def test_no_text_can_leave_its_cell(text):
    text = text.encode("utf-8", "ignore").decode()
    html = Table(text, [text, text], [(text, [[text, text]])], [text])._repr_html_()
    assert not acts(html), "escaped text is never taken for HTML that acts"
    assert html.count("<td>") == 1 and visible(text) == visible(visible(text))


def test_markdown_of_a_table_is_text(hostile, fault):
    from markdown_it import MarkdownIt

    with fault("outputs", "hostile texts in a table's Markdown"):
        html = MarkdownIt("gfm-like", dict(html=True, linkify=False)).render((hostile.folder / "tables/t1_glue.md").read_text())
        assert not acts(html.replace("<s>", "").replace("</s>", "")) and html.count("<tr>") == 1 + len(HOSTILE)
    for text in HOSTILE.values():
        one = " ".join(visible(text).split())
        inline = MarkdownIt("gfm-like", dict(html=True, linkify=False)).renderInline(markdown(one))
        assert "<" not in inline.replace("<br>", ""), inline


@pytest.mark.parametrize("figure", ["whole maps", "rows", "words"])
def test_tokens_in_pictures_are_no_formulas(figure, fault, tmp_path):
    tokens = [t[:60] for t in [*HOSTILE.values(), "$", "$x$", r"$\frac{", r"\$", "##$", "日本", "a" * 99]]
    tokens = tokens[:23] if figure == "whole maps" else tokens * 3
    weights = np.full((len(tokens), len(tokens)), 1 / len(tokens))
    with fault("outputs", "hostile tokens in a picture's labels"):
        if figure == "words":
            fig = attribution_figure(weights[0], weights[0], tokens, dict(teacher="positive", student="negative"))
        else:
            fig = attention_figure(weights, weights, tokens)
        with pytest.warns(UserWarning, match="missing from font"):
            fig.savefig(tmp_path / "a.svg")
        labels = [t for ax in fig.axes for t in (*ax.get_xticklabels(), *ax.get_yticklabels(), *ax.texts) if "$" in t.get_text()]
        assert labels and not any(t.get_parse_math() for t in labels)
        ElementTree.parse(tmp_path / "a.svg")
    plt.close("all")


# the terminal

def test_a_table_on_the_terminal_is_text(capsys, fault):
    texts = [t[:200] for t in HOSTILE.values() if "\ud800" not in t] + ["[red]x[/red]", "[/]", "[link=http://a.org]b[/link]", ":boom:"]
    with fault("outputs", "hostile texts in a table on the terminal"):
        cli.show(pd.DataFrame({t: [t] for t in ["[/]", "\x1b[31m"]}), texts[0])
        for text in texts:
            cli.show(pd.DataFrame({"name": [text]}), "[/x] \x1b[31m")
        out = capsys.readouterr().out
        assert not {"\x1b", "\x07", "\x9b", "\u202e", "\x00"} & set(out)
        assert "[red]x[/red]" in out and "[/]" in out and ":boom:" in out


@pytest.mark.parametrize("words", [
    ["reproduce", "--preset", "\x1b[31mquick"], ["reproduce", "--data", "no/\x1b[31mfolder"], ["report", "--run", "no/\x1b[2Jrun\u202e"],
    ["reproduce", "--set", "data.\x1b[31m=1"], ["evaluate", "\x1b[31mcola", "--predictions", "x.tsv"], ["reproduce", "--run", "a\nb"],
    ["reproduce", "--scale", "\x1b]0;x\x07"], ["distil", "--teacher", "./\x1b[31mx", "--text", "x", "--out", "y"], ["--\x1b[31m"],
    ["\x1b[31mx"], ["reproduce", "--cores", "\x1b[31m"], ["evaluate", "cola", "--predictions", "no\x1b[31m.tsv"],
], ids=lambda words: " ".join(words).encode("unicode-escape").decode())
def test_an_error_quotes_a_code_of_the_terminal_as_text(command, words, fault, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTILREPRO_TEST", "1")
    with fault("outputs", "a code of the terminal in a command's words"):
        code, out, err = command(*words)
        assert code == 2 and not {"\x1b", "\x07", "\u202e"} & set(out + err) and "Traceback" not in err, err


# names

def test_the_command_that_a_table_names_is_one_word_a_word(hostile, fault):
    with fault("outputs", "a run's name in a command that a reader copies"):
        assert shlex.split(command(hostile))[-2:] == ["--run", f"runs/{NAME}"]
        assert command(SimpleNamespace(name="quick", settings=load_settings("quick", "smoke"))).endswith("--scale smoke --run runs/quick")


@pytest.mark.parametrize(("name", "scale"), [("...yaml", ""), ("-x;y.yaml", ""), ("a.yaml", "../../up"), ("a.yaml", "$(id)")])
def test_a_preset_cannot_name_a_run_folder_elsewhere(tmp_path, name, scale, fault):
    (tmp_path / name).write_text(json.dumps(dict(extends="quick", scales={scale: {}} if scale else {})))
    with fault("outputs", "a preset or scale whose name leads elsewhere"):
        settings = load_settings(str(tmp_path / name), scale)
        with pytest.raises(UserError, match="cannot name a run folder"):
            workflow.run_folder(settings)
        assert workflow.run_folder(settings, "mine") == Path("mine")


def test_publishing_replaces_published_results_alone(hostile, tmp_path, fault):
    (tmp_path / "home/papers").mkdir(parents=True)
    (tmp_path / "home/papers/thesis.txt").write_text("years")
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "home", tmp_path / "home/papers/..", hostile.folder, hostile.folder.parent, tmp_path / "file", Path("/")):
        with fault("outputs", "results published over a folder of something else"):
            with pytest.raises(UserError, match="something else than published results"):
                workflow.publish(hostile, place)
    assert (tmp_path / "home/papers/thesis.txt").read_text() == "years" and (hostile.folder / "records").is_dir()
    with fault("outputs", "results published twice"):
        first, again = workflow.publish(hostile, tmp_path / "a b"), workflow.publish(hostile, tmp_path / "a b")
        assert first == again and all(p.is_relative_to(tmp_path / "a b") for p in first)


@pytest.mark.parametrize("out", ["/", "file"])
def test_a_student_needs_a_folder_of_its_own(tmp_path, out, fault):
    (tmp_path / "file").write_text("x")
    with fault("outputs", "a student saved where no folder can be"):
        with pytest.raises(UserError, match="cannot be saved|no folder|there is no"):
            workflow.distil("./no-teacher", ("*.txt",), tmp_path / out)


@pytest.mark.parametrize("value", ["it's", 'a "b"', "$(touch pwned)", "`touch pwned`", "a; touch pwned", "$HOME", "{x} ü", "-x",
                                   "a\ntouch pwned", "$(shell touch pwned)"])
@pytest.mark.parametrize("door", ["reproduce", "bench"])
def test_make_hands_a_name_on_and_reads_it_never(tmp_path, value, door, fault):
    if not shutil.which("make"):
        pytest.skip("no make here")
    shutil.copy(ROOT / "Makefile", tmp_path)
    tool = "#!/bin/sh\nprintf '%s\\0' \"$@\" > said\n"
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / "nbs/stages").mkdir(parents=True)
    (tmp_path / "nbs/stages/b01_x.ipynb").write_text("{}")
    for name in ("distilrepro", "papermill"):
        (tmp_path / ".venv/bin" / name).write_text(tool)
        (tmp_path / ".venv/bin" / name).chmod(0o755)
    for name in ("settings.ini", "setup.py", "pyproject.toml", "constraints.txt", ".venv/run", ".venv/dev", ".venv/bench"):  # installed
        (tmp_path / name).write_text("")
    with fault("outputs", "a run's name on make's command line"):
        done = subprocess.run(["make", door, f"RUN={value}"], cwd=tmp_path, capture_output=True, text=True)
        assert not (tmp_path / "pwned").exists()
        if "\n" in value:
            assert done.returncode != 0, "make ends a recipe's line at a newline, and the shell refuses the half"
            return
        said = (tmp_path / "said").read_text().split("\0")[:-1]
        bench = ["run", value, "--", "nbs/stages/b01_x.ipynb", f"{value}/notebooks/b01_x.ipynb"]
        asked = [f"--run={value}"] if door == "reproduce" else bench
        assert done.returncode == 0 and said[-len(asked) :] == asked, done.stderr
