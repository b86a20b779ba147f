"""Killed at random moments, asked to stop, started twice: what a run ends on is what it ends on unbroken."""
import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import killing
import psutil
import pytest

from distilrepro.records import Run, locked, read_records, read_unit
from distilrepro.repair import damage
from distilrepro.seals import digest

FORK = get_context("forkserver")  # a clean server that has imported torch once: each start takes no time
FORK.set_forkserver_preload(["killing"])
TIMES = {"tokens_per_s", "seconds"}


def start(target, *args):
    process = FORK.Process(target=target, args=args)
    process.start()
    return process


def kill(process) -> None:
    "SIGKILL to its process group."
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it had not made its group yet, or has ended
        process.kill()


def outcome(folder: Path) -> dict:
    "Everything a run ends on, but for times: records, predictions, weights; and that nothing half is left and all is whole."
    run = Run(folder)
    assert not list(damage(run))
    litter = [p.name for p in folder.rglob(".*") if p.name not in (".lock", ".locks")]
    assert not litter, litter
    records = read_records(run)
    records = records[~records.metric.isin(TIMES)].drop(columns=["created", "check", "run"])
    weights = [p for p in folder.glob("checkpoints/*/*.safetensors") if "steps" not in p.parent.name]
    files = sorted([*folder.glob("predictions/*"), *weights])
    return {"records": records.to_json(), "ledger": json.loads((folder / "ledger.json").read_text()),
            "files": {p.relative_to(folder).as_posix(): digest(p) for p in files}}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    "An unbroken run: what it ended on, its seconds, its writes."
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    killing.make(folder)
    warm = start(len, "")  # the server imports torch
    warm.join()
    begun = time.monotonic()
    process = start(killing.all_stages, str(folder))
    process.join()
    assert process.exitcode == 0, folder.with_suffix(".said").read_text()
    return outcome(folder), time.monotonic() - begun, int(folder.with_suffix(".said").read_text().split()[1])


def test_killed_anywhere(unbroken, tmp_path, fault):
    want, seconds, writes = unbroken
    rounds, moments = 0, killing.moments(fault.size(2, 60), seconds, writes, seed=7)
    while moments:
        rounds, folder, killed = rounds + 1, tmp_path / f"run{rounds}", []
        killing.make(folder)
        while True:
            how, when = moments.pop() if moments else ("", -1)
            process = start(killing.all_stages, str(folder), int(when) if how == "at a write" else -1)
            process.join(when if how == "by the clock" else None)
            if process.is_alive():
                kill(process)
                process.join()
            assert process.exitcode in (0, -signal.SIGKILL), folder.with_suffix(".said").read_text()
            if process.exitcode == 0:
                break
            killed.append(how)
        got = outcome(folder)
        for how in killed:
            with fault("kill", f"SIGKILL to the process group {how}, stages of a run"):
                assert got == want


def values(folder: Path, unit: str) -> list[float]:
    return [r.value for r in read_unit(folder / f"records/{unit}.jsonl") if r.metric not in TIMES]


def test_a_notebook_killed_while_it_runs_or_is_saved(tmp_path, fault):
    seconds, want = 0.0, []
    for i in range(fault.size(2, 9)):
        folder = tmp_path / f"run{i}"
        killing.make(folder)
        notebook = folder / "notebooks/s01_teacher.ipynb"
        process = start(killing.one_notebook, str(folder), "s01_teacher")
        begun = time.monotonic()
        if not want:  # unbroken
            process.join()
            seconds, want = time.monotonic() - begun, values(folder, "teacher")
            continue
        process.join(seconds * (1.08 - i * 0.1))  # the first about when it is saved, others earlier and earlier
        kill(process)
        process.join()
        assert not notebook.exists() or json.loads(notebook.read_text())["cells"]
        process = start(killing.one_notebook, str(folder), "s01_teacher")
        process.join()
        with fault("kill", "SIGKILL to papermill while a notebook runs or is saved"):
            assert process.exitcode == 0 and json.loads(notebook.read_text())["cells"]
            assert values(folder, "teacher") == want
            assert not list(notebook.parent.glob(".*")) and not list(notebook.parent.glob("*failed*"))


def wait_for(there, seconds=120.0):
    "Wait until something is there."
    until = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < until
        time.sleep(0.05)


def steps(folder: Path) -> list[int]:
    return sorted(int(p.name.split("-")[1]) for p in folder.glob("checkpoints/student-steps/step-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_stops_within_five_seconds_with_a_checkpoint(unbroken, tmp_path, fault, number):
    for i in range(fault.size(1, 5)):
        folder = tmp_path / f"run{i}"
        killing.make(folder)
        process = start(killing.all_stages, str(folder))
        wait_for(lambda folder=folder: steps(folder))
        time.sleep(0.1 * i)
        os.kill(process.pid, number)
        asked = time.monotonic()
        process.join()
        seconds, said = time.monotonic() - asked, folder.with_suffix(".said").read_text()
        with fault("stop", f"{signal.Signals(number).name} to a stage that trains"):
            if process.exitcode == 3:  # not so quick that it had ended
                assert said.startswith("Interrupted: stopped after update") and said.endswith("run the same command again to go on")
                assert steps(folder)[-1] == int(said.split()[4])
            assert seconds < 5
            process = start(killing.all_stages, str(folder))
            process.join()
            assert process.exitcode == 0 and outcome(folder) == unbroken[0]
        fault.measured("stop", f"{signal.Signals(number).name} until the stage had ended", seconds, "s")


def family(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


@pytest.mark.story
def test_a_whole_run_asked_to_stop_leaves_no_process_behind(tmp_path, fault):
    for number in (signal.SIGTERM, signal.SIGINT)[: fault.size(1, 2)]:
        folder = tmp_path / number.name
        sets = [w for s in (*killing.SETS, "distil.max_updates=4000", "distil.epochs=1000", "distil.save_every=2000") for w in ("--set", s)]
        words = ["-c", "from distilrepro.cli import main; main()", "reproduce", "--scale", "smoke", "--run", str(folder), *sets]
        process = subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True, cwd=killing.ROOT)
        wait_for(lambda folder=folder: (folder / "progress/distil.json").is_file(), 300)
        below = family(process.pid)
        assert len(below) >= 3  # the workflow, papermill, a kernel
        process.send_signal(number)
        asked = time.monotonic()
        said = process.communicate(timeout=60)[1]
        seconds = time.monotonic() - asked
        fault.measured("stop", f"{number.name} until a whole run had ended, all its processes too", seconds, "s")
        with fault("stop", f"{number.name} to a whole run, workflow, papermill and kernel"):
            assert process.returncode == 130 and "run the same command again to go on" in said and "Traceback" not in said, said
            assert seconds < 5 and not [p for p in below if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
            assert steps(folder), "no checkpoint was written"


def test_two_processes_on_one_run(unbroken, tmp_path, fault):
    for i in range(fault.size(1, 4)):
        folder = tmp_path / f"run{i}"
        killing.make(folder)
        both = [start(killing.all_stages, str(folder)) for _ in range(2)]
        for process in both:
            process.join()
        with fault("two at once", "two processes do the stages of one run"):
            assert 0 in (codes := [p.exitcode for p in both]) and set(codes) <= {0, 3}
            if 3 in codes:
                assert "another process is working on" in folder.with_suffix(".said").read_text()
            assert outcome(folder) == unbroken[0]


def test_the_second_reproduce_says_so(tmp_path, fault, command):
    with locked(tmp_path / "run"), fault("two at once", "reproduce on the folder of a run that is at work"):
        code, _, said = command("reproduce", "--scale", "smoke", "--run", tmp_path / "run")
        assert code == 2 and f"another process is working on {tmp_path / 'run'}" in said and "Traceback" not in said


def hold(folder: str) -> None:
    with locked(Path(folder)), locked(Path(folder), "distil"):
        Path(folder, "held").touch()
        time.sleep(600)


def test_a_dead_process_holds_no_lock(tmp_path, fault):
    process = start(hold, str(tmp_path))
    wait_for((tmp_path / "held").exists)
    kill(process)
    process.join()
    with fault("two at once", "the lock of a process that was killed"), locked(tmp_path), locked(tmp_path, "distil"):
        pass


def test_the_comparison_sees_weights_and_predictions(unbroken):
    names = ("teacher", "student", "finetune-teacher-cola-1", "finetune-student-cola-1")
    weights = {f"checkpoints/{n}/model.safetensors" for n in names}
    assert set(unbroken[0]["files"]) == weights | {f"predictions/{n}.parquet" for n in names[2:]}
