"""Attention within each piece of a row, with dropout: against the formula written out, with the masks that were drawn"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

from distilrepro import packing
from distilrepro.packing import attend_apart, hidden_rows

WIDTH = 8  # of a head; a sequence of at most as many tokens can carry the unit matrix as values


def drop(query, key, value, widths, lengths, rate, seed=0):
    "The package's attention, [1, heads, n, head width], with random numbers of its own."
    torch.manual_seed(seed)
    return attend_apart(None, query, key, value, None, widths, lengths, dropout=rate)[0].transpose(1, 2)


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
    heads=st.integers(1, 3), rate=st.sampled_from([0.05, 0.1, 0.5, 0.9]), seed=st.integers(0, 99),
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
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
            q, k, v = (x.view(1, 40, 2, 64).transpose(1, 2) for x in row)
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


@pytest.mark.parametrize("kind", [BertModel, DistilBertModel])
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), more=st.integers(0, 3), narrow=st.booleans(), padded=st.booleans())
@settings(deadline=None, max_examples=40)
def test_a_row_and_a_rectangle_give_the_hidden_states_of_the_stock_model(kind, lengths, more, narrow, padded):
    "In value and in the gradient of every weight, whichever of the two is thought to be cheaper."
    model, places = encoder(kind, 8), torch.arange(max(lengths) + more)
    attention = (places < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, 31, attention.shape) * attention
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "NARROW", 8 if narrow else 7)
        patch.setattr(packing, "CALL", 1000)
        assert packing._cheap(attention, 8) == narrow
        rows = hidden_rows(model, ids, attention, padded)
    model.set_attn_implementation("sdpa")
    stock = model(ids, attention_mask=attention).last_hidden_state
    for out in (rows, stock.flatten(0, 1) if padded else stock[attention.bool()]):
        twist = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        found.append([out.detach(), *torch.autograd.grad((out * twist).sum(), model.parameters(), allow_unused=True)])
    assert sum(g is not None for g in found[0]) > 20
    for own, plain in zip(*found, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("width", "lengths", "cheap"), [
    (64, [10, 10], True), (64, [10, 4], True), (64, [20, 7], False), (128, [10, 4], True), (128, [10, 3], False), (129, [10, 10], False),
])
def test_padding_is_cheap_for_narrow_encoders_alone(width, lengths, cheap):
    attention = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    assert packing._cheap(attention, width) is cheap
