"""SQuAD: normalisation and marks by other means, spans by brute force, D by a loop over positions, windows by what they spell."""
import json
import re
import string
from fractions import Fraction

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from transformers import BertConfig, BertForMaskedLM, DistilBertConfig, DistilBertForMaskedLM

from distilrepro.answers import load_predictions
from distilrepro.config import Data, Finetune, Loop, UserError
from distilrepro.finetune import SoftTargets, UntrainedTeacher, labelled_batch
from distilrepro.sources import load_split, load_tokenizer
from distilrepro.squad import (
    LONGEST,
    N_BEST,
    check_squad,
    decode,
    encode_squad,
    evaluate_squad,
    finetune_squad,
    golds_of,
    load_reader,
    mark,
    normalise,
    predict_spans,
    span_logits,
    squad_floor,
    squad_metrics,
    squad_objective,
    squad_rows,
    window_starts,
    word_f1,
)

SIZE = dict(max_position_embeddings=64, initializer_range=0.2)
LOOP = Loop(epochs=1, batch=16, accumulation=1, lr=3e-3, betas=(0.9, 0.999), clip=1.0, warmup=0.1, min_updates=1, log_every=20)


TOKENIZER = load_tokenizer(Data())


@pytest.fixture(scope="module")
def tokenizer():
    return TOKENIZER


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tokenizer):
    "A folder with a BERT and a DistilBERT that know nothing."
    torch.manual_seed(0)
    folder, n = tmp_path_factory.mktemp("bases"), len(tokenizer)
    wide = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    BertForMaskedLM(BertConfig(vocab_size=n, **wide, **SIZE)).save_pretrained(folder / "bert")
    small = dict(dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    DistilBertForMaskedLM(DistilBertConfig(vocab_size=n, **small, **SIZE)).save_pretrained(folder / "distilbert")
    return folder


@pytest.fixture(scope="module")
def short():
    return load_split(Data(), "squad", "validation").select(range(30))


def question(context, answer, at=None, key="q", asked="who ?"):
    "A row of SQuAD."
    starts = [context.index(answer) if at is None else at]
    return dict(id=key, context=context, question=asked, answers={"text": [answer], "answer_start": starts})


def joined(short, n, asked, key="long"):
    "A context of n stories; the question is about one of them."
    texts, found = short["context"][:n], short[asked]["answers"]
    at = len(" ".join(texts[:asked])) + (asked > 0) + found["answer_start"][0]
    return question(" ".join(texts), found["text"][0], at, key, short[asked]["question"])


# the metric

def slow_normalise(text: str) -> str:
    "Character by character, then word by word."
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join("".join(" " if run in ("a", "an", "the") else run for run in re.split(r"(\w+)", kept)).split())


def slow_f1(said: str, true: str) -> Fraction:
    "Precision and recall with words crossed off one by one, in fractions."
    p, g = slow_normalise(said).split(), slow_normalise(true).split()
    left, hits = list(g), 0
    for word in p:
        if word in left:
            left.remove(word)
            hits += 1
    if not hits:
        return Fraction(0)
    precision, recall = Fraction(hits, len(p)), Fraction(hits, len(g))
    return 2 * precision * recall / (precision + recall)


PIECES = ["a", "an", "the", "The", "A", "cat", "Cats", "theme", "x", "é", "İ", "–", "-", ".", "'", "$", "5", "½", " ", "\t", "\u00a0", "中"]
texts = st.one_of(st.text(max_size=20), st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
                  st.lists(st.sampled_from(PIECES), max_size=8).map(" ".join))


@given(texts)
@settings(max_examples=150)
def test_normalisation_is_the_official_one(text):
    assert normalise(text) == slow_normalise(text)
    assert normalise(normalise(text)) == normalise(text)


@given(texts, texts)
@settings(max_examples=150)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(a, b):
    assert word_f1(a, b) == pytest.approx(float(slow_f1(a, b)))
    assert word_f1(a, b) == word_f1(b, a)
    assert word_f1(a, a) == (1.0 if normalise(a) else 0.0)


@given(st.lists(st.sampled_from(["cat", "dog", "the", "5", "é"]), min_size=1, max_size=6), st.randoms())
def test_word_order_and_articles_do_not_matter_to_f1(words, rng):
    other = [*words, "an", "The"]
    rng.shuffle(other)
    gold = " ".join([*words, "cat"])
    assert word_f1(" ".join(other), gold) == word_f1(" ".join(words), gold)


@pytest.mark.parametrize(("said", "golds", "exact", "f1"), [
    ("Denver Broncos", ["Denver Broncos", "the Broncos"], 1, 1),
    ("the  DENVER broncos!", ["Denver Broncos"], 1, 1),
    ("Broncos", ["Denver Broncos", "Carolina Panthers"], 0, 2 / 3),  # precision 1, recall 1/2
    ("Broncos", ["Denver Broncos", "Broncos of Denver"], 0, 2 / 3),  # the better of 2/3 and 1/2
    ("new york new york", ["New York"], 0, 2 / 3),  # a word counts as often as both have it
    ("24-10", ["24–10"], 0, 0),  # `-` is dropped, `–` is not
    ("Beyoncé", ["Beyonce"], 0, 0),  # accents stay
    ("$1.5", ["15"], 1, 1),
    ("", ["x"], 0, 0),
    ("an", ["the"], 1, 0),  # both are empty: the official script has it so
])
def test_marks_by_hand(said, golds, exact, f1):
    assert mark(said, golds) == pytest.approx((exact, f1))


def test_metrics_are_means_over_questions():
    golds = {"1": ["x"], "2": ["y z"], "3": ["w"]}
    assert squad_metrics({"3": "v", "1": "x", "2": "z"}, golds) == pytest.approx({"exact_match": 1 / 3, "f1": (1 + 2 / 3) / 3})


@pytest.mark.parametrize(("given_ids", "message"), [
    (["1"], r"missing ids: 2, such as 2, 3; give one answer for each of the 3"),
    (["1", "2", "3", "7"], r"unknown ids: 1, such as 7"),
])
def test_missing_and_unknown_ids_are_refused(given_ids, message):
    with pytest.raises(UserError, match=message):
        squad_metrics(dict.fromkeys(given_ids, "x"), {i: ["x"] for i in "123"})


# the rows

@pytest.mark.parametrize(("change", "message"), [
    (dict(answers={"text": ["Bob"], "answer_start": [7]}), r"row 1 \(id q1\) has the answer 'Bob' at 7, where its context has ' Bo'"),
    (dict(answers={"text": ["Bob"], "answer_start": [-7]}), "correct the offset"),
    (dict(answers={"text": ["Bob"], "answer_start": [90]}), "where its context has ''"),
    (dict(answers={"text": ["Ada", "Bob"], "answer_start": [0, 9]}), "'Bob' at 9"),  # the second answer is checked too
    (dict(answers={"text": [], "answer_start": []}), "SQuAD 2.0"),
    (dict(answers={"text": ["Ada"], "answer_start": [0, 8]}), "not one offset for each"),
    (dict(question="  "), "empty context or question"),
    (dict(id="q0"), "repeats the id of row 0"),
])
def test_a_bad_row_is_named(change, message):
    good = question("Ada met Bob .", "Ada")
    with pytest.raises(UserError, match=message):
        check_squad(Dataset.from_list([good | {"id": "q0"}, good | {"id": "q1"} | change]))


def test_an_offset_wrong_by_one_is_found_wherever_it_stands(short):
    check_squad(short)
    rows = short.to_list()
    rows[17]["answers"]["answer_start"][0] += 1
    with pytest.raises(UserError, match="row 17"):
        check_squad(Dataset.from_list(rows))


# the windows

@given(st.integers(0, 400), st.integers(1, 90), st.integers(1, 90))
def test_windows_cover_the_context_without_a_gap_and_without_waste(tokens, room, step):
    step = min(step, room)
    starts = list(window_starts(tokens, room, step))
    covered = {t for s in starts for t in range(s, min(s + room, tokens))}
    assert covered == set(range(tokens)) and starts[0] == 0
    assert len(starts) == 1 or starts[-2] + room < tokens  # the one before the last did not reach the end


def spelled(window, context):
    "What the target of a window says."
    a, b = (p - window["first"] for p in window["label"])
    return context[window["offsets"][a][0] : window["offsets"][b][1]]


WORDS = ["kate", "the", "café", "Zürich", "中文", "x", "24–10", "(a", "b)", "…", "sees"]


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=150), st.data())
@settings(max_examples=50)
def test_a_target_spells_the_answer_and_lies_where_all_of_it_is_seen(words, data):
    i = data.draw(st.integers(0, len(words) - 1))
    j = data.draw(st.integers(i, min(i + 3, len(words) - 1)))
    start = len(" ".join(words[:i])) + (i > 0)
    answer, context = " ".join(words[i : j + 1]), " ".join(words)
    windows = encode_squad(Dataset.from_list([question(context, answer, start)]), TOKENIZER, 40)
    seen = [len(w["offsets"]) and w["offsets"][0][0] <= start and w["offsets"][-1][1] >= start + len(answer) for w in windows]
    assert [w["label"] != (0, 0) for w in windows] == seen
    assert all(spelled(w, context) == answer for w, s in zip(windows, seen, strict=True) if s)
    assert all(len(w["input_ids"]) == len(w["token_type_ids"]) <= 40 for w in windows)


def test_an_answer_late_in_a_long_context_falls_into_the_second_window(short, tokenizer):
    row = joined(short, 5, 4)
    first, second = encode_squad(Dataset.from_list([row]), tokenizer, 96)[:2]
    assert first["label"] == (0, 0) and first["input_ids"][0] == tokenizer.cls_token_id
    assert spelled(second, row["context"]) == row["answers"]["text"][0]
    assert (first["offsets"][32:] == second["offsets"][: len(first["offsets"]) - 32]).all()  # a third of 96 further on


def test_windows_of_384_have_the_original_step_and_query(tokenizer):
    context = " ".join(["kate"] * 900)
    windows = encode_squad(Dataset.from_list([question(context, "kate", 0, asked=" ".join(["who"] * 100))]), tokenizer, 384)
    assert windows[0]["first"] == 64 + 2
    assert [int(w["offsets"][0][0]) // 5 for w in windows] == [0, 128, 256, 384, 512, 640]  # the last one reaches 640 + 384 - 67


# the losses

def windows_of(short, tokenizer):
    "Windows of very different lengths."
    rows = [dict(short[0]) | {"id": "0"}, joined(short, 5, 2), dict(short[3]) | {"id": "3"}]
    keys = ("id", "context", "question", "answers")
    return encode_squad(Dataset.from_list([{k: r[k] for k in keys} for r in rows]), tokenizer, 64)


def loss_of(model, rows, soft=None):
    "Loss and parts of some windows as one update."
    batch = labelled_batch(rows, 0)
    loss, parts = squad_objective(model, rows, 0, soft).loss(batch, batch.counts)
    return loss.item(), parts


@pytest.fixture(scope="module")
def pair(bases):
    "Student and teacher with span heads that say something."
    models = [load_reader(bases / n, seed=3) for n in ("distilbert", "bert")]
    for m in models:
        torch.nn.init.normal_(m.qa_outputs.weight, std=1.0)
    return models


@pytest.mark.parametrize("soft", [False, True])
def test_padding_does_not_show_in_the_loss(pair, short, tokenizer, soft):  # B2
    student, teacher = pair
    rows, targets = windows_of(short, tokenizer), SoftTargets(teacher, 2.0, 0.5, 0.5) if soft else None
    assert len({len(r["input_ids"]) for r in rows}) > 1
    alone = [loss_of(student, [r], targets)[0] for r in rows]
    assert loss_of(student, rows, targets)[0] == pytest.approx(np.mean(alone), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 8.0])
def test_d_is_alpha_kl_t_squared_and_alpha_ce(pair, short, tokenizer, temperature):  # B11
    student, teacher = pair
    rows = windows_of(short, tokenizer)
    kl, ce = 0.0, 0.0
    for r in rows:
        s, t = (span_logits(m, labelled_batch([r], 0))[0].double().detach().numpy() for m in pair)
        for k in range(2):
            p, log_q, log_p = softmax(t[k] / temperature), log_softmax(s[k] / temperature), log_softmax(t[k] / temperature)
            kl += temperature**2 * (p * (log_p - log_q)).sum() / 2 / len(rows)
            ce -= log_softmax(s[k])[r["label"][k]] / 2 / len(rows)
    loss, parts = loss_of(student, rows, SoftTargets(teacher, temperature, 0.3, 0.9))
    assert loss == pytest.approx(0.3 * kl + 0.9 * ce, rel=1e-4)
    assert (parts["soft"].item(), parts["task"].item()) == pytest.approx((kl, ce), rel=1e-4)
    assert kl > 0.01


def test_the_teacher_is_in_eval_mode_and_gets_no_gradient(pair, short, tokenizer):
    student, teacher = pair
    teacher.train()
    rows = windows_of(short, tokenizer)
    batch = labelled_batch(rows, 0)
    loss, _ = squad_objective(student, rows, 0, SoftTargets(teacher, 2.0, 1.0, 0.0)).loss(batch, batch.counts)
    loss.backward()
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())
    assert student.qa_outputs.weight.grad.abs().sum() > 0
    student.zero_grad()


# decoding

def brute(logits_2wc, windows, contexts):
    "Every pair of every window, the best in order of window, start, end."
    best = {}
    for w, r in enumerate(windows):
        n = len(r["offsets"])
        ranked = [sorted(range(n), key=lambda i, k=k: (-logits_2wc[k, w, i], i))[:N_BEST] for k in range(2)]
        pairs = [(logits_2wc[0, w, s] + logits_2wc[1, w, e], -w, -s, -e) for s in ranked[0] for e in ranked[1] if 0 <= e - s < LONGEST]
        for p in pairs:
            best[r["row"]] = max(best.get(r["row"], p), p)
    out = {}
    for row, (_, w, s, e) in best.items():
        offsets = windows[-w]["offsets"]
        out[row] = contexts[row][offsets[-s][0] : offsets[-e][1]]
    return out


@pytest.mark.parametrize("levels", [2, 8, 10**6], ids=["nearly all tie", "some tie", "none ties"])
def test_spans_equal_brute_force_over_several_windows(short, tokenizer, levels):
    dataset = Dataset.from_list([joined(short, 1 + i % 12, 0, f"q{i}") for i in range(40)])
    windows, rng = encode_squad(dataset, tokenizer, 80), np.random.default_rng(levels)
    assert max(np.bincount([w["row"] for w in windows])) > 3
    logits = np.full((2, len(windows), max(len(w["offsets"]) for w in windows)), -np.inf)
    for i, w in enumerate(windows):
        logits[:, i, : len(w["offsets"])] = rng.integers(0, levels, (2, len(w["offsets"])))
    truth = brute(logits, windows, dataset["context"][:])
    assert decode(logits, windows, dataset) == {f"q{i}": truth.get(i, "") for i in range(40)}


def test_no_allowed_span_is_an_empty_answer():
    context = " ".join("x" * 1 for _ in range(60))
    window = dict(row=0, first=2, offsets=np.array([(2 * i, 2 * i + 1) for i in range(60)]))
    logits = np.zeros((2, 1, 60))
    logits[0, 0, 40:] = logits[1, 0, :20] = 1.0  # the 20 best ends all lie before the 20 best starts
    assert decode(logits, [window], Dataset.from_list([question(context, "x")])) == {"q": ""}


def test_perfect_logits_give_perfect_marks_and_the_original_text(short, tokenizer):
    name = "MÜLLER-Lüdenscheidt (born 1958)"
    dataset = Dataset.from_list([question(f"It was  {name} .", name), joined(short, 6, 4)])
    windows = encode_squad(dataset, tokenizer, 64)
    logits = np.zeros((2, len(windows), max(len(w["offsets"]) for w in windows)))
    for i, w in enumerate(windows):
        logits[:, i, len(w["offsets"]) :] = -np.inf
        for k in range(2):
            logits[k, i, w["label"][k] - w["first"]] += 5 * (w["label"] != (0, 0))
    said = decode(logits, windows, dataset)
    assert said["q"] == name
    assert squad_metrics(said, golds_of(dataset)) == {"exact_match": 1.0, "f1": 1.0}


def test_answers_do_not_depend_on_the_batch(pair, short, tokenizer):
    windows = windows_of(short, tokenizer)
    together = predict_spans(pair[0], windows, 0, batch=len(windows))
    for i, w in enumerate(windows):
        n = len(w["offsets"])
        np.testing.assert_allclose(together[:, i, :n], predict_spans(pair[0], [w], 0)[:, 0], atol=1e-4)
        assert np.isneginf(together[:, i, n:]).all()


# models and whole runs

@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_only_the_head_may_be_missing(bases, tmp_path, name):  # B17
    model, again, other = (load_reader(bases / name, seed) for seed in (1, 1, 2))
    assert torch.equal(model.qa_outputs.weight, again.qa_outputs.weight)
    assert not torch.equal(model.qa_outputs.weight, other.qa_outputs.weight)
    with pytest.raises(UserError, match="fine-tuned on SQuAD"):
        load_reader(bases / name)
    model.save_pretrained(tmp_path, state_dict={k.replace("layer.0", "layer.x"): v for k, v in model.state_dict().items()})
    with pytest.raises(UserError, match="lacks tensors.*layer.0.*a whole encoder"):
        load_reader(tmp_path, seed=1)


def test_the_floor_is_the_best_of_rules_that_read_nothing():
    rows = [question("b c d e f g h", "c", key="1"), question("c b x y z", "c b x y z", key="2")]
    # two words: 2/3 and 4/7; five: 1/3 and 1; all: 1/4 and 1
    assert squad_floor(Dataset.from_list(rows)) == pytest.approx((1 / 3 + 1) / 2)


def test_a_little_training_beats_the_floor(tmp_path, tokenizer):
    torch.manual_seed(0)
    shape = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, hidden_dropout_prob=0)
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **shape, **SIZE)).save_pretrained(tmp_path / "b")
    args = Finetune(max_len=64, max_eval=150, loop=LOOP.model_copy(update={"epochs": 2.0, "lr": 5e-3}))
    tuned = finetune_squad(tmp_path / "b", Data(), tokenizer, args, seed=1)
    assert tuned.log[-1]["loss"] < 0.8 * tuned.log[0]["loss"]
    assert tuned.metrics["score"] == tuned.metrics["f1"] == pytest.approx(tuned.predictions.f1.mean())
    assert tuned.metrics["score"] > tuned.metrics["floor"] == squad_floor(squad_rows(Data(), "validation", 150))
    tuned.model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    table, metrics = evaluate_squad(tmp_path / "tuned", Data(), args)
    assert table.prediction.equals(tuned.predictions.prediction) and metrics["f1"] == tuned.metrics["f1"]
    assert json.loads(table.label[0]) == golds_of(squad_rows(Data(), "validation", 150))[table.id[0]]


def test_a_second_distillation_moves_the_student_to_its_teacher(bases, tokenizer, short):
    args = Finetune(max_len=64, max_eval=100, loop=LOOP.model_copy(update={"epochs": 2.0, "lr": 5e-3}))
    few = args.model_copy(update={"max_train": 160})
    teacher, windows = finetune_squad(bases / "bert", Data(), tokenizer, args, seed=1).model, encode_squad(short, tokenizer, 64)
    def apart(model):
        s, t = (torch.tensor(predict_spans(m, windows, 0)).clamp(min=-1e4) for m in (model, teacher))
        return (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1).mean().item()
    alone = finetune_squad(bases / "distilbert", Data(), tokenizer, few, seed=1)
    led = finetune_squad(bases / "distilbert", Data(), tokenizer, few, seed=1, soft=SoftTargets(teacher, 2.0, 1.0, 0.0))
    assert apart(led.model) < 0.9 * apart(alone.model)


def test_a_teacher_that_learnt_nothing_is_refused(bases, tokenizer):  # B6
    soft, args = SoftTargets(load_reader(bases / "bert", seed=5), 2.0, 0.5, 0.5), Finetune(max_len=64, max_train=32, max_eval=99, loop=LOOP)
    with pytest.raises(UntrainedTeacher, match="not above the floor"):
        finetune_squad(bases / "distilbert", Data(), tokenizer, args, seed=1, soft=soft)


# predictions from elsewhere

@pytest.mark.parametrize(("text", "message"), [
    ("id\ttext", "is not JSON"), ("[]", "holds a list"), ('{"1": "x", "2": 3}', "1 answers are no text, the first is 3 of id '2'"),
    (None, "could not read"), (b"\xff\xfe", "is not JSON"),
])
def test_predictions_that_are_not_the_official_form_are_refused(tmp_path, text, message):
    path = tmp_path / "answers.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        load_predictions(path)


def test_predictions_in_the_official_form_are_read(tmp_path):
    said = {"1": "24–10", "2": ""}
    (tmp_path / "p.json").write_text(json.dumps(said, ensure_ascii=False), encoding="utf-8")
    assert load_predictions(tmp_path / "p.json") == said
