"""Size and speed: counts against naive loops and PyTorch's counter, and a harness whose order, threads and clock are watched."""
import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    DistilBertModel,
)

from distilrepro import speed
from distilrepro.config import UserError
from distilrepro.speed import disk_mb, flops_per_token, formula_parameters, interleaved_passes, parameter_counts, time_call, time_pass


def bert(layers=2, width=32, ffn=64, vocab=50):
    return BertConfig(vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=ffn,
                      max_position_embeddings=64, num_labels=2)


def distil(layers=2, width=32, ffn=64, vocab=50):
    return DistilBertConfig(vocab_size=vocab, dim=width, n_layers=layers, n_heads=4, hidden_dim=ffn,
                            max_position_embeddings=64, num_labels=2)


def examples(count=6):
    return [dict(input_ids=np.full(n, 7), token_type_ids=np.zeros(n, int), label=0, id=n) for n in range(4, 4 + count)]


@pytest.mark.parametrize("model", [
    BertModel(bert()), BertForMaskedLM(bert()), BertForSequenceClassification(bert()),
    DistilBertModel(distil()), DistilBertForMaskedLM(distil()), DistilBertForSequenceClassification(distil()),
], ids=lambda m: type(m).__name__)
def test_counts_equal_distinct_storages(model):
    "Tied tensors share memory: count each piece of memory once."
    storages = {p.untyped_storage().data_ptr(): p.numel() for p in model.parameters()}
    counts = parameter_counts(model)
    assert counts["total"] == sum(storages.values())
    assert counts["total"] == sum(v for k, v in counts.items() if k != "total")
    assert counts["embeddings"] == sum(p.numel() for p in model.base_model.embeddings.parameters())


def test_tied_decoder_is_not_counted_twice():
    model = DistilBertForMaskedLM(distil())
    assert model.vocab_projector.weight is model.distilbert.embeddings.word_embeddings.weight
    assert parameter_counts(model)["head"] == 32 * 32 + 32 + 2 * 32 + 50  # transform, its norm, the decoder's bias


@settings(max_examples=15, deadline=None)
@given(layers=st.integers(1, 4), width=st.sampled_from([8, 16, 40]), ffn=st.integers(1, 50), vocab=st.integers(5, 90))
def test_formula_equals_count(layers, width, ffn, vocab):
    with torch.device("meta"):
        for config, kind in ((bert(layers, width, ffn, vocab), BertModel), (distil(layers, width, ffn, vocab), DistilBertModel)):
            assert formula_parameters(config) == parameter_counts(kind(config))["total"]


@settings(max_examples=10, deadline=None)
@given(layers=st.integers(1, 3), width=st.sampled_from([8, 16]), ffn=st.integers(2, 40), length=st.integers(2, 30))
def test_flops_equal_pytorchs_counter(layers, width, ffn, length):
    for model in (BertModel(bert(layers, width, ffn), add_pooling_layer=False), DistilBertModel(distil(layers, width, ffn))):
        model.set_attn_implementation("eager")  # the fused kernel's products are not counted
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(torch.ones(1, length, dtype=torch.long))
        assert counter.get_total_flops() == length * flops_per_token(model.config, length)


def test_disk_counts_weights_alone(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"x" * 1500)
    (tmp_path / "b.safetensors").write_bytes(b"x" * 500)
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 9000)
    assert disk_mb(tmp_path) == pytest.approx(0.002)
    with pytest.raises(UserError, match="no \\*.safetensors"):
        disk_mb(tmp_path / "missing")


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps"])
def test_b16_timer_refuses_an_accelerator_without_synchronise(device):
    "B16: a GPU call returns before its work is done."
    with pytest.raises(UserError, match="measures the queue"):
        time_call(lambda: None, device)


def test_clock_runs_between_two_waits(monkeypatch):
    log, ticks = [], iter([10.0, 12.5])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: (log.append("tick"), next(ticks))[1])
    assert time_call(lambda: log.append("work"), "cuda", lambda: log.append("wait")) == 2.5
    assert log == ["wait", "tick", "work", "wait", "tick"]


class Spy(nn.Module):
    "Notes how it is called."
    def __init__(self, name, log):
        super().__init__()
        self.name, self.log, self.weight = name, log, nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, attention_mask):
        self.log.append((self.name, input_ids.shape[1], self.training, torch.is_inference_mode_enabled(), torch.get_num_threads()))


def test_models_take_turns_and_state_is_put_back():
    log, threads = [], torch.get_num_threads()
    models = {"a": Spy("a", log), "b": Spy("b", log).eval()}
    table = interleaved_passes(models, examples(3), warmup=2, repeats=3, threads=2)
    assert table.model.tolist() == list("abbaab") and table.repeat.tolist() == [0, 0, 1, 1, 2, 2]
    assert [name for name, *_ in log] == [m for m in "abbaab" for _ in range(2 + 3)], "two of warm-up, then the pass"
    assert [length for _, length, *_ in log[:5]] == [4, 5, 4, 5, 6]
    assert {rest for _, _, *r in log for rest in [tuple(r)]} == {(False, True, 2)}, "eval, inference mode, pinned threads"
    assert models["a"].training and not models["b"].training and torch.get_num_threads() == threads


def test_state_is_put_back_after_a_failure():
    class Broken(Spy):
        def forward(self, **kwargs):
            raise ValueError("broken")
    model, threads = Broken("x", []), torch.get_num_threads()
    with pytest.raises(ValueError, match="broken"):
        interleaved_passes({"x": model}, examples(2), threads=threads + 1)
    assert model.training and torch.get_num_threads() == threads


def test_percentiles_and_sum_come_from_the_same_latencies(monkeypatch):
    seconds = np.arange(1, 101) / 1000
    monkeypatch.setattr(speed, "time_pass", lambda *_: seconds)
    row = interleaved_passes({"x": nn.Linear(1, 1)}, examples(1), repeats=1).iloc[0]
    assert (row.pass_s, row.p50_ms, row.p95_ms) == (pytest.approx(5.05), pytest.approx(50.5), pytest.approx(95.05))


def test_timing_leaves_weights_alone():
    model = BertForSequenceClassification(bert())
    before = copy.deepcopy(model.state_dict())
    assert time_pass(model, examples(3), warmup=1).shape == (3,)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("models, rows, repeats", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_nothing_to_time_is_the_users_mistake(models, rows, repeats):
    with pytest.raises(UserError, match=f"no work: {models} models, {rows} examples, {repeats} repeats"):
        interleaved_passes({"x": nn.Linear(1, 1)} if models else {}, examples(rows), repeats=repeats)
