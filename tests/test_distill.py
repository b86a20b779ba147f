"The loop: killed anywhere it ends on the same bits; its schedule is the official one; its faults name their place."
import errno
import os
import shutil

import numpy as np
import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from distilrepro import distill, records
from distilrepro.checkpoints import Place, load_checkpoint, save_checkpoint
from distilrepro.config import Data, Loop, Loss, Mask, Teacher, UserError
from distilrepro.corpus import build_store, load_tokenizer
from distilrepro.distill import (
    Objective,
    adamw,
    distil_objective,
    evaluate_mlm,
    fit,
    lr_factor,
    masked_text,
    micro_batches,
    planned_updates,
)
from distilrepro.student import build_student, new_teacher

LOOP = Loop(epochs=2, max_updates=14, batch=4, accumulation=2, lr=3e-3, min_updates=1, log_every=3, eval_every=4, save_every=4, warmup=0.2)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A corpus as masked text, a teacher, and a little held-out text."
    data, tokenizer = Data(documents=70, heldout_tokens=300, max_len=48), load_tokenizer(Data())
    folder = tmp_path_factory.mktemp("stores")
    store = build_store(data, tokenizer, ["synthetic"], "train", folder / "train", 0)
    held = build_store(data, tokenizer, ["synthetic"], "validation", folder / "held", data.heldout_tokens)
    shape = Teacher(path="", layers=4, width=16, heads=2, ffn=24, max_pos=48, init_range=0.3)
    teacher = new_teacher(shape, len(tokenizer), tokenizer.pad_token_id, 0)
    return masked_text(store, tokenizer, Mask(), seed=3), teacher, masked_text(held, tokenizer, Mask(scope="example"), seed=0)


def pair(world):
    "A fresh student with its objective and held-out measurement."
    text, teacher, held = world
    student, _ = build_student(teacher)
    return student, distil_objective(student, teacher, text, Loss()), lambda: evaluate_mlm(student, teacher, held)


def test_no_epochs_train_nothing(world, tmp_path):
    student, objective, evaluate = pair(world)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    log = fit(student, objective, LOOP.model_copy(update=dict(epochs=0, min_updates=0)), tmp_path, evaluate)
    assert [(e["step"], e["split"]) for e in log] == [(0, "heldout")] and not student.training
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    with pytest.raises(UserError, match="only 0 optimizer updates"):
        fit(student, objective, LOOP.model_copy(update=dict(epochs=0)))


def timeless(log):
    "A log without speeds."
    return [{k: v for k, v in entry.items() if k != "tokens_per_s"} for entry in log]


@pytest.fixture(scope="module")
def unbroken(world):
    "Weights and log of a run that nothing disturbed."
    student, objective, evaluate = pair(world)
    return student, timeless(fit(student, objective, LOOP, evaluate=evaluate))


def same(student, other):
    return all(torch.equal(v, other.state_dict()[k]) for k, v in student.state_dict().items())


class Killed(Exception):
    "Stands for the end of the process."


def killer(at):
    "A progress reporter that ends the run after some update."
    def told(done, total):
        if done == at:
            raise Killed
    return told


@pytest.mark.parametrize("kills", [(1,), (3,), (4,), (5,), (9,), (13,), (14,), (5, 7, 12)], ids=str)
def test_a_run_killed_anywhere_ends_on_the_same_bits(world, unbroken, tmp_path, kills):
    for at in kills:
        student, objective, evaluate = pair(world)
        with pytest.raises(Killed):
            fit(student, objective, LOOP, tmp_path, evaluate, "key", killer(at))
    torch.manual_seed(len(kills))  # another process has another generator
    student, objective, evaluate = pair(world)
    done = []
    log = fit(student, objective, LOOP, tmp_path, evaluate, "key", lambda d, t: done.append(d))
    assert same(student, unbroken[0])
    assert timeless(log) == unbroken[1]
    assert done[0] == (kills[-1] - 1) // 4 * 4 + 1, "it went on from the newest checkpoint, not from the start"


def test_a_finished_run_is_not_trained_again(world, unbroken, tmp_path):
    student, objective, evaluate = pair(world)
    fit(student, objective, LOOP, tmp_path, evaluate, "key")
    assert len(list(tmp_path.glob("step-*"))) == 2 and not list(tmp_path.glob(".*"))
    again, objective, evaluate = pair(world)
    log = fit(again, objective, LOOP, tmp_path, evaluate, "key", killer(1))
    assert same(again, unbroken[0]) and timeless(log) == unbroken[1]


def test_a_checkpoint_of_another_key_is_not_continued(world, unbroken, tmp_path):
    student, objective, evaluate = pair(world)
    with pytest.raises(Killed):
        fit(student, objective, LOOP, tmp_path, evaluate, "old", killer(9))
    student, objective, evaluate = pair(world)
    done = []
    log = fit(student, objective, LOOP, tmp_path, evaluate, "new", lambda d, t: done.append(d))
    assert done[0] == 1 and same(student, unbroken[0]) and timeless(log) == unbroken[1]


def test_a_checkpoint_that_was_being_written_is_not_continued(world, tmp_path):
    student, objective, _ = pair(world)
    optimizer = adamw(student, LOOP)
    save_checkpoint(tmp_path, student, optimizer, "key", Place(4))
    shutil.copytree(tmp_path / "step-00000004", tmp_path / ".step-00000008.part")
    (tmp_path / ".step-00000008.part/optimizer.safetensors").unlink()
    assert load_checkpoint(tmp_path, student, optimizer, "key").update == 4


def test_optimizer_moments_return_bit_by_bit(world, tmp_path):
    student, objective, _ = pair(world)
    optimizer = adamw(student, LOOP)
    for p in student.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    save_checkpoint(tmp_path, student, optimizer, "key", place := Place(1, [{"step": 1}], {"loss": [2.5]}))
    other, _, _ = pair(world)
    fresh = adamw(other, LOOP)
    assert load_checkpoint(tmp_path, other, fresh, "key") == place
    want, got = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert want.keys() == got.keys()
    for i in want:
        assert all(torch.equal(torch.as_tensor(want[i][k]), torch.as_tensor(got[i][k])) for k in ("exp_avg", "exp_avg_sq", "step"))


@pytest.mark.parametrize(("total", "warmup"), [(1, 0.0), (1, 1.0), (7, 0.0), (20, 0.05), (30, 0.1), (33, 0.5), (9, 1.0)])
def test_schedule_is_that_of_transformers(total, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, -(-total * int(warmup * 100) // 100), total)
    for update in range(total):
        assert lr_factor(update, total, warmup) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(("epochs", "accumulation", "limit", "batches", "want"), [
    (3, 50, 0, 101, (3, 9)), (3, 50, 0, 100, (2, 6)), (1, 1, 0, 1, (1, 1)), (0.5, 10, 0, 35, (4, 2)), (0.1, 1, 0, 5, (5, 1)),
    (3, 50, 4, 101, (3, 4)), (3, 50, 400, 101, (3, 9)), (3, 256, 0, 2300, (9, 27)),
])
def test_planned_updates_by_hand(epochs, accumulation, limit, batches, want):
    loop = Loop(epochs=epochs, accumulation=accumulation, max_updates=limit, min_updates=0)
    assert planned_updates(loop, batches) == want


def test_each_example_is_seen_once_an_epoch(world):
    text = world[0]
    n = len(text.store)
    loop = LOOP.model_copy(update={"max_updates": 0})
    def plan(epoch): return distill.plan_epoch(text.store.lengths, loop.batch, loop.seed, epoch, True)
    per_epoch, total = planned_updates(loop, len(plan(0)))
    walk = list(micro_batches(plan, loop, per_epoch, 0, total))
    assert [u for u, _, _ in walk] == list(range(total))
    for epoch in (0, 1):
        seen = np.concatenate([ids for _, e, groups in walk if e == epoch for ids in groups])
        assert sorted(seen.tolist()) == list(range(n))
    for start in (1, per_epoch - 1, per_epoch, total - 1):
        rest = list(micro_batches(plan, loop, per_epoch, start, total))
        assert [[i.tolist() for i in g] for _, _, g in rest] == [[i.tolist() for i in g] for _, _, g in walk[start:]]


class Size:
    tokens = 1

    def __add__(self, other):
        return self


class Batch:
    def __init__(self, ids):
        self.ids, self.counts = ids.tolist(), Size()


def line(loss):
    "A model of one weight, and an objective over ten examples."
    model = torch.nn.Linear(1, 1)
    return model, Objective(np.full(10, 5), lambda ids, epoch, number: Batch(ids), lambda batch, counts: (loss(model, batch), {}))


def test_a_loss_that_is_not_finite_names_update_and_examples():
    def loss(model, batch): return model.weight.sum() * (float("nan") if 7 in batch.ids else 1.0)
    model, objective = line(loss)
    loop = Loop(epochs=1, batch=1, accumulation=1, min_updates=1)
    order = [i.item() for i in distill.plan_epoch(objective.lengths, 1, loop.seed, 0, True)]
    with pytest.raises(RuntimeError, match=rf"loss became nan at update {order.index(7)} on examples \[7\]; lower lr"):
        fit(model, objective, loop)


def test_a_gradient_that_is_not_finite_names_the_update_and_leaves_the_weights():
    def loss(model, batch): return (model.weight * 0).abs().sqrt().sum()  # finite value, slope 0/0
    model, objective = line(loss)
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="gradient became nan at update 0"):
        fit(model, objective, Loop(epochs=1, batch=5, accumulation=1, min_updates=1))
    assert torch.equal(model.weight.detach(), before)


@pytest.mark.parametrize("factor", [0.01, 0.5, 1.0, 1 + 1e-9, 1.5, 1e6])
def test_clipping_below_at_and_above_the_limit_is_that_of_torch(factor):
    torch.manual_seed(0)
    model, twin = torch.nn.Linear(7, 5), torch.nn.Linear(7, 5)
    twin.load_state_dict(model.state_dict())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    limit = factor * torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    norm = distill._step(model, torch.optim.SGD(model.parameters()), LOOP.model_copy(update=dict(clip=limit)), 1.0, [])
    assert norm == torch.nn.utils.clip_grad_norm_(twin.parameters(), limit).item()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q - q.grad) and p.grad is None


def test_no_space_is_a_failure_and_leaves_the_checkpoint_before(world, unbroken, tmp_path, monkeypatch):
    student, objective, evaluate = pair(world)
    sync, full = os.fsync, []
    def told(done, total): full.append(done) if done == 8 else None
    def fsync(fd):
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(fd)
    monkeypatch.setattr(records.os, "fsync", fsync)
    with pytest.raises(RuntimeError, match="step-00000008.*No space left.*run again"):
        fit(student, objective, LOOP, tmp_path, evaluate, "key", told)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]
    monkeypatch.setattr(records.os, "fsync", sync)
    student, objective, evaluate = pair(world)
    log = fit(student, objective, LOOP, tmp_path, evaluate, "key")
    assert same(student, unbroken[0]) and timeless(log) == unbroken[1]


def test_the_teacher_is_left_as_it_was(world):
    teacher = world[1].train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student, objective, _ = pair(world)
    fit(student, objective, LOOP.model_copy(update={"max_updates": 3}))
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not teacher.training and not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


def test_vectors_do_not_decay_and_every_parameter_is_in_one_group(world):
    student, _, _ = pair(world)
    optimizer = adamw(student, Loop(weight_decay=0.1))
    decaying, rest = optimizer.param_groups
    assert (decaying["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    names = {id(p): n for n, p in student.named_parameters()}
    assert all(names[id(p)].endswith("bias") or "norm" in names[id(p)].lower() for p in rest["params"])
    assert sorted(map(id, decaying["params"] + rest["params"])) == sorted(names)


def test_too_few_updates_are_refused_before_any_work(world, tmp_path):
    student, objective, evaluate = pair(world)
    with pytest.raises(UserError, match="14 optimizer updates.*min_updates=1000"):
        fit(student, objective, LOOP.model_copy(update={"min_updates": 1000}), tmp_path, evaluate)
    assert not list(tmp_path.iterdir())


def test_held_out_measurement_equals_official_outputs(world):
    _, teacher, text = world
    student, _ = build_student(teacher)
    got = evaluate_mlm(student, teacher, text, batch=4)
    nll = hits = kl = cosine = 0.0
    masked = tokens = 0
    by_length = np.argsort(text.store.lengths, kind="stable")
    with torch.no_grad():
        for at in range(0, len(by_length), 4):
            b = text(by_length[at : at + 4], 0, at)
            s, t = (m(b.ids_bl, b.attention_bl, output_hidden_states=True) for m in (student.eval(), teacher.eval()))
            for i, j in b.attention_bl.nonzero().tolist():
                q, p = s.logits[i, j].log_softmax(0), t.logits[i, j].log_softmax(0)
                kl += (p.exp() * (p - q)).sum().item()
                cosine += torch.cosine_similarity(s.hidden_states[-1][i, j], t.hidden_states[-1][i, j], dim=0).item()
                tokens += 1
                if (label := b.labels_bl[i, j].item()) >= 0:
                    nll, hits, masked = nll - q[label].item(), hits + (q.argmax().item() == label), masked + 1
    want = dict(mlm_loss=nll / masked, mlm_accuracy=hits / masked, kl=kl / tokens, cosine=cosine / tokens, n=masked)
    assert got == {k: pytest.approx(v, rel=1e-4) for k, v in want.items()}
