"""Silent bugs seen in other reproductions, one named test each, against loops and official outputs.

Elsewhere: B5 replacement shares (test_masking), B16 timing without synchronisation (test_speed), B18 order of MNLI's labels (test_tasks),
B19 medians that are medians (test_tables, test_stats), B20 attention maps under fused attention (test_attention).
Not here: B6 (soft targets for tasks) and B13 (stored teacher outputs) have no room; B14 cannot happen, as no checkpoint is chosen on the
evaluated split: `finetune` evaluates the last weights alone.
"""
import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, get_linear_schedule_with_warmup

from distilrepro.config import Loop, Loss, UserError, load_settings
from distilrepro.distill import Objective, distil_objective, fit, planned_updates
from distilrepro.finetune import load_classifier
from distilrepro.losses import IGNORE, count, soft_ce, triple_loss, vocab_loss
from distilrepro.records import Record
from distilrepro.student import build_student, layer_map
from distilrepro.tasks import TASKS, GlueMetric, get_task

V, D = 29, 8


def bert(layers=2, seed=0):
    torch.manual_seed(seed)
    return BertForMaskedLM(BertConfig(vocab_size=V, hidden_size=D, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=12,
                                      max_position_embeddings=40, initializer_range=0.5)).double().eval()


def batch(lengths, width):
    "Ids, attention and labels, padded."
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE)
    for i, n in enumerate(lengths):
        ids[i, :n] = torch.randint(5, V, (n,), generator=torch.Generator().manual_seed(i))
        labels[i, 1:n:3] = ids[i, 1:n:3]
    return ids, (torch.arange(width) < torch.tensor(lengths)[:, None]).long(), labels


@pytest.fixture(scope="module")
def models():
    teacher = bert(4)
    return build_student(teacher, dropout=0.0, token_type="fold", mlm_transform=True)[0].double().eval(), teacher


@pytest.fixture(scope="module")
def naive(models):
    "The three terms by a loop over real tokens of the models' official outputs."
    def compute(ids, attention, labels, T):
        with torch.no_grad():
            s, t = (m(ids, attention_mask=attention, output_hidden_states=True) for m in models)
        terms = {"ce": [], "mlm": [], "cos": []}
        for i, j in attention.nonzero().tolist():
            q, p = s.logits[i, j].div(T).log_softmax(0), t.logits[i, j].div(T).log_softmax(0)
            terms["ce"].append(T**2 * sum(p[v].exp() * (p[v] - q[v]) for v in range(V)).item())
            a, b = s.hidden_states[-1][i, j], t.hidden_states[-1][i, j]
            terms["cos"].append(1 - (a @ b / (a.norm() * b.norm())).item())
            if labels[i, j] != IGNORE:
                terms["mlm"].append(-s.logits[i, j].log_softmax(0)[labels[i, j]].item())
        return {k: float(np.mean(v)) for k, v in terms.items()}
    return compute


def terms(models, *inputs, **loss):
    total, parts = triple_loss(*models, *inputs, Loss(**loss), count(inputs[1], inputs[2]))
    return total.item(), {k: v.item() for k, v in parts.items()}


@pytest.mark.parametrize("T", [1.0, 2.0, 5.0])
def test_b01_the_divergence_is_a_mean_over_tokens(models, naive, T):
    inputs = batch([9, 5, 7], 9)
    total, parts = terms(models, *inputs, temperature=T)
    want = naive(*inputs, T)
    assert parts == {k: pytest.approx(v, rel=1e-6) for k, v in want.items()}
    assert total == pytest.approx(5 * want["ce"] + 2 * want["mlm"] + want["cos"], rel=1e-6)


def test_b01_twice_the_rows_leave_the_mean():
    g = torch.Generator().manual_seed(0)
    s, t = (torch.randn(7, V, generator=g) for _ in range(2))
    once, twice = soft_ce(s, t, 2.0) / 7, soft_ce(s.repeat(2, 1), t.repeat(2, 1), 2.0) / 14
    torch.testing.assert_close(once, twice)


@pytest.mark.parametrize("width", [10, 33])
def test_b02_padding_is_in_no_term(models, naive, width):
    tight, padded = terms(models, *batch([9, 5, 7], 9)), terms(models, *batch([9, 5, 7], width))
    assert padded[0] == pytest.approx(tight[0], rel=1e-9)
    assert padded[1] == {k: pytest.approx(v, rel=1e-9) for k, v in tight[1].items()}


def test_b03_the_cosine_is_taken_token_by_token(models):
    ids, attention, labels = batch([6, 4], 6)
    with torch.no_grad():
        s, t = (m.base_model(input_ids=ids, attention_mask=attention).last_hidden_state for m in models)
    by_token = np.mean([1 - torch.cosine_similarity(s[i, j], t[i, j], dim=0).item() for i, j in attention.nonzero().tolist()])
    cls_only = np.mean([1 - torch.cosine_similarity(s[i, 0], t[i, 0], dim=0).item() for i in range(2)])
    got = terms(models, ids, attention, labels)[1]["cos"]
    assert got == pytest.approx(by_token, rel=1e-6) and abs(got - cls_only) > 1e-4


def test_b04_identical_stacks_align_their_last_layers():
    teacher = bert(3)
    student, _ = build_student(teacher, (0, 1, 2), token_type="fold", mlm_transform=True, dropout=0.0)
    parts = terms((student.double().eval(), teacher), *batch([8, 6], 8))[1]
    assert parts["cos"] == pytest.approx(0, abs=1e-9) and parts["ce"] == pytest.approx(0, abs=1e-9)
    shallower, _ = build_student(teacher, (0, 1), token_type="fold", mlm_transform=True, dropout=0.0)
    assert terms((shallower.double().eval(), teacher), *batch([8, 6], 8))[1]["cos"] > 1e-3


def test_b07_every_mapped_tensor_is_copied_and_counted():
    teacher = bert(12)
    student, book = build_student(teacher)
    own, theirs = student.state_dict(), teacher.state_dict()
    copied = [(r.tensor, r.source) for r in book.itertuples() if r.fate == "copied"]
    assert len(copied) == 4 + 6 * 16 + 2
    assert all(torch.equal(own[s], theirs[t].to(own[s].dtype)) for s, t in copied)
    for i, j in enumerate([0, 2, 4, 7, 9, 11]):
        a, b = own[f"distilbert.transformer.layer.{i}.ffn.lin1.weight"], theirs[f"bert.encoder.layer.{j}.intermediate.dense.weight"]
        assert torch.equal(a, b.to(a.dtype))


def test_b08_the_papers_map_is_the_papers():
    assert layer_map("paper", 12) == layer_map("paper", 12, 6) == (0, 2, 4, 7, 9, 11)
    assert layer_map("every_other", 12) == (0, 2, 4, 6, 8, 10)
    assert load_settings("sanh2019").student.layer_map == "paper"


def test_b09_a_few_dozen_updates_are_refused():
    with pytest.raises(UserError, match="only 27 optimizer updates.*min_updates=1000"):
        planned_updates(Loop(epochs=3, batch=16, accumulation=256), 2300)


class Tokens:
    tokens = 1

    def __add__(self, other):
        return self


@dataclasses.dataclass
class Item:
    counts: Tokens


def test_b10_warm_up_is_counted_in_updates():
    model = torch.nn.Linear(1, 1)
    objective = Objective(np.full(80, 4), lambda ids, epoch, number: Item(Tokens()), lambda batch, counts: (model.weight.sum() ** 2, {}))
    loop = Loop(epochs=1, batch=1, accumulation=4, lr=1e-2, warmup=0.25, min_updates=1, log_every=1)
    log = fit(model, objective, loop)
    official = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=1e-2)
    schedule, want = get_linear_schedule_with_warmup(official, 5, 20), []
    for _ in range(20):
        want.append(schedule.get_last_lr()[0])
        official.step()
        schedule.step()
    assert [e["lr"] for e in log] == pytest.approx(want)
    assert max(want) == want[5] == 1e-2, "80 micro-batches, 20 updates, 5 of them warm-up"


def test_b11_the_gradient_hardly_depends_on_the_temperature():
    g = torch.Generator().manual_seed(0)
    s, t = (0.3 * torch.randn(50, V, generator=g, dtype=torch.float64) for _ in range(2))
    def size(T):
        x = s.clone().requires_grad_()
        return torch.autograd.grad(soft_ce(x, t, T), x)[0].norm().item()
    reference = size(1.0)
    assert all(0.8 < size(T) / reference < 1.25 for T in (2.0, 4.0, 8.0))


def test_b11_squared_temperature_is_there_without_labels_too():
    g = torch.Generator().manual_seed(1)
    rows, t_rows = (torch.randn(6, D, generator=g) for _ in range(2))
    head, t_head = ((torch.randn(V, D, generator=g), torch.randn(V, generator=g)) for _ in range(2))
    labels = torch.full((6,), IGNORE)
    s, t = rows @ head[0].T + head[1], t_rows @ t_head[0].T + t_head[1]
    for T in (1.0, 3.0):
        p, q = (t / T).softmax(-1), (s / T).softmax(-1)
        want = T**2 * (p * (p / q).log()).sum()
        loss, kl, ce = vocab_loss(rows, head, t_rows, t_head, labels, T, 1.0, 1.0)
        torch.testing.assert_close((loss, kl), (want, want), rtol=1e-4, atol=1e-4)
        assert ce == 0


def test_b12_the_teacher_is_deterministic_though_handed_over_in_train_mode():
    teacher = bert().train()
    student, _ = build_student(teacher, dropout=0.0)
    objective = distil_objective(student.double().eval(), teacher, FakeText(), Loss())
    inputs = batch([8, 6], 8)
    item = type("Batch", (), dict(ids_bl=inputs[0], attention_bl=inputs[1], labels_bl=inputs[2]))
    losses = [objective.loss(item, count(*inputs[1:]))[0].item() for _ in range(3)]
    assert losses[0] == losses[1] == losses[2]


class FakeText:
    store = type("Store", (), {"lengths": np.array([8, 6])})


def test_b12_the_loss_is_zero_only_for_the_teacher_itself(models):
    inputs = batch([8, 6], 8)
    teacher = models[1]
    alike = terms((teacher, teacher), *inputs)[1]
    assert alike["ce"] == pytest.approx(0, abs=1e-9) and alike["cos"] == pytest.approx(0, abs=1e-9)
    other = terms((bert(4, seed=9), teacher), *inputs)[1]
    assert other["ce"] > 0.1 and other["cos"] > 0.1


def test_b15_metric_and_split_are_part_of_a_result():
    assert {"metric", "split", "n", "task"} <= set(Record.model_fields)
    assert TASKS["cola"].metrics == ("matthews_correlation",)
    constant = GlueMetric("cola").compute(predictions=[1, 1, 1, 1], references=[1, 1, 1, 0])
    assert constant == {"matthews_correlation": 0.0}, "not the accuracy of 0.75"
    official = {"cola": 1043, "sst2": 872, "mrpc": 408, "stsb": 1500, "qqp": 40430, "mnli": 9815, "qnli": 5463, "rte": 277, "wnli": 71}
    assert {t: TASKS[t].eval_size for t in official} == official, "the official dev sets, never a new split"


def test_b17_weights_under_other_names_are_refused(tmp_path):
    bert().float().save_pretrained(tmp_path)
    whole = load_classifier(tmp_path, get_task("rte"), 0)
    weights = load_file(tmp_path / "model.safetensors")
    assert torch.equal(whole.bert.encoder.layer[1].output.dense.weight, weights["bert.encoder.layer.1.output.dense.weight"])
    renamed = {k.replace("bert.encoder.layer.1.output", "model.layer.1.out"): v for k, v in weights.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks tensors of the encoder.*layer.1.output"):
        load_classifier(tmp_path, get_task("rte"), 0)
