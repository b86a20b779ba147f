"The vocabulary terms in pieces against whole matrices, loops and finite differences."
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForMaskedLM

from distilrepro import fused, products
from distilrepro.config import Loss, UserError
from distilrepro.fused import BLOCK, CACHE, IGNORE, PIECE, vocab_loss
from distilrepro.losses import Counts, count, hidden_cosine, triple_loss, vocab_terms
from distilrepro.products import product
from distilrepro.student import build_student

ROWS = BLOCK["cpu"]


def case(n, d=5, vocab=11, masked=0.3, seed=0, dtype=torch.float64, spread=1.0):
    "Rows and decoders of student and teacher, and labels."
    g = torch.Generator().manual_seed(seed)
    def draw(*shape): return spread * torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    student = [draw(n, d), draw(vocab, d), draw(vocab)]
    labels = torch.where(torch.rand(n, generator=g) < masked, torch.randint(0, vocab, (n,), generator=g), IGNORE)
    return [t.requires_grad_() for t in student], (draw(n, d + 2), (draw(vocab, d + 2), draw(vocab))), labels


def gradients(function, tensors, upstream=1.0):
    "Value and gradients of a scalar function of the student's tensors."
    value = function(*tensors)
    return value.detach(), torch.autograd.grad(value * upstream, tensors, allow_unused=True)


def whole(teacher, labels, T, a, b):
    def f(rows, w, bias):
        kl, ce = vocab_terms(rows, (w, bias), *teacher, labels, T)
        return a * kl + b * ce
    return f


def pieces(teacher, labels, T, a, b, compiled=False):
    return lambda rows, w, bias: vocab_loss(rows, (w, bias), *teacher, labels, T, a, b, compiled)[0]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 23), st.integers(1, 3), st.integers(1, 5), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([1.0, 2.0, 7.0]),
       st.sampled_from([(5.0, 2.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)]), st.integers(0, 99))
def test_pieces_equal_whole_matrices(n, blocks, block, masked, T, weights, seed):
    tensors, teacher, labels = case(n, masked=masked, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "PIECE", dict(cpu=blocks * block))
        patch.setattr(fused, "BLOCK", dict(cpu=block))
        patch.setattr(fused, "CACHE", 0)
        value, grads = gradients(pieces(teacher, labels, T, *weights), tensors, upstream=3.7)
        _, kl, ce = vocab_loss(tensors[0], tuple(tensors[1:]), *teacher, labels, T, *weights)
    want, want_grads = gradients(whole(teacher, labels, T, *weights), tensors, upstream=3.7)
    want_kl, want_ce = vocab_terms(tensors[0], tuple(tensors[1:]), *teacher, labels, T)
    torch.testing.assert_close((value, kl, ce), (want, want_kl.detach(), want_ce.detach()))
    for got, expected in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got, expected if expected is not None else torch.zeros_like(got))
    assert not kl.requires_grad and not ce.requires_grad


@pytest.mark.parametrize("n", [1, ROWS - 1, ROWS, *(PIECE["cpu"] + n for n in (-1, 0, 1, PIECE["cpu"] + 33))])
@pytest.mark.parametrize("cache", [0, CACHE, None])
def test_pieces_of_the_real_size_equal_whole_matrices(n, cache, monkeypatch):
    "In blocks of two sizes, and by the kernel in C, which has none."
    monkeypatch.setattr(fused, "CACHE", cache or 0)
    tensors, teacher, labels = case(n, vocab=7, dtype=torch.float32)
    got = gradients(pieces(teacher, labels, 2.0, 5 / n, 2 / n, compiled=cache is None), tensors)
    torch.testing.assert_close(got, gradients(whole(teacher, labels, 2.0, 5 / n, 2 / n), tensors), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("width", "models"), [(fused.OWN - 3, 0), (fused.OWN - 1, 1), (fused.OWN, 2)])
def test_wide_logits_come_from_the_other_library(width, models, monkeypatch):
    "The teacher is two wider; with 261 words, no multiple of 16, and a last piece that is not full."
    asked = []
    monkeypatch.setattr(products, "_has_onednn", torch.backends.mkldnn.is_available)
    monkeypatch.setattr(fused, "product", lambda x, w: asked.append(len(x)) or product(x, w))
    n = PIECE["cpu"] + 100
    tensors, teacher, labels = case(n, d=width, vocab=261, dtype=torch.float32, spread=0.05)
    got = gradients(pieces(teacher, labels, 2.0, 5 / n, 2 / n), tensors)
    torch.testing.assert_close(got, gradients(whole(teacher, labels, 2.0, 5 / n, 2 / n), tensors), rtol=1e-4, atol=1e-5)
    assert sum(asked) == models * n * torch.backends.mkldnn.is_available()


def test_terms_equal_a_loop_over_tokens():
    (rows, w, b), (t_rows, (t_w, t_b)), labels = case(6, masked=0.5, seed=3)
    T, kl, ce = 2.0, 0.0, 0.0
    for r, t, y in zip((rows @ w.T + b).tolist(), (t_rows @ t_w.T + t_b).tolist(), labels.tolist(), strict=True):
        def log_softmax(x, T):
            top = max(x)
            return [(v - top) / T - math.log(sum(math.exp((u - top) / T) for u in x)) for v in x]
        q, p = log_softmax(r, T), log_softmax(t, T)
        kl += T**2 * sum(math.exp(pi) * (pi - qi) for pi, qi in zip(p, q, strict=True))
        ce -= log_softmax(r, 1.0)[y] if y != IGNORE else 0.0
    _, got_kl, got_ce = vocab_loss(rows, (w, b), t_rows, (t_w, t_b), labels, T, 1.0, 1.0)
    assert (got_kl.item(), got_ce.item()) == (pytest.approx(kl), pytest.approx(ce))


@pytest.mark.parametrize("T", [1.0, 2.0, 7.0])
@pytest.mark.parametrize("masked", [0.0, 0.5, 1.0])
def test_gradient_equals_finite_differences(T, masked):
    tensors, teacher, labels = case(4, d=3, vocab=5, masked=masked, seed=1)
    assert torch.autograd.gradcheck(pieces(teacher, labels, T, 5.0, 2.0), tensors)


@pytest.mark.parametrize("compiled", [False, True])
def test_bfloat16_gradients_point_the_same_way(compiled):
    tensors, teacher, labels = case(700, d=64, vocab=1000, masked=0.15, dtype=torch.float32, spread=0.3)
    value, exact = gradients(pieces(teacher, labels, 2.0, 5 / 700, 2 / 100), tensors)
    with torch.autocast("cpu", torch.bfloat16):
        low_value, low = gradients(pieces(teacher, labels, 2.0, 5 / 700, 2 / 100, compiled), tensors)
    assert low_value.item() == pytest.approx(value.item(), rel=1e-2)
    for got, want in zip(low, exact, strict=True):
        assert got.dtype == torch.float32
        assert torch.cosine_similarity(got.flatten(), want.flatten(), dim=0) >= 0.999


@pytest.mark.parametrize("n", [13, 600])
def test_strips_of_the_weight_change_no_bit(monkeypatch, n):
    "37 words in strips of 8, 8, 8, 8 and 5, one piece of rows and two, under autocast; a temperature whose product is rounded."
    tensors, teacher, labels = case(n, vocab=37, dtype=torch.float32)
    got = []
    for strip in (8, 64):
        monkeypatch.setattr(fused, "STRIP", strip)
        with torch.autocast("cpu", torch.bfloat16):
            got.append(gradients(pieces(teacher, labels, 3.0, 5 / n, 2 / n), tensors))
    torch.testing.assert_close(*got, rtol=0, atol=0)
    assert all(g.abs().max() > 0 for g in got[0][1])


@pytest.mark.parametrize("upstream", [1.0, 3.7])
def test_a_graph_that_is_kept_gives_its_gradients_again(upstream):
    tensors, teacher, labels = case(20, seed=2)
    value = pieces(teacher, labels, 2.0, 0.3, 0.7)(*tensors) * upstream
    _, want = gradients(whole(teacher, labels, 2.0, 0.3, 0.7), tensors, upstream)
    for times in (1, 2):
        value.backward(retain_graph=True)
        torch.testing.assert_close([t.grad for t in tensors], [times * g for g in want])
    for t in tensors:
        t.grad.zero_()
    value.backward()
    torch.testing.assert_close([t.grad for t in tensors], list(want))


MERGED = """
import torch
from distilrepro import fused, products
fused.CACHE = 0  # blocks of as many rows as a large vocabulary gets
torch.manual_seed(0)
x, y, biases = torch.randn(37, 101), torch.randn(37, 101), torch.randn(2, 101)
labels = torch.full((37,), -100).index_fill(0, torch.tensor([3, 30]), 7)
out = []
for soften in (fused._soften, fused._softened()):
    z = x.clone()
    out.append([z, *map(sum, zip(*fused._in_blocks(z, y, *biases, labels, (2.0, 0.3, 0.7), soften)))])
torch.testing.assert_close(*out)
for tokens in (3, 5, 7):  # every batch has its own weights, and one graph serves them all
    list(fused._in_blocks(x.clone(), y, *biases, labels, (2.0, 0.3 / tokens, 0.7 / tokens), fused._softened()))
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 1, torch._dynamo.utils.counters["stats"]
"""


@pytest.mark.parametrize("compiler", [None, "/no/such/compiler"])
def test_passes_that_torch_merges_or_not_give_the_same(compiler, tmp_path):
    "Two blocks of 16 rows and a rest of 5, as on a GPU; in a process of its own, since what is compiled stays."
    if compiler is None and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler on this machine")
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)} | ({"CXX": compiler} if compiler else {})
    done = subprocess.run([sys.executable, "-c", MERGED], env=env, capture_output=True, text=True, check=True)
    assert ("WON'T CONVERT" in done.stderr) == bool(compiler)


@pytest.mark.parametrize("compiled", [False, True])
def test_large_logits_stay_finite(compiled):
    tensors, teacher, labels = case(9, spread=60.0, dtype=torch.float32)
    value, grads = gradients(pieces(teacher, labels, 1.0, 5.0, 2.0, compiled), tensors)
    assert torch.isfinite(value) and all(torch.isfinite(g).all() for g in grads)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    teacher = BertForMaskedLM(BertConfig(vocab_size=31, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
                                         max_position_embeddings=32, initializer_range=0.5)).double().eval()
    student, _ = build_student(teacher, dropout=0.0)
    return student.double().eval(), teacher


def batch(lengths, width, seed=0):
    "Ids, attention and labels of sequences, padded to a width."
    g = torch.Generator().manual_seed(seed)
    ids, labels = torch.zeros(len(lengths), width, dtype=torch.long), torch.full((len(lengths), width), IGNORE)
    for i, n in enumerate(lengths):
        ids[i, :n] = torch.randint(5, 31, (n,), generator=g)
        labels[i, 1:n:3] = ids[i, 1:n:3]
    return ids, (torch.arange(width) < torch.tensor(lengths)[:, None]).long(), labels


@pytest.mark.parametrize("positions", ["all", "masked"])
def test_padding_changes_nothing(models, positions):
    args, out = Loss(positions=positions), []
    for width in (7, 19):
        ids, attention, labels = batch([7, 4, 6], width)
        loss, parts = triple_loss(*models, ids, attention, labels, args, count(attention, labels))
        out.append([loss.detach(), *(parts[k].detach() for k in ("ce", "mlm", "cos"))])
    torch.testing.assert_close(*out)


AS_RUN = dict(positions="padded", kl_mean_over="sequences", cos_tokens="cls")


@pytest.mark.parametrize("choice", [dict(positions="all"), dict(positions="masked"), AS_RUN], ids=["all", "masked", "as run"])
def test_accumulated_micro_batches_equal_one_batch(models, choice):
    student, args = models[0], Loss(**choice)
    ids, attention, labels = batch([9, 3, 5, 8, 6], 9)
    labels[1] = IGNORE  # a micro-batch of its own without a masked token
    whole_counts = count(attention, labels)

    def accumulate(groups):
        student.zero_grad()
        total = 0.0
        for g in groups:
            loss, _ = triple_loss(*models, ids[g], attention[g], labels[g], args, whole_counts)
            loss.backward()
            total += loss.item()
        return total, [p.grad.clone() for p in student.parameters()]

    (one, grads), (many, many_grads) = accumulate([[0, 1, 2, 3, 4]]), accumulate([[0], [1], [2, 4], [3]])
    assert many == pytest.approx(one)
    torch.testing.assert_close(many_grads, grads)
    parts = [count(attention[g], labels[g]) for g in ([0], [1], [2, 4], [3])]
    assert sum(parts, Counts(0, 0)) == whole_counts


def test_vocabularies_and_widths_that_differ_are_named():
    tensors, teacher, labels = case(3)
    with pytest.raises(UserError, match="11 and 10 words"):
        vocab_loss(tensors[0], tuple(tensors[1:]), teacher[0], (teacher[1][0][:10], teacher[1][1][:10]), labels, 2.0, 1.0, 1.0)
    with pytest.raises(UserError, match="w_cos=0"):
        hidden_cosine(torch.ones(3, 4), torch.ones(3, 5))
