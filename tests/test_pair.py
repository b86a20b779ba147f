"""A pair: answers in the order of the examples, checked against the saved models; everything that does not fit is refused."""
import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from distilrepro.config import UserError, finetune_for, load_settings
from distilrepro.finetune import evaluate_model
from distilrepro.pair import load_eager, load_pair, probabilities, shared_tokenizer, state_case
from distilrepro.records import create_run, read_predictions, write_predictions
from distilrepro.sources import load_tokenizer
from distilrepro.stages import tuned_folder
from distilrepro.tasks import get_task

TASKS = ("sst2", "imdb", "stsb")


def models(words, labels, seed):
    "An untrained teacher and student."
    torch.manual_seed(seed)
    shape = dict(vocab_size=words, num_labels=labels, max_position_embeddings=160, initializer_range=0.2)
    bert = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **shape)
    distil = DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=32, **shape)
    return dict(teacher=BertForSequenceClassification(bert), student=DistilBertForSequenceClassification(distil))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of the small language whose fine-tuned models are untrained ones; predictions are stored in another order."
    root = tmp_path_factory.mktemp("pair")
    sets = (f"grid.tasks=[{','.join(TASKS)}]", "grid.seeds=[5,6]", "finetune.max_eval=30")
    run = create_run(root / "demo", load_settings("quick", "smoke", sets), root)
    tokenizer = load_tokenizer(run.settings.data)
    for task in TASKS:
        for name, model in models(len(tokenizer), get_task(task).num_labels, 0).items():
            folder = tuned_folder(run, name, task)
            for saved in (model, tokenizer):
                saved.save_pretrained(folder)
            table, _ = evaluate_model(folder, task, run.settings.data, finetune_for(run.settings, task))
            write_predictions(run, folder.name, table.sample(frac=1, random_state=1))
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        root / "mlm")
    return run


@pytest.mark.parametrize("task", TASKS)
def test_all_parts_speak_of_the_same_examples_in_one_order(run, task):
    pair = load_pair(run, task)
    ids, labels = [r["id"] for r in pair.rows], [r["label"] for r in pair.rows]
    assert len(ids) == 30 and pair.texts.id.tolist() == ids and pair.folders["student"].name == f"finetune-student-{task}-5"
    for said in pair.answers.values():
        assert said.id.tolist() == ids and said.label.tolist() == labels
    fields = get_task(task).fields
    for row, words in zip(pair.rows, pair.texts[list(fields)].itertuples(index=False), strict=True):
        assert pair.tokenizer(*words)["input_ids"][:40] == row["input_ids"][:40].tolist()


def test_answers_are_those_of_the_models_one_example_at_a_time(run):
    pair = load_pair(run, "sst2")
    for name, said in pair.answers.items():
        model = load_eager(pair.folders[name])
        for row, logits in zip(pair.rows[:10], said[["logit_0", "logit_1"]].to_numpy(), strict=False):
            with torch.inference_mode():
                assert model(torch.as_tensor(row["input_ids"])[None]).logits[0].numpy() == pytest.approx(logits, abs=1e-4)


def test_the_truth_comes_along_where_there_is_one(run):
    texts = load_pair(run, "sst2").texts
    assert all(max(json.loads(t)["words"]) < len(s.split()) for t, s in zip(texts.truth, texts.sentence, strict=True))


def test_any_folder_can_stand_in(run):
    own, teacher = load_pair(run, "sst2"), tuned_folder(run, "teacher", "sst2")
    pair = load_pair(run, "sst2", student=str(teacher))
    assert pair.folders == dict(student=teacher, teacher=teacher)
    assert np.allclose(probabilities(pair.answers["student"]), probabilities(own.answers["teacher"]), atol=1e-5)
    assert not np.allclose(probabilities(own.answers["student"]), probabilities(own.answers["teacher"]), atol=1e-2), "a test that can fail"


def test_both_given_need_no_fine_tuning_of_the_run(run):
    folders = [str(tuned_folder(run, m, "sst2")) for m in ("student", "teacher")]
    assert len(load_pair(run, "cola", *folders).rows) == 30
    with pytest.raises(UserError, match="unknown task in run demo 'cola'"):
        load_pair(run, "cola", student=folders[0])


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_a_stale_checkpoint_is_noticed(run, task):
    unit = tuned_folder(run, "student", task).name
    said = read_predictions(run, unit)
    column = "score" if task == "stsb" else "logit_0"
    try:
        write_predictions(run, unit, said.assign(**{column: said[column] + 0.5}))
        with pytest.raises(UserError, match="does not give the stored answers"):
            load_pair(run, task)
        for other in (said.iloc[1:], said.assign(label=said.label.max() - said.label), said.assign(id=said.id + 1)):
            write_predictions(run, unit, other)
            with pytest.raises(UserError, match="answered other examples"):
                load_pair(run, task)
    finally:
        write_predictions(run, unit, said)


def test_models_that_are_no_pair_are_refused(run, tmp_path):
    mlm = run.folder.parent / "mlm"
    with pytest.raises(UserError, match="lacks tensors .*classifier.bias"):
        load_pair(run, "sst2", student=str(mlm))
    with pytest.raises(UserError, match="no model in"):
        load_pair(run, "sst2", teacher=str(tmp_path))
    with pytest.raises(UserError, match="1 outputs, sst2 needs 2"):
        load_pair(run, "sst2", student=str(tuned_folder(run, "student", "stsb")))
    with pytest.raises(UserError, match="squad are texts"):
        load_pair(run, "squad")


def test_another_vocabulary_is_refused_though_it_is_as_large(run, tmp_path):
    tokenizer = load_tokenizer(run.settings.data)
    words = list(tokenizer.get_vocab())
    BertTokenizer(vocab={w: i for i, w in enumerate([*words[:5], *reversed(words[5:])])}).save_pretrained(tmp_path)
    models(len(words), 2, 0)["student"].save_pretrained(tmp_path)
    with pytest.raises(UserError, match="read different tokens"):
        load_pair(run, "sst2", student=str(tmp_path))


def test_a_truncation_saved_with_a_tokenizer_makes_no_difference(run, tmp_path):
    cut = load_tokenizer(run.settings.data)
    cut("a long review of a film", truncation=True, max_length=4)
    cut.save_pretrained(tmp_path)
    shared_tokenizer(dict(student=tmp_path, teacher=tuned_folder(run, "teacher", "sst2")))


def test_class_ten_does_not_come_before_class_two():
    logits = np.arange(12.0)[None]
    table = pd.DataFrame({f"logit_{c}": logits[:, c] for c in sorted(range(12), key=str)})
    assert (np.diff(probabilities(table)[0]) > 0).all()
    with pytest.raises(UserError, match="regression"):
        probabilities(pd.DataFrame({"id": [1], "label": [2.5], "prediction": [2.0]}))


def test_a_case_is_stated_with_names_of_classes(run):
    pair = load_pair(run, "sst2")
    row, p = pair.rows[4], probabilities(pair.answers["teacher"])[4]
    facts = state_case(pair, row["id"], "why")[""]
    assert facts.to_dict() == facts.to_dict() | dict(chosen="why", label=("negative", "positive")[row["label"]])
    assert facts["teacher"] == f"{('negative', 'positive')[p.argmax()]} (probability {p.max():.2f})"
    assert facts["text"].replace(" ", "") == pair.texts.sentence[4].replace(" ", "")
    with pytest.raises(UserError, match="no example -1 among the 30 evaluated ones of sst2"):
        state_case(pair, -1, "")


def test_both_parts_of_a_pair_of_sentences_are_stated(run):
    pair = load_pair(run, "stsb")
    first, second = pair.texts.loc[0, ["sentence1", "sentence2"]]
    classes = dataclasses.replace(pair, task=get_task("mrpc"), rows=[r | dict(label=1) for r in pair.rows],
                                  answers={m: t.assign(logit_0=0.0, logit_1=1.0) for m, t in pair.answers.items()})
    assert state_case(classes, pair.rows[0]["id"], "").loc["text", ""].replace(" ", "") == f"{first}/{second}".replace(" ", "")
