"Likeness inside: divergences against scipy, heads found again, CKA by its definition and its symmetries, a run from start to end."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file
from scipy.spatial.distance import jensenshannon
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

from distilrepro.config import UserError, load_settings
from distilrepro.likeness import (
    KINDS,
    Products,
    as_encoder,
    compare_heads,
    compare_inside,
    compare_stages,
    head_divergences,
    heads_figure,
    held_out,
    js_divergence,
    layers_figure,
    likeness_sentences,
    linear_cka,
    load_encoder,
    look_inside,
    match_heads,
    stage_table,
    stream_products,
    student_stages,
)
from distilrepro.records import create_run
from distilrepro.stages import distil_stage, teacher_stage
from distilrepro.student import build_student

SHAPE = dict(vocab_size=40, hidden_size=24, num_hidden_layers=4, num_attention_heads=4, intermediate_size=32, max_position_embeddings=32,
             initializer_range=0.4)
SETS = ("data.documents=300", "data.heldout_tokens=600", "teacher.layers=4", "teacher.loop.max_updates=4", "teacher.loop.min_updates=2",
        "student.layers=2", "distil.max_updates=6", "distil.min_updates=2", "distil.save_every=2", "distil.log_every=3")


@pytest.fixture(scope="module")
def models():
    "A teacher with its head, and a student cut from it with the token types folded in: its first layer does what its original does."
    torch.manual_seed(0)
    teacher = BertForMaskedLM(BertConfig(**SHAPE)).eval()
    return as_encoder(build_student(teacher, token_type="fold")[0]), as_encoder(teacher)


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [rng.integers(1, 40, n) for n in (5, 9, 12, 7, 16, 11)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("likeness") / "run"
    run = create_run(folder, load_settings("sanh2019", "smoke", SETS), folder.parent)
    teacher_stage(run)
    distil_stage(run)
    return run


# without subnormal numbers: half of the smallest is 0, and scipy divides by it
rows = arrays(float, 7, elements=st.floats(0, 1, allow_subnormal=False)).filter(lambda v: v.sum() > 0.1).map(lambda v: v / v.sum())


@settings(max_examples=80)
@given(rows, rows)
def test_divergence_is_scipys_bounded_symmetric_and_zero_for_equals(p, q):
    a, b = torch.tensor(p), torch.tensor(q)
    value = js_divergence(a, b).item()
    assert 0 <= value <= 1 and value == js_divergence(b, a).item() and js_divergence(a, a).item() == pytest.approx(0, abs=1e-12)
    assert value == pytest.approx(np.nan_to_num(jensenshannon(p, q, base=2)) ** 2, abs=1e-7)


def test_rows_without_a_common_token_differ_by_one_bit():
    assert js_divergence(torch.tensor([0.5, 0.5, 0, 0]), torch.tensor([0, 0, 0.2, 0.8])).item() == pytest.approx(1)


def test_divergences_of_heads_are_those_of_a_loop(models, texts):
    found = head_divergences(*models, texts[:2])
    assert found.shape == (2, 2, 4, 4, 4)
    for i, ids in enumerate(texts[:2]):
        s, t = (look_inside(m, ids)[0].numpy() for m in models)
        for place in ((0, 0, 1, 2), (1, 3, 0, 0), (1, 2, 3, 1)):
            own, source, a, b = place
            expected = np.mean([jensenshannon(s[own, a, k], t[source, b, k], base=2) ** 2 for k in range(len(ids))])
            assert found[i][place] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 0, 2, 1), (1, 0, 3, 2)])
def test_heads_that_were_shuffled_inside_the_model_are_found_again(models, texts, order):
    "Not the maps are shuffled but the weights that make them."
    teacher = models[1]
    shuffled = BertModel(BertConfig(**SHAPE)).eval()
    shuffled.load_state_dict(teacher.state_dict(), strict=False)
    attention = shuffled.encoder.layer[0].attention
    rows_of = torch.cat([torch.arange(6 * h, 6 * h + 6) for h in order])
    with torch.no_grad():
        for part in (attention.self.query, attention.self.key, attention.self.value):
            part.weight.copy_(part.weight[rows_of])
            part.bias.copy_(part.bias[rows_of])
        attention.output.dense.weight.copy_(attention.output.dense.weight[:, rows_of])
    found = compare_heads(head_divergences(as_encoder(shuffled), teacher, texts), (0, 1, 2, 3))
    assert found.teacher_head[found.layer == 0].tolist() == list(order)
    assert found.matched.max() < 1e-5, "the layer's output did not change, so all later heads are the teacher's too"
    assert (found.same[:4].to_numpy() > 0.01).tolist() == [h != i for i, h in enumerate(order)]


def test_matching_is_the_best_of_all_orders_and_fewer_heads_are_allowed():
    from itertools import permutations

    cost = np.random.default_rng(1).random((4, 5))
    best = min(permutations(range(5), 4), key=lambda p: cost[range(4), list(p)].sum())
    assert match_heads(cost).tolist() == list(best)
    with pytest.raises(UserError, match="the student has 5 heads in a layer, the teacher 4"):
        match_heads(cost.T)


def test_heads_are_matched_on_some_sequences_and_reported_on_others():
    rng = np.random.default_rng(2)
    divergences = rng.random((6, 2, 3, 4, 4))
    found = compare_heads(divergences, (0, 2))
    fit, report = divergences[[0, 2, 4]].mean(0), divergences[[1, 3, 5]].mean(0)
    second = found[found.layer == 1]
    heads = match_heads(fit[1, 2])
    assert second.teacher_head.tolist() == heads.tolist() and second.matched.tolist() == pytest.approx(report[1, 2][range(4), heads])
    assert second.same.tolist() == pytest.approx(report[1, 2].diagonal())
    assert second.shuffled.tolist() == pytest.approx(report[1, 2].mean(1))
    others = [report[1, u][range(4), match_heads(fit[1, u])] for u in (0, 1)]
    assert second.elsewhere.tolist() == pytest.approx(np.mean(others, axis=0))


def test_one_layer_has_no_other_layers_and_fewer_heads_no_same_number():
    found = compare_heads(np.random.default_rng(0).random((2, 1, 1, 2, 3)), (0,))
    assert found.elsewhere.isna().all() and found.same.isna().all() and found.matched.notna().all()
    with pytest.raises(UserError, match="one sequence cannot be split"):
        compare_heads(np.zeros((1, 1, 1, 2, 2)), (0,))


def gram_cka(x, y):
    "CKA from centred Gram matrices of examples (Kornblith et al. 2019, equations 3 and 4): the other way to write it."
    centre = np.eye(len(x)) - 1 / len(x)
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    return (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(5, 40), st.integers(1, 6), st.integers(1, 6))
def test_cka_is_that_of_gram_matrices_and_within_its_bounds(seed, n, p, q):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(3, 1, (n, p)), rng.normal(-2, 2, (n, q))
    value = linear_cka(Products(torch.tensor(x)[None], torch.tensor(y)[None]))[0].item()
    assert value == pytest.approx(gram_cka(x, y), abs=1e-8) and -1e-9 <= value <= 1 + 1e-9


def test_cka_of_a_rotation_is_one_and_of_noise_near_zero():
    torch.manual_seed(0)
    x, noise = torch.randn(2, 5000, 12, dtype=torch.double)
    rotation = torch.linalg.qr(torch.randn(12, 12, dtype=torch.double))[0]
    assert linear_cka(Products(x[None], (0.1 * x @ rotation - 5)[None]))[0].item() == pytest.approx(1)
    value, chance = (v.item() for v in linear_cka(Products(x[None], noise[None])))
    assert value < 0.01 and chance == pytest.approx(12 / 5000, rel=0.1)
    assert linear_cka(Products(x[None], (x @ torch.randn(12, 12, dtype=torch.double))[None]))[0].item() < 0.99, "no other linear map"


def test_the_chance_level_is_the_mean_over_shufflings():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 4))
    y = x @ rng.normal(size=(4, 3))
    shuffled = np.mean([gram_cka(x, rng.permutation(y)) for _ in range(3000)])
    assert linear_cka(Products(torch.tensor(x)[None], torch.tensor(y)[None]))[1].item() == pytest.approx(shuffled, rel=0.03)


@settings(max_examples=15)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=5))
def test_streamed_equals_whole(lengths):
    x, y = (torch.tensor(np.random.default_rng(k).normal(5, 1, (2 + k, sum(lengths), 3))) for k in (0, 1))
    total, at = None, 0
    for n in lengths:
        one = Products(x[:, at : at + n], y[:, at : at + n])
        total, at = one if total is None else total + one, at + n
    for streamed, whole in zip(linear_cka(total), linear_cka(Products(x, y)), strict=True):
        assert streamed.shape == (2, 3) and np.allclose(streamed, whole, atol=1e-9, equal_nan=True)


def test_features_that_never_vary_have_no_cka():
    x = torch.ones(1, 6, 3, dtype=torch.double)
    assert np.isnan(linear_cka(Products(x, torch.randn(1, 6, 2, dtype=torch.double)))[0]).all()


def test_products_of_models_are_those_of_their_hidden_states(models, texts):
    x, y = (torch.cat([look_inside(m, ids)[1] for ids in texts], dim=1).double().numpy() for m in models)
    found = linear_cka(stream_products(*models, texts))[0]
    expected = [[gram_cka(a, b) for b in y] for a in x]
    assert np.allclose(found, expected, atol=1e-5)
    assert found[0, 0] == pytest.approx(1) and found[1, 1] == pytest.approx(1)


def test_an_encoder_is_found_under_any_head_and_refused_where_it_lacks_tensors(tmp_path, texts):
    torch.manual_seed(0)
    tuned = BertForSequenceClassification(BertConfig(**SHAPE, num_labels=3)).eval()
    tuned.save_pretrained(tmp_path / "tuned")
    maps, hidden = look_inside(load_encoder(tmp_path / "tuned"), texts[0])
    with torch.inference_mode():
        expected = tuned.bert(torch.tensor(texts[0])[None]).last_hidden_state[0]
    assert torch.allclose(hidden[-1], expected, atol=1e-5) and torch.allclose(maps.sum(-1), torch.ones(4, 4, 5), atol=1e-5)
    with pytest.raises(UserError, match="no model in .*written by save_pretrained"):
        load_encoder(tmp_path / "none")
    BertForSequenceClassification(BertConfig(**SHAPE | dict(num_hidden_layers=3))).save_pretrained(tmp_path / "short")
    (tmp_path / "short/config.json").write_text((tmp_path / "tuned/config.json").read_text())
    with pytest.raises(UserError, match="says num_hidden_layers 4, its weights have 3"):
        load_encoder(tmp_path / "short")
    with pytest.raises(UserError, match="the text holds token 40, the model knows 40"):
        look_inside(load_encoder(tmp_path / "tuned"), np.array([40]))


def test_a_model_beside_itself_is_alike_in_every_number(models, texts):
    alike = compare_inside(models[1], models[1], texts, (0, 1, 2, 3))
    table = stage_table({("given", float("nan")): alike})
    assert [table.matched[0], table.same[0], table.high[0]] == pytest.approx([0, 0, 0], abs=1e-5)
    assert [table.cka[0], table.cka_last[0], *table.cka_halves[0]] == pytest.approx([1, 1, 1, 1])
    assert table.shuffled[0] > 0.01 and alike.tokens == sum(map(len, texts)) and table.sequences[0] == 3


def test_a_run_is_followed_from_its_start_over_what_it_kept_to_its_end(run):
    teacher, text = load_encoder(run.folder / "checkpoints/teacher"), held_out(run, 6)
    assert len(text) == 6 and all(ids.dtype == np.int64 for ids in text)
    found = compare_stages(run, student_stages(run), teacher, text)
    assert list(found) == [("random start", 0), ("cut from the teacher", 0), ("on the way", 4), ("distilled", 6)]
    table = stage_table(found, 200).set_index("stage")
    assert table.cka["cut from the teacher"] > table.cka["random start"]
    assert ((0 <= table[list(KINDS)]) & (table[list(KINDS)] <= 1)).all(axis=None) and (table.cka <= 1 + 1e-9).all()
    end = dict(zip(("a", "b"), list(found.values())[2:], strict=True))
    assert not np.allclose(end["a"].cka, end["b"].cka, atol=1e-9), "the checkpoint on the way is another student"
    words = likeness_sentences(table.reset_index())
    assert len(words) == 6 and words[2].startswith("On the way after 4 updates") and "After distillation the heads" in words[4]
    heads, layers = heads_figure(found["distilled", 6].heads), layers_figure(found)
    assert [ax.get_title().split(":")[0] for ax in heads.axes[:4]] == list(KINDS.values())
    titles = ["random start", "cut from the teacher", "on the way, 4 updates", "distilled, 6 updates"]
    assert [ax.get_title() for ax in layers.axes[:4]] == titles


def test_stages_are_what_they_are_called(run):
    "The cut start holds the teacher's tensors, the random one does not; a step loaded into the rebuilt student is that step."
    stages = {name: encoder.state_dict() for name, _, encoder in student_stages(run)}
    teacher = load_encoder(run.folder / "checkpoints/teacher").state_dict()["embeddings.word_embeddings.weight"]
    words = {name: state["embeddings.word_embeddings.weight"] for name, state in stages.items()}
    assert torch.equal(words["cut from the teacher"], teacher) and not torch.equal(words["random start"], teacher)
    steps = {n: load_file(run.folder / f"checkpoints/student-steps/step-{n:08d}/model.safetensors") for n in (4, 6)}
    kept = {n: state["distilbert.embeddings.word_embeddings.weight"] for n, state in steps.items()}
    assert torch.equal(words["on the way"], kept[4]) and torch.equal(words["distilled"], kept[6])


def test_a_run_without_its_text_says_what_to_do(tmp_path):
    bare = create_run(tmp_path / "bare", load_settings("quick", "smoke"), tmp_path)
    with pytest.raises(UserError, match="bare holds no text in corpus/heldout.*distilrepro reproduce"):
        held_out(bare, 4)
