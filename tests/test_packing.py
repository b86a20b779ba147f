"""Rows and rectangles give the hidden states of the stock model, and either is taken where it is cheaper"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_blocks import encoder
from transformers import BertModel, DistilBertModel

from distilrepro import packing
from distilrepro.packing import attend_apart, hidden_rows


def test_a_row_attends_as_torch_does_sequence_by_sequence():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 9, 4)
    own = attend_apart(None, query, key, value, None, [4, 5], [3, 5], scaling=0.3)[0].transpose(1, 2)
    for (a, b), n in (((0, 4), 3), ((4, 9), 5)):
        looks = (query[:, :, a:b] @ key[:, :, a : a + n].mT * 0.3).softmax(-1)
        torch.testing.assert_close(own[:, :, a:b], looks @ value[:, :, a : a + n])


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
