"""Contenders in processes of their own: the same work for all, in changing order, and nothing counted that was not done."""
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from transformers import BertConfig, BertForMaskedLM

from distilrepro.config import Data, load_settings
from distilrepro.rivals import Job, ours, take_turns
from distilrepro.sources import load_tokenizer


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    "A small fine-tuning of a small BERT."
    folder, tokenizer = tmp_path_factory.mktemp("bert"), load_tokenizer(Data())
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64)
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    args = load_settings("sanh2019", "smoke").finetune
    loop = args.loop.model_copy(update=dict(epochs=2.0, batch=8, lr=1e-3))
    return Job(folder, "mrpc", Data(), args.model_copy(update=dict(max_len=48, max_train=20, max_eval=10, loop=loop)), seed=1)


def test_contenders_take_turns_and_each_begins_once(job):
    told = []
    found = take_turns([job, replace(job, seed=2)], ["ours", "trainer"], lambda job, name, turn: told.append((job.seed, name)))
    assert told == [(j.seed, name) for j, name, _ in found] == [(1, "ours"), (1, "trainer"), (2, "trainer"), (2, "ours")]
    assert all(turn.updates == 6 and turn.train_s > 0 and turn.eval_s > 0 for _, _, turn in found)
    assert all(turn.said.id.equals(found[0][2].said.id) for _, _, turn in found)
    assert found[0][2].said.equals(ours(job).said)  # a process of its own gives the answers of this one
    assert not found[0][2].said.equals(found[3][2].said)  # another seed gives others


def test_a_job_larger_than_its_data_is_refused(job, monkeypatch):
    monkeypatch.setattr("distilrepro.rivals.ProcessPoolExecutor", lambda n, context, begin: ThreadPoolExecutor(n))
    with pytest.raises(RuntimeError, match=r"ours made .* asked for .* 10000000"):
        take_turns([replace(job, args=job.args.model_copy(update={"max_eval": 10_000_000}))], ["ours"])
