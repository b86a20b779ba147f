"""The example browser: read by a parser that knows nothing of it; hostile texts must be texts and no more."""
import base64
import hashlib
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilrepro.browser import KEPT, LIMIT, SCRIPT, browser_page, choose_examples, fold, save_browser, visible
from distilrepro.errors import KINDS, Answers

OURS = set("""html head meta title style body h1 ul li form label input select option button p table thead tbody tr th td small details
              summary script""".split())
PLAIN = set("""lang charset name content http-equiv id type autocomplete value role aria-label scope data-kind data-label data-tags
               data-name""".split())
HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onmouseover='alert(1)", "</script><script>alert(1)</script>",
    "</style></td></tr></table><iframe src=javascript:alert(1)>", "<!-- ", "]]>", "&lt;b&gt; &amp;", "\x1b[31mred\x1b[0m \x9b2J",
    "abc\u202egnp.exe", "\u2066left\u2069", "\x00\x08\x7f", "${alert(1)} `x`", "javascript:alert(1)", "{{7*7}}", "", "word " * 3000,
]


class Page(HTMLParser):
    "Elements, attributes, and the cells of each row."

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.rows, self.scripts, self.inside, self.data = [], [], [], [], "", {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.inside = tag
        if tag == "tr":
            self.rows.append([])
            self.data = dict(attrs)
        if tag == "td":
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append(data)
        elif self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def made(texts, task="imdb", **columns):
    "Answers about some texts."
    n = len(texts)
    labels = () if task == "squad" else ("negative", "positive")
    fields = ("question", "context") if task == "squad" else ("text",)
    base = dict(id=range(n), label="positive", teacher="positive", teacher_right=True, student="negative", student_right=False)
    base["kind"] = KINDS[0]
    extra = dict(teacher_f1=1.0, student_f1=0.0) if task == "squad" else dict(teacher_sure=0.9, student_sure=np.linspace(0.5, 0.9, n))
    return Answers(task, labels, fields, fields[:1], pd.DataFrame(base | extra | dict.fromkeys(fields, texts) | columns))


def count_kinds(values):
    "Count how often each kind is there."
    values = list(values)
    return {k: values.count(k) for k in range(4)}


def tagged(n, *names):
    "Tags that every example has."
    return pd.DataFrame(dict.fromkeys(names, np.ones(n)), index=range(n))


@pytest.mark.parametrize("task", ["imdb", "squad"])
def test_hostile_texts_are_texts(task):
    answers = made(HOSTILE, task, **(dict.fromkeys(("label", "student", "teacher", "id"), HOSTILE) if task == "squad" else {}))
    page = browser_page(HOSTILE[0], answers, tagged(len(HOSTILE), *HOSTILE[:5]), tuple(HOSTILE))
    page.encode()
    seen = Page(page)
    assert set(seen.tags) <= OURS and {name for name, _ in seen.attributes} <= PLAIN
    assert seen.tags.count("script") == seen.tags.count("style") == 1 and "".join(seen.scripts) == SCRIPT
    assert len(seen.rows) == 1 + len(HOSTILE) and {len(r) for r in seen.rows[1:]} == {7}
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page)
    cells = [row[5] for row in seen.rows[1:]]
    assert all(any(visible(text[:KEPT]) in cell for cell in cells) for text in HOSTILE)


@settings(max_examples=60)
@given(st.lists(st.text(max_size=300), min_size=1, max_size=4))
def test_any_text_stays_inside_its_cell(texts):
    seen = Page(browser_page("t", made(texts), tagged(len(texts), *dict.fromkeys(texts))))
    assert set(seen.tags) <= OURS and len(seen.rows) == 1 + len(texts) and {len(r) for r in seen.rows[1:]} == {7}


def test_nothing_is_fetched_and_the_policy_names_the_script():
    page = browser_page("t", made(["a"]), tagged(1, "negation"))
    ours = re.sub("'sha256-[^']+'", "", page.replace(SCRIPT, ""))  # a hash may hold any letters
    assert not re.search(r"https?:|//[a-z]|url\(|@import|\bsrc=|\bhref=|\son[a-z]+=", ours)
    assert not re.search(r"fetch|XMLHttp|import\(|innerHTML|document\.write|eval", SCRIPT)
    (policy,) = [v for k, v in Page(page).attributes if k == "content" and "default-src" in v]
    style = re.search("<style>(.*?)</style>", page, re.S)[1]
    for kind, text in (("script", SCRIPT), ("style", style)):
        code = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{code}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_a_page_is_bounded():
    n = LIMIT + 100
    page = browser_page("t", made(["<é> <tag> and &c." + "x" * 19983] * n), tagged(n, "negation"))
    seen = Page(page)
    assert len(seen.rows) == 1 + LIMIT and len(page) < LIMIT * (KEPT + 1500)
    assert f"{LIMIT} of {n} examples" in page and "20000 characters in all" in page


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0.5, 1)), max_size=30), st.integers(1, 12))
def test_disagreements_come_first(rows, limit):
    kinds, sure = ([r[i] for r in rows] for i in (0, 1))
    table = pd.DataFrame(dict(id=range(len(rows)), kind=[KINDS[k] for k in kinds], student_sure=np.array(sure, float)))
    chosen = choose_examples(table, limit).tolist()
    assert len(chosen) == len(set(chosen)) == min(limit, len(rows))
    shown = count_kinds(kinds[i] for i in chosen)
    there = count_kinds(kinds)
    if shown[2] + shown[3]:  # agreements only once no disagreement is left out
        assert shown[0] == there[0] and shown[1] == there[1]
    assert all(shown[k] == there[k] or shown[k] >= shown[1 - k] - 1 for k in (0, 1))  # in turn
    assert [kinds[i] for i in chosen] == sorted(kinds[i] for i in chosen)
    for k in range(4):
        of_kind = [sure[i] for i in chosen if kinds[i] == k]
        left = [s for i, s in enumerate(sure) if kinds[i] == k and i not in chosen]
        assert of_kind == sorted(of_kind, reverse=True) and (not of_kind or not left or min(of_kind) >= max(left))


def test_filters_offer_what_is_there():
    answers = made(["a", "b"], kind=[KINDS[0], KINDS[2]])
    tags = pd.DataFrame({"negation": [1.0, 0.0], "never": [0.0, 0.0], "violation: form": [np.nan, 1.0]})
    seen = Page(browser_page("t", answers, tags))
    offered = [v for k, v in seen.attributes if k == "value"]
    assert offered == ["", KINDS[0], KINDS[2], "", "negative", "positive", "", "negation", "violation: form"]
    assert [v for k, v in seen.attributes if k == "data-tags"] == ["|negation|", "|violation: form|"]
    assert "label" not in [v for k, v in Page(browser_page("t", made(["a"], "squad"), tagged(1, "x"))).attributes if k == "id"]


def test_broken_halves_of_characters_can_be_written():
    assert visible("half \ud800 \udfff").encode() == b"half [U+D800] [U+DFFF]"


def test_folded_text_is_whole_on_demand():
    text = "It was a long review. " * 30
    folded = fold(text)
    assert folded.count(text) == 1 and folded.startswith("<details><summary>It was") and " …</summary>" in folded
    assert fold("short") == "short"


def test_the_file_lies_beside_the_tables(tmp_path):
    link = save_browser(SimpleNamespace(folder=tmp_path), "a4_cola_browser", "<!doctype html>")
    assert (tmp_path / "tables/a4_cola_browser.html").read_text() == "<!doctype html>"
    assert 'href="../tables/a4_cola_browser.html"' in link._repr_html_()
