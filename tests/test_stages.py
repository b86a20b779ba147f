"A teacher with text of its own, and a student that is only cut from it, through the stages."
import math
from collections import Counter

import pandas as pd
import pytest
import torch
from transformers import DistilBertForMaskedLM

from distilrepro.config import Data, load_settings
from distilrepro.corpus import load_tokenizer
from distilrepro.records import create_run, read_records
from distilrepro.stages import corpora, distil_stage, teacher_stage, teacher_text
from distilrepro.student import load_teacher, student_from

SETS = (
    "data.source=local", "data.corpus=[few]", "data.heldout=few", "data.tokenizer=", "data.min_len_exclusive=2",
    "teacher.corpus=[cats, dogs]", "teacher.max_tokens=60", "teacher.train=true", "teacher.path=", "teacher.layers=2", "teacher.width=16",
    "teacher.heads=2", "teacher.ffn=24", "teacher.max_pos=64", "teacher.loop.min_updates=1", "teacher.loop.batch=4",
    "teacher.loop.epochs=1", "student.layers=1", "ablation={students: {copied: {distil: {epochs: 0, min_updates: 0}}}}",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    for name, lines in dict(few=["the doctor reads"] * 8, cats=["the cat sleeps"] * 40, dogs=["the dog runs"] * 40).items():
        (folder / name).mkdir()
        for split in ("train", "validation"):
            pd.DataFrame(dict(text=lines)).to_parquet(folder / name / f"{split}.parquet")
    load_tokenizer(Data()).save_pretrained(folder / "tokenizer")
    return create_run(folder / "run", load_settings("sanh2019", "smoke", (f"data.dir={folder}", *SETS)), folder)


def test_a_teacher_with_sets_of_its_own_is_trained_on_parts_of_all(run):
    text = corpora(run)
    own = teacher_text(run, text)
    lines = Counter(text.tokenizer.decode(own[i], skip_special_tokens=True) for i in range(len(own)))
    assert set(lines) == {"the cat sleeps", "the dog runs"} and max(lines.values()) - min(lines.values()) <= 1
    assert int(own.lengths.sum()) <= 60 < own.lengths.sum() + own.lengths.max(), "cut at the budget"
    assert len(text.train) == 8, "the student's text is another"
    teacher_stage(run)
    assert read_records(run, "teacher").step.max() == math.ceil(len(own) / 4), "one pass over its own sets"


def test_a_control_is_cut_and_not_trained(run):
    teacher_stage(run)
    records = distil_stage(run, "copied")
    assert set(records.step) == {0} and set(records.split) == {"heldout"}
    stored = DistilBertForMaskedLM.from_pretrained(run.folder / "checkpoints/copied").state_dict()
    cut, _ = student_from(load_teacher(str(run.folder / "checkpoints/teacher")), run.settings.student)
    assert all(torch.equal(v, stored[k]) for k, v in cut.state_dict().items())
