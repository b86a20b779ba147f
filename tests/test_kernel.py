"The kernel in C against torch's functions in double precision, and what happens where it cannot be had."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM

from distilrepro import fused, kernel
from distilrepro.config import Loss
from distilrepro.distill import threads
from distilrepro.fused import IGNORE, vocab_loss
from distilrepro.kernel import NUMBERS, kernel_for
from distilrepro.losses import count, triple_loss
from distilrepro.student import build_student

NEAR = {torch.float32: 1e-5, torch.bfloat16: 5e-3}  # of the gradient that is written, to its largest


def case(n, words, kind, masked, spread, seed):
    "Logits of both models, biases, labels."
    g = torch.Generator().manual_seed(seed)
    x_nv, y_nv = ((spread * torch.randn(n, words, generator=g)).to(kind) for _ in range(2))
    labels = torch.where(torch.rand(n, generator=g) < masked, torch.randint(0, words, (n,), generator=g), IGNORE)
    return x_nv, y_nv, *torch.randn(2, words, generator=g), labels


def by_torch(x_nv, y_nv, s_bias, t_bias, labels, T, a, b):
    "Gradient by the undivided logits, its sum over rows, both terms."
    s_nv, t_nv = (((z.double() + c.double()) * T).requires_grad_() for z, c in ((x_nv, s_bias), (y_nv, t_bias)))
    kl = F.kl_div((s_nv / T).log_softmax(-1), (t_nv / T).log_softmax(-1), reduction="sum", log_target=True) * T**2
    ce = F.cross_entropy(s_nv, labels, ignore_index=IGNORE, reduction="sum")
    grad = torch.autograd.grad(a * kl + b * ce, s_nv)[0]
    return grad, grad.sum(0), kl.detach(), ce.detach()


def summed(shares):
    "Add what the threads found."
    return tuple(map(sum, zip(*shares, strict=True)))


@settings(deadline=None, max_examples=120)
@given(st.integers(1, 9), st.integers(1, 70), st.sampled_from(list(NUMBERS)), st.sampled_from([0.0, 0.4, 1.0]),
       st.sampled_from([1.0, 2.0, 2.5, 7.0]), st.sampled_from([(5.0, 2.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)]), st.integers(1, 4),
       st.sampled_from([0.1, 1.0, 8.0]), st.integers(0, 99))
def test_rows_equal_the_formula(n, words, kind, masked, T, weights, count, spread, seed):
    x_nv, y_nv, *rest = case(n, words, kind, masked, spread, seed)
    grad, *wants = by_torch(x_nv, y_nv, *rest, T, *weights)
    with threads(count):
        gots = summed(kernel_for(kind)(x_nv, y_nv, *rest, (T, *weights)))
    scale = 1 + sum(weights)
    torch.testing.assert_close(x_nv.double(), grad, rtol=NEAR[kind], atol=NEAR[kind] * scale * T)
    for got, want in zip(gots, wants, strict=True):  # summed before they are rounded
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-5 * scale * n * T)


@pytest.mark.parametrize("kind", NUMBERS)
def test_a_vocabulary_of_the_real_size(kind):
    x_nv, y_nv, *rest = case(3, 30528, kind, 0.5, 1.0, 0)
    grad, *wants = by_torch(x_nv, y_nv, *rest, 2.0, 0.3, 0.7)
    gots = summed(kernel_for(kind)(x_nv, y_nv, *rest, (2.0, 0.3, 0.7)))
    torch.testing.assert_close(x_nv.double(), grad, rtol=NEAR[kind], atol=1e-7)
    for got, want in zip(gots, wants, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_no_number_is_not_hidden(kind, bad, side):
    given_ = case(4, 40, kind, 0.0, 1.0, 0)
    given_[side][2, 5] = bad
    assert not torch.isfinite(summed(kernel_for(kind)(*given_, (2.0, 1.0, 1.0)))[1])


@pytest.mark.parametrize("bad", [40, 2**40])
def test_a_label_beyond_the_vocabulary_is_refused_before_memory_is_touched(bad):
    x_nv, y_nv, *biases, labels = case(4, 40, torch.float32, 0.0, 1.0, 0)
    before, labels[2] = x_nv.clone(), bad
    with pytest.raises(IndexError, match=f"label {bad} is no word"):
        kernel_for(torch.float32)(x_nv, y_nv, *biases, labels, (2.0, 1.0, 1.0))
    assert torch.equal(x_nv, before)


def test_labels_of_another_type_or_stride_are_read_as_they_mean():
    found = []
    for change in (lambda z: z, lambda z: z.int(), lambda z: torch.stack([z, z + 1], 1)[:, 0]):
        x_nv, y_nv, *biases, labels = case(9, 40, torch.float32, 0.5, 1.0, 3)
        found.append((x_nv, *summed(kernel_for(torch.float32)(x_nv, y_nv, *biases, change(labels), (2.0, 0.3, 0.7)))))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_rows_of_several_threads_are_the_same_bits_again():
    found = []
    for _ in range(2):
        x_nv, *rest = case(50, 200, torch.float32, 0.3, 1.0, 7)
        with threads(3):
            found.append((x_nv, *summed(kernel_for(torch.float32)(x_nv, *rest, (2.0, 0.3, 0.7)))))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(("compilers", "words"), [((), "no C compiler"), (("false",), "false failed")])
def test_without_a_compiler_torch_computes_and_a_warning_says_so(monkeypatch, compilers, words):
    tensors = [torch.randn(5, 8), torch.randn(30, 8), torch.randn(30)]
    other = torch.randn(5, 8), (torch.randn(30, 8), torch.randn(30)), torch.tensor([IGNORE, 3, IGNORE, IGNORE, 29])
    want = vocab_loss(tensors[0], tuple(tensors[1:]), *other, 2.0, 0.3, 0.7, compiled=False)
    monkeypatch.setattr(kernel, "COMPILERS", compilers)
    kernel_for.cache_clear()
    try:
        with pytest.warns(UserWarning, match=words):
            got = vocab_loss(tensors[0], tuple(tensors[1:]), *other, 2.0, 0.3, 0.7, compiled=True)
    finally:
        kernel_for.cache_clear()
    assert all(map(torch.equal, got, want))


def test_other_types_are_left_to_torch_without_a_word(recwarn):
    assert kernel_for(torch.float64) is None and kernel_for(torch.float16) is None and not recwarn.list


@pytest.mark.parametrize("bf16", [False, True])
def test_training_uses_the_kernel_without_being_told(monkeypatch, bf16):
    teacher = BertForMaskedLM(BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16))
    student, ids = build_student(teacher)[0], torch.randint(0, 30, (2, 5))
    inputs, asked = (ids, torch.ones_like(ids), ids), []
    monkeypatch.setattr(fused, "kernel_for", lambda kind: asked.append(kind) or kernel_for(kind))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        triple_loss(student, teacher, *inputs, Loss(), count(*inputs[1:]))
    assert asked == [torch.bfloat16 if bf16 else torch.float32]
