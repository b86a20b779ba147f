"""Layers as blocks: the formula of attention written out, differences, and the stock layers to the last bit"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

from distilrepro import blocks, packing
from distilrepro.blocks import is_stock, layer_rows
from distilrepro.packing import hidden_rows

WIDTH = 8  # of a head; a sequence of at most as many tokens can carry the unit matrix as values


class Attend(torch.autograd.Function):
    "The attention of a block as a function that autograd knows."

    @staticmethod
    def forward(ctx, query, key, value, how):
        out, masks = blocks._attend(query, key, value, how)
        ctx.save_for_backward(query, key, value, *masks)
        ctx.how = how
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *masks = ctx.saved_tensors
        *grads, _ = blocks._attend_back(grad, query, key, value, masks, ctx.how)
        return *grads, None


def drop(query, key, value, widths, lengths, rate, seed=0):
    "The package's attention, [1, heads, n, head width], with random numbers of its own."
    torch.manual_seed(seed)
    return Attend.apply(query, key, value, blocks._Looking(widths, lengths, rate, query.shape[-1] ** -0.5))


def drawn(query, key, widths, lengths, rate):
    "The masks of all sequences: values that are unit matrices show every probability, a dropped one as zero."
    heads, units = query.shape[1], torch.cat([torch.eye(w, WIDTH, dtype=query.dtype) for w in widths])
    looks = drop(query, key, units.expand(1, heads, -1, -1), widths, lengths, rate)
    return [x[:, :, :, :n] > 0 for x, n in zip(looks.split(widths, dim=2), lengths, strict=True)]


def spelt_out(query, key, value, widths, lengths, rate, masks):
    "softmax(Q K^T / sqrt(d)) with its mask, times V, one sequence after the other."
    out = []
    for q, k, v, n, keep in zip(*(x.split(widths, dim=2) for x in (query, key, value)), lengths, masks, strict=True):
        looks = (q @ k[:, :, :n].mT / WIDTH**0.5).exp()
        out.append((looks / looks.sum(-1, keepdim=True) * keep / (1 - rate)) @ v[:, :, :n])
    return torch.cat(out, dim=2)


def random_row(heads, n):
    "Queries, keys and values as a layer makes them: views of [1, n, heads x head width]."
    leaves = [torch.randn(1, n, heads * WIDTH, dtype=torch.double, requires_grad=True) for _ in range(3)]
    return leaves, [x.view(1, n, heads, WIDTH).transpose(1, 2) for x in leaves]


@given(
    sizes=st.lists(st.tuples(st.integers(1, WIDTH), st.integers(0, 4)), min_size=1, max_size=5),
    heads=st.integers(1, 3), rate=st.sampled_from([0.0, 0.05, 0.1, 0.5, 0.9]), seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_dropped_attention_is_the_formula_in_value_and_gradient(sizes, heads, rate, seed):
    widths, lengths = [w for w, _ in sizes], [max(1, w - padding) for w, padding in sizes]
    torch.manual_seed(seed)
    leaves, row = random_row(heads, sum(widths))
    masks = drawn(*(x.detach() for x in row[:2]), widths, lengths, rate)
    twist = torch.randn(1, heads, sum(widths), WIDTH, dtype=torch.double)
    found = []
    for out in (drop(*row, widths, lengths, rate), spelt_out(*row, widths, lengths, rate, masks)):
        found.append([out.detach(), *torch.autograd.grad((out * twist).sum(), leaves)])
    for own, plain in zip(*found, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-9, atol=1e-11)


def test_gradients_by_differences():
    torch.manual_seed(0)
    row = [torch.randn(1, 2, 7, 3, dtype=torch.double, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *r: drop(*r, [4, 3], [3, 3], 0.4), row)


def test_padding_asks_and_is_never_looked_at():
    leaves, row = random_row(2, 6)
    out = drop(*row, [4, 2], [1, 2], 0.5)
    _, dk, dv = torch.autograd.grad(out.sum(), leaves)
    assert dk[0, 1:4].abs().max() == 0 and dv[0, 1:4].abs().max() == 0 and dv[0, 4:].abs().max() > 0
    assert out[0, :, 1:4].abs().max() > 0


def test_dropout_keeps_the_mean():
    "Over many draws the output is the one without dropout, within five standard errors."
    torch.manual_seed(1)
    _, row = random_row(1, 5)
    row = [x.detach() for x in row]
    many = torch.stack([drop(*row, [5], [5], 0.3, seed) for seed in range(4000)])
    error = many.std(0) / len(many) ** 0.5
    assert ((many.mean(0) - drop(*row, [5], [5], 0.0)).abs() < 5 * error).all()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_same_numbers_as_torch_under_autocast(kind):
    "Given the random numbers of torch's own form, its output and its gradients, in the type that autocast hands over."
    torch.manual_seed(2)
    row = [torch.randn(1, 40, 128, dtype=kind, requires_grad=True) for _ in range(3)]
    widths, found = [16, 24], []
    for own in (True, False):
        q, k, v = (x.view(1, 40, 2, 64).transpose(1, 2) for x in row)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
            torch.manual_seed(3)
            pieces = zip(*(x.split(widths, dim=2) for x in (q, k, v)), strict=True)
            stock = [F.scaled_dot_product_attention(*piece, dropout_p=0.1) for piece in pieces]
        out = drop(q, k, v, widths, widths, 0.1, 3) if own else torch.cat(stock, dim=2)
        found.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), row)])
    for ours, stock in zip(*found, strict=True):
        assert ours.dtype == stock.dtype == kind
        torch.testing.assert_close(ours.float(), stock.float(), rtol=1e-5, atol=1e-6)


def encoder(kind, width):
    "An encoder in double precision, without dropout."
    torch.manual_seed(0)
    if kind is BertModel:
        shape = dict(hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, initializer_range=0.5)
        return BertModel(BertConfig(vocab_size=31, max_position_embeddings=32, **shape), add_pooling_layer=False).double().eval()
    shape = dict(dim=width, n_layers=2, n_heads=2, hidden_dim=16, initializer_range=0.5)
    return DistilBertModel(DistilBertConfig(vocab_size=31, max_position_embeddings=32, **shape)).double().eval()


FAMILIES = pytest.mark.parametrize("kind", [BertModel, DistilBertModel])
NO_GRADIENT = ("key.bias", "k_lin.bias")  # adds the same to all scores of a query: zero but for rounding


def in_training(kind, rate=0.1):
    "An encoder in float32 with dropout wherever its family has it."
    torch.manual_seed(0)
    if kind is BertModel:
        shape = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128)
        rates = dict(hidden_dropout_prob=rate, attention_probs_dropout_prob=rate)
        return BertModel(BertConfig(vocab_size=31, **shape, **rates), add_pooling_layer=False).train()
    rates = dict(dropout=rate, attention_dropout=rate)
    return DistilBertModel(DistilBertConfig(vocab_size=31, dim=64, n_layers=3, n_heads=2, hidden_dim=128, **rates)).train()


def batch(lengths):
    attention = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.arange(1, 1 + attention.numel()).view_as(attention) % 31 * attention, attention


def learnt(model, ids, attention, coarse=False, padded=False):
    "Rows and the gradient of each parameter, always from the same random numbers."
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=coarse):
        rows = hidden_rows(model, ids, attention, padded)
    (rows * torch.linspace(-1, 1, rows.numel()).view_as(rows)).sum().backward()
    return {"rows": rows.detach()} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def no_rectangles(monkeypatch):
    monkeypatch.setattr(packing, "NARROW", 0)


@FAMILIES
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_blocks_are_the_stock_layers_to_the_last_bit(no_rectangles, monkeypatch, kind, coarse, padded, rate):
    "Over several sequences: the rows, and every gradient that is not zero but for rounding."
    model, found = in_training(kind, rate), []
    for own in (True, False):
        monkeypatch.setattr(packing, "is_stock", is_stock if own else lambda encoder: False)
        found.append(learnt(model, *batch([7, 12, 3]), coarse, padded))
    ours, stock = found
    assert list(ours) == list(stock) and len(ours) > 45
    for name in ours:
        if name.endswith(NO_GRADIENT):
            assert ours[name].abs().max() < (1e-2 if coarse else 1e-4)
        else:
            assert torch.equal(ours[name], stock[name]), name


@FAMILIES
@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_gradients_of_whole_layers_by_differences(kind, rate):
    "Of the embeddings and of every parameter of two layers; the random numbers stay the same."
    model = encoder(kind, 4).train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = rate
    rows = torch.randn(5, 4, dtype=torch.double, requires_grad=True)
    weights = [p for layer in blocks._layers(model) for p in layer.parameters()]

    def run(*_):
        torch.manual_seed(3)
        return layer_rows(model, rows, [3, 2], [2, 2])

    assert len(weights) == 32 and torch.autograd.gradcheck(run, (rows, *weights))


def test_a_second_derivative_is_refused():
    "What is computed twice has no history: a wrong number would come without a word."
    model = in_training(DistilBertModel)
    rows = layer_rows(model, torch.randn(4, 64, requires_grad=True), [4], [4])
    grads = torch.autograd.grad(rows.square().sum(), list(model.transformer.layer.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grads[0].sum().backward()


@FAMILIES
def test_frozen_parameters_stay_without_gradient(no_rectangles, kind):
    free, frozen = in_training(kind), in_training(kind)
    still = {n for n, p in frozen.named_parameters() if "layer.1" in n or "embeddings" in n}
    for n, p in frozen.named_parameters():
        p.requires_grad_(n not in still)
    whole, part = (learnt(m, *batch([5, 9])) for m in (free, frozen))
    assert set(part) == set(whole) - still
    assert all(torch.equal(part[n], whole[n]) for n in part if not n.endswith(NO_GRADIENT))


class Twice(nn.Linear):
    "A linear layer of somebody's own."

    def forward(self, x):
        return 2 * super().forward(x)


def own_linear(model):
    layer = model.transformer.layer[1].ffn
    layer.lin1 = Twice(64, 128)


def own_activation(model):
    model.transformer.layer[0].ffn.activation = nn.Tanh()


def checkpointed(model):
    model.gradient_checkpointing_enable()


@pytest.mark.parametrize("change", [own_linear, own_activation, checkpointed])
def test_what_is_not_stock_runs_as_it_is(no_rectangles, change):
    model = in_training(DistilBertModel, 0.0)
    assert is_stock(model)
    change(model)
    assert not is_stock(model)
    ids, attention = batch([6, 4])
    rows = hidden_rows(model, ids, attention)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(rows, model(ids, attention_mask=attention).last_hidden_state[attention.bool()], rtol=1e-4, atol=1e-5)


def test_a_causal_layer_and_an_encoder_of_ones_own_are_not_stock():
    shape = dict(vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)

    class Own(BertModel):
        "May do anything."

    assert is_stock(BertModel(BertConfig(**shape)))
    assert not is_stock(BertModel(BertConfig(**shape, is_decoder=True))) and not is_stock(Own(BertConfig(**shape)))


def test_hooks_are_heard(no_rectangles):
    "A hook on a part of a layer runs; those that transformers leaves behind do not keep the blocks out."
    model, heard = in_training(DistilBertModel), []
    ids, attention = batch([6, 4])
    model(ids, output_hidden_states=True, output_attentions=True)
    assert is_stock(model)
    first, second = model.transformer.layer[:2]
    for part, listen in ((first.ffn, "register_forward_hook"), (second, "register_full_backward_hook")):
        watch = getattr(part, listen)(lambda *_: heard.append(1))
        learnt(model, ids, attention)
        watch.remove()
    assert len(heard) == 2 and is_stock(model)
