"""Errors and tags: the split against a loop, intervals against their formulas, tags on written sentences and on injected violations."""
import json
from collections import Counter
from itertools import product
from math import comb
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilrepro.config import Data, UserError, load_settings
from distilrepro.errors import (
    KINDS,
    confusion_figure,
    confusions,
    error_rates,
    join_answers,
    load_answers,
    mean_f1,
    share,
    split_errors,
)
from distilrepro.language import NOUNS, NUMBERS
from distilrepro.lookalikes import task as lookalike
from distilrepro.records import create_run, write_predictions
from distilrepro.sources import load_tokenizer
from distilrepro.tags import (
    CONSTRUCTIONS,
    RULES,
    error_findings,
    has,
    length_slices,
    measure_tokens,
    odds_text,
    over_represented,
    overlap,
    quarters,
    question_word,
    rare_words,
    slices_figure,
    tag_examples,
    tag_figure,
    tag_rates,
    tag_run,
    violation_tags,
    words,
)

ROOT = Path(__file__).resolve().parent.parent
COLA = ("unacceptable", "acceptable")


def predictions(labels, said):
    "Predictions as fine-tuning stores them; the answer is clear, the other classes are not."
    logits = {f"logit_{k}": np.where(np.array(said) == k, 2.0, -2.0) for k in range(2)}
    return pd.DataFrame(dict(id=range(len(labels)), label=labels, prediction=said) | logits)


def answers(labels, student, teacher, texts=None):
    "Answers to CoLA from lists of class numbers."
    texts = texts or [f"sentence {i} ." for i in range(len(labels))]
    source = pd.DataFrame(dict(id=range(len(labels)), label=labels, sentence=texts))
    return join_answers("cola", COLA, predictions(labels, student), predictions(labels, teacher), source)


TRIPLES = st.lists(st.tuples(*[st.integers(0, 1)] * 3), min_size=1, max_size=40)


@settings(max_examples=20)
@given(TRIPLES)
def test_the_split_and_the_confusions_are_those_of_a_loop(triples):
    found = answers(*(list(c) for c in zip(*triples, strict=True)))
    kinds, cells = Counter(), Counter()
    for label, student, teacher in triples:
        s, t = student != label, teacher != label
        kinds["both wrong" if s and t else "only student wrong" if s else "only teacher wrong" if t else "both right"] += 1
        cells["student", label, student] += 1
        cells["teacher", label, teacher] += 1
    split = split_errors(found.table)
    assert dict(zip(split.kind, split.n, strict=True)) == {k: kinds[k] for k in KINDS}
    assert abs(split.share.sum() - 1) < 1e-12 and ((split.low <= split.share) & (split.share <= split.high)).all()
    for model, table in confusions(found).items():
        assert all(table.iloc[a, b] == cells[model, a, b] for a, b in product((0, 1), (0, 1)))


@pytest.mark.parametrize("k, n", [(0, 1), (0, 30), (1, 2), (7, 30), (30, 30), (400, 1043)])
def test_intervals_are_wilsons(k, n):
    z, p = 1.959963984540054, k / n
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = ((p + z**2 / (2 * n) + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    assert np.allclose(share(k, n), (p, low, high), atol=1e-9)
    assert all(np.isnan(share(0, 0)))


def test_the_interval_of_f1_is_that_of_a_mean():
    f1 = pd.Series(np.random.default_rng(3).beta(2, 5, 300))
    middle, low, high = mean_f1(f1)
    half = 1.96 * f1.std() / np.sqrt(len(f1))
    assert abs(middle - f1.mean()) < 1e-12 and np.allclose((low, high), (middle - half, middle + half), atol=0.15 * half)


@pytest.mark.parametrize("tag, yes, no", [
    ("negation", ["I do not know", "It does n't work", "don’t", "didn 't", "No!", "He cannot", "without end", "Nobody"],
     ["a knot", "note", "nothings", "mint", "another", "can"]),
    ("contrast", ["Good but long", "Although old, ...", "However", "it rains, though"], ["butter", "through", "thought", "yet", "while"]),
    ("numeral", ["3 dogs", "1999", "Two dogs", "hundreds"], ["one of them", "someone", "tense", "often"]),
    ("form: question", ["Who came?", "Who came ? "], ["Who? Nobody."]),
    ("form: wh-word", ["I know who came"], ["whole", "show"]),
    ("form: self, each other", ["John saw himself", "They met each other", "one another"], ["a shelf", "the other", "selfish"]),
    ("form: comparative", ["taller than me", "the more you eat"], ["then", "more"]),
    ("form: any or ever", ["without any help", "if ever"], ["many", "every", "never"]),
    ("form: and, or", ["black and white", "tea or milk"], ["sand", "for"]),
])
def test_rules_on_written_sentences(tag, yes, no):
    rule = (RULES | CONSTRUCTIONS)[tag]
    assert has(rule, yes).tolist() == [True] * len(yes) and has(rule, no).tolist() == [False] * len(no)


@pytest.mark.parametrize("text, word", [
    ("Who won?", "who"), ("To whom did it go?", "who"), ("Whose dog is it?", "who"), ("In which year?", "which"),
    ("How did he die?", "how"), ("How many dogs?", "how many"), ("How much does it cost?", "how many"),
    ("By what was it moved?", "what"), ("Where is it?", "where"),
    ("When?", "when"), ("Why not?", "why"), ("The show was whatever", "other"), ("", "other"),
])
def test_question_words(text, word):
    assert question_word(text) == word


def test_overlap_as_in_hans():
    assert overlap("The judge by the actor stopped the banker.", "The banker stopped the actor.") == (4 / 6, True)
    assert overlap("The judge ran.", "The judge ran fast.") == (3 / 4, False)
    assert overlap("a", "") == (0.0, False)


def test_words_and_rare_words():
    assert words("It's <br />the 2nd FILM, isn’t it?") == ["it's", "the", "nd", "film", "isn’t", "it"]
    assert rare_words(["a b", "a c", ""], Counter(a=3, b=3, c=2)).tolist() == [False, True, False]


def test_tokens_are_counted_before_any_cut_and_pieces_by_word():
    tokenizer = load_tokenizer(Data())
    first, second = ["tom repairs the car .", "anna misplaces zebras ."], ["the car .", "tom ."]
    tokens, pieces = measure_tokens(tokenizer, [first, second])
    assert tokens.tolist() == [len(tokenizer(a, b)["input_ids"]) for a, b in zip(first, second, strict=True)]
    longest = [max(len(tokenizer.tokenize(w)) for w in f"{a} {b}".split()) for a, b in zip(first, second, strict=True)]
    assert pieces.tolist() == longest


def diagnose(sentence):
    "What is wrong with a sentence of the look-alike, read from its words alone."
    forms = {"break": "breaks broke", "find": "finds found", "lose": "loses lost", "buy": "buys bought", "eat": "eats ate"}
    third, past = ({f.split()[i] for f in forms.values()} for i in (0, 1))
    said = sentence.removesuffix(" .").split()
    if {f"{base}ed" for base in forms} & set(said):
        return "form"
    if not (forms.keys() | third | past) & set(said):
        return "missing"
    at = next(i for i, w in enumerate(said) if w in forms.keys() | third | past)
    subject = 2 if said[0] == "the" else 1
    negated = said[subject] in ("did", "does", "do") and said[subject + 1] == "not"
    if at != subject + 2 * negated:
        return "order"
    if any(a in NUMBERS and b in NOUNS for a, b in zip(said, said[1:], strict=False)):
        return "number"
    now = said[subject] != "did" if negated else said[at] not in past
    if (now and said[-1] in ("yesterday", "week") and said[-2] != "every") or (not now and said[-2] == "every"):
        return "tense"
    several = subject == 2 and said[1].endswith("s")
    fits = said[at] in forms if negated else not now or (said[at] in third) != several
    return None if fits else "agreement"


def test_cola_tags_match_the_injected_violation_as_an_independent_reader_sees_it():
    rows = lookalike("cola", 0)["train"]
    tags = violation_tags(pd.Series([json.dumps(r["truth"]) for r in rows]))
    assert len(tags) == 6
    for i, row in enumerate(rows):
        told = {name.removeprefix("violation: ") for name, tag in tags.items() if tag[i] == 1}
        read = diagnose(row["sentence"])
        assert told == {read} - {None} and np.isnan(tags["violation: form"][i]) == (row["label"] == 1), row


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of the toy language with predictions and no checkpoint."
    made = create_run(tmp_path_factory.mktemp("runs") / "quick", load_settings("quick", "smoke"), ROOT)
    rng = np.random.default_rng(0)
    for task, split in (("cola", "validation"), ("mrpc", "validation"), ("imdb", "test")):
        labels = np.array([r["label"] for r in lookalike(task, made.settings.data.seed)[split]])[:60]
        for model, wrong in (("student", 0.4), ("teacher", 0.2)):
            said = np.where(rng.random(60) < wrong, 1 - labels, labels)
            write_predictions(made, f"finetune-{model}-{task}-1", predictions(labels, said))
    rows = lookalike("squad", made.settings.data.seed)["validation"][:60]
    golds = [json.dumps(r["answers"]["text"]) for r in rows]
    for model in ("student", "teacher"):
        exact = (rng.random(60) < 0.5).astype(float)
        table = dict(id=[r["id"] for r in rows], label=golds, prediction="the car", exact_match=exact, f1=np.maximum(exact, 0.3))
        write_predictions(made, f"finetune-{model}-squad-1", pd.DataFrame(table))
    return made


@pytest.mark.parametrize("task, some", [
    ("cola", "violation: order"), ("mrpc", "second inside first"), ("imdb", "contrast"), ("squad", "asks: who"),
])
def test_a_run_without_checkpoints_is_enough(run, task, some):
    found = load_answers(run, task)
    tags, tokens = tag_run(run, found)
    assert len(found.table) == len(tags) == len(tokens) == 60 and some in tags and tags.isin([0, 1]).any(axis=None)
    rates = tag_rates(found.table, tags)
    assert rates.n[0] == 60 and ("student_f1" in rates) == (task == "squad")
    source = {r.get("id", i): r for i, r in enumerate(lookalike(task, 0)["test" if task == "imdb" else "validation"])}
    for row in found.table.to_dict("records"):
        assert all(source[row["id"]][f] == row[f] for f in found.fields)
    for fig in (confusion_figure(found), tag_figure(found, rates), slices_figure(found, length_slices(found.table, tokens), 8)):
        assert fig.get_label()
        plt.close(fig)
    assert error_findings(found, over_represented(found.table, tags))[0].startswith("The teacher is wrong")


def test_squad_answers_are_graded_and_tagged_by_the_question(run):
    found = load_answers(run, "squad")
    (counts,) = confusions(found).values()
    assert counts.to_numpy().sum() == 60 and counts.loc["no word"].sum() == 0
    assert counts.loc["exact", "exact"] == (found.table.kind == "both right").sum()
    tags, _ = tag_run(run, found)
    asked = [t for t in tags if t.startswith("asks: ")]
    assert (tags[asked].sum(axis=1) == 1).all()
    first = found.table.question.str.startswith("where ")
    assert (tags["asks: where"][first] == 1).all() and first.any()


def test_what_cannot_be_looked_at_is_named(run):
    with pytest.raises(UserError, match="stsb is answered with a number"):
        load_answers(run, "stsb")
    with pytest.raises(UserError, match="leave student and teacher empty"):
        load_answers(run, "squad", student="somewhere")
    with pytest.raises(UserError, match="finetune-student-rte-1"):
        load_answers(run, "rte")
    with pytest.raises(UserError, match="task"):
        load_answers(run, "colla")


def test_other_data_than_was_answered_is_refused(run):
    source = pd.DataFrame(lookalike("cola", 1)["validation"]).rename(columns={"idx": "id"})
    said = predictions([r["label"] for r in lookalike("cola", 0)["validation"]], [0] * 400)
    with pytest.raises(UserError, match="not of the same examples"):
        join_answers("cola", COLA, said, said, source)
    with pytest.raises(UserError, match="not of the same examples"):
        join_answers("cola", COLA, said[:200], said[:200], source[:100])


def random_case(seed=0, n=300):
    "Answers and tags of which the first is the student's own trouble."
    rng = np.random.default_rng(seed)
    tags = pd.DataFrame({f"tag {k}": (rng.random(n) < p).astype(float) for k, p in enumerate((0.2, 0.5, 0.03))})
    labels = rng.integers(0, 2, n)
    teacher = np.where(rng.random(n) < 0.1, 1 - labels, labels)
    student = np.where(rng.random(n) < 0.1 + 0.4 * tags["tag 0"], 1 - labels, labels)
    return answers(labels.tolist(), student.tolist(), teacher.tolist()), tags


def test_fishers_p_holms_correction_and_the_counts_by_hand():
    found, tags = random_case()
    tags["tag 1"] = tags["tag 1"].where(np.arange(300) % 2 == 0)  # applies to every other example
    weighed = over_represented(found.table, tags).set_index("tag")
    t = found.table
    for tag, row in weighed.iterrows():
        cells = Counter((tags[tag][i], not t.student_right[i]) for i in range(300) if t.teacher_right[i] and tags[tag][i] in (0, 1))
        a, b, c, d = (cells[k] for k in ((1, True), (1, False), (0, True), (0, False)))
        assert (row.wrong, row.n, row.other_wrong, row.other_n) == (a, a + b, c, c + d)
        ways = {k: comb(a + b, k) * comb(c + d, a + c - k) for k in range(max(0, a - d), min(a + b, a + c) + 1)}
        p = sum(w for w in ways.values() if w <= ways[a] * (1 + 1e-9)) / sum(ways.values())
        assert abs(p - row.p) < 1e-9 and row.low <= row.odds <= row.high
    ordered = weighed.sort_values("p")
    assert np.allclose(ordered.p_holm, np.minimum(1, np.maximum.accumulate(ordered.p * [3, 2, 1])))
    assert weighed.index[0] == "tag 0" and weighed.p_holm.iloc[0] < 0.001
    assert any("tag 0" in s for s in error_findings(found, over_represented(found.table, tags)))


def test_tags_that_divide_nothing_are_not_tested():
    found, tags = random_case()
    tags = tags.assign(everywhere=1.0, nowhere=0.0)
    weighed = over_represented(found.table, tags).set_index("tag")
    assert weighed.p[["everywhere", "nowhere"]].isna().all() and weighed.p.notna().sum() == 3
    assert odds_text(*weighed.loc["nowhere", ["odds", "low", "high"]]) == "–"
    assert "nowhere" not in set(tag_rates(found.table, tags).tag)


def test_rates_by_tag_and_by_length_are_those_of_a_loop():
    found, tags = random_case()
    tokens = np.random.default_rng(1).integers(3, 30, 300)
    t = found.table
    for row in tag_rates(t, tags).iloc[1:].itertuples():
        inside = [i for i in range(300) if tags[row.tag][i] == 1]
        assert (row.n, row.student_wrong) == (len(inside), sum(not t.student_right[i] for i in inside))
        assert row.teacher_rate == pytest.approx(sum(t.teacher[i] != t.label[i] for i in inside) / len(inside))
    slices = length_slices(t, tokens)
    assert len(slices) == 6 and slices.n.sum() == 300 and (slices["first"][1:].to_numpy() > slices["last"][:-1].to_numpy()).all()
    for s in slices.itertuples():
        inside = [i for i in range(300) if s.first <= tokens[i] <= s.last]
        assert (s.n, s.teacher_wrong) == (len(inside), sum(not t.teacher_right[i] for i in inside))


@pytest.mark.parametrize("student, teacher, said", [
    ([0, 1, 1], [0, 1, 1], "so is the other"), ([1, 1, 1], [0, 1, 1], "answers acceptable to 3 of 3"), ([1, 0, 0], [1, 0, 0], "3 of 3"),
])
def test_few_examples_and_no_errors_are_told_in_words(student, teacher, said):
    found = answers([0, 1, 1], student, teacher, ["tom eat the pear .", "tom ate .", "sam ate ."])
    tags, tokens = tag_examples(found, load_tokenizer(Data()), Counter())
    rates, slices = tag_rates(found.table, tags), length_slices(found.table, tokens)
    sentences = error_findings(found, over_represented(found.table, tags))
    assert any(said in s for s in sentences) and all("nan" not in s for s in sentences)
    for fig in (confusion_figure(found), tag_figure(found, rates), slices_figure(found, slices, 96)):
        fig.canvas.draw()
        plt.close(fig)
    assert np.isnan(error_rates(found.table[:0])["student_rate"]) and split_errors(found.table).n.sum() == 3


def test_a_class_without_examples_is_drawn_as_such():
    found = answers([1, 1], [1, 0], [1, 1])
    fig = confusion_figure(found)
    texts = [t.get_text() for t in fig.axes[1].texts]
    plt.close(fig)
    assert texts == ["no example", "no example", "50%\n1 of 2", "50%\n1 of 2"]


def test_quarters_keep_equal_numbers_together():
    cut = quarters(np.array([3, 3, 3, 4, 5, 9, 9, 9]), "up to {}", "from {}")
    assert {k: v.sum() for k, v in cut.items()} == {"up to 3": 3, "from 9": 3}
    assert quarters(np.array([2, 2]), "a", "b") == {}
