"""A tiny run to be killed, starved and damaged: what the tests of faults start again and again, each time in a process group of its own."""
import os
import random
import resource
import signal
import sys
from pathlib import Path

from distilrepro import plan
from distilrepro.config import Interrupted, UserError, load_settings
from distilrepro.records import Run, create_run
from distilrepro.stages import distil_stage, finetune_stage, teacher_stage

ROOT = Path(__file__).resolve().parent.parent
SETS = ("data.documents=120", "data.heldout_tokens=500", "teacher.layers=4", "student.layers=2", "teacher.loop.max_updates=12",
        "teacher.loop.save_every=3", "distil.max_updates=12", "distil.min_updates=10", "distil.save_every=3", "finetune.max_train=64",
        "finetune.max_eval=48", "finetune.loop.epochs=1", "finetune.tasks={}", "grid.seeds=[1]", "grid.task_seeds={}", "grid.tasks=[cola]",
        "second.tasks=[]")
WRITES = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")  # of `os`: what a file passes on its way to the disk and from it


def make(folder: Path, *sets: str) -> Run:
    "A run folder of the tiny preset."
    return create_run(folder, load_settings("quick", "smoke", (*SETS, *sets)), folder)


def count_writes(to: int) -> list[int]:
    "Count the calls that bring files to the disk; before number `to` the process group dies as by `kill -9`. -1: never."
    made = [0]
    def counting(call):
        def counted(*args, **kwargs):
            if made[0] == to:
                os.killpg(os.getpgid(0), signal.SIGKILL)
            made[0] += 1
            return call(*args, **kwargs)
        return counted
    for name in WRITES:
        setattr(os, name, counting(getattr(os, name)))
    return made


def stages(folder: Path) -> None:
    "Do the stages of a run."
    run = Run(folder)
    teacher_stage(run)
    distil_stage(run)
    for model in ("teacher", "student"):
        finetune_stage(run, model, ("cola",))


def all_stages(folder: str, die_at: int = -1, file_limit: int = 0) -> None:
    "Do the stages in a process group of its own, perhaps to die at a write, perhaps with a limit to file sizes; write down what they said."
    os.setsid()
    made, said = count_writes(die_at), Path(folder).with_suffix(".said")
    if file_limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    try:
        stages(Path(folder))
        message = f"done {made[0]}"
    except (UserError, RuntimeError) as e:
        message = f"{type(e).__name__}: {e}"
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    said.write_text(message)
    sys.exit(0 if message.startswith("done") else 3)


def one_notebook(folder: str, job: str) -> None:
    "Execute one notebook of a run in a process group of its own."
    os.setsid()
    os.environ["PYTHONPATH"] = str(ROOT)
    try:
        plan.run_job(Path(folder), job, ROOT)
    except Interrupted:
        sys.exit(130)


def moments(n: int, seconds: float, writes: int, seed: int) -> list[tuple[str, float]]:
    "Random moments to kill at: half of them by the clock, half at a write."
    rng = random.Random(seed)
    return [("by the clock", rng.uniform(0, seconds)) if i % 2 else ("at a write", rng.randrange(writes)) for i in range(n)]
