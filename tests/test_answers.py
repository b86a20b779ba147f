"Files of answers are marked by the official rules, and every mistake in them is one sentence, through the very command."
import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from distilrepro.answers import check_ids, mark_answers, read_answers
from distilrepro.config import Data, UserError
from distilrepro.tasks import get_task

CONTEXT = "The cat sat on the red mat in the big house ."


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "A folder in the local layout with a few rows of four tasks."
    folder = tmp_path_factory.mktemp("answers")
    rng = np.random.default_rng(0)
    pairs = dict(sentence1=["a b"] * 40, sentence2=["c"] * 40, idx=range(40))
    sets = {
        "cola": dict(sentence=["a b"] * 40, label=rng.integers(0, 2, 40), idx=range(40)),
        "mrpc": pairs | dict(label=rng.integers(0, 2, 40)), "rte": pairs | dict(label=rng.integers(0, 2, 40)),
        "stsb": pairs | dict(label=rng.uniform(0, 5, 40)),
        "squad": dict(id=["q1", "q2", "q3"], title=["t"] * 3, context=[CONTEXT] * 3, question=["who ?", "where ?", "what ?"],
                      answers=[dict(text=["The cat", "cat"], answer_start=[0, 4]), dict(text=["the big house"], answer_start=[30]),
                               dict(text=["red mat"], answer_start=[19])]),
    }
    for name, columns in sets.items():
        (folder / name).mkdir()
        pd.DataFrame(columns).to_parquet(folder / name / "validation.parquet")
    return Data(source="local", dir=str(folder))


def truth(data, task):
    return pd.read_parquet(f"{data.dir}/{task}/validation.parquet").label.to_numpy()


def official(task, label, said):
    "The metrics by scikit-learn and scipy."
    if task == "cola":
        return {"matthews_correlation": matthews_corrcoef(label, said)}
    if task == "stsb":
        return {"pearson": pearsonr(label, said)[0], "spearmanr": spearmanr(label, said)[0]}
    return {"accuracy": np.mean(label == said), "f1": f1_score(label, said)} if task == "mrpc" else {"accuracy": np.mean(label == said)}


@pytest.mark.parametrize("task", ["cola", "mrpc", "rte", "stsb"])
@pytest.mark.parametrize("kind", ["tsv", "csv", "parquet"])
def test_scores_are_the_official_ones_in_any_order_of_rows(data, tmp_path, task, kind):
    rng = np.random.default_rng(1)
    said = rng.uniform(0, 5, 40) if task == "stsb" else rng.integers(0, 2, 40)
    table = pd.DataFrame({"index": range(40), "prediction": said}).sample(frac=1, random_state=2)
    path = tmp_path / f"a.{kind}"
    {"tsv": lambda: table.to_csv(path, sep="\t", index=False), "csv": lambda: table.to_csv(path, index=False),
     "parquet": lambda: table.to_parquet(path)}[kind]()
    n, found = mark_answers(path, task, data)
    want = official(task, truth(data, task), said)
    assert n == 40 and {k: found[k] for k in want} == pytest.approx(want)
    assert found["score"] == pytest.approx(np.mean(list(want.values())))


def test_class_names_are_those_of_the_glue_server(data, tmp_path):
    names = get_task("rte").labels  # entailment is 0
    table = pd.DataFrame({"index": range(40), "prediction": [names[i] for i in truth(data, "rte")]})
    table.to_csv(tmp_path / "RTE.tsv", sep="\t", index=False)
    assert mark_answers(tmp_path / "RTE.tsv", "rte", data)[1]["accuracy"] == 1
    assert read_answers(tmp_path / "RTE.tsv", get_task("rte")).tolist() == truth(data, "rte").tolist()


def test_squad_by_hand(data, tmp_path):
    said = {"q1": "a cat!", "q2": "in the house", "q3": "dog"}
    (tmp_path / "a.json").write_text(json.dumps(said))
    n, found = mark_answers(tmp_path / "a.json", "squad", data)
    # q1: "cat" is a gold: 1 and 1. q2: {in, house} and {big, house}: one word shared of two and two: F1 1/2. q3: 0.
    assert n == 3 and found["exact_match"] == pytest.approx(1 / 3) and found["f1"] == pytest.approx(1.5 / 3)


@pytest.mark.parametrize(("given", "words"), [
    ({"q1": "x"}, ["missing ids: 2", "q2"]), ({"q1": "", "q2": "", "q3": "", "q9": ""}, ["unknown ids: 1", "q9"]),
    (["x"], ["list", "mapping"]), ({"q1": 3, "q2": "", "q3": ""}, ["3", "q1"]),
])
def test_squad_answers_that_do_not_fit_are_named(data, tmp_path, given, words):
    (tmp_path / "a.json").write_text(json.dumps(given))
    with pytest.raises(UserError) as e:
        mark_answers(tmp_path / "a.json", "squad", data)
    assert [w for w in words if w not in str(e.value)] == []


@pytest.mark.parametrize(("table", "words"), [
    (dict(index=range(39), prediction=[0] * 39), ["missing ids: 1", "39"]),
    (dict(index=range(41), prediction=[0] * 41), ["unknown ids: 1", "40"]),
    (dict(index=[*range(39), 0], prediction=[0] * 40), ["there twice"]),
    (dict(index=range(40), prediction=[7] * 40), ["7", "0..1"]),
    (dict(index=range(40), prediction=["maybe"] * 40), ["'maybe'", "acceptable"]),
    (dict(index=range(40), answer=[0] * 40), ["no column prediction"]),
])
def test_glue_answers_that_do_not_fit_are_named(data, tmp_path, table, words):
    pd.DataFrame(table).to_csv(tmp_path / "a.tsv", sep="\t", index=False)
    with pytest.raises(UserError) as e:
        mark_answers(tmp_path / "a.tsv", "cola", data)
    assert [w for w in words if w not in str(e.value)] == []


def test_files_that_are_no_tables_are_named(data, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no more")
    (tmp_path / "a.xlsx").write_bytes(b"")
    for name, words in {"a.parquet": "not a readable parquet file", "a.xlsx": ".tsv, .csv, .parquet", "none.tsv": "could not read"}.items():
        with pytest.raises(UserError, match=words):
            mark_answers(tmp_path / name, "cola", data)


def test_ids_are_compared_as_sets():
    check_ids("cola", {"1", "2"}, {"2", "1"})
    with pytest.raises(UserError, match="missing ids: 1, such as 3"):
        check_ids("cola", {"1", "2"}, {"1", "2", "3"})


def test_one_call_of_the_command_marks_a_file(data, tmp_path, command):
    (tmp_path / "a.json").write_text(json.dumps({"q1": "cat", "q2": "big house", "q3": "red mat"}))
    code, out, err = command("evaluate", "squad", "--predictions", tmp_path / "a.json", "--data", data.dir)
    assert code == 0 and "100.0" in out and "squad, 3 examples" in out, err
    (tmp_path / "b.json").write_text("{}")
    code, _, err = command("evaluate", "squad", "--predictions", tmp_path / "b.json", "--data", data.dir)
    assert code == 2 and "missing ids: 3" in err and "Traceback" not in err
    code, _, err = command("evaluate", "squad", "--data", data.dir)
    assert code == 2 and "either --model DIR or --predictions FILE" in err
