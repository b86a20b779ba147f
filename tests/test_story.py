"The whole story from an empty folder, killed on the way, against the same stages done in this process without a break."
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from distilrepro import plan
from distilrepro.again import compare
from distilrepro.records import Run, create_run, read_records
from distilrepro.stages import distil_stage, finetune_stage, teacher_stage

pytestmark = pytest.mark.story
BUDGET = (
    "data.documents=300", "data.heldout_tokens=1000", "teacher.layers=4", "teacher.loop.max_updates=12", "teacher.loop.min_updates=2",
    "student.layers=2", "distil.max_updates=60", "distil.min_updates=2", "distil.save_every=3", "distil.log_every=3",
    "grid.tasks=[stsb, imdb]", "grid.seeds=[1, 2]", "finetune.max_train=64", "finetune.max_eval=32", "speed.max_examples=5",
)
COMMAND = [sys.executable, "-c", "from distilrepro.cli import main; main()"]


def reproduce(folder):
    "Start the command on a run folder, in a process group of its own."
    sets = [word for value in BUDGET for word in ("--set", value)]
    words = ["reproduce", "--preset", "sanh2019", "--scale", "smoke", "--run", str(folder), "--cores", "2", *sets]
    return subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def end(process):
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    return out


def kill_tree(process):
    "End a process and all that came from it at once, as a power cut would."
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for p in tree:
        try:
            os.kill(p.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    psutil.wait_procs(tree[1:], timeout=20)
    process.communicate()


def wait_for(found, process, seconds=600):
    "Wait until something is found while a process lives."
    limit = time.time() + seconds
    while not found():
        assert process.poll() is None and time.time() < limit, "the run ended before it could be killed"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    "A run that was killed in the middle of distillation and started again."
    folder = tmp_path_factory.mktemp("story") / "run"
    process = reproduce(folder)
    steps = folder / "checkpoints/student-steps"
    wait_for(lambda: any(steps.glob("step-*")), process)
    kill_tree(process)
    killed_at = max(int(p.name.removeprefix("step-")) for p in steps.glob("step-*"))
    assert killed_at < 60 and not (folder / "records/distil.jsonl").exists(), "it was killed while distillation was under way"
    printed = end(reproduce(folder))
    return Run(folder), printed


def values(run):
    "What the training stages measured, without what a clock said."
    table = read_records(run)
    table = table[table.stage.isin(["teacher", "distil", "finetune"]) & ~table.metric.isin(["tokens_per_s", "seconds"])]
    columns = ["stage", "model", "task", "split", "metric", "seed", "step", "n", "value"]
    numbers = {"seed": float, "step": float, "n": float}  # a run with other records beside these reads them as floats
    return table[columns].astype(numbers).sort_values(columns).reset_index(drop=True)


def test_the_command_prints_its_report_which_holds_the_story(story):
    run, printed = story
    assert Path(printed.strip().splitlines()[-1]) == run.folder / "report.html"
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>", " ", page)
    for words in ("Table 1", "Table 3", "performance by task", "parameters by component", "Attention on a mistake", "toy"):
        assert words in text, words
    assert len(re.findall(r"<svg|data:image/", page)) >= 3, "both figures and the attention map are inside the page"
    assert not re.search(r'(src|href)="(https?:)?//[^"]+\.(js|css|png|svg)"', page), "nothing is loaded from elsewhere"


def test_killed_and_started_again_it_ends_on_the_values_of_an_unbroken_run(story, tmp_path):
    run = create_run(tmp_path / "run", story[0].settings, tmp_path)
    teacher_stage(run)
    distil_stage(run)
    for model in ("teacher", "student"):
        finetune_stage(run, model, run.settings.grid.tasks)
    want, got = values(run), values(story[0])
    assert len(want) > 50
    assert got.to_csv() == want.to_csv()
    for name in ("teacher", "student", "finetune-student-imdb-1"):
        file = f"checkpoints/{name}/model.safetensors"
        assert (story[0].folder / file).read_bytes() == (run.folder / file).read_bytes(), name


def test_a_second_call_does_nothing(story):
    folder = story[0].folder
    def state():
        parts = ("records", "notebooks", "checkpoints", "predictions")
        return {str(p): p.stat().st_mtime_ns for part in parts for p in (folder / part).rglob("*") if p.is_file()}
    before = state()
    end(reproduce(folder))
    assert state() == before


def test_what_somebody_deleted_is_made_again_and_the_same(story, tmp_path):
    run = story[0]
    shutil.copytree(run.folder / "records", tmp_path / "records")
    (run.folder / "records/components.jsonl").unlink()
    end(reproduce(run.folder))
    assert set(compare(run.folder, tmp_path).state) == {"same"}


def test_papermill_by_hand_works_and_a_misspelt_parameter_is_named(story, tmp_path):
    book = plan.checkout() / "nbs/tables/t1_glue.ipynb"
    def papermill(*words):
        command = [sys.executable, "-m", "papermill", str(book), str(tmp_path / "out.ipynb"), "-k", "python3", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)
    good = papermill("-p", "run", str(story[0].folder))
    assert good.returncode == 0 and (tmp_path / "out.ipynb").is_file(), good.stderr[-2000:]
    bad = papermill("-p", "rnu", str(story[0].folder))
    assert bad.returncode != 0 and "unknown parameter 'rnu'; did you mean 'run'" in bad.stderr + bad.stdout
