"""A disk that is full, forbids writing or loses bits: said by name, never silently wrong, never half a file left."""
import os
import random
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import killing
import numpy as np
import pandas as pd
import pytest
import torch
from test_faults_kill import outcome, start, unbroken  # noqa: F401  a fixture

from distilrepro.checkpoints import Place, load_checkpoint, save_checkpoint
from distilrepro.config import Data
from distilrepro.corpus import build_store, load_tokenizer
from distilrepro.records import Record, Run, read_predictions, read_records, read_unit, write_predictions, write_records
from distilrepro.repair import mend
from distilrepro.stages import model_hash, save_model


def flip(path: Path, rng: random.Random) -> None:
    "Flip one random bit of a file."
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    "Cut a file somewhere before its end."
    os.truncate(path, rng.randrange(path.stat().st_size))


def damages(fault, path: Path, n: int):
    "Damage a file n times, in two ways; it is whole again afterwards."
    whole, rng = path.read_bytes(), random.Random(path.name)
    for name, harm in (("a bit flips", flip), ("it is cut short", cut)):
        for _ in range(n):
            harm(path, rng)
            yield name
            path.write_bytes(whole)


@pytest.fixture
def run(tmp_path):
    return killing.make(tmp_path / "run")


def test_records(run, fault):
    rows = [dict(model="student", task="cola", metric=f"m{i}", value=i / 7, seed=i) for i in range(20)]
    want = write_records(run, "unit", rows, stage="finetune", config_hash="abc")
    path = run.folder / "records/unit.jsonl"
    for name in damages(fault, path, fault.size(200, 5000)):
        with fault("disk", f"a file of records: {name}"):
            try:
                assert read_unit(path) == want and all(isinstance(r, Record) for r in want)  # only white space differed
            except RuntimeError as e:
                assert f"{path} is damaged" in str(e) and "delete it and run again" in str(e)
    assert read_unit(path) == want


def test_predictions(run, fault):
    rng = np.random.default_rng(0)
    numbers = dict(id=np.arange(30), label=rng.integers(0, 2, 30), prediction=rng.integers(0, 2, 30), logit_0=rng.normal(size=30))
    table = pd.DataFrame(numbers | dict(said=[f"answer {i}" for i in range(30)]))
    path = write_predictions(run, "unit", table)
    for name in damages(fault, path, fault.size(200, 5000)):
        with fault("disk", f"a file of predictions: {name}"):
            try:
                pd.testing.assert_frame_equal(read_predictions(run, "unit"), table)  # a byte that nobody reads
            except RuntimeError as e:
                assert f"{path} is damaged" in str(e) and "run again" in str(e)
    pd.testing.assert_frame_equal(read_predictions(run, "unit"), table)


def test_token_store(tmp_path, fault):
    data = Data(documents=40, max_len=32)
    def store(): return build_store(data, load_tokenizer(data), ["synthetic"], "train", tmp_path / "store", 0)
    first, want = store(), (store()).content_hash
    tokens = np.array(first.tokens)
    for file in ("tokens.bin", "offsets.npy", "manifest.json", "SHA256SUMS"):
        for name in damages(fault, tmp_path / "store" / file, fault.size(3, 60)):
            with fault("disk", f"a token store: {name}"):
                with pytest.warns(UserWarning, match="store is damaged"):
                    again = store()
                assert again.content_hash == want and np.array_equal(again.tokens, tokens)


def test_checkpoints(tmp_path, fault):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    optimizer, weights = torch.optim.AdamW(model.parameters()), {}
    for update in (1, 2):
        model(torch.ones(5)).sum().backward()
        optimizer.step()
        weights[update] = model.weight.detach().clone()
        save_checkpoint(tmp_path / "steps", model, optimizer, "key", Place(update))
    shutil.copytree(tmp_path / "steps", tmp_path / "whole")
    for file in ("model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"):
        for name in damages(fault, tmp_path / "whole/step-00000002" / file, fault.size(3, 100)):
            shutil.rmtree(tmp_path / "steps")
            shutil.copytree(tmp_path / "whole", tmp_path / "steps")
            fresh = torch.nn.Linear(5, 3)
            with fault("disk", f"the newest checkpoint: {name}"), pytest.warns(UserWarning, match="step-00000002 is damaged"):
                place = load_checkpoint(tmp_path / "steps", fresh, torch.optim.AdamW(fresh.parameters()), "key")
                assert place.update == 1 and torch.equal(fresh.weight, weights[1])


def test_models(tmp_path, fault):
    from transformers import BertConfig, BertForMaskedLM

    tokenizer = load_tokenizer(Data())
    shape = BertConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    save_model(BertForMaskedLM(shape), tokenizer, tmp_path / "teacher")
    want = model_hash(tmp_path / "teacher")
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        for name in damages(fault, tmp_path / "teacher" / file, fault.size(3, 100)):
            with fault("disk", f"a saved model: {name}"), pytest.raises(RuntimeError, match=f"teacher is damaged: {file}"):
                model_hash(tmp_path / "teacher")
    assert model_hash(tmp_path / "teacher") == want


def test_what_is_damaged_is_made_anew(unbroken, tmp_path, fault):  # noqa: F811
    rng, folder = random.Random(3), tmp_path / "run"
    killing.make(folder)
    start(killing.all_stages, str(folder)).join()
    paths = sorted([*folder.glob("records/*"), *folder.glob("predictions/*"), *folder.glob("checkpoints/*[!s]/model.safetensors")])
    for path in rng.sample(paths, fault.size(1, len(paths))):
        cut(path, rng)
        with fault("disk", "a file of a finished run is cut short, the run goes on"):
            assert mend(Run(folder))
            process = start(killing.all_stages, str(folder))
            process.join()
            assert process.exitcode == 0 and outcome(folder) == unbroken[0]


def starve(folder: Path, **limits) -> str:
    "Do the stages under a limit; returns what they said."
    process = start(killing.all_stages, str(folder), -1, *limits.values())
    process.join()
    assert process.exitcode in (0, 3)
    return folder.with_suffix(".said").read_text()


def whole_files(folder: Path) -> bool:
    "Is everything in a run folder that is not hidden still whole?"
    read_records(Run(folder))
    return not mend(Run(folder))


def test_files_that_may_not_grow(unbroken, tmp_path, fault):  # noqa: F811
    for limit in (60_000, 500, 300, 5_000, 20_000, 150_000, 1_000_000)[: fault.size(1, 7)]:
        folder = tmp_path / f"run{limit}"
        killing.make(folder)
        with fault("disk", "no file may grow beyond a limit (ulimit -f)"):
            said = starve(folder, file_limit=limit)
            assert said.startswith("done") or f"RuntimeError: could not write {folder}" in said and "run again" in said, said
            assert not said.startswith("done") or limit > 100_000
            assert whole_files(folder)
            assert starve(folder).startswith("done") and outcome(folder) == unbroken[0]


@contextmanager
def small_disk(folder: Path, size: str):
    "A disk of a given size in memory, where this process may mount one."
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(unbroken, tmp_path, fault):  # noqa: F811
    for kib in (300, 900, 100, 200, 500, 700)[: fault.size(1, 6)]:
        with small_disk(tmp_path / f"disk{kib}", f"{kib}k"):
            folder = tmp_path / f"disk{kib}/run"
            killing.make(folder)
            with fault("disk", "no space left on the device, then there is"):
                said = starve(folder)
                assert "RuntimeError: could not write" in said and "free space" in said and str(folder) in said, said
                assert whole_files(folder)
                subprocess.run(["mount", "-o", "remount,size=64m", str(folder.parent)], check=True)
                assert starve(folder).startswith("done") and outcome(folder) == unbroken[0]


def test_a_folder_that_may_not_be_written(tmp_path, fault, command, monkeypatch):
    from distilrepro import records

    def refuse(*_, **__): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(records, "open", refuse, raising=False)
    with fault("disk", "a run folder that is read-only"):
        code, _, said = command("reproduce", "--scale", "smoke", "--run", tmp_path / "run")
        assert code == 1 and f"could not write {tmp_path / 'run'}" in said
        assert "Permission denied" in said and "choose another run folder" in said
    assert not list((tmp_path / "run").rglob("*.*"))
