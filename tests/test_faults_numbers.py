"""Numbers that are not finite, bfloat16, and determinism: stopped with names, or left out and counted; the same bits each time."""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_distill import LOOP, Killed, killer, pair, same, timeless, world  # noqa: F401  a fixture

from distilrepro.checkpoints import load_checkpoint
from distilrepro.config import Loop
from distilrepro.corpus import plan_epoch
from distilrepro.distill import Objective, adamw, fit


def poisoned(objective: Objective, examples: set[int], value: float, what: str) -> Objective:
    "An objective whose loss, or gradient, is not finite on batches with some examples."
    def make(ids, epoch, number):
        batch = objective.make(ids, epoch, number)
        object.__setattr__(batch, "bad", bool(examples & set(ids.tolist())))
        return batch
    def loss(batch, counts):
        total, parts = objective.loss(batch, counts)
        if batch.bad:
            spoilt = total * value if what == "loss" else total + (0 * total).abs().sqrt() * (1 if np.isnan(value) else value)
            return spoilt, parts
        return total, parts
    return Objective(objective.lengths, make, loss)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_it_stops_and_names_examples_and_the_last_good_checkpoint(world, tmp_path, fault, what, value):  # noqa: F811
    student, objective, _ = pair(world)
    plan = plan_epoch(objective.lengths, LOOP.batch, LOOP.seed, 0, LOOP.length_groups)
    update = 6
    bad = int(plan[update * LOOP.accumulation][0])
    with fault("numbers", f"a {what} of {value}"):
        with pytest.raises(RuntimeError) as e:
            fit(student, poisoned(objective, {bad}, value, what), LOOP, tmp_path, key="key")
        said = str(e.value)
        assert f"at update {update} on examples [" in said and str(bad) in said and "skip_nonfinite" in said
        assert said.endswith(f"the last good checkpoint is {tmp_path / 'step-00000004'}")
        assert all(p.isfinite().all() for p in student.parameters())
        place = load_checkpoint(tmp_path, student, adamw(student, LOOP), "key")
        assert place.update == 4 and all(p.isfinite().all() for p in student.parameters())


def test_some_may_be_left_out_and_are_counted(world, tmp_path, fault):  # noqa: F811
    plan = plan_epoch(world[0].store.lengths, LOOP.batch, LOOP.seed, 0, LOOP.length_groups)
    bad, seen = {int(plan[u * LOOP.accumulation + 1][0]) for u in (2, 6)}, {}
    loop = LOOP.model_copy(update={"skip_nonfinite": 2, "max_updates": 7})
    with fault("numbers", "two updates whose loss is not finite are left out"):
        student, objective, _ = pair(world)
        log = fit(student, poisoned(objective, bad, float("nan"), "loss"), loop, tmp_path / "a", key="key")
        assert [e.get("skipped", 0) for e in log if e["split"] == "train"] == [1, 1, 2]
        assert all(p.isfinite().all() for p in student.parameters())
        seen["whole"] = student, timeless(log)
    with fault("numbers", "left out, broken off, gone on: the same count and the same bits"):
        student, objective, _ = pair(world)
        with pytest.raises(Killed):
            fit(student, poisoned(objective, bad, float("nan"), "loss"), loop, tmp_path / "b", key="key", on_step=killer(5))
        student, objective, _ = pair(world)
        log = fit(student, poisoned(objective, bad, float("nan"), "loss"), loop, tmp_path / "b", key="key")
        assert same(student, seen["whole"][0]) and timeless(log) == seen["whole"][1]
    with fault("numbers", "a third one stops the run"), pytest.raises(RuntimeError, match="the loss became nan"):
        student, objective, _ = pair(world)
        fit(student, poisoned(objective, bad, float("nan"), "loss"), loop.model_copy(update={"skip_nonfinite": 1}))


def test_leaving_out_is_skipping_the_step(fault):
    "By hand: the updates that remain are those of AdamW on their own, at their own learning rates."
    def loss_of(model, x): return ((model.weight * x).sum() - 1) ** 2
    class Size:
        tokens = 1
        def __add__(self, other): return self
    class Batch:
        def __init__(self, ids): self.x, self.counts = float(ids[0]), Size()
    loop = Loop(epochs=1, batch=1, accumulation=1, min_updates=1, skip_nonfinite=10, lr=0.1, warmup=0.0)
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    twin = torch.nn.Linear(1, 1)
    twin.load_state_dict(model.state_dict())
    order = [int(i[0]) for i in plan_epoch(np.full(10, 5), 1, loop.seed, 0, True)]
    def loss(batch, counts): return loss_of(model, batch.x) * (float("nan") if batch.x == 4 else 1.0), {}
    with fault("numbers", "an update left out changes nothing but itself"):
        fit(model, Objective(np.full(10, 5), lambda ids, epoch, number: Batch(ids), loss), loop)
        optimizer = torch.optim.AdamW(twin.parameters(), lr=0.1, betas=loop.betas, eps=loop.eps, weight_decay=0.0)
        for update, x in enumerate(order):
            if x != 4:
                optimizer.param_groups[0]["lr"] = 0.1 * (10 - update) / 10
                optimizer.zero_grad()
                loss_of(twin, x).backward()
                torch.nn.utils.clip_grad_norm_(twin.parameters(), loop.clip)
                optimizer.step()
        torch.testing.assert_close(model.weight, twin.weight, rtol=1e-5, atol=1e-6)


def test_bfloat16_stays_near_float32(world, fault):  # noqa: F811
    losses = {}
    for bf16 in (False, True):
        student, objective, _ = pair(world)
        log = fit(student, objective, LOOP.model_copy(update={"bf16": bf16, "log_every": 1}))
        losses[bf16] = np.array([e["loss"] for e in log])
    worst = float(np.abs(losses[True] / losses[False] - 1).max())
    with fault("numbers", "bfloat16 in place of float32: the loss of each update within 2 %"):
        assert 0 < worst < 0.02
    fault.measured("numbers", "largest difference of the loss in bfloat16", 100 * worst, "%")


TOKENISE = """
import sys, tempfile
from distilrepro.config import Data
from distilrepro.corpus import build_store, load_tokenizer
data = Data(documents=300, max_len=48)
print(build_store(data, load_tokenizer(data), ["synthetic"], "train", tempfile.mkdtemp() + "/store", 0).content_hash)
"""


def test_two_runs_are_equal_with_one_worker_and_with_two(world, fault):  # noqa: F811
    students = []
    for _ in range(2):
        student, objective, evaluate = pair(world)
        students.append((student, timeless(fit(student, objective, LOOP, evaluate=evaluate))))
    with fault("numbers", "two runs in one process: the same bits"):
        assert same(students[0][0], students[1][0]) and students[0][1] == students[1][1]
    hashes = [subprocess.run([sys.executable, "-c", TOKENISE], capture_output=True, text=True, check=True,
                             env=os.environ | {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(n)}).stdout for n in (1, 2)]
    with fault("numbers", "tokenised by one worker and by two: the same store"):
        assert hashes[0] == hashes[1] and len(hashes[0].strip()) == 64
