"""Attribution: a planted truth is found, shares add up, words survive their pieces, curves and ranks against plain loops."""
import itertools
import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, DistilBertConfig, DistilBertForSequenceClassification

from distilrepro.attribution import (
    METHODS,
    OPINION,
    SHARES,
    attribution_figure,
    change,
    choose_rows,
    deciding_words,
    deletion,
    deletion_figure,
    gains,
    gradient_x_input,
    integrated_gradients,
    mask_words,
    mean_interval,
    rank_auc,
    study,
    truth_scores,
    words_of,
    write_words,
)
from distilrepro.config import UserError
from distilrepro.language import FEELINGS, SIGNED
from distilrepro.lookalikes import task as lookalike
from distilrepro.pair import Pair
from distilrepro.tasks import get_task

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] good bad the a film plot was act ##ing very . and long".split()
TOKENIZER = BertTokenizer(vocab={w: i for i, w in enumerate(WORDS)})
GOOD, MASK = WORDS.index("good"), WORDS.index("[MASK]")
SHAPE = dict(vocab_size=len(WORDS), max_position_embeddings=32)


def sentences(n, seed=0, length=10):
    "Noise with one word that decides."
    rng, out = np.random.default_rng(seed), []
    for i in range(n):
        ids, label = rng.integers(7, len(WORDS), length), i % 2
        ids[1] = WORDS.index("film")  # no piece before the first word
        ids[rng.integers(2, length)] = GOOD if label else GOOD + 1
        ids = np.array([2, *ids, 3])
        out.append(dict(input_ids=ids, token_type_ids=np.zeros_like(ids), label=label, id=100 + i))
    return out


@pytest.fixture(scope="module")
def model():
    "A tiny BERT that has learnt that good is good and bad is bad."
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, initializer_range=0.1,
                        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SHAPE)
    model = BertForSequenceClassification(config).train()
    optimizer, rows = torch.optim.AdamW(model.parameters(), lr=3e-3), sentences(256)
    ids, labels = (torch.tensor(np.stack([r[k] for r in rows])) for k in ("input_ids", "label"))
    for step in range(80):
        part = slice(32 * (step % 8), 32 * (step % 8) + 32)
        loss = torch.nn.functional.cross_entropy(model(ids[part]).logits, labels[part])
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert loss < 0.05
    return model.eval()


def made(model, n=12, said=None):
    "A pair whose truth is known; both sides are the one model."
    rows = sentences(n, seed=1)
    with torch.no_grad():
        classes = model(torch.tensor(np.stack([r["input_ids"] for r in rows]))).logits.argmax(1).numpy()
    ids = [r["id"] for r in rows]
    words = [write_words(t, words_of(t)) for t in (TOKENIZER.convert_ids_to_tokens(r["input_ids"]) for r in rows)]
    truth = [json.dumps(dict(words=[i for i, w in enumerate(ws) if w in ("good", "bad")])) for ws in words]
    answers = pd.DataFrame(dict(id=ids, label=[r["label"] for r in rows], prediction=classes if said is None else said))
    texts = pd.DataFrame(dict(id=ids, sentence=[" ".join(ws) for ws in words], truth=truth))
    return Pair(get_task("sst2"), {}, dict(student=answers, teacher=answers), rows, texts, TOKENIZER)


@pytest.fixture(scope="module")
def seen(model):
    return study(model, made(model), "student", list(range(12)))


def parts(example):
    groups = words_of(TOKENIZER.convert_ids_to_tokens(example["input_ids"]))
    return groups, mask_words(example, groups, MASK)


def test_the_planted_word_is_found_and_by_chance_it_is_not(model, seen):
    scores = mean_interval(dict(truth_scores(seen, made(model))))
    assert (scores.low.filter(like="deciding") > 0.9).all() and (scores.n == 12).all()
    rng = np.random.default_rng(0)
    noise = seen.assign(scores=[rng.normal(size=len(w)) for w in seen.words])
    null = mean_interval(dict(truth_scores(noise, made(model)))).loc["integrated gradients, deciding words"]
    assert null.low < 0.5 < null.high


def test_shares_add_up_to_the_change(model):
    for example in sentences(6, seed=2):
        _, masked = parts(example)
        for target in (0, 1):
            found, whole = integrated_gradients(model, example, target, masked, steps=100), change(model, example, target, masked)
            with torch.no_grad():
                ends = [model(torch.tensor(e["input_ids"])[None]).logits[0].numpy() for e in (example, masked)]
            margin = [e[target] - e[1 - target] for e in ends]
            assert whole == pytest.approx(margin[0] - margin[1], abs=1e-4)
            assert found.sum() == pytest.approx(whole, abs=0.02 * abs(whole) + 0.02)
            assert found[[0, -1]] == pytest.approx([0, 0], abs=1e-6), "special tokens are the same at both ends"


@pytest.mark.parametrize("kind", ["bert", "distil"])
def test_both_methods_equal_plain_gradients(kind):
    torch.manual_seed(1)
    bert = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3, **SHAPE)
    distil = DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32, num_labels=3, **SHAPE)
    model = (BertForSequenceClassification(bert) if kind == "bert" else DistilBertForSequenceClassification(distil)).eval()
    example = sentences(1)[0]
    _, masked = parts(example)
    table = model.get_input_embeddings().weight.detach()
    x, x0 = (table[torch.tensor(e["input_ids"])] for e in (example, masked))

    def gradient(point):
        point = point.clone().requires_grad_()
        logits = model(inputs_embeds=point[None]).logits[0]
        odds = torch.log(torch.softmax(logits, 0)[2] / (1 - torch.softmax(logits, 0)[2]))
        return torch.autograd.grad(odds, point)[0]
    walk = sum(gradient(x0 + (k + 0.5) / 50 * (x - x0)) for k in range(50)) / 50
    assert integrated_gradients(model, example, 2, masked) == pytest.approx(((x - x0) * walk).sum(-1).numpy(), abs=1e-4)
    assert gradient_x_input(model, example, 2, masked) == pytest.approx((x * gradient(x)).sum(-1).numpy(), abs=1e-5)


tokens = st.lists(st.sampled_from(["a", "film", "##ing", "##s", "[SEP]", "[CLS]", "."]), max_size=30)


@settings(max_examples=50, deadline=None)
@given(tokens)
def test_words_hold_every_piece_once_and_no_special_token(tokens):
    groups = words_of(tokens)
    real = [i for i, t in enumerate(tokens) if not t.startswith("[")]
    assert [i for g in groups for i in g] == real and all((np.diff(g) == 1).all() for g in groups)
    assert "".join(write_words(tokens, groups)) == "".join(tokens[i].removeprefix("##") for i in real)
    heads = [tokens[g[0]] for g in groups]
    assert sum(h.startswith("##") for h in heads) <= 1 + tokens.count("[SEP]") + tokens.count("[CLS]")


def test_masking_leaves_the_example_alone_and_takes_whole_words():
    example = dict(input_ids=np.array([2, 12, 13, 9, 3]), label=1)
    groups = words_of(TOKENIZER.convert_ids_to_tokens(example["input_ids"]))
    assert mask_words(example, groups[:1], MASK)["input_ids"].tolist() == [2, MASK, MASK, 9, 3]
    assert mask_words(example, [], MASK)["input_ids"].tolist() == example["input_ids"].tolist() == [2, 12, 13, 9, 3]


def test_a_curve_equals_masking_by_hand(model):
    example = sentences(1, seed=3)[0]
    groups, _ = parts(example)
    orders = [np.arange(len(groups)), np.arange(len(groups))[::-1]]
    curves = deletion(model, example, groups, orders, 1, MASK)
    for order, (at, share) in itertools.product((0, 1), enumerate(SHARES)):
        ids = example["input_ids"].copy()
        for word in orders[order][: int(np.ceil(share * len(groups)))]:
            ids[groups[word]] = MASK
        with torch.no_grad():
            expected = torch.softmax(model(torch.tensor(ids)[None]).logits[0], 0)[1].item()
        assert curves[order, at] == pytest.approx(expected, abs=1e-5)


def test_masking_the_planted_word_first_costs_more_than_at_random(seen):
    found = mean_interval(dict(gains(seen)))
    assert found.low["integrated gradients"] > 0, "the gradient at a saturated end may even have the wrong sign"
    for method in METHODS:
        part = seen[seen.method == method].set_index("id").curve
        random = seen[seen.method == "random"].set_index("id").curve
        by_hand = np.mean([np.mean([random[i][k] - part[i][k] for k in range(1, len(SHARES) - 1)]) for i in part.index])
        assert found["mean"][method] == pytest.approx(by_hand)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0, 3.0]), st.booleans()), min_size=1, max_size=9))
def test_rank_equals_counting_all_pairs(words):
    scores, true = np.array([s for s, _ in words]), [i for i, (_, t) in enumerate(words) if t]
    others = [i for i in range(len(words)) if i not in true]
    wins = [1.0 if abs(scores[i]) > abs(scores[j]) else 0.5 if abs(scores[i]) == abs(scores[j]) else 0.0 for i in true for j in others]
    found = rank_auc(scores, true)
    assert found == pytest.approx(np.mean(wins)) if wins else np.isnan(found)


def test_deciding_words_are_those_the_generator_used():
    for row in lookalike("sst2", 3)["validation"][:50]:
        words = row["sentence"].split()
        said = {words[i] for i in deciding_words(json.dumps(row["truth"]), words)}
        assert said & OPINION and said <= OPINION | {"not", "never", "hardly", "but", "although"}
    signs = {w: sign for table in (SIGNED, FEELINGS) for sign, ws in table.items() for w in ws}
    for row in lookalike("imdb", 3)["test"][:50]:
        words = row["text"].split()
        (i,) = deciding_words(json.dumps(row["truth"]), words)
        assert signs[words[i]] == (1 if row["label"] else -1) and "indeed" in words[i - 6 : i]
        assert deciding_words(json.dumps(row["truth"]), words[: i - 3]) == [], "cut off before it"
    assert deciding_words(json.dumps(dict(violation=None)), ["a"]) is None


def test_real_texts_have_no_truth(model, seen):
    pair = made(model)
    for texts in (pair.texts.drop(columns="truth"), pair.texts.assign(truth=json.dumps(dict(violation="order")))):
        with pytest.raises(UserError, match="no truth about the words of sst2"):
            truth_scores(seen, Pair(pair.task, {}, pair.answers, pair.rows, texts, TOKENIZER))


def test_a_model_that_gives_one_answer_is_said_not_failed(model):
    "At the floor: log-odds of the one answer are still shared, and the curve may be flat."
    flat = BertForSequenceClassification(model.config).eval()
    with torch.no_grad():
        flat.classifier.weight.zero_()
    seen = study(flat, made(flat, n=4), "teacher", [0, 1, 2, 3])
    assert np.ptp(np.stack(seen.curve)) < 1e-6 and mean_interval(dict(gains(seen)))["mean"].abs().max() < 1e-6
    assert (truth_scores(seen, made(flat, n=4)).filter(like="deciding") == 0.5).all().all(), "all words tie"


def test_intervals_hold_the_mean_and_leave_undefined_examples_out():
    values = dict(a=np.array([0.1, 0.4, np.nan, 0.9]), b=np.array([1.0, 1.0, 1.0, np.nan]))
    found = mean_interval(values)
    assert found.n.tolist() == [2, 2] and found["mean"].tolist() == [0.25, 1.0] and found.low["b"] == found.high["b"] == 1
    assert 0.1 <= found.low["a"] < 0.25 < found.high["a"] <= 0.4
    empty = mean_interval(dict(a=np.array([np.nan])))
    assert empty.n.tolist() == [0] and np.isnan(empty["mean"]).all()


def test_the_same_examples_are_chosen_again_and_empty_ones_never(model):
    pair = made(model)
    assert choose_rows(pair, 5) == choose_rows(pair, 5) and len(choose_rows(pair, 100)) == 12
    pair.rows[3]["input_ids"] = np.array([2, 8, 3])
    assert 3 not in choose_rows(pair, 100)


@pytest.mark.parametrize("length", [1, 10, 200])
def test_words_are_named_and_models_not_swapped(length):
    words = ["wonderful", "film", "incomprehensibilities", "."] * length
    scores = np.random.default_rng(0).normal(size=(2, len(words)))
    fig = attribution_figure(scores[0], scores[1], words, dict(student="negative", teacher="positive"))
    try:
        shown = {ax.get_title(): [p.get_width() for p in ax.patches] for ax in fig.axes}
        assert len(fig.axes[0].get_yticklabels()) == min(len(words), 20)
        for title, values in zip(("teacher says positive", "student says negative"), scores[::-1], strict=True):
            assert set(np.round(shown[title], 9)) <= set(np.round(values, 9))
            if len(words) <= 20:
                assert shown[title] == pytest.approx(values.tolist())
        assert max(shown["teacher says positive"], key=abs) == scores[1][np.abs(scores[1]).argmax()]
        fig.canvas.draw()
    finally:
        plt.close(fig)


def test_curves_are_drawn_as_their_means(seen):
    fig = deletion_figure(dict(teacher=seen, student=seen))
    try:
        lines = {line.get_label(): line.get_ydata() for line in fig.axes[1].lines}
        for method in (*METHODS, "random"):
            assert lines[method] == pytest.approx(np.mean(np.stack(seen.curve[seen.method == method]), axis=0))
        assert "(n = 12)" in fig.axes[0].get_title() and fig.axes[0].get_title().startswith("teacher")
    finally:
        plt.close(fig)
