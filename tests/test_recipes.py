"Whole recipes at scale smoke, job by job as the plan lists them, until the tables that they are for are filled."
import pytest

from distilrepro.config import load_settings
from distilrepro.downstream import cornell_retention, cornell_table
from distilrepro.latency import latency_table
from distilrepro.plan import jobs
from distilrepro.records import create_run, read_records
from distilrepro.stages import distil_stage, finetune_stage, speed_stage, teacher_stage, zeroshot_stage
from distilrepro.zeroshot import resplit_table, zeroshot_table

STAGES = {
    "s01_teacher": teacher_stage, "s02_distil": distil_stage, "s04_speed": speed_stage, "s06_zeroshot": zeroshot_stage,
    "s03_finetune": lambda run, model, tasks: finetune_stage(run, model, tuple(tasks)),
}
TABLES = {"cornell": (cornell_table, cornell_retention, latency_table), "sst2_random": (zeroshot_table, resplit_table)}


@pytest.fixture(scope="module", params=TABLES)
def run(request, tmp_path_factory):
    "A run of the recipe, its stages done in this process in the order of the plan."
    run = create_run(tmp_path_factory.mktemp("recipe") / request.param, load_settings(request.param, "smoke"), tmp_path_factory.mktemp("x"))
    for job in (j for j in jobs(run.settings) if j.notebook.startswith("stages/")):
        STAGES[job.name.split("-")[0]](run, **job.parameters)
    return run


def own_rows(table):
    "The rows of the run itself: those of the first block."
    return table.blocks[0][1]


def test_its_tables_are_filled(run):
    for make in TABLES[run.settings.preset]:
        table = make(run)
        assert own_rows(table) and "missing" not in str(own_rows(table)), table.to_markdown()
        assert table.toy, "synthetic numbers are labelled"


def test_every_unit_of_the_grid_is_there(run):
    s, found = run.settings, read_records(run, "finetune-*")
    have = set(found[found.metric == "score"][["model", "task", "seed"]].itertuples(index=False, name=None))
    assert have == {(m, t, i) for m in ("teacher", "student") for t in s.grid.tasks for i in s.grid.task_seeds.get(t, s.grid.seeds)}


def test_the_student_keeps_the_recipes_character(run):
    layers = {"cornell": ("every_other", "teacher"), "sst2_random": ("paper", "random")}[run.settings.preset]
    assert (run.settings.student.layer_map, run.settings.student.init) == layers
    steps = read_records(run, "distil").step.max()
    assert steps == {"cornell": 120, "sst2_random": 60}[run.settings.preset]
