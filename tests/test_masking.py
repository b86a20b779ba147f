"Masking against loops, closed forms and other processes."
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from distilrepro.config import Mask
from distilrepro.masking import choose, fold, mask_tokens, token_weights, uniforms

V, PAD, MASK, SPECIALS = 60, 0, 4, [0, 1, 2, 3, 4]
COUNTS = (1e4 / np.arange(1, V + 1)).astype(int)


def sentence(i, n):
    "Return [CLS] n-2 ordinary tokens [SEP], a function of i."
    return [2, *np.random.default_rng(i).integers(5, V, n - 2).tolist(), 3]


def batch(ids, lengths, width=0):
    "Pad the sentences of `ids` to `width` or the longest."
    width = max(width, max(lengths[i] for i in ids))
    out = torch.full((len(ids), width), PAD)
    for row, i in enumerate(ids):
        out[row, :lengths[i]] = torch.tensor(sentence(i, lengths[i]))
    return out, (out != PAD).long()


def run(ids, lengths, mask, seed=0, epoch=0, step=0, width=0, smoothing=0.7):
    weights = token_weights(COUNTS, Mask(smoothing=smoothing), SPECIALS)
    x, attention = batch(ids, lengths, width)
    return x, attention, *mask_tokens(x, attention, np.array(ids), weights, mask, MASK, seed, epoch, step)


def splitmix(state):
    "The published reference in unlimited integers."
    m = (1 << 64) - 1
    z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & m
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & m
    return z ^ (z >> 31)


def number(*words):
    "Return the random number of an address, in unlimited integers."
    state, m = 0, (1 << 64) - 1
    for word in words:
        state = splitmix((state + 0x9E3779B97F4A7C15 & m) ^ (word & m))
    return (state >> 11) / 2**53


WORDS = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5)


@given(WORDS, WORDS)
def test_uniforms_equal_a_reference_in_python_integers(words, last):
    state = fold(np.zeros(1, dtype=np.uint64), *words)
    assert uniforms(state).tolist() == [number(*words)]
    assert uniforms(fold(state, np.array(last))).tolist() == [number(*words, word) for word in last]


def masked_slowly(rows, examples, weights, mask, seed, time):
    "Mask rows of token ids one token at a time: the rows, and their labels."
    keys = [[(-math.log1p(-number(seed, time, 0, e, i)) / weights[t], r, i) for i, t in enumerate(row) if weights[t]]
            for r, (row, e) in enumerate(zip(rows, examples, strict=True))]
    groups, sizes = (keys, map(len, rows)) if mask.scope == "example" else ([sum(keys, [])], [sum(map(len, rows))])
    masked, labels = [list(row) for row in rows], [[-100] * len(row) for row in rows]
    for group, size in zip(groups, sizes, strict=True):
        for _, r, i in sorted(group)[:math.ceil(mask.rate * size)]:
            kind, token = (number(seed, time, draw, examples[r], i) for draw in (1, 2))
            labels[r][i] = rows[r][i]
            if kind < mask.mask + mask.random:
                masked[r][i] = MASK if kind < mask.mask else int(token * len(weights))
    return masked, labels


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(3, 30), min_size=1, max_size=8), st.sampled_from(["batch", "example"]), st.floats(0, 1), st.integers(0, 99),
       st.sampled_from([0.0, 0.7]), st.integers(0, 40))
def test_masking_equals_a_loop_over_tokens(lengths, scope, rate, seed, smoothing, width):
    mask, n = Mask(scope=scope, rate=rate, mask=0.5, random=0.4, keep=0.1), len(lengths)
    examples = [7 * i + 2 for i in range(n)]
    weights = token_weights(COUNTS, Mask(smoothing=smoothing), SPECIALS)
    x, attention = batch(range(n), lengths, width)
    masked, labels = mask_tokens(x, attention, np.array(examples), weights, mask, MASK, seed, 5, 5)
    rows = [sentence(i, length) for i, length in enumerate(lengths)]
    want = masked_slowly(rows, examples, weights.double().tolist(), mask, seed, 5)
    got = [[row[:length].tolist() for row, length in zip(x, lengths, strict=True)] for x in (masked, labels)]
    assert got == [*want]
    assert all((masked[r, n:] == PAD).all() and (labels[r, n:] == -100).all() for r, n in enumerate(lengths))

FROZEN = {  # (row, position, what stands there)
    "batch": [(0, 7, 12), (0, 9, 25), (0, 13, 4), (1, 1, 10), (1, 4, 4), (1, 12, 46)],
    "example": [(0, 3, 46), (0, 12, 4), (0, 16, 27), (1, 4, 4), (1, 7, 10), (1, 19, 3)],
}


def test_masks_of_earlier_runs_stay_as_they_were():
    "Drawn before masking was made fast; other numbers would mean other training runs from the same seeds."
    words = torch.arange(5, 45).view(2, 20)
    for scope, want in FROZEN.items():
        mask = Mask(scope=scope, mask=0.5, keep=0.1, random=0.4)
        masked, labels = mask_tokens(words, words**0, np.array([3, 8]), torch.ones(60), mask, MASK, 1, 2, 3)
        at = (labels != -100).nonzero()
        assert [(*map(int, place), int(masked[tuple(place)])) for place in at] == want


ROWS = st.lists(st.lists(st.just(0.0) | st.floats(1e-3, 9), min_size=5, max_size=5), min_size=1, max_size=6)


@given(ROWS, st.integers(0, 2**32), st.data())
def test_choose_takes_the_smallest_keys(weights, seed, data):
    weights = np.array(weights)
    u = np.random.default_rng(seed).random(weights.shape)
    k = [data.draw(st.integers(0, 5)) for _ in weights]
    for row, w, numbers, n in zip(choose(weights, u, np.array(k)), weights, u, k, strict=True):
        with np.errstate(divide="ignore"):
            keys = [(-np.log1p(-x) / v, i) for i, (x, v) in enumerate(zip(numbers, w, strict=True))]
        want = [i for key, i in sorted(keys)[:n] if key < np.inf]
        assert row.nonzero()[0].tolist() == sorted(want)


def test_weights_equal_a_loop():
    weights = token_weights(COUNTS, Mask(), SPECIALS)
    for token in range(V):
        want = 0.0 if token in SPECIALS else max(int(COUNTS[token]), 1) ** -0.7
        assert weights[token].item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("scope", ["batch", "example"])
def test_b5_replacement_is_80_10_10(scope):
    lengths, seen = [100] * 400, np.zeros(3)
    for step in range(20):
        x, _, masked, labels = run(range(400), lengths, Mask(scope=scope), step=step, epoch=step)
        old, new = x[labels != -100], masked[labels != -100]
        seen += [int((new == MASK).sum()), int((new == old).sum()), int(((new != old) & (new != MASK)).sum())]
    assert seen.sum() >= 1e5
    want = np.array([0.8 + 0.1 / V, 0.1 + 0.1 / V, 0.1 - 0.2 / V])  # a random token may be [MASK] or the old one
    assert stats.chisquare(seen, want * seen.sum()).pvalue > 1e-3


def test_random_replacements_are_uniform_over_the_vocabulary():
    seen = np.zeros(V)
    for epoch in range(20):
        _, _, masked, labels = run(range(200), [100] * 200, Mask(scope="example", mask=0.0, keep=0.0, random=1.0), epoch=epoch)
        seen += np.bincount(masked[labels != -100], minlength=V)
    assert stats.chisquare(seen).pvalue > 1e-3


SENTENCES = st.lists(st.integers(3, 40), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(SENTENCES, st.sampled_from(["batch", "example"]), st.floats(0, 1), st.integers(0, 99), st.sampled_from([0.0, 0.7]))
def test_number_chosen_is_exact_and_nothing_special_is_chosen(lengths, scope, rate, seed, smoothing):
    x, attention, masked, labels = run(range(len(lengths)), lengths, Mask(scope=scope, rate=rate), seed=seed, width=50, smoothing=smoothing)
    chosen = labels != -100
    if scope == "example":
        assert chosen.sum(1).tolist() == [min(math.ceil(rate * n), n - 2) for n in lengths]
    else:
        assert chosen.sum() == min(math.ceil(rate * sum(lengths)), sum(lengths) - 2 * len(lengths))
    assert (x[chosen] >= 5).all() and (attention[chosen] == 1).all()
    assert (labels[chosen] == x[chosen]).all() and (masked[~chosen] == x[~chosen]).all()


@settings(max_examples=40, deadline=None)
@given(SENTENCES, st.randoms(use_true_random=False), st.integers(1, 5), st.integers(0, 30))
def test_example_scope_does_not_depend_on_batch_order_or_padding(lengths, rng, size, pad):
    mask, whole = Mask(scope="example"), {}
    x, attention, masked, labels = run(range(len(lengths)), lengths, mask, epoch=3, step=0)
    for i, n in enumerate(lengths):
        whole[i] = masked[i, :n].tolist(), labels[i, :n].tolist()
    order = list(range(len(lengths)))
    rng.shuffle(order)
    for step, start in enumerate(range(0, len(order), size)):
        part = order[start:start + size]
        _, _, masked, labels = run(part, lengths, mask, epoch=3, step=100 + step, width=41 + pad)
        for row, i in enumerate(part):
            assert (masked[row, :lengths[i]].tolist(), labels[row, :lengths[i]].tolist()) == whole[i]
            assert (labels[row, lengths[i]:] == -100).all()


def test_batch_scope_depends_on_step_seed_and_members_alone():
    lengths, mask = [30] * 12, Mask()
    first = run(range(6), lengths, mask, seed=1, step=7, epoch=0)[3]
    assert torch.equal(first, run(range(6), lengths, mask, seed=1, step=7, epoch=9)[3])
    assert torch.equal(first, run(range(6), lengths, mask, seed=1, step=7, width=64)[3][:, :30])
    assert torch.equal(first.flip(0), run([5, 4, 3, 2, 1, 0], lengths, mask, seed=1, step=7)[3])
    for change in ({"step": 8}, {"seed": 2}):
        assert not torch.equal(first, run(range(6), lengths, mask, **{"seed": 1, "step": 7, **change})[3])


def test_example_scope_changes_with_epoch_seed_and_example():
    lengths, mask = [40] * 4, Mask(scope="example")
    first = run(range(4), lengths, mask, epoch=1)[3]
    assert torch.equal(first, run(range(4), lengths, mask, epoch=1, step=55)[3])
    assert not torch.equal(first, run(range(4), lengths, mask, epoch=2)[3])
    assert not torch.equal(first, run(range(4), lengths, mask, epoch=1, seed=1)[3])
    same_words = torch.tensor([sentence(0, 40)] * 2)
    weights = token_weights(COUNTS, mask, SPECIALS)
    _, labels = mask_tokens(same_words, torch.ones_like(same_words), np.array([0, 1]), weights, mask, MASK, 0, 0, 0)
    assert not torch.equal(labels[0], labels[1])


@pytest.mark.parametrize("scope", ["batch", "example"])
def test_inclusion_probabilities_equal_a_sequential_draw(scope):
    "numpy's `choice` draws one after the other, renormalising: what torch.multinomial of the original does."
    words, trials = [2, 5, 9, 20, 59, 6, 30, 3], 6000 if scope == "example" else 1500
    ids, mask, one = torch.tensor([words]), Mask(scope=scope, rate=0.3), np.ones(1, int)
    weights = token_weights(COUNTS, mask, SPECIALS)
    k = math.ceil(0.3 * len(words))
    if scope == "example":
        many = ids.expand(trials, -1)
        labels = mask_tokens(many, torch.ones_like(many), np.arange(trials), weights, mask, MASK, 0, 0, 0)[1]
    else:
        labels = torch.cat([mask_tokens(ids, torch.ones_like(ids), one, weights, mask, MASK, 0, 0, step)[1] for step in range(trials)])
    ours = (labels != -100).sum(0).numpy()
    rng, p = np.random.default_rng(0), weights[words].double().numpy()
    naive = np.zeros(len(words))
    for _ in range(trials):
        naive[rng.choice(len(words), k, replace=False, p=p / p.sum())] += 1
    error = np.sqrt(naive * (1 - naive / trials) * 2) / trials
    assert (np.abs(ours - naive) / trials <= 4.5 * error).all()


def test_same_draw_in_another_process():
    code = ("import torch, numpy as np; from distilrepro.config import Mask; from distilrepro.masking import mask_tokens; "
            "x = torch.arange(5, 45).view(2, 20); w = torch.ones(60); "
            "print([mask_tokens(x, x ** 0, np.array([3, 8]), w, Mask(scope=s), 4, 1, 2, 3)[0].tolist() for s in ('batch', 'example')])")
    x = torch.arange(5, 45).view(2, 20)
    torch.rand(7)  # the state of torch's generator must not matter
    w, ids = torch.ones(60), np.array([3, 8])
    here = [mask_tokens(x, torch.ones_like(x), ids, w, Mask(scope=s), 4, 1, 2, 3)[0].tolist() for s in ("batch", "example")]
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == str(here)


def test_nothing_to_mask_is_no_error():
    x = torch.tensor([[2, 3, 0], [2, 1, 3]])
    weights = token_weights(COUNTS, Mask(), SPECIALS)
    for scope in ("batch", "example"):
        masked, labels = mask_tokens(x, (x != 0).long(), np.arange(2), weights, Mask(scope=scope), MASK, 0, 0, 0)
        assert torch.equal(masked, x) and (labels == -100).all()
