"What lies between a command and the stages: text laid out, settings resolved, errors handed on, one teacher distilled end to end."
import json
import subprocess
import sys

import nbformat
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, pipeline

from distilrepro import plan, workflow
from distilrepro.config import Data, UserError, load_settings
from distilrepro.corpus import load_tokenizer
from distilrepro.records import create_run, read_records, write_records
from distilrepro.synthetic import documents

SMALL = ("data.max_len=32", "distil.batch=4", "distil.accumulation=1", "distil.max_updates=6", "distil.min_updates=2",
         "distil.save_every=2", "distil.log_every=2")  # and half of the teacher's four layers


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    "A random BERT with its tokenizer, and text files in its language."
    folder, tokenizer = tmp_path_factory.mktemp("own"), load_tokenizer(Data())
    torch.manual_seed(0)
    shape = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24,
                       max_position_embeddings=32)
    BertForMaskedLM(shape).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    lines = documents(0, 120)
    (folder / "a.txt").write_text("\n".join(lines[:60]))
    (folder / "b.txt").write_text("\n\n".join(lines[60:]) + "\n")
    return folder


def test_a_bert_on_text_files_becomes_a_stock_student(teacher, tmp_path):
    out = tmp_path / "student"
    assert workflow.distil(str(teacher / "teacher"), (str(teacher / "*.txt"),), out, SMALL) == out
    model, info = AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)
    assert model.config.model_type == "distilbert" and model.config.n_layers == 2
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert len(pipeline("fill-mask", model=str(out), tokenizer=str(out), device="cpu")("the [MASK] sleeps")) == 5
    assert "6 updates" in (out / "README.md").read_text()
    record = tmp_path / "student-run/records/distil.jsonl"
    weights, before = (out / "model.safetensors").read_bytes(), (record.read_bytes(), record.stat().st_mtime_ns)
    workflow.distil(str(teacher / "teacher"), (str(teacher / "*.txt"),), out, SMALL)
    assert (record.read_bytes(), record.stat().st_mtime_ns) == before, "a second call does nothing again"
    assert (out / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(("sets", "words"), [
    (("student.layer_map=[0, 4]",), "layer_map .0, 4. does not fit: the teacher has layers 0 to 3"),
    (("student.layers=5",), "only 4 layers"),
    (("distil.min_updates=1000",), "6 optimizer updates"),
    (("data.min_len_exclusive=100",), "corpus text .train. is empty"),
])
def test_mistakes_of_the_user_are_named(teacher, tmp_path, sets, words):
    with pytest.raises(UserError, match=words):
        workflow.distil(str(teacher / "teacher"), (str(teacher / "*.txt"),), tmp_path / "student", (*SMALL, *sets))
    assert not (tmp_path / "student").exists()


def test_text_longer_than_the_teacher_reads_is_refused(teacher, tmp_path):
    (tmp_path / "long.txt").write_text("\n".join(" ".join(documents(i, 4)) for i in range(20)))
    with pytest.raises(UserError, match="sequences of .* tokens, the teacher positions for 32; set data.max_len=32"):
        workflow.distil(str(teacher / "teacher"), (str(tmp_path / "long.txt"),), tmp_path / "student", (*SMALL, "data.max_len=64"))


def test_a_prepared_folder_is_all_that_snakemake_needs(command, tmp_path):
    code, out, err = command("reproduce", "--scale", "smoke", "--run", tmp_path / "run", "--prepare")
    assert (code, out.strip()) == (0, str(tmp_path / "run")), err
    words = [sys.executable, "-m", "snakemake", "--dry-run", "--cores", "2", "--snakefile", str(plan.checkout() / "Snakefile"),
             "--directory", out.strip(), "--config", f"root={plan.checkout()}"]
    whole, bare = (subprocess.run([*words, *more], capture_output=True, text=True, check=True).stdout for more in ((), ("gpu=0",)))
    assert f"{len(plan.jobs(load_settings('quick', 'smoke'))) + 1}\n" in whole.split("total")[1], "every job, and the report"
    assert "gpu=1" in whole and "gpu=1" not in bare


def test_a_tokenizer_of_another_vocabulary_is_refused(teacher, tmp_path):
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
                               max_position_embeddings=32)).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="their vocabularies differ"):
        workflow.distil(str(tmp_path / "other"), (str(teacher / "*.txt"),), tmp_path / "student",
                        (*SMALL, f"data.tokenizer={json.dumps(str(teacher / 'teacher'))}"))


@settings(deadline=None, max_examples=20)
@given(st.lists(st.lists(st.sampled_from(["a line", "another", "", "   ", "é ü", "x" * 50]), max_size=130), min_size=1, max_size=3))
def test_every_line_is_laid_out_once_and_every_fiftieth_held_out(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("text")
    want = {"train": [], "validation": []}
    for i, lines in enumerate(files):
        (folder / f"{i}.txt").write_text("\n".join(lines), encoding="utf-8")
        full = [x.strip() for x in lines if x.strip()]
        for j, line in enumerate(full):
            want["train" if j % 50 else "validation"].append(line)
    if not want["validation"]:
        with pytest.raises(UserError, match="hold no text"):
            workflow.lay_out_text((str(folder / "*.txt"),), folder / "out")
        return
    assert workflow.lay_out_text((str(folder / "*.txt"),), folder / "out") == sum(map(len, want.values()))
    for split, lines in want.items():
        assert pq.read_table(folder / f"out/text/{split}.parquet")["text"].to_pylist() == lines


def test_text_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="no file matches.*none"):
        workflow.lay_out_text((str(tmp_path / "none/*.txt"),), tmp_path / "out")


def test_data_folder_and_presets_that_need_one(tmp_path):
    with pytest.raises(UserError, match="does not exist.*distilrepro fetch"):
        workflow.resolve("quick", data=str(tmp_path / "none"))
    with pytest.raises(UserError, match="--data DIR"):
        workflow.resolve("minilm")
    (tmp_path / "with: colon é").mkdir()
    s = workflow.resolve("minilm", data=str(tmp_path / "with: colon é"))
    assert (s.data.source, s.data.dir) == ("local", str(tmp_path / "with: colon é"))


def test_run_folders_tell_scales_apart(tmp_path):
    assert workflow.run_folder(load_settings("sanh2019")).name == "sanh2019"
    assert workflow.run_folder(load_settings("sanh2019", "smoke")).name == "sanh2019-smoke"
    assert workflow.run_folder(load_settings("sanh2019"), str(tmp_path)) == tmp_path


@pytest.fixture
def run(tmp_path):
    return create_run(tmp_path / "run", load_settings("quick", sets=("data.dir=/home/jane/data",)), tmp_path)


def test_the_first_error_is_handed_on_with_its_kind(run):
    assert "workflow.log" in str(workflow.first_error(run))
    (run.folder / "errors").mkdir()
    (run.folder / "errors/s02_distil.json").write_text(json.dumps(dict(kind="UserError", message="no such layer")))
    error = workflow.first_error(run)
    assert isinstance(error, UserError) and str(error) == "s02_distil: no such layer"
    (run.folder / "errors/s02_distil.json").write_text(json.dumps(dict(kind="RuntimeError", message="disk")))
    assert not isinstance(workflow.first_error(run), UserError)


def test_progress_half_written_is_no_error(run):
    (run.folder / "progress").mkdir()
    (run.folder / "progress/a.json").write_text('{"done": 3, "to')
    (run.folder / "progress/b.json").write_text('{"done": 3, "total": 9}')
    assert workflow.running(run) == {"b": (3, 9)}


def test_an_unknown_job_names_the_closest(run):
    with pytest.raises(UserError, match="unknown job 't1_glu'; did you mean 't1_glue'"):
        plan.run_job(run.folder, "t1_glu", plan.checkout())


def test_published_results_hold_records_and_no_place(run, tmp_path):
    write_records(run, "a", [dict(model="student", metric="score", value=0.5, stage="s")])
    (run.folder / "tables").mkdir()
    (run.folder / "tables/t1.csv").write_text("x")
    (run.folder / "tables/t1.svg").write_text("x")
    (run.folder / "checkpoints").mkdir()
    (run.folder / "checkpoints/big").write_text("x")
    said = [nbformat.v4.new_output("stream", name=name, text=str(run.folder)) for name in ("stdout", "stderr")]
    cell = nbformat.v4.new_code_cell("1", execution_count=7, outputs=said)
    book = nbformat.v4.new_notebook(metadata={"papermill": {"duration": 3}}, cells=[cell])
    (run.folder / "notebooks").mkdir()
    for name in ("a4_errors-cola", "s02_distil", "s03_finetune-teacher-1"):
        nbformat.write(book, run.folder / f"notebooks/{name}.ipynb")
    names = {p.relative_to(tmp_path / "results").as_posix() for p in workflow.publish(run, tmp_path / "results")}
    shown = {"notebooks/a4_errors-cola.ipynb", "notebooks/s02_distil.ipynb"}
    assert names == {"config.yaml", "provenance.json", "records/a.jsonl", "tables/t1.csv"} | shown
    cell = nbformat.read(tmp_path / "results/notebooks/a4_errors-cola.ipynb", 4)["cells"][0]
    assert [o["text"] for o in cell.outputs] == [f"runs/{run.name}"] and cell.execution_count is None
    assert "jane" not in (tmp_path / "results/config.yaml").read_text()
    assert yaml.safe_load((tmp_path / "results/config.yaml").read_text())["preset"] == "quick"
    assert len(read_records(run)) == 1


def test_a_job_starts_without_compiling_grammars():
    "papermill alone would load the package that takes three quarters of its import; after ours it works all the same."
    code = """
import sys
from distilrepro.plan import _papermill
papermill = _papermill()
book = papermill.iorw.load_notebook_node("nbs/stages/s01_teacher.ipynb")
papermill.iorw.nbformat.validate(book)
print(sorted(name for name in ("rfc3987_syntax", "papermill", "jsonschema") if sys.modules.get(name)))
"""
    said = subprocess.run([sys.executable, "-c", code], cwd=plan.checkout(), capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "['jsonschema', 'papermill']"
