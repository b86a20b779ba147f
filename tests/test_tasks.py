"""Tasks: metrics against other implementations, label maps against GLUE's own order, faults a user can make."""
import math
import socket

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, DistilBertConfig, DistilBertForSequenceClassification

from distilrepro.config import UserError
from distilrepro.finetune import answer, class_logits, hard_loss, labelled_batch
from distilrepro.tasks import TASKS, GlueMetric, check_rows, encode, floor, get_task, number_rows, score

CLASSIFICATION = [n for n, t in TASKS.items() if t.labels]
answers = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60)
scores = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=2, max_size=60)


def compute(name, pairs):
    return GlueMetric(name).compute(predictions=[p for p, _ in pairs], references=[r for _, r in pairs])


@settings(max_examples=40, deadline=None)
@given(answers)
def test_binary_metrics_follow_the_confusion_table(pairs):
    "Formulas written out on TP, TN, FP, FN, with 0/0 = 0."
    tp, tn, fp, fn = (sum(pair == cell for pair in pairs) for cell in ((1, 1), (0, 0), (1, 0), (0, 1)))
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert compute("cola", pairs)["matthews_correlation"] == pytest.approx((tp * tn - fp * fn) / root if root else 0, abs=1e-12)
    both = compute("mrpc", pairs)
    assert both["accuracy"] == pytest.approx((tp + tn) / len(pairs))
    assert both["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn) if tp else 0)
    assert score("mrpc", both) == pytest.approx((both["accuracy"] + both["f1"]) / 2)


@settings(max_examples=40, deadline=None)
@given(scores)
def test_correlations_equal_scipy_or_zero_for_a_constant(pairs):
    p, r = np.array(pairs, float).T / 4
    got = compute("stsb", list(zip(p, r, strict=True)))
    if np.ptp(p) == 0 or np.ptp(r) == 0:
        assert got == {"pearson": 0, "spearmanr": 0}
    else:
        assert got["pearson"] == pytest.approx(np.corrcoef(p, r)[0, 1], abs=1e-9)
        assert got["spearmanr"] == pytest.approx(np.corrcoef(stats.rankdata(p), stats.rankdata(r))[0, 1], abs=1e-9)


def test_metrics_equal_sklearn_on_three_classes():
    rng = np.random.default_rng(0)
    p, r = rng.integers(0, 3, (2, 200))
    assert GlueMetric("mnli").compute(predictions=p, references=r) == {"accuracy": pytest.approx(sk.accuracy_score(r, p))}


def test_metric_works_in_batches_and_one_by_one():
    whole = compute("qqp", [(0, 1), (1, 1), (1, 0), (1, 1)])
    batches = GlueMetric("qqp")
    batches.add_batch(predictions=[0, 1], references=[1, 1])
    batches.add(prediction=1, reference=0)
    batches.add(prediction=1, reference=1)
    assert batches.compute() == whole


def test_metric_needs_no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a metric opened a connection")
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert compute("rte", [(0, 0), (1, 0)]) == {"accuracy": 0.5}


@pytest.mark.parametrize("predictions, references, message", [
    ([0], [0, 1], "1 predictions for 2 references"),
    ([], [], "at least one"),
    ([0, 7], [0, 1], r"predictions\[1\] is 7"),
    ([0, 1], [0, -1], r"references\[1\] is -1"),
    ([0.5, 1], [0, 1], r"predictions\[0\] is 0.5"),
    ([[0.1, 0.9]], [1], "argmax of logits"),
    (["yes"], [1], "list of numbers"),
])
def test_bad_answers_are_the_users_mistake(predictions, references, message):
    with pytest.raises(UserError, match=message):
        GlueMetric("rte").compute(predictions=predictions, references=references)


def test_unknown_task_names_the_closest():
    with pytest.raises(UserError, match="did you mean 'mnli'"):
        get_task("mnli-m")


def test_b18_label_order_is_glues():
    "B18: class numbers as in the GLUE files and the Hugging Face sets; matched and mismatched never mixed."
    assert TASKS["mnli"].labels == ("entailment", "neutral", "contradiction")
    assert TASKS["mnli"].eval_split == "validation_matched"
    for name in ("rte", "qnli"):
        assert TASKS[name].labels == ("entailment", "not_entailment")
    assert TASKS["wnli"].labels == ("not_entailment", "entailment")
    for name in ("mrpc", "qqp", "cola", "sst2", "imdb"):
        assert TASKS[name].labels[1] in ("equivalent", "duplicate", "acceptable", "positive"), "class 1 is the positive one of F1"


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_floor_is_the_headline_of_the_majority(name):
    labels = np.arange(TASKS[name].num_labels).repeat([3, 9, 2][:TASKS[name].num_labels])
    ones = np.ones_like(labels)
    accuracy = sk.accuracy_score(labels, ones)
    mean = (accuracy + sk.f1_score(labels, ones)) / 2 if TASKS[name].num_labels == 2 else accuracy
    assert floor(name, labels) == pytest.approx({"cola": 0, "mrpc": mean, "qqp": mean}.get(name, accuracy))


def make(labels, **columns):
    return Dataset.from_dict({"sentence": ["x"] * len(labels), "label": labels} | columns)


@pytest.mark.parametrize("dataset, message", [
    (make([0, 1, 3]), "row 2 has label 3; expected 0..1"),
    (make([0, -1]), "row 1 has label -1.*test split"),
    (make([0.0, float("nan")]), "row 1 has label nan"),
    (make(["yes"]), "row 0 has label 'yes'"),
    (make([]), "split is empty"),
    (make([0, 1], sentence=["a", None]), "row 1 has sentence = None"),
    (make([0]).rename_column("sentence", "text"), "no sentence; expected sentence, label, found text, label"),
])
def test_bad_rows_are_named(dataset, message):
    with pytest.raises(UserError, match=message):
        check_rows("sst2", dataset)


def test_scores_outside_the_scale_are_named():
    pairs = Dataset.from_dict({"sentence1": ["a"] * 2, "sentence2": ["b"] * 2, "label": [5.0, 5.2]})
    with pytest.raises(UserError, match="row 1 has label 5.2; expected a number from 0 to 5"):
        check_rows("stsb", pairs)


@pytest.fixture(scope="module")
def tokenizer():
    return BertTokenizer(vocab={w: i for i, w in enumerate("[PAD] [UNK] [CLS] [SEP] [MASK] a b c d e f".split())})


@settings(max_examples=25, deadline=None)
@given(a=st.lists(st.sampled_from("abcdef"), max_size=12), b=st.lists(st.sampled_from("abcdef"), max_size=12), max_len=st.integers(5, 30))
def test_pairs_lose_tokens_from_the_longer_side(tokenizer, a, b, max_len):
    "Truncation against the plain rule: drop the last token of the longer side until the pair fits."
    data = Dataset.from_dict({"sentence1": [" ".join(a)], "sentence2": [" ".join(b)], "label": [0]})
    got = encode("rte", data, tokenizer, max_len)[0]
    na, nb = len(a), len(b)
    while na + nb + 3 > max_len:
        na, nb = (na - 1, nb) if na > nb else (na, nb - 1)
    ids, cut = got["input_ids"].tolist(), got["token_type_ids"].tolist().count(0) - 2
    assert len(ids) == na + nb + 3 and sorted([cut, len(ids) - cut - 3]) == sorted([na, nb])
    assert ids == [2, *[tokenizer.vocab[w] for w in a[:cut]], 3, *[tokenizer.vocab[w] for w in b[:len(ids) - cut - 3]], 3]


def test_many_rows_keep_order_and_ids(tokenizer):
    n = 2300  # more than two blocks
    labels = [i % 2 for i in range(n)]
    data = Dataset.from_dict({"sentence": ["abcdef"[i % 6] for i in range(n)], "label": labels, "idx": list(range(n, 0, -1))})
    got = encode("sst2", data, tokenizer, 8)
    assert [e["id"] for e in got] == list(range(n, 0, -1))
    assert [int(e["input_ids"][1]) for e in got] == [5 + i % 6 for i in range(n)]
    assert [e["label"] for e in got] == labels


def test_ids_survive_a_selection(tokenizer):
    "Numbered before it is cut, a row keeps its id in every sample."
    whole = number_rows(make([0, 1, 0, 1], sentence=list("abcd")))
    ids = {tuple(e["input_ids"]): e["id"] for e in encode("sst2", whole, tokenizer, 8)}
    part = encode("sst2", whole.select([3, 1]), tokenizer, 8)
    assert [e["id"] for e in part] == [ids[tuple(e["input_ids"])] for e in part] == [3, 1]


THIN = dict(vocab_size=40, dim=8, n_layers=2, n_heads=2, hidden_dim=16, max_position_embeddings=16, num_labels=3)
SMALL = dict(vocab_size=40, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, num_labels=3)
MODELS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SMALL)),
    "distilbert": lambda: DistilBertForSequenceClassification(DistilBertConfig(**THIN)),
}


@pytest.mark.parametrize("family", MODELS)
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 14), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_the_first_token_alone_gives_the_answers_and_gradients_of_the_stock_model(family, lengths, seed):
    "In float64, against the stock forward pass padded further than the batch needs."
    torch.manual_seed(seed)
    model, rng = MODELS[family]().double().eval(), np.random.default_rng(seed)
    rows = [dict(input_ids=rng.integers(1, 40, n), token_type_ids=np.arange(n) % 2, label=int(rng.integers(3))) for n in lengths]
    batch = labelled_batch(rows, 0)
    wide = {k: torch.nn.functional.pad(v, (0, 16 - v.shape[1])) for k, v in batch.inputs.items()}
    found = []
    for said in (class_logits(model, batch.inputs), answer(model, wide).logits.float()):
        model.zero_grad()
        hard_loss(get_task("mnli"), said, batch.labels_b).backward()
        found.append((said.detach(), {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}))
    (ours, slopes), (stock, stock_slopes) = found
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=0)
    assert slopes.keys() == stock_slopes.keys()
    for name, slope in slopes.items():
        torch.testing.assert_close(slope, stock_slopes[name], atol=1e-5, rtol=0)
