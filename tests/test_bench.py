"""The benchmark: peers that compute what they say, turns that alternate, contenders that cannot cheat or die in silence."""
import json
import multiprocessing
import os
import time
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import BertConfig

from distilrepro.bench import (
    ALLOCATORS,
    BARS,
    BY_PRODUCT,
    Racer,
    as_records,
    bar_table,
    entries,
    last_cores,
    products,
    race,
    ratio_table,
    setting_name,
    shape_rate,
)
from distilrepro.config import Loss, UserError
from distilrepro.corpus import padding_share, plan_epoch
from distilrepro.peers import (
    CONTENDERS,
    Contender,
    Original,
    Ours,
    PlainTrainer,
    PublicLoop,
    TextBrewer,
    TorchDistill,
    Turns,
    Work,
    deal,
    draw_lengths,
    exactness,
    original_loss,
    plain_loss,
    work_flops,
)
from distilrepro.records import Record

TINY = Work(layers=2, width=32, heads=2, batch=4, vocab=97, longest=24, sequences=64, dropout=0.0, loss=Loss(w_ce=1, w_mlm=1, w_cos=1))


class Fake(Contender):
    "A contender that only sleeps, and counts."

    def __init__(self, work, folder):
        super().__init__(work, folder)
        self.done = 0

    def step(self, examples):
        time.sleep(0.02)
        self.done += 1
        return float(len(examples))

    def updates(self):
        return self.done


class Lazy(Fake):
    "Skips every second update."
    def updates(self): return self.done // 2


class Dying(Fake):
    "Is killed in its second turn, as by the kernel for memory."
    def step(self, examples):
        if self.done == 2:
            os.kill(os.getpid(), 9)
        return super().step(examples)


class Failing(Fake):
    "Raises in its first turn."
    def step(self, examples): raise ZeroDivisionError("no such luck")


class Environment(Fake):
    "Tells by its loss whether the allocator was tuned, how many threads it has and how many cores all of them may use."
    def step(self, examples):
        super().step(examples)
        cores = set().union(*(os.sched_getaffinity(int(t)) for t in os.listdir("/proc/self/task")))
        return torch.get_num_threads() + 100 * len(cores) + 10 * sum(os.environ.get(k) == v for k, v in ALLOCATORS["tuned"].items())


# what the contenders compute

@pytest.fixture
def examples():
    return deal(TINY, draw_lengths(TINY), False, 3)


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    "Rates of the machine are not what is tested."
    monkeypatch.setattr("distilrepro.bench.SQUARE", 64)


@pytest.fixture
def quick_start(monkeypatch):
    "Processes that share one start: importing torch and transformers takes seconds."
    multiprocessing.set_forkserver_preload(["distilrepro.peers", __name__])
    monkeypatch.setattr("distilrepro.bench.START", "forkserver")


@pytest.mark.parametrize("weights", [(1, 1, 1), (5, 2, 1), (0, 1, 0), (3, 0, 0)])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.0])
def test_ours_and_the_original_find_one_loss_and_one_gradient(tmp_path, weights, temperature):
    "In float64, where nothing but another objective could make a difference."
    loss = Loss(temperature=temperature, **dict(zip(("w_ce", "w_mlm", "w_cos"), weights, strict=True)))
    found = exactness(replace(TINY, loss=loss), tmp_path, double=True)
    assert found["loss_error"] < 1e-11 and found["gradient_error"] < 1e-11, found


def test_float32_is_as_exact_as_the_bars_ask(tmp_path):
    found = exactness(replace(TINY, loss=Loss()), tmp_path)
    assert found["loss_error"] < 1e-6 and found["gradient_error"] < 1e-5, found


def test_another_objective_is_noticed(tmp_path, monkeypatch):
    def without_square(*args): return original_loss(*args[:-1], args[-1].model_copy(update=dict(w_ce=args[-1].w_ce / 4)))
    monkeypatch.setattr("distilrepro.peers.original_loss", without_square)
    found = exactness(replace(TINY, loss=Loss()), tmp_path)
    assert found["loss_error"] > 1e-3 and found["gradient_error"] > 1e-2, found


def test_the_public_loop_makes_the_update_of_the_step(tmp_path, examples):
    "`fit` and the contender `ours` leave the same weights after one update on the same examples; its clock is that of its log."
    (tmp_path / "twin").mkdir()
    loop, ours = PublicLoop(TINY, tmp_path), Ours(TINY, tmp_path / "twin")
    loop.loop = loop.loop.model_copy(update=dict(epochs=1, warmup=0.0))
    loop.step(np.sort(examples[0]))
    order = plan_epoch(loop.store.lengths[np.sort(examples[0])], TINY.batch, TINY.seed, 0, False)[0]
    ours.step(np.sort(examples[0])[order])
    assert loop.clock == pytest.approx(loop.store.lengths[examples[0]].sum() / loop.logs[0][-1]["tokens_per_s"])
    for (name, p), q in zip(loop.student.named_parameters(), ours.student.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-7), name


def test_the_plain_loss_counts_padding_and_agrees_with_numpy():
    rng, args = np.random.default_rng(0), Loss(w_ce=3, w_mlm=2, temperature=2)
    s, t = rng.normal(size=(2, 3, 5, 7))
    labels = np.full((3, 5), -100)
    labels[0, 1], labels[2, 4] = 6, 0

    def softmax(x): return np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    p, q = softmax(t / 2), softmax(s / 2)
    kl = (p * np.log(p / q)).sum(-1).mean() * 4
    ce = -np.mean([np.log(softmax(s))[0, 1, 6], np.log(softmax(s))[2, 4, 0]])
    assert plain_loss(*map(torch.tensor, (s, t, labels)), args).item() == pytest.approx(3 * kl + 2 * ce, rel=1e-9)


def test_the_trainer_makes_the_update_that_its_loss_asks_for(tmp_path, examples):
    (tmp_path / "twin").mkdir()
    plain, twin = PlainTrainer(TINY, tmp_path), PlainTrainer(TINY, tmp_path / "twin")
    batch = twin.collate(examples[0])
    labels = batch.pop("labels")
    twin.student.train()
    with torch.no_grad():
        t_logits = twin.teacher(**batch).logits
    want = plain_loss(twin.student(**batch).logits, t_logits, labels, TINY.loss)
    want.backward()
    torch.nn.utils.clip_grad_norm_(twin.student.parameters(), 5.0)
    twin.optimizer.step()
    assert plain.step(examples[0]) == pytest.approx(want.item(), rel=1e-5)  # the collator's masks are seeded
    for (name, p), q in zip(plain.student.named_parameters(), twin.student.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6), name


@pytest.mark.skipif(find_spec("torchdistill") is None, reason="extra [bench]")
def test_torchdistill_computes_the_plain_loss(tmp_path, examples):
    box = TorchDistill(TINY, tmp_path)
    batch = box.collate(examples[0])
    labels = batch.pop("labels")
    logits = [m(**batch).logits for m in (box.student, box.teacher)]
    want = plain_loss(*logits, labels, TINY.loss).item()
    assert box.box.forward_process(batch, labels.flatten()).item() == pytest.approx(want, rel=1e-5)
    assert box.step(examples[1]) > 0 and box.updates() == 1


@pytest.mark.skipif(find_spec("textbrewer") is None, reason="extra [bench]")
def test_textbrewer_pulls_as_the_original_does(tmp_path, examples):
    "Its soft cross-entropy differs from the KL by a constant: equal gradients, hence equal updates on equal masks."
    brewer = TextBrewer(TINY, tmp_path)
    (tmp_path / "twin").mkdir()
    twin = TextBrewer(TINY, tmp_path / "twin")
    batch = twin.collate(examples[0])
    loss = original_loss(twin.student.train(), twin.teacher, batch["input_ids"], batch["attention_mask"], batch["labels"], TINY.loss)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(twin.student.parameters(), 5.0)
    twin.optimizer.step()
    brewer.step(examples[0])
    before = dict(Original(TINY, tmp_path / "twin").student.named_parameters())
    moved = [(p - before[n]).abs().max().item() for n, p in brewer.student.named_parameters()]
    assert max(moved) > 1e-5
    for (name, p), q in zip(brewer.student.named_parameters(), twin.student.parameters(), strict=True):
        assert torch.allclose(p, q, atol=2e-5), name


def test_a_library_that_is_missing_is_named(monkeypatch, tmp_path):
    def gone(name): raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    monkeypatch.setattr("distilrepro.peers.import_module", gone)
    for kind, name in ((TextBrewer, "textbrewer"), (TorchDistill, "torchdistill")):
        with pytest.raises(UserError, match=rf"{name}.*pip install 'distilrepro\[bench\]'"):
            kind(TINY, tmp_path)


def test_flops_by_hand_from_the_parameters():
    "Every weight of a matrix is used once a token, at two operations; attention compares each token with all, twice."
    work, n = replace(TINY, layers=4), 9
    d, f, v = 32, 128, 97
    trunk = 2 * (4 * d * d + 2 * d * f) + 4 * n * d
    teacher, student = 4 * trunk, 2 * trunk
    head = 2 * (d * d + d * v)
    assert work_flops(work, [n]) == n * (teacher + head + 3 * (student + head))
    assert work_flops(work, [n, n]) == 2 * work_flops(work, [n])
    assert BertConfig(hidden_size=d, intermediate_size=f).intermediate_size == 4 * d


def test_every_contender_is_dealt_the_same_mix_of_lengths():
    work = Work()
    lengths = draw_lengths(work)
    groups, random = (deal(work, lengths, g, 8) for g in (True, False))
    means = [np.concatenate([lengths[ids] for ids in plan[1:]]).mean() for plan in (groups, random)]
    assert means[0] == pytest.approx(means[1], rel=0.1)
    assert padding_share(lengths, groups) < 0.1 and padding_share(lengths, random) > 0.3
    assert not np.intersect1d(groups[0], np.concatenate(groups[1:])).size


def test_turns_raise_what_went_wrong_inside():
    def loop(batches):
        for b in batches:
            assert b < 2, "too many"
    turn = Turns(loop)
    turn(0), turn(1)
    with pytest.raises(AssertionError, match="too many"):
        turn(2)


# the coordinator

def test_turns_alternate_and_never_overlap(quick_start):
    rounds = []
    turns, sums, rates = race({"a": (Fake, TINY), "b": (Fake, TINY)}, 3, on_round=rounds.append)
    assert rounds == [0, 1, 2, 3] and rates["product"].tolist() == [*products(TINY), BY_PRODUCT]
    assert turns.groupby("model").turn.apply(list).tolist() == [[1, 2, 3]] * 2
    turns = turns.sort_values("start")
    assert turns.model.tolist() == ["a", "b"] * 3
    assert (turns.start.to_numpy()[1:] >= (turns.start + turns.seconds).to_numpy()[:-1]).all()
    assert (turns.seconds >= 0.02).all() and turns.loss.eq(TINY.batch).all()
    for row in sums.itertuples():
        mine = turns[turns.model == row.model]
        assert row.updates == 8 and row.tokens == mine.tokens.sum()
        assert row.tokens_per_s == pytest.approx(mine.tokens.sum() / mine.seconds.sum())
        best = rates.set_index("product").gflops
        assert row.limit_share == pytest.approx(mine.flops.sum() / mine.seconds.sum() / 1e9 / best["square"])
        near = (mine.flops.sum() / (mine.beside * mine.seconds).sum()) / 1e9
        assert row.beside_share == pytest.approx(near) and row.beside_share >= row.limit_share  # no product was faster than the best
        assert row.limit_share * best["square"] == pytest.approx(row.shape_share * shape_rate(TINY, best))


def test_every_contender_makes_its_turns_in_a_process(quick_start):
    found, _ = entries(list(CONTENDERS), TINY)
    turns, sums, _ = race(found, steps=1)
    assert sums.model.tolist() == list(found) and (sums.updates == 4).all()
    assert np.isfinite(turns.loss).all() and (turns.seconds > 0).all()
    both = turns.set_index("model")
    assert both.tokens["ours"] == both.tokens["loop"] == both.tokens["original"]


@pytest.mark.parametrize(("kind", "said"), [
    (Lazy, "contender bad made 3 updates in 3 turns of two"),
    (Dying, "contender bad died after 1 turns with exit code -9; killed, most likely for memory"),
    (Failing, "contender bad failed after 0 turns: ZeroDivisionError: no such luck"),
])
def test_a_contender_that_cheats_dies_or_fails_is_named_and_no_process_stays(quick_start, kind, said):
    with pytest.raises(RuntimeError, match=said):
        race({"good": (Fake, TINY), "bad": (kind, TINY)}, steps=2)
    assert not [p for p in multiprocessing.active_children() if p.is_alive()]


def test_threads_cores_and_allocator_reach_the_child():
    racer = Racer("x", Environment, TINY, 1, "tuned", last_cores(1))
    try:
        racer.hear()
        assert racer.ask()["loss"] == 1 + 100 * 1 + 10 * len(ALLOCATORS["tuned"])
    finally:
        racer.close()
    assert len(ALLOCATORS["tuned"]) == 4 and not set(ALLOCATORS["tuned"]) & set(os.environ)


# what is made of it

def test_a_race_becomes_records_and_a_table():
    turns = pd.DataFrame([dict(model=m, turn=i, start=0.0, seconds=s, cpu_share=1.0, tokens=100, flops=1, loss=2.0)
                          for m, s in (("ours", 0.5), ("original", 2.0), ("trainer", 4.0)) for i in (1, 2)])
    rates = pd.DataFrame([dict(bf16=False, product="square", gflops=9.0, low=8.0)])
    sums = pd.DataFrame([dict(model=m, tokens_per_s=v, limit_share=v / 250, beside_share=v / 240,
                              shape_share=v / 200, peak_rss_mb=r, tokens=200, updates=3)
                         for m, v, r in (("ours", 200.0, 100), ("original", 50.0, 500), ("trainer", 25.0, 400))])
    where = setting_name(1, "default")
    records = pd.DataFrame([json.loads(Record(run="r", preset="p", scale="s", stage="bench", **r).model_dump_json())
                            for r in as_records(turns, sums, rates, "12x256", where)])
    table = ratio_table(records).loc[("12x256", where)]
    assert table.vs_original.to_dict() == dict(ours=4.0, original=1.0, trainer=0.5)
    assert table.vs_trainer.to_dict() == dict(ours=8.0, original=2.0, trainer=1.0)
    assert table.low.to_dict() == table.high.to_dict() == dict(ours=200.0, original=50.0, trainer=25.0)
    bars = bar_table(records, where).set_index(["size", "contender", "against"])
    verdict = bars.verdict["12x256"]
    assert (verdict["ours", "original"], verdict["ours", "memory"], verdict["ours", "limit"]) == ("met", "met", "met")
    assert bars.measured["12x256", "ours", "limit beside"] == pytest.approx(200 / 240)
    assert bars.measured["12x256", "ours", "memory"] == 0.25 and verdict["ours-bf16", "original"] == "not measurable here"
    assert len(bars) == sum(map(len, BARS.values())) and set(bar_table(records, "another").verdict) == {"not measurable here"}


def test_a_missing_library_is_left_out_with_its_reason(monkeypatch):
    monkeypatch.setattr("distilrepro.bench.find_spec", lambda name: None)
    found, left_out = entries(list(CONTENDERS), TINY)
    assert list(found) == ["ours", "loop", "original", "trainer"]
    assert set(left_out) == {"textbrewer", "torchdistill"} and "distilrepro[bench]" in left_out["textbrewer"]
