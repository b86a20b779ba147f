"""Forms of inference: each against the model one example at a time, files that take any shape, reasons, sizes, and a stage that resumes."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, DistilBertConfig, DistilBertForSequenceClassification

from distilrepro import export
from distilrepro.config import Forms, UserError, load_settings
from distilrepro.corpus import load_tokenizer
from distilrepro.export import FORMS, logits_of, open_form, padded_batches, parity, time_rows
from distilrepro.forms import forms_figure, forms_findings, forms_table
from distilrepro.plan import SECTIONS, jobs
from distilrepro.records import Run, create_run, read_records
from distilrepro.seals import SEAL, seal
from distilrepro.speed import disk_mb
from distilrepro.stages import save_model, tuned_folder

ROOT = Path(__file__).resolve().parent.parent
FP32 = ("eager", "sdpa", "compiled", "onnx")
# Share of the spread of the logits that a form may be off by. int8 keeps 8 bits of each weight and input (7 of a weight in ONNX), one
# part in about 250; over some layers that adds up to a few percent on random weights. bfloat16 keeps 8 bits of each number.
LOOSE = dict(int8=0.1, onnx_int8=0.1, bf16=0.05, compiled_bf16=0.05)


def rows(count=11, vocab=50):
    rng = np.random.default_rng(1)
    return [dict(id=i, label=i % 2, input_ids=rng.integers(1, vocab, n), token_type_ids=(np.arange(n) > n // 2).astype(int))
            for i, n in enumerate(rng.integers(4, 40, count))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "A random BERT and a random DistilBERT with loud heads, saved."
    torch.manual_seed(3)
    base, shape = tmp_path_factory.mktemp("models"), dict(vocab_size=50, max_position_embeddings=64, num_labels=2)
    made = dict(
        teacher=BertForSequenceClassification(
            BertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, **shape)),
        student=DistilBertForSequenceClassification(DistilBertConfig(dim=32, n_layers=1, n_heads=4, hidden_dim=64, **shape)))
    for name, model in made.items():
        nn.init.normal_(model.classifier.weight)
        model.save_pretrained(base / name)
    return {name: base / name for name in made}


def one_by_one(folder):
    "What stock transformers says about each example alone, without padding and without this package."
    kind = BertForSequenceClassification if folder.name == "teacher" else DistilBertForSequenceClassification
    model, out = kind.from_pretrained(folder, attn_implementation="eager").eval(), []
    for row in rows():
        inputs = dict(input_ids=torch.tensor(row["input_ids"])[None])
        inputs |= dict(token_type_ids=torch.tensor(row["token_type_ids"])[None]) if folder.name == "teacher" else {}
        with torch.no_grad():
            out.append(model(**inputs).logits[0].numpy())
    return np.array(out)


# Compiling is slow (half a minute a graph): here the smaller model and one graph, in the forms' table both and all.
CASES = [(m, n) for m in ("teacher", "student") for n in FORMS if not (m == "teacher" and "compiled" in n)]


@pytest.mark.parametrize("model, name", CASES)
def test_parity_with_stock_transformers(folders, tmp_path, model, name):
    if why := FORMS[name].obstacle():
        pytest.skip(why)
    call, wanted = open_form(name, folders[model], tmp_path / name), one_by_one(folders[model])
    for size in (4,) if "compiled" in name else (1, 4):  # four examples of different lengths: padding must not count
        off = np.abs(logits_of(call, rows(), 0, size) - wanted).max()
        assert off < (1e-4 if name in FP32 else LOOSE[name] * np.ptp(wanted)), f"batch {size}: off by {off}"
        assert name in FP32 or off > 1e-6, "a rounded form that differs by nothing was not rounded"


def test_every_form_has_a_bound():
    assert set(FORMS) == {*FP32, *LOOSE}


@pytest.mark.parametrize("name", ["onnx", "onnx_int8"])
def test_one_file_takes_every_shape(folders, tmp_path, name):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    call = open_form(name, folders["teacher"], tmp_path / "form")
    file = tmp_path / "form/model.onnx"
    stamp = file.stat().st_mtime_ns
    assert {p.name for p in file.parent.iterdir()} == {file.name, SEAL}
    for count, length in ((1, 3), (5, 64), (9, 17)):
        inputs = dict(input_ids=torch.ones(count, length, dtype=torch.long), attention_mask=torch.ones(count, length, dtype=torch.long),
                      token_type_ids=torch.zeros(count, length, dtype=torch.long))
        said = call(inputs)
        assert said.shape == (count, 2) and said.dtype == torch.float32 and torch.isfinite(said).all()
    assert file.stat().st_mtime_ns == stamp


def test_onnx_inputs_are_named_and_their_axes_are_free(folders, tmp_path):
    onnx = pytest.importorskip("onnx")
    for model, names in dict(teacher=["input_ids", "attention_mask", "token_type_ids"], student=["input_ids", "attention_mask"]).items():
        graph = onnx.load(FORMS["onnx"].write(folders[model], tmp_path / model) / "model.onnx").graph
        assert [i.name for i in graph.input] == names
        assert {d.dim_param for i in graph.input for d in i.type.tensor_type.shape.dim} == {"batch", "length"}


def test_batches_hold_every_example_once_and_little_padding():
    batches, order = padded_batches(rows(), 0, 4)
    assert sorted(order) == list(range(11)) and [len(b["input_ids"]) for b in batches] == [4, 4, 3]
    lengths = [int(n) for b in batches for n in b["attention_mask"].sum(1)]
    assert lengths == sorted(len(r["input_ids"]) for r in rows())


def test_parity_by_hand():
    a, b = np.array([[0.0, 1], [2, 1], [0, 3]]), np.array([[0.0, 1], [1, 2], [0.5, 3]])
    assert parity(a, b) == dict(max_difference=1, agreement=pytest.approx(2 / 3))
    assert parity(np.array([[1.0], [2.0]]), np.array([[1.049], [1.949]]))["agreement"] == 0.5


@pytest.mark.parametrize("absent, form", [("onnxruntime", "onnx"), ("onnx", "onnx_int8")])
def test_a_missing_package_is_a_reason_that_names_the_extra(folders, tmp_path, monkeypatch, absent, form):
    real, match = export.find_spec, r"distilrepro\[export\]"
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == absent else real(name))
    with pytest.raises(UserError, match=match):
        open_form(form, folders["student"], tmp_path / "x")
    assert absent in FORMS[form].obstacle()
    with pytest.raises(UserError, match=match):
        export.with_extra("no_such_module_at_all")


def test_no_compiler_and_no_bf16_are_reasons(monkeypatch):
    monkeypatch.setattr(export.shutil, "which", lambda name: None)
    assert "C++ compiler" in FORMS["compiled"].obstacle()
    monkeypatch.setattr(export, "cpu_has_bf16", lambda: False)
    assert "bfloat16" in FORMS["bf16"].obstacle() and "bfloat16" in FORMS["compiled_bf16"].obstacle()


def test_unknown_forms_and_untrained_heads_are_the_users_mistake(folders, tmp_path):
    with pytest.raises(UserError, match="did you mean 'onnx'"):
        open_form("onxx", folders["student"], tmp_path)
    BertForSequenceClassification.from_pretrained(folders["teacher"]).bert.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="expected a fine-tuned classifier"):
        open_form("eager", tmp_path / "bare", tmp_path / "x")
    with pytest.raises(UserError, match="onxx"):
        load_settings("quick", "smoke", ("forms.names=[onxx]",))


def test_disk_counts_every_weight_file_and_int8_is_smaller(folders, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"x" * 1000)
    (tmp_path / "model.onnx.data").write_bytes(b"x" * 3000)
    (tmp_path / "config.json").write_bytes(b"x" * 9000)
    assert disk_mb(tmp_path) == pytest.approx(0.004)
    model = BertForSequenceClassification.from_pretrained(folders["teacher"])
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    whole, packed = disk_mb(folders["teacher"]), disk_mb(FORMS["int8"].write(folders["teacher"], tmp_path / "int8"))
    assert whole - packed == pytest.approx(3 * linear / 1e6, rel=0.1), "three bytes of four are saved on each weight of a linear layer"
    assert not [p for p in (tmp_path / "int8").iterdir() if p.suffix not in {".json", ".safetensors"} and p.name != SEAL]


def test_a_last_batch_that_is_not_full_is_not_timed():
    seen = []
    def call(inputs):
        seen.append(len(inputs["input_ids"]))
        return torch.zeros(len(inputs["input_ids"]), 2)
    out = time_rows(rows(11), 0, {("student", "eager"): call}, Forms(batches=(4,), warmup=3, repeats=2), 1)
    assert seen == [4, 4, 4] * 2, "one batch of warm-up covers three examples, then two full batches"
    assert {r["n"] for r in out} == {8} and {r["batch"] for r in out} == {4}
    rate = {(r["seed"], r["metric"]): r["value"] for r in out}
    assert rate[0, "examples_per_s"] == pytest.approx(8 / rate[0, "pass_s"])


TINY = ("forms={names: [sdpa, int8, onnx_int8, bf16], task: mrpc, batches: [1, 4], threads: [1], max_examples: 6, warmup: 1, repeats: 1}",
        "grid.tasks=[mrpc]", "finetune.max_eval=24", "data.documents=200")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A measured run folder whose fine-tuned models are random; the teacher's layers take 28 MB."
    run = create_run(tmp_path_factory.mktemp("stage") / "run", load_settings("sanh2019", "smoke", TINY), ROOT)
    tokenizer = load_tokenizer(run.settings.data)
    torch.manual_seed(5)
    shape = dict(vocab_size=len(tokenizer), max_position_embeddings=128, num_labels=2)
    bert = BertConfig(hidden_size=512, num_hidden_layers=3, num_attention_heads=4, intermediate_size=1280, **shape)
    save_model(BertForSequenceClassification(bert), tokenizer, tuned_folder(run, "teacher", "mrpc"))
    student = DistilBertForSequenceClassification(DistilBertConfig(dim=32, n_layers=1, n_heads=4, hidden_dim=64, **shape))
    save_model(student, tokenizer, tuned_folder(run, "student", "mrpc"))
    export.forms_stage(run)
    return run


def test_stage_measures_everything_of_every_form_or_says_why_not(run):
    found = read_records(run, "forms")
    assert not (run.folder / "progress/forms.json").exists()
    for (model, form), part in found.groupby(["model", "form"]):
        metrics = set(part.metric)
        if metrics == {"skipped"}:
            assert part.note.iloc[0] == FORMS[form].obstacle() != ""
            continue
        assert metrics == {"score", "max_difference", "agreement", "disk_mb", "memory_mb", "pass_s", "latency_p50_ms", "latency_p95_ms",
                           "examples_per_s"}, (model, form)
        assert {(b, n) for b, n in part[part.metric == "pass_s"][["batch", "n"]].itertuples(index=False)} == {(1, 6), (4, 4)}
        assert part[part.metric == "score"].n.tolist() == [24], "the score is that of the whole split"
    assert set(found.form) == {"eager", "sdpa", "int8", "onnx_int8", "bf16"} and set(found.model) == {"teacher", "student"}


def test_memory_and_disk_hold_the_weights_and_int8_needs_less(run):
    found = read_records(run, "forms").query("model == 'teacher'").set_index(["form", "metric"]).value
    whole = disk_mb(tuned_folder(run, "teacher", "mrpc"))
    assert found["eager", "disk_mb"] == whole > 28 and found["eager", "memory_mb"] >= 0.9 * whole
    assert found["int8", "disk_mb"] < 0.45 * whole and found["int8", "memory_mb"] < found["eager", "memory_mb"]


def test_stage_resumes_and_starts_anew_when_a_weight_changes(run, monkeypatch):
    path = run.folder / "records/forms.jsonl"
    text, weights = path.read_text(), next((run.folder / "checkpoints").glob("finetune-student-*/model.safetensors"))
    before = weights.read_bytes()
    def refuse(*_): raise AssertionError("computed again")
    monkeypatch.setattr(export, "form_rows", refuse)
    assert len(export.forms_stage(run)) == len(text.splitlines())
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(RuntimeError, match="is damaged: model.safetensors"):
        export.forms_stage(run)
    seal(weights.parent)  # another model, wholly written
    with pytest.raises(AssertionError, match="computed again"):
        export.forms_stage(run)
    weights.write_bytes(before)
    seal(weights.parent)
    assert path.read_text() == text


def test_a_missing_package_is_told_and_one_installed_later_is_something_to_do(run, tmp_path, monkeypatch):
    mine = Run(shutil.copytree(run.folder, tmp_path / "run"))
    monkeypatch.setattr(export, "size_rows", lambda *_: [])
    with monkeypatch.context() as m:
        m.setattr(export, "find_spec", lambda name: None)
        without = export.forms_stage(mine)
    gone = without.query("metric == 'skipped' and form == 'onnx_int8'")
    assert len(gone) == 2 and gone.note.str.contains("distilrepro\\[export\\]").all()
    assert {"score", "pass_s"} <= set(without[without.form == "sdpa"].metric), "the others go on"
    assert any("distilrepro[export]" in note for note in forms_table(mine).notes) and forms_findings(mine).sentences
    if not FORMS["onnx_int8"].obstacle():
        assert export.forms_stage(mine).query("form == 'onnx_int8'").metric.ne("skipped").all()


def test_table_and_picture_of_a_stage(run):
    table = forms_table(run)
    names = [row[0].split("\n")[0] for row in table.blocks[0][1]]
    assert "Teacher, PyTorch, eager" in names and "Student, ONNX Runtime int8" in names and table.toy
    assert {len(row) for _, block in table.blocks for row in block} == {len(table.columns)}
    assert json.loads(table.to_json())["rows"]
    assert "PyTorch, SDPA" in forms_figure(run).get_label() and "lead lies between" in " ".join(forms_findings(run).sentences)


def test_a_run_without_forms_has_no_job_and_an_empty_table(tmp_path):
    run = create_run(tmp_path / "none", load_settings("sanh2019", "smoke"), ROOT)
    assert "s07_forms" not in {j.name for j in jobs(run.settings)} and "forms" in {j.name for j in jobs(run.settings)}
    assert forms_table(run).blocks == [] and "To fill" in forms_table(run).notes[0] and "To fill" in forms_figure(run).get_label()


def test_job_runs_alone_after_fine_tuning_and_where_the_task_is_there():
    quick = load_settings("quick", "smoke")
    (job,) = [j for j in jobs(quick) if j.name == "s07_forms"]
    assert job.alone and any("finetune-student" in n for n in job.needs)
    assert not [j for j in jobs(load_settings("quick", "smoke", ("grid.tasks=[sst2]",))) if j.name == "s07_forms"]
    more = load_settings("quick", "smoke", ("forms.repeats=5",))
    assert {stage for stage, sections in SECTIONS.items() if quick.hash(*sections) != more.hash(*sections)} == {"s07_forms"}


