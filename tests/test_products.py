"""Products by either library against double precision; weights laid out once: equal, noticed when changed, forgotten in the end"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from distilrepro import blocks, products
from distilrepro.packing import hidden_rows
from distilrepro.products import WIDE, by_onednn, lasting, product

ROUNDING = 2.0**-24
needs_bf16 = pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="bfloat16 is emulated here")


@pytest.fixture(autouse=True)
def nothing_laid():
    products._LAID.clear()


@pytest.fixture
def everywhere(monkeypatch):
    "oneDNN wherever it computes right, also where it was not measured."
    monkeypatch.setattr(products, "_has_onednn", torch.backends.mkldnn.is_available)


SIZES = st.integers(1, 300)


@given(n=st.integers(1, 70), k=SIZES, m=SIZES, turned=st.booleans(), biased=st.booleans(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=80)
def test_a_product_is_that_of_doubles(n, k, m, turned, biased, seed):
    "By oneDNN at every width, of weights as they lie and of transposed ones."
    torch.manual_seed(seed)
    x, b = torch.randn(n, k), torch.randn(m) if biased else None
    w = torch.randn(k, m).T if turned else torch.randn(m, k)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(products, "WIDE", 1)
        patch.setattr(products, "_has_onednn", torch.backends.mkldnn.is_available)
        assert by_onednn(x, w) == torch.backends.mkldnn.is_available()
        found = product(x, w, b)
    bound = (x.double().abs() @ w.double().abs().T + (0 if b is None else b.abs())) * k**0.5 * 4 * ROUNDING
    exact = F.linear(x.double(), w.double(), None if b is None else b.double())
    assert found.dtype == torch.float32 and ((found - exact).abs() <= bound + ROUNDING * exact.abs()).all()


@pytest.mark.parametrize(("shape", "kind", "grad", "has", "asked"), [
    ((WIDE, WIDE), torch.float32, False, True, True),
    ((4 * WIDE, WIDE), torch.float32, False, True, True),
    ((WIDE - 1, 4 * WIDE), torch.float32, False, True, False),
    ((WIDE, WIDE), torch.float64, False, True, False),
    ((WIDE, WIDE), torch.bfloat16, False, True, False),  # torch asks oneDNN itself
    ((WIDE, WIDE), torch.float32, True, True, False),  # the operation has no gradient
    ((WIDE, WIDE), torch.float32, False, False, False),
])
def test_onednn_is_asked_for_wide_float32_where_nothing_listens(monkeypatch, shape, kind, grad, has, asked):
    monkeypatch.setattr(products, "_has_onednn", lambda: has)
    with torch.set_grad_enabled(grad):
        assert by_onednn(torch.ones(3, shape[1], dtype=kind), torch.ones(shape, dtype=kind)) is asked


def test_a_product_has_its_gradient_where_one_is_wanted(everywhere):
    x, w = torch.randn(3, WIDE, requires_grad=True), torch.randn(WIDE, WIDE, requires_grad=True)
    found = torch.autograd.grad(product(x, w).sum(), (x, w))
    torch.testing.assert_close(found, (w.sum(0).expand(3, -1), x.sum(0).expand(WIDE, -1)), rtol=1e-4, atol=1e-4)


def wide_encoder():
    torch.manual_seed(0)
    shape = dict(vocab_size=61, hidden_size=WIDE, num_hidden_layers=2, num_attention_heads=4, intermediate_size=2 * WIDE)
    return BertModel(BertConfig(**shape), add_pooling_layer=False).eval()


ATTENTION = (torch.arange(9) < torch.tensor([9, 4])[:, None]).long()
IDS = (torch.arange(18).view(2, 9) * 7 % 60 + 1) * ATTENTION


def rows_of(model, coarse=True):
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=coarse):
        return hidden_rows(model, IDS, ATTENTION).clone()


def test_wide_layers_by_both_libraries(everywhere, monkeypatch):
    "Rows and gradients of blocks whose products oneDNN makes, against those of torch alone."
    model, found, asked = wide_encoder(), [], []
    for own in (True, False):
        monkeypatch.setattr(products, "by_onednn", lambda x, w, own=own: asked.append(own) or (own and by_onednn(x, w)))
        rows = hidden_rows(model, IDS, ATTENTION)
        grads = torch.autograd.grad((rows * torch.linspace(-1, 1, rows.numel()).view_as(rows)).sum(), [*model.encoder.parameters()])
        found.append((rows.detach(), torch.cat([g.flatten() for g in grads])))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))
    assert asked == [True] * 24 + [False] * 24  # of two layers, six products on the way there and six on the way back


@needs_bf16
def test_laid_out_weights_change_no_bit(monkeypatch):
    model = wide_encoder().requires_grad_(False)
    own = rows_of(model)
    assert len(products._LAID) == 2 * 6  # two layers of six weights
    monkeypatch.setattr(blocks, "lasting", lambda w, low: w.to(low))
    assert torch.equal(own, rows_of(model))


@needs_bf16
def test_a_weight_is_laid_out_once():
    model = wide_encoder().requires_grad_(False)
    rows_of(model)
    before = {id(w): products._LAID[w][1] for w in products._LAID}
    rows_of(model)
    assert all(products._LAID[w][1] is before[id(w)] for w in products._LAID)


CHANGES = {
    "in place": lambda m, w: w.mul_(2),
    "other memory": lambda m, w: setattr(w, "data", 2 * w.data),
    "a state loaded": lambda m, w: m.load_state_dict({k: 2 * v for k, v in m.state_dict().items()}),
    "a new parameter": lambda m, w: setattr(m.encoder.layer[1].output.dense, "weight", nn.Parameter(2 * w, requires_grad=False)),
}


@needs_bf16
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_laid_out_anew(monkeypatch, change):
    "Stale weights would be a teacher that is not the one on disk."
    model = wide_encoder().requires_grad_(False)
    before = rows_of(model)
    with torch.no_grad():
        CHANGES[change](model, model.encoder.layer[1].output.dense.weight)
    own = rows_of(model)
    monkeypatch.setattr(blocks, "lasting", lambda w, low: w.to(low))
    assert torch.equal(own, rows_of(model)) and not torch.equal(own, before)


@needs_bf16
def test_weights_that_learn_are_never_laid_out():
    model = wide_encoder()
    with torch.autocast("cpu", torch.bfloat16):
        hidden_rows(model, IDS, ATTENTION).sum().backward()
    with torch.no_grad():
        rows_of(model)
    assert not products._LAID


@needs_bf16
def test_a_frozen_layer_below_one_that_learns_passes_its_gradient_on():
    "Its weights are needed transposed, which laid-out ones cannot be."
    free, part = wide_encoder(), wide_encoder()
    part.encoder.layer[1].requires_grad_(False)
    grads = []
    for model in (free, part):
        with torch.autocast("cpu", torch.bfloat16):
            hidden_rows(model, IDS, ATTENTION).square().sum().backward()
        grads.append(model.encoder.layer[0].output.dense.weight.grad)
    assert torch.equal(*grads) and grads[0].any()


@needs_bf16
def test_a_copy_and_the_files_of_a_teacher_know_nothing_of_it(tmp_path):
    model = wide_encoder().requires_grad_(False)
    own = rows_of(model)
    twin = copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    again = BertModel.from_pretrained(tmp_path, add_pooling_layer=False).requires_grad_(False).eval()
    assert len(products._LAID) == 12
    assert all(torch.equal(own, rows_of(m)) for m in (twin, again)) and len(products._LAID) == 36
    del twin, again
    assert len(products._LAID) == 12


def test_other_types_and_narrow_weights_are_only_cast():
    narrow, wide = torch.ones(WIDE - 1, WIDE), torch.ones(WIDE, WIDE)
    assert lasting(wide, torch.float32) is wide
    assert lasting(narrow, torch.bfloat16).layout == lasting(wide, torch.float16).layout == torch.strided
    with torch.inference_mode():
        made_here = torch.ones(WIDE, WIDE)
    assert lasting(made_here, torch.bfloat16).layout == torch.strided and not products._LAID
