"Every mistake ends with one sentence and exit code 2, every failure with 1, through the very `main` of the command."
import re
import subprocess
import sys

import pandas as pd
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from distilrepro import cli
from distilrepro.config import Data
from distilrepro.corpus import load_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A BERT with tokenizer, and sets in the local layout: one good, some broken."
    folder, tokenizer = tmp_path_factory.mktemp("cli"), load_tokenizer(Data())
    torch.manual_seed(0)
    shape = BertConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
                       max_position_embeddings=64)
    BertForMaskedLM(shape).save_pretrained(folder / "bert")
    shape.num_labels = 3
    BertForSequenceClassification(shape).save_pretrained(folder / "mnli-model")
    for name in ("bert", "mnli-model"):
        tokenizer.save_pretrained(folder / name)
    rows = pd.DataFrame(dict(sentence=["the dog sleeps", "no cat runs"] * 8, label=[1, 0] * 8, idx=range(16)))
    sets = {"good": rows, "no-column": rows.drop(columns="sentence"), "bad-label": rows.assign(label=[1, 7] * 8)}
    for name, table in sets.items():
        (folder / name / "cola").mkdir(parents=True)
        table.to_parquet(folder / name / "cola/train.parquet")
        table.to_parquet(folder / name / "cola/validation.parquet")
    (folder / "no-split/cola").mkdir(parents=True)
    rows.to_parquet(folder / "no-split/cola/train.parquet")
    (folder / "a.txt").write_text("the dog sleeps\n" * 4)
    (folder / "empty.txt").write_text("\n \n")
    return folder


MISTAKES = {
    "preset": (["reproduce", "--preset", "quik"], ["unknown preset 'quik'", "did you mean 'quick'"]),
    "key": (["reproduce", "--set", "loss.temprature=4"], ["did you mean 'loss.temperature'"]),
    "scale": (["doctor", "--scale", "tiny"], ["unknown scale 'tiny'", "smoke"]),
    "data folder": (["reproduce", "--data", "@/none"], ["none does not exist", "distilrepro fetch"]),
    "run folder": (["report", "--run", "@/none"], ["not a run folder", "distilrepro reproduce"]),
    "task": (["finetune", "--model", "@/bert", "--task", "colla", "--out", "@/out", "--data", "@/good", "--set", "data.tokenizer="],
             ["'colla'", "did you mean 'cola'"]),
    "split": (["finetune", "--model", "@/bert", "--task", "cola", "--out", "@/out", "--data", "@/no-split", "--set", "data.tokenizer="],
              ["no split 'validation' of cola", "there is: train"]),
    "column": (["finetune", "--model", "@/bert", "--task", "cola", "--out", "@/out", "--data", "@/no-column", "--set", "data.tokenizer="],
               ["cola: no sentence"]),
    "label": (["finetune", "--model", "@/bert", "--task", "cola", "--out", "@/out", "--data", "@/bad-label", "--set", "data.tokenizer="],
              ["cola: row 1 has label 7", "0..1"]),
    "wrong task": (["evaluate", "cola", "--model", "@/mnli-model", "--data", "@/good", "--set", "data.tokenizer="],
                   ["has 3 outputs, cola needs 2", "another task"]),
    "no text": (["distil", "--teacher", "@/bert", "--text", "@/nothing*.txt", "--out", "@/out"], ["no file matches"]),
    "empty text": (["distil", "--teacher", "@/bert", "--text", "@/empty.txt", "--out", "@/out"], ["hold no text"]),
    "no teacher": (["distil", "--teacher", "@/none/teacher", "--text", "@/a.txt", "--out", "@/out"], ["does not exist", "save_pretrained"]),
    "no network": (["distil", "--teacher", "nobody/no-such-bert", "--text", "@/a.txt", "--out", "@/out"], ["nobody/no-such-bert"]),
    "layer map": (["distil", "--teacher", "@/bert", "--text", "@/a.txt", "--out", "@/out", "--set", "student.layer_map=[0,5]",
                   "--set", "data.min_len_exclusive=1", "--set", "student.layers=2"], ["layer_map [0, 5] does not fit", "layers 0 to 1"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_code_two(command, place, name):
    words, said = MISTAKES[name]
    code, _, err = command(*(w.replace("@", str(place)) for w in words))
    assert code == 2 and [s for s in said if s not in err] == []
    assert err.splitlines()[-1].startswith("error: ") or "error: " in err
    assert "Traceback" not in err and not (place / "out").exists()


def test_a_failure_is_one_sentence_and_code_one(command, monkeypatch):
    def fail(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr(cli, "preset_names", fail)
    code, _, err = command("presets")
    assert code == 1 and err.strip() == "failed: [Errno 28] No space left on device"


def test_words_that_are_no_options_end_with_code_two(command):
    assert command("reproduce", "--prest", "quick")[0] == 2
    assert command("reprodce")[0] == 2


def scores(printed):
    "Metric -> value of a printed table."
    return dict(re.findall(r"(\w+)\s+│\s+(-?[\d.]+)", printed))


def test_fine_tuning_and_evaluating_agree(command, place, tmp_path):
    changes = ("data.tokenizer=", "finetune.loop.epochs=1", "finetune.loop.batch=8", "finetune.max_len=16")
    common = ["--data", place / "good", *(word for c in changes for word in ("--set", c))]
    code, tuned, err = command("finetune", "--task", "cola", "--model", place / "bert", "--out", tmp_path / "cola", *common)
    assert code == 0, err
    assert len(pd.read_parquet(tmp_path / "cola/predictions.parquet")) == 16
    code, measured, err = command("evaluate", "cola", "--model", tmp_path / "cola", *common)
    assert code == 0 and scores(measured).items() <= scores(tuned).items() and "score" in scores(measured), err
    assert "best_step" not in scores(tuned), "a number of updates is no score"
    code, marked, err = command("evaluate", "cola", "--predictions", tmp_path / "cola/predictions.parquet", "--data", place / "good")
    assert code == 0 and marked == measured, err


def test_a_fine_tuned_teacher_changes_what_is_learnt(command, place, tmp_path):
    def tune(out, *words, lr):
        changes = ("data.tokenizer=", "finetune.loop.epochs=9", "finetune.loop.batch=8", "finetune.max_len=16", f"finetune.loop.lr={lr}")
        code, _, err = command("finetune", "--task", "cola", "--model", place / "bert", "--out", tmp_path / out,
                               "--data", place / "good", *words,
                               *(word for c in changes for word in ("--set", c)))
        return pd.read_parquet(tmp_path / out / "predictions.parquet") if code == 0 else err
    assert len(tune("teacher", lr=0.03)) == len(tune("alone", lr=0.001)) == 16
    taught = tune("taught", "--teacher", tmp_path / "teacher", lr=0.001)
    assert len(taught) == 16 and not taught.equals(pd.read_parquet(tmp_path / "alone/predictions.parquet"))
    assert "the teacher scores 0.0 on CoLA" in tune("worse", "--teacher", tmp_path / "alone", lr=0.001), "at the floor: refused"


def test_presets_are_listed(command):
    code, out, _ = command("presets")
    assert code == 0 and all(name in out for name in ("quick", "sanh2019", "cornell", "minilm"))


@pytest.mark.parametrize(("words", "code"), [(["doctor", "--preset", "quik"], 2), (["presets"], 0)])
def test_another_process_ends_with_the_same_codes(words, code):
    program = [sys.executable, "-c", "from distilrepro.cli import main; main()"]
    done = subprocess.run([*program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr


def test_the_doctor_says_what_is_here_and_what_it_takes(command):
    code, out, err = command("doctor", "--preset", "sanh2019", "--scale", "smoke")
    assert code == 0, err
    for words in ("torch", "generated", "minutes", "distil", "GFLOP/s"):
        assert words in out, words
