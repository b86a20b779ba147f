"""What a second run would do is what the workflow engine then does, and equal runs are told from unequal ones."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distilrepro.again import compare, due
from distilrepro.config import load_settings
from distilrepro.plan import jobs
from distilrepro.records import Run, create_run, read_records, write_atomic, write_records
from distilrepro.repair import mend
from distilrepro.workflow import prepare

ROOT = Path(__file__).parent.parent
SMALL = ("grid.tasks=[sst2, squad]", "grid.seeds=[1, 2]", "grid.task_seeds={}", "grid.jobs=1", "second.tasks=[squad]",
         "ablation.students={triple: {}}", "ablation.tasks=[sst2]", "zeroshot.targets=[sst2]")


def settings(*sets):
    return load_settings("sanh2019", "smoke", (*SMALL, *sets))


def pending(run):
    "Ask Snakemake what it would execute."
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(run.folder), "--cores", "1",
               "--config", f"root={ROOT}", "--rerun-triggers", "mtime", "--nolock", "--summary"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}).stdout
    rows = [line.split("\t") for line in said.splitlines()[1:]]
    return {Path(r[0]).stem for r in rows if r[-1] == "update pending"}


@pytest.fixture
def finished(tmp_path):
    "A run in which everything was executed, with shells for notebooks and one number a unit."
    run = prepare(settings(), tmp_path / "run")
    for n, job in enumerate(jobs(run.settings)):
        for unit in job.records:
            write_records(run, unit, [dict(model="student", metric="score", value=n / 7)], stage="finetune")
        write_atomic(run.folder / f"notebooks/{job.name}.ipynb", "{}")
    write_atomic(run.folder / "report.html", "")
    return run


@pytest.mark.parametrize("sets, gone", [
    ((), ()),
    (("loss.temperature=3",), ()),
    (("speed.repeats=7",), ("records/teacher.jsonl",)),
    ((), ("notebooks/t1_glue.ipynb", "report.html")),
    ((), ("records/finetune-student_d-squad-1.jsonl", "records/components.jsonl")),
    ((), ("records/finetune-triple-sst2-1.jsonl",)),
])
def test_what_is_due_is_what_the_engine_does(finished, sets, gone):
    for name in gone:
        (finished.folder / name).unlink()
    before = {p: p.stat().st_mtime_ns for p in finished.folder.rglob("*") if p.is_file()}
    said = set(due(settings(*sets), finished.folder, ROOT).notebook)
    assert {p: p.stat().st_mtime_ns for p in finished.folder.rglob("*") if p.is_file()} == before  # it only looks
    run = prepare(settings(*sets), finished.folder)
    mend(run)
    assert pending(run) == said | ({"report"} if said else set())


def test_every_file_of_records_has_a_writer():
    for folder in (ROOT / "results/quick", ROOT / "results/minilm-small"):
        written = {unit for job in jobs(Run(folder).settings) for unit in job.records} | {"cost"}
        assert {p.stem for p in folder.glob("records/*.jsonl")} <= written


@pytest.mark.parametrize("value", [0.0, 1e-16, 3e-16, -0.5])
def test_one_changed_bit_is_seen(finished, value, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "copy")
    assert set(compare(finished.folder, tmp_path / "copy").state) == {"same"}
    copy = create_run(tmp_path / "copy", settings(), ROOT)
    old = float(read_records(copy, "distil").value.iloc[0])
    write_records(copy, "distil", [dict(model="student", metric="score", value=old + value)], stage="finetune")
    found = compare(finished.folder, tmp_path / "copy").set_index("records").state
    assert found["distil"] == ("differs" if old + value != old else "same") and (found.drop("distil") == "same").all()
