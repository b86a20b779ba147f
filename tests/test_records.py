"Writing under faults, hashes of code, parameters of notebooks, locks, and what provenance leaves out."
import errno
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pandas as pd
import pytest

from distilrepro import records
from distilrepro.config import UserError, load_settings
from distilrepro.records import (
    atomic_folder,
    code_hash,
    create_run,
    imported_rooms,
    is_done,
    locked,
    read_predictions,
    read_records,
    start,
    write_atomic,
    write_predictions,
    write_records,
)


def child(code, *arguments):
    "Start a process that prints `ready` at the place where it is to be killed."
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def kill_when_ready(process):
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()


@pytest.fixture
def run(tmp_path):
    return create_run(tmp_path / "run", load_settings("quick"), tmp_path)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, step):
    path = write_atomic(tmp_path / "a.json", "old")
    def refuse(*_): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(records.os, step, refuse)
    with pytest.raises(RuntimeError, match="a.json: No space left.*run again"):
        write_atomic(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), UserError("wrong"), RuntimeError("broken")])
def test_a_folder_that_is_not_finished_leaves_the_old_one(tmp_path, error):
    with atomic_folder(tmp_path / "model") as new:
        (new / "weights").write_text("old")
    with pytest.raises(type(error)):
        with atomic_folder(tmp_path / "model") as new:
            (new / "weights").write_text("half")
            raise error
    assert (tmp_path / "model/weights").read_text() == "old" and os.listdir(tmp_path) == ["model"]


def test_a_folder_without_space_is_a_failure_that_names_it(tmp_path):
    with pytest.raises(RuntimeError, match="model: No space left"):
        with atomic_folder(tmp_path / "model"):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == []


KILLED_FILE = """
import os, sys, time
from distilrepro import records
def wait(*_): print("ready", flush=True); time.sleep(60)
setattr(records.os, sys.argv[2], wait)
records.write_atomic(sys.argv[1], "new" * 100000)
"""


def test_kill_9_in_the_middle_of_writing_leaves_the_old_file(tmp_path):
    for step in ("fsync", "replace"):
        path = write_atomic(tmp_path / "a.jsonl", "old")
        kill_when_ready(child(KILLED_FILE, path, step))
        assert path.read_text() == "old"
    assert [p.name for p in tmp_path.glob("*")] == ["a.jsonl"] or all(p.name.startswith(".") for p in tmp_path.iterdir() if p != path)


HOLDER = """
import sys, time
from distilrepro.records import locked
with locked(sys.argv[1]):
    print("ready", flush=True); time.sleep(60)
"""


def test_a_lock_is_held_by_one_live_process_and_ends_with_it(tmp_path):
    process = child(HOLDER, tmp_path)
    assert process.stdout.readline() == "ready\n"
    with pytest.raises(UserError, match="another process is working on"):
        with locked(tmp_path):
            pass
    process.kill()
    process.wait()
    process.stdout.close()
    with locked(tmp_path), pytest.raises(UserError):
        with locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


@pytest.fixture
def package(tmp_path, monkeypatch):
    "A copy of the package's modules that may be changed."
    shutil.copytree(records.PACKAGE, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(records, "PACKAGE", tmp_path / "package")
    return tmp_path / "package"


@pytest.mark.parametrize(("room", "changes"), [
    ("finetune", True), ("tasks", True), ("config", True), ("lookalikes", True), ("figures", False), ("cli", False), ("stages", False),
])
def test_hash_of_code_follows_what_it_reaches_and_nothing_else(package, room, changes):
    source = "from distilrepro.finetune import finetune\n"
    before = code_hash(source)
    assert before == code_hash(source) != code_hash(source + "x = 1\n")
    (package / f"{room}.py").write_text((package / f"{room}.py").read_text() + "\nANOTHER = 1\n")
    assert (code_hash(source) != before) == changes


def test_imports_are_found_in_every_form():
    source = "from distilrepro.tasks import x\nfrom .stats import y\nimport os\nfrom torch import nn\ndef f():\n    from .speed import z\n"
    assert imported_rooms(source) == {"tasks", "stats", "speed"}


@pytest.mark.parametrize(("names", "types", "words"), [
    (dict(rnu="x", run="y"), {}, "unknown parameter 'rnu'; did you mean 'run'"),
    (dict(task="cola"), dict(task=str), "'run' is missing; it must be a str"),
    (dict(run=3), {}, "'run' must be a str, got 3"),
    (dict(run="x", tasks="cola"), dict(tasks=list), "'tasks' must be a list, got 'cola'"),
    (dict(run="x", n=True), dict(n=int), "'n' must be a int, got True"),
    (dict(run="no/such/run"), {}, "not a run folder.*distilrepro reproduce"),
])
def test_parameters_of_a_notebook_are_checked_by_name_and_type(names, types, words):
    with pytest.raises(UserError, match=words):
        start(names, **types)


def test_a_notebook_finds_its_run(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for folder in ("run", str(run.folder)):
        assert start(dict(run=folder, task="cola", _=1), task=str).folder == run.folder


def test_a_run_of_another_version_is_refused(run):
    config = run.folder / "config.yaml"
    config.write_text(config.read_text() + "\nnew_section: {a: 1}\n")
    with pytest.raises(UserError, match="(?s)config.yaml does not hold the settings of this version.*start a new run folder"):
        records.Run(run.folder)


def test_records_return_as_written_and_carry_their_origin(run):
    write_records(run, "a", [dict(model="student", metric="score", value=0.5, seed=1)], stage="finetune", config_hash="h")
    write_records(run, "b", [dict(model="teacher", metric="score", value=0.1, step=3)], stage="finetune", config_hash="h")
    table = read_records(run)
    assert list(table.value) == [0.5, 0.1] and set(table.preset) == {"quick"} and set(table.run) == {"run"}
    assert set(table.hardware) == {run.provenance["hardware"]["name"]} and not table.created.eq("").any()
    assert is_done(run, "a", "h") and not is_done(run, "a", "other") and not is_done(run, "c", "h")
    assert read_records(run, "none").empty and list(read_records(run, "none").columns) == list(table.columns)


def test_a_unit_is_replaced_whole(run):
    row = dict(model="student", metric="score", value=0.5, stage="s")
    write_records(run, "a", [row, row])
    write_records(run, "a", [row | dict(value=0.7)])
    assert list(read_records(run).value) == [0.7]


def test_a_damaged_file_is_named(run):
    write_records(run, "a", [dict(model="student", metric="score", value=0.5, stage="s")])
    path = run.folder / "records/a.jsonl"
    path.write_text(path.read_text()[:40])
    with pytest.raises(RuntimeError, match="a.jsonl is damaged.*delete it and run again"):
        read_records(run)


def test_an_unknown_field_is_no_record(run):
    with pytest.raises(ValueError, match="valu"):
        write_records(run, "a", [dict(model="student", metric="score", valu=0.5, value=1, stage="s")])
    assert not (run.folder / "records/a.jsonl").exists()


def test_predictions_return_as_written_and_missing_ones_are_named(run):
    with pytest.raises(UserError, match="holds no predictions"):
        read_predictions(run, "a")
    table = pd.DataFrame(dict(id=[0, 1], label=[1, 0], prediction=[1, 1], logit_0=[0.25, 0.5]))
    write_predictions(run, "finetune-student-cola-1", table)
    pd.testing.assert_frame_equal(read_predictions(run, "finetune-student-cola-1"), table)
    with pytest.raises(UserError, match="did you mean 'finetune-student-cola-1'"):
        read_predictions(run, "finetune-student-cola-2")


def test_a_run_brought_up_to_date_keeps_what_it_holds(run, tmp_path):
    write_records(run, "a", [dict(model="student", metric="score", value=0.5, stage="s")])
    config = (run.folder / "config.yaml").stat().st_mtime_ns
    again = create_run(run.folder, load_settings("quick"), tmp_path)
    assert len(read_records(again)) == 1 and (run.folder / "config.yaml").stat().st_mtime_ns == config
    assert again.settings == run.settings


def test_provenance_names_no_person_no_host_and_no_secret(tmp_path, monkeypatch):
    secrets = {"HF_TOKEN": "hf_51f0c1a7e", "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI", "USER": "jane-q-doe", "HOSTNAME": "the-host-of-jane"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    run = create_run(tmp_path / "run", load_settings("quick"), tmp_path)
    card = run.provenance
    assert set(card) == {"created", "distilrepro", "git", "python", "packages", "hardware"}
    text = json.dumps(card)
    forbidden = [*secrets.values(), str(tmp_path), os.path.expanduser("~"), *(n for n in (socket.gethostname(),) if len(n) > 4)]
    monkeypatch.undo()
    user = getpass.getuser()
    forbidden += [user] if len(user) > 4 else []
    assert [f for f in forbidden if f in text] == []
    assert card["packages"]["torch"] and card["hardware"]["cores"] >= 1
