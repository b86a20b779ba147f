"""The audit of claims: verdicts against hand-computed numbers, flipped by a changed input; nothing in the arithmetic without a source."""
import ast
import copy
import re
from itertools import product as combinations
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

from distilrepro import claims
from distilrepro.claims import audit, check, claim_findings, claims_table, find, floor_table, numbers, own_table, runs_table
from distilrepro.config import UserError, load_settings
from distilrepro.records import create_run, write_records
from distilrepro.tables import reference

REFERENCE = Path(__file__).resolve().parent.parent / "distilrepro/reference"
ROWS = {row["id"]: row for row in audit()}
# worked out by hand (RECIPES.md, section 3, and a pocket calculator), to the digits given
BY_HAND = dict(
    s0_retained=94.35, s0_retained_ratio=95.57, s0_paper_retained=97.15, s0_paper_retained_mean=96.38, s0_speed=2.60,
    s0_speed_without_mrpc=1.97, s0_fraction=60.6, s1_retained=96.86, s1_retained_mean=96.49, s1_tiny=69.06, s1_elmo_macro=68.69,
    s1_bert_macro=79.72, s1_bert_mnli=84.7, s1_distilbert_macro=77.01, s1_tiny_macro=54.8, s1_tiny_macro_medians=54.90,
    s1_tiny_macro_means=54.81, s1_faster=102.6, s1_elmo_seconds=567.6, s1_corpus=0.063, s2_within=3.14, s3_bert_macro=79.72,
    s3_distilbert_macro=148.3, s3_faster=62.9, s3_faster_time=38.6, s3_smaller=40.0, s3_without_ce=74.04, s3_without_cos=75.54,
    s3_without_mlm=76.69, s3_random=73.31, hf_retained=96.86, hf_bert_macro=79.50, hf_distilbert_macro=77.00, hf_smaller=39.4,
    hf_batch=2000,
)
VERDICTS = dict(
    s0_retained="confirmed", s0_retained_ratio="inconsistent", s0_speed="rounding", s0_speed_without_mrpc="inconsistent",
    s0_mrpc="not checkable", s0_epochs="not checkable", s1_retained="confirmed", s1_tiny="rounding", s1_bert_macro="inconsistent",
    s1_bert_mnli="inconsistent", s1_distilbert_macro="confirmed", s1_tiny_macro="inconsistent", s1_tiny_macro_medians="confirmed",
    s1_corpus="inconsistent", s1_epochs="inconsistent", s1_elmo_seconds="inconsistent", s2_sst2="not checkable",
    s3_distilbert_macro="not checkable", s3_faster="rounding", s3_faster_time="inconsistent", s3_smaller="confirmed",
    hf_bert_macro="confirmed", hf_smaller="rounding", hf_mrpc="inconsistent", hf_batch="inconsistent",
)


def test_every_claim_has_an_own_id_a_source_and_a_verdict():
    entries = reference("claims")["claims"]
    assert len(ROWS) == len(entries) and {row["source"] for row in ROWS.values()} == {"S0", "S1", "S2", "S3", "HF_README"}
    assert {row["verdict"] for row in ROWS.values()} == set(claims.VERDICTS)
    for before, row in zip(entries, entries[1:], strict=False):
        if row.get("other"):
            assert all(before[k] == row[k] for k in ("source", "claim", "value", "unit")), row["id"]


@pytest.mark.parametrize("name", BY_HAND)
def test_recomputed_numbers_are_those_worked_out_by_hand(name):
    digits = len(str(BY_HAND[name]).partition(".")[2])
    assert ROWS[name]["recomputed"] == pytest.approx(BY_HAND[name], abs=0.5 * 10**-digits + 1e-9)


@pytest.mark.parametrize("name", VERDICTS)
def test_verdicts(name):
    assert ROWS[name]["verdict"] == VERDICTS[name]


def test_what_is_printed_agrees_with_the_reference():
    known = numbers()
    printed = {c["id"]: c["value"] for c in reference("claims")["claims"]}
    s0 = known["s0_claims"]
    assert [float(printed[k]) for k in ("s0_retained", "s0_paper_retained", "s0_speed")] == [
        s0["retention_pct"], s0["paper_retention_pct"], s0["speedup"]]
    assert float(printed["s0_epochs"]) == s0["pretrain_epochs"] and float(printed["s0_fraction"]) == 100 * s0["params_fraction"]
    values = {c["what"]: c["value"].removesuffix(" %") for c in known["claims"]}
    assert [values[k] for k in ("retained", "retained_tiny", "faster", "smaller")] == [
        printed[k] for k in ("s1_retained", "s1_tiny", "s1_faster", "s1_smaller")]
    cells = dict(s1_bert_macro="BERT-base/score", s1_bert_mnli="BERT-base/MNLI", s1_tiny_macro="TinyDistilBERT/score",
                 s1_distilbert_mnli="DistilBERT/MNLI", s1_elmo_macro="ELMo/score", s1_distilbert_macro="DistilBERT/score")
    assert {k: float(printed[k]) for k in cells} == {k: find(f"glue_dev/S1/{path}", known).value for k, path in cells.items()}


def numbers_in(text: str) -> list[float]:
    "The numbers of a text."
    return [float(n.replace(" ", "")) for n in re.findall(r"\d[\d ]*\d(?:\.\d+)?|\d+(?:\.\d+)?", re.sub(r"(?<=\d) (?=\d{3}\b)", "", text))]


def leaves(node) -> set[float]:
    "All numbers of a YAML file."
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, list):
        return set().union(*map(leaves, node), set())
    return {abs(float(node))} if isinstance(node, int | float) else set()


def test_every_number_of_the_arithmetic_stands_in_a_file_or_counts_cells():
    sources = set().union(*(leaves(yaml.safe_load((REFERENCE / f"{n}.yaml").read_text())) for n in ("published", "facts")))
    for row in ROWS.values():
        left = row["arithmetic"].partition(" = ")[0].partition(" against ")[0]
        strange = set(numbers_in(left)) - sources - {1, 2, 3, 5, 7, 9, 100}
        assert not strange, (row["id"], strange)


def test_no_number_is_typed_in_the_room():
    nodes = ast.walk(ast.parse(Path(claims.__file__).read_text()))
    typed = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, int | float)}
    assert typed <= {0, 0.5, 1, 2, 5, 9, 10, 40, 60, 100, 1e-9}, "halves, counts, percent, widths of lines; scores come from files"


@pytest.mark.parametrize("path, change, name, before, after", [
    (("s0_table1", 0, "cola"), 67.2, "s0_retained", "confirmed", "inconsistent"),
    (("s0_latency_ms", 0, "mrpc"), 9.1, "s0_speed", "rounding", "inconsistent"),
    (("glue_dev", 1, "values", 2), 84.7, "s1_bert_macro", "inconsistent", "confirmed"),
    (("size_speed", 2, "seconds"), 417.5, "s3_faster", "rounding", "confirmed"),
    (("facts", "s1_glue_epochs", "value"), 4, "s1_epochs", "inconsistent", "confirmed"),
    (("facts", "devices", "value"), 16, "hf_batch", "inconsistent", "confirmed"),
])
def test_a_changed_number_changes_the_verdict(path, change, name, before, after):
    changed = copy.deepcopy(numbers())
    node = changed
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = change
    assert ROWS[name]["verdict"] == before and {r["id"]: r for r in audit(changed)}[name]["verdict"] == after


def test_bounds_hold_every_number_that_rounds_to_the_inputs():
    t, s = claims.rounded(79.5), claims.rounded(77.0)
    corners = [b / a for a, b in combinations((79.45, 79.55), (76.95, 77.05))]
    share = s / t
    assert (share.low, share.high) == pytest.approx((min(corners), max(corners)))
    inside = np.random.default_rng(1).uniform([s.low, t.low], [s.high, t.high], (1000, 2))
    assert ((inside[:, 0] / inside[:, 1] >= share.low) & (inside[:, 0] / inside[:, 1] <= share.high)).all()


def test_text_evaluates_to_the_value():
    a, b, c = claims.exact(7), claims.rounded(2.5), claims.rounded(0.5)
    for q in (a - (b + c), a / (b * c), (a - b) * c, a - b - c, a / b / c, (a + b) / (c - a)):
        assert float(eval(q.text.replace("×", "*"))) == pytest.approx(q.value)  # plain numbers and operators, made two lines above


def test_the_three_verdicts_at_their_edges():
    assert claims.judge("97", 96.5, 96.5, 96.5) == "confirmed" and claims.judge("97", 96.49, 96.49, 96.49) == "inconsistent"
    assert claims.judge("2.61", 2.60, 2.57, 2.62) == "rounding" and claims.judge("2.61", 2.60, 2.60, 2.604) == "inconsistent"
    assert claims.judge("60", 64.9, 64.9, 64.9) == "rounding" and claims.judge("60", 65.1, 65.1, 65.1) == "inconsistent"
    assert claims.judge("60.0", 62.9, 62.9, 62.9) == "inconsistent", "a printed decimal is no rounding to tens"


def test_parameter_counts_are_those_of_the_architectures():
    import torch
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in m.parameters()) for m in (BertModel(BertConfig()), DistilBertModel(DistilBertConfig()))]
    assert sizes == [reference("facts")[k]["value"] for k in ("bert_parameters", "distilbert_parameters")]


def test_eight_of_nine_tiny_cells_are_means_and_one_is_neither():
    fits = {(d["task"], d["statistic"]) for d in runs_table().data if d["verdict"] == "confirmed"}
    assert {t for t, s in fits if s == "mean"} == {"CoLA", "MRPC", "QNLI", "QQP", "RTE", "SST-2", "STS-B", "WNLI"}
    assert {t for t, s in fits if s == "median"} == {"WNLI"}, "where all runs are equal"


def test_cells_at_the_floor():
    cells = {(d["model"], d["source"], d["task"]): d["reads"] for d in floor_table().data}
    assert cells["TinyDistilBERT", "S1", "MRPC"] == "below the floor" and cells["BERT-base", "HF_README", "WNLI"] == "below the floor"
    assert cells["DistilBERT", "S3", "WNLI"] == "the floor itself" and cells["TinyDistilBERT", "S1", "RTE"] == "within chance of the floor"
    assert ("DistilBERT", "S1", "RTE") not in cells and ("TinyDistilBERT", "S1", "CoLA") not in cells


def test_table_says_what_is_missing_and_findings_name_each_inconsistency():
    rows = list(ROWS.values())
    shown = claims_table(rows).to_markdown()
    for row in rows:
        if row["verdict"] == "not checkable":
            assert row["missing"].split()[0] in shown
    said = claim_findings(rows).sentences
    for row in rows:
        if row["verdict"] == "inconsistent" and not row["other"]:
            assert any(row["arithmetic"] in s and s.startswith("Inconsistent.") for s in said)
    assert any("Holds by one reading. Cornell poster" in s and "95.566 %" in s for s in said)


def test_own_numbers_stay_in_their_own_table(tmp_path):
    run = create_run(tmp_path / "toy", load_settings("quick", "smoke"), tmp_path)
    assert all(row[2] == "missing" and "distilrepro reproduce" in row[3] for row in own_table(run).blocks[0][1])
    task = run.settings.speed.tasks[0]
    for model, scale in (("teacher", 2.0), ("student", 1.0)):
        passes = [dict(metric="pass_s", value=scale * (1 + k / 10), seed=k, n=9, task=task) for k in range(3)]
        write_records(run, f"speed-{model}", [dict(metric="parameters", value=100 * scale), *passes], stage="speed", model=model)
    cells = {row[0].split("\n")[1]: row[2] for row in own_table(run).blocks[0][1]}
    assert cells["throughput"].startswith("100.0") and cells["time saved"].startswith("50.0") and cells["parameters"] == "50.0"
    assert own_table(run).toy and "toy" in own_table(run).blocks[0][0] and not claims_table(audit()).toy


@pytest.mark.parametrize("path", ["glue_dev/S9/BERT-base/MNLI", "glue_dev/S1/MNLI", "facts/nothing", "nothing"])
def test_a_path_to_nothing_is_named(path):
    with pytest.raises(UserError, match="no number"):
        find(path, numbers())


def test_an_unknown_calculation_is_named():
    with pytest.raises(UserError, match="did you mean 'saved'"):
        check(dict(id="x", value="1", unit="", how="save", of=[]), numbers())
