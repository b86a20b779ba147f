"""Attention: maps against the formula and a hook, the choice of the mistake against a plain loop, pictures by their contents."""
import itertools
import weakref

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForSequenceClassification, DistilBertConfig, DistilBertForSequenceClassification

from distilrepro.attention import (
    attention_figure,
    attention_maps,
    attention_modules,
    choose_case,
    least_sure,
    matched_layers,
    pick_map,
    rollout,
    rows_figure,
    set_lines,
    telling_mistake,
    widest,
)
from distilrepro.config import UserError
from distilrepro.pair import load_eager

SHAPE = dict(vocab_size=50, num_labels=3, max_position_embeddings=64)
BERT = BertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, **SHAPE)
DISTIL = DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, **SHAPE)
DEEP = BertConfig(**BERT.to_dict() | dict(num_hidden_layers=8))
EXAMPLE = dict(input_ids=np.array([2, 7, 9, 4, 3, 8, 3]), token_type_ids=np.array([0, 0, 0, 0, 0, 1, 1]), label=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, model in (("bert", BertForSequenceClassification(BERT)), ("distil", DistilBertForSequenceClassification(DISTIL)),
                        ("deep", BertForSequenceClassification(DEEP))):
        model.save_pretrained(root / name)
    return root


@pytest.mark.parametrize("name, layers", [("bert", 3), ("distil", 2)])
def test_b20_maps_are_there_and_rows_sum_to_one(folders, name, layers):
    model = load_eager(folders / name)
    maps = attention_maps(model, EXAMPLE)
    assert maps.shape == (layers, 4, 7, 7) and not model.training
    assert torch.allclose(maps.sum(-1), torch.ones(layers, 4, 7), atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "distil"])
def test_b20_fused_attention_is_refused(folders, name):
    model = load_eager(folders / name)
    model.set_attn_implementation("sdpa")
    with pytest.raises(UserError, match="no attention maps.*load_eager"):
        attention_maps(model, EXAMPLE)


def test_dropout_is_noticed(folders):
    with pytest.raises(UserError, match="do not sum to 1"):
        attention_maps(load_eager(folders / "distil").train(), EXAMPLE)


def test_maps_reproduce_what_the_layer_wrote(folders):
    "The map times the values is the context that enters the output projection."
    model, seen = load_eager(folders / "bert"), {}
    attention = model.bert.encoder.layer[1].attention
    attention.self.value.register_forward_hook(lambda m, i, o: seen.update(value=o))
    attention.output.dense.register_forward_pre_hook(lambda m, i: seen.update(context=i[0]))
    maps = attention_maps(model, EXAMPLE)
    values = seen["value"].view(7, 4, 8).transpose(0, 1)
    assert torch.allclose((maps[1] @ values).transpose(0, 1).reshape(1, 7, 32), seen["context"], atol=1e-5)


def test_token_types_reach_the_teacher(folders):
    model = load_eager(folders / "bert")
    other = EXAMPLE | {"token_type_ids": np.zeros(7, int)}
    assert not torch.allclose(attention_maps(model, EXAMPLE), attention_maps(model, other))


@pytest.mark.parametrize("name, layers", [("bert", 3), ("distil", 2)])
def test_maps_are_those_of_the_stock_output(folders, name, layers):
    model = load_eager(folders / name)
    inputs = {k: torch.as_tensor(EXAMPLE[k])[None] for k in ("input_ids", "token_type_ids")[: 2 if name == "bert" else 1]}
    with torch.no_grad():
        stock = torch.stack(model(**inputs, output_attentions=True).attentions)[:, 0]
    assert torch.allclose(attention_maps(model, EXAMPLE), stock, atol=1e-6)
    assert torch.equal(attention_maps(model, EXAMPLE, [layers - 1]), attention_maps(model, EXAMPLE)[-1:])
    for wrong in ([layers], [-1], []):
        with pytest.raises(UserError, match=f"there are {layers} layers"):
            attention_maps(model, EXAMPLE, wrong)


def alive(model, call):
    "The most maps alive at once while a call runs."
    born, most = [], [0]

    def count(_module, _args, out):
        born.append(weakref.ref(out[1].untyped_storage()))
        most.append(sum(r() is not None for r in born))
    handles = [m.register_forward_hook(count) for m in attention_modules(model)]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return max(most)


def test_long_inputs_hold_no_more_maps_than_were_asked_for(folders):
    model = load_eager(folders / "deep")
    example = dict(input_ids=np.arange(60) % 50)
    with torch.no_grad():
        ids = torch.as_tensor(example["input_ids"])[None]
        assert alive(model, lambda: model(ids, output_attentions=True)) == 8, "the stock model keeps all: the count can fail"
    assert alive(model, lambda: attention_maps(model, example, [5])) == 2, "the asked one and the one at work"
    assert alive(model, lambda: attention_maps(model, example, [0, 5])) == 3
    assert alive(model, lambda: rollout(model, example)) == 1


def test_hooks_do_not_stay_behind(folders):
    model = load_eager(folders / "bert")
    attention_maps(model, EXAMPLE), rollout(model, EXAMPLE)
    model.set_attn_implementation("sdpa")
    with pytest.raises(UserError):
        rollout(model, EXAMPLE)
    assert not any(m._forward_hooks for m in attention_modules(model))


@pytest.mark.parametrize("name, layers", [("bert", 3), ("distil", 2)])
def test_rollout_is_the_sum_over_all_paths(folders, name, layers):
    model, n = load_eager(folders / name), 4
    example = {k: v[:n] for k, v in EXAMPLE.items() if k != "label"}
    maps = attention_maps(model, example).numpy()
    naive = np.zeros((n, n))
    for path in itertools.product(range(n), repeat=layers + 1):  # from the last layer's token down to the input's
        weight = 1.0
        for step, (i, j) in enumerate(itertools.pairwise(path)):
            attended = sum(maps[layers - 1 - step, head, i, j] for head in range(4)) / 4
            weight *= 0.5 * attended + 0.5 * (i == j)
        naive[path[0], path[-1]] += weight
    assert rollout(model, example) == pytest.approx(naive, abs=1e-6)


def test_models_of_another_family_are_named():
    with pytest.raises(UserError, match="no attention to look at in a Linear; expected a BERT"):
        attention_maps(torch.nn.Linear(2, 2), EXAMPLE)


def test_matched_layers_are_those_the_student_was_copied_from(folders):
    student, teacher = load_eager(folders / "distil"), load_eager(folders / "deep")
    assert matched_layers(student, teacher) == [(0, 0), (1, 7)]
    assert matched_layers(student, teacher, "last") == [(0, 6), (1, 7)]
    with pytest.raises(UserError, match="has only 2 layers"):
        matched_layers(teacher, student)


@pytest.mark.parametrize("length", [3, 24, 25, 200])
def test_columns_hide_nothing(length):
    rows = dict(teacher=random_map(length)[:2], student=random_map(length, 1)[:3])
    tokens = [f"t{i}" for i in range(length)]
    kept, names = widest(rows, tokens)
    assert len(names) == min(length, 24) and kept["student"].shape == (3, len(names))
    assert all(np.allclose(w.sum(1), 1) for w in kept.values())
    if length > 24:
        top = max(range(length), key=lambda i: max(w[:, i].max() for w in rows.values()))
        at = names.index(f"t{top} ({top})")
        assert np.array_equal(kept["teacher"][:, at], rows["teacher"][:, top]) and names[-1] == f"{length - 23} others"


@pytest.mark.parametrize("length", [3, 10, 200])
def test_rows_of_all_heads_are_labelled_and_not_swapped(length):
    tokens = ["[CLS]", *["good", "##ness", "film"] * length][:length - 1] + ["[SEP]"]
    rows = dict(student=random_map(length)[:2], teacher=random_map(length, 1)[:3])
    names = dict(student=["head 1", "head 2"], teacher=["head 1", "head 2", "head 3"])
    fig = rows_figure(rows["student"], rows["teacher"], names, tokens, "last layer")
    try:
        shown = {ax.get_title(): ax for ax in fig.axes[:2]}
        for model, ax in shown.items():
            assert [t.get_text() for t in ax.get_yticklabels()] == names[model]
            assert np.asarray(ax.images[0].get_array()) == pytest.approx(widest(dict(teacher=rows["teacher"], student=rows["student"]),
                                                                                tokens)[0][model])
        assert shown["teacher"].images[0].norm is shown["student"].images[0].norm, "one colour scale for both"
        assert f"of {length} tokens, last layer" in fig.get_label()
        fig.canvas.draw()
        with pytest.raises(UserError, match=f"do not match {length} tokens"):
            rows_figure(rows["student"], rows["teacher"][:, 1:], names, tokens, "")
    finally:
        plt.close(fig)


def test_layers_and_heads_out_of_range_are_named():
    maps = torch.rand(2, 3, 4, 4)
    assert np.array_equal(pick_map(maps, -2, -1), maps[0, 2].numpy())
    for layer, head in ((2, None), (-3, None), (0, 3)):
        with pytest.raises(UserError, match=f"no layer {layer} or head {head}; there are 2 layers of 3 heads"):
            pick_map(maps, layer, head)


def table(labels, logits):
    logits = np.array(logits, float)
    columns = {f"logit_{c}": logits[:, c] for c in range(logits.shape[1])}
    return pd.DataFrame({"id": 100 + np.arange(len(labels)), "label": labels, "prediction": logits.argmax(1)} | columns)


three = st.lists(st.floats(-5, 5, allow_nan=False), min_size=3, max_size=3)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), three, three), min_size=1, max_size=12))
def test_telling_mistake_equals_a_plain_loop(rows):
    labels, s_logits, t_logits = zip(*rows, strict=True)
    best, found = -1.0, None
    for i, (y, s, t) in enumerate(rows):
        p_s, p_t = (np.exp(x) / np.exp(x).sum() for x in (np.array(s), np.array(t)))
        if np.argmax(t) == y and np.argmax(s) != y and p_t[y] * p_s.max() > best + 1e-12:
            best, found = p_t[y] * p_s.max(), 100 + i
    assert telling_mistake(table(labels, s_logits), table(labels, t_logits)) == found


def test_order_of_rows_does_not_matter():
    rng = np.random.default_rng(0)
    labels, s, t = rng.integers(0, 3, 40), rng.normal(size=(40, 3)), rng.normal(size=(40, 3))
    expected = telling_mistake(table(labels, s), table(labels, t))
    shuffled = table(labels, s).sample(frac=1, random_state=1), table(labels, t).sample(frac=1, random_state=2)
    assert expected is not None and telling_mistake(*shuffled) == expected


def test_no_mistake_falls_back_to_the_least_sure():
    perfect = table([0, 1, 2], [[4, 0, 0], [0, 0.5, 0], [0, 0, 3]])
    assert telling_mistake(perfect, perfect) is None and least_sure(perfect) == 101
    chosen, why = choose_case(perfect, perfect)
    assert chosen == 101 and "wrong on 0 of 3 examples" in why and "least sure" in why


def test_tables_of_other_examples_or_of_scores_are_refused():
    a = table([0, 1], [[1, 0, 0], [0, 1, 0]])
    for b in (a.iloc[:1], a.assign(label=[1, 1]), a.assign(id=[5, 6])):
        with pytest.raises(UserError, match="not asked the same examples"):
            telling_mistake(a, b)


tokens = st.lists(st.sampled_from(["a", "film", "un", "##read", "##able", "##s", "wonderful", "."]), min_size=1, max_size=80)


@settings(max_examples=50, deadline=None)
@given(tokens, st.integers(24, 70))
def test_set_lines_loses_nothing_and_never_overlaps(tokens, width):
    places = set_lines(tokens, width)
    assert [text for *_, text in places] == [t.removeprefix("##") if i and t.startswith("##") else t for i, t in enumerate(tokens)]
    for (l1, c1, text), (l2, c2, _) in zip(places, places[1:], strict=False):
        assert (l2, c2) >= (l1, c1 + len(text)) or l2 > l1
        assert l2 - l1 in (0, 1)


def random_map(length, seed=0):
    return torch.softmax(torch.from_numpy(np.random.default_rng(seed).normal(size=(length, length))), -1).numpy()


@pytest.mark.parametrize("length", [3, 10, 24, 25, 130, 512])
def test_every_token_is_labelled_at_any_length(length):
    tokens = ["[CLS]", *["good", "##ness", "film"] * length][:length - 1] + ["[SEP]"]
    fig = attention_figure(random_map(length), random_map(length, 1), tokens)
    try:
        if length <= 24:
            assert [t.get_text() for t in fig.axes[1].get_yticklabels()] == tokens
            assert fig.axes[0].images[0].norm is fig.axes[1].images[0].norm, "one colour scale for both"
        else:
            assert len(fig.axes[0].texts) == length and len(fig.axes[0].patches) == length - 2
            assert fig.axes[2].get_xlim() == fig.axes[3].get_xlim(), "one scale for both"
        assert f"on {length} tokens" in fig.get_label() and "teacher: " in fig.get_label()
        fig.canvas.draw()
    finally:
        plt.close(fig)


def test_teacher_and_student_are_not_swapped():
    student, teacher = np.full((4, 4), 0.25), np.eye(4)
    fig = attention_figure(student, teacher, ["[CLS]", "a", "b", "[SEP]"])
    try:
        shown = {ax.get_title(): np.asarray(ax.images[0].get_array()) for ax in fig.axes[:2]}
        assert np.array_equal(shown["teacher"], teacher) and np.array_equal(shown["student"], student)
    finally:
        plt.close(fig)


def test_maps_of_another_example_are_refused():
    with pytest.raises(UserError, match="do not match 4 tokens"):
        attention_figure(random_map(4), random_map(5), list("abcd"))
