"Students of any shape against official models, independent counts, and models that are none."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, BertModel, pipeline

from distilrepro.config import Data, Student, Teacher, UserError, load_settings
from distilrepro.corpus import load_tokenizer
from distilrepro.fused import vocab_loss
from distilrepro.loading import model_folder
from distilrepro.student import build_student, layer_map, load_teacher, new_teacher, prove_copies, student_from


def bert(layers=4, heads=2, size=4, vocab=23, kind=BertForMaskedLM, **more):
    "A small BERT whose every tensor, biases and LayerNorms too, is random."
    config = BertConfig(vocab_size=vocab, hidden_size=heads * size, num_hidden_layers=layers, num_attention_heads=heads,
                        intermediate_size=3 * size + 1, max_position_embeddings=16, **more)
    model = kind(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=torch.Generator().manual_seed(p.numel()), std=0.5)
    return model


def distinct(model):
    "Parameters of a model, each storage once."
    return sum({p.data_ptr(): p.numel() for p in model.parameters()}.values())


IDS = torch.tensor([[2, 9, 5, 11, 3], [2, 7, 22, 3, 0]])
REAL = (IDS != 0).long()
shapes = st.tuples(st.integers(1, 9), st.integers(1, 3), st.sampled_from([2, 3, 4]))


@settings(deadline=None, max_examples=15)
@given(shapes, st.sampled_from(["paper", "every_other", "first", "last"]), st.sampled_from(["drop", "fold"]), st.booleans())
def test_every_copied_tensor_is_its_source_at_any_shape(shape, rule, token_type, transform):
    teacher = bert(*shape)
    student, book = build_student(teacher, rule, token_type=token_type, mlm_transform=transform)
    depth = (shape[0] + 1) // 2
    assert student.config.n_layers == depth and (student.config.dim, student.config.n_heads) == (shape[1] * shape[2], shape[1])
    copied = book[book.fate == "copied"]
    assert len(copied) == 4 + 16 * depth + 2 + 4 * transform, "embeddings, layers, decoder with bias, transform with LayerNorm"
    own, theirs = student.state_dict(), teacher.state_dict()
    for row in copied.itertuples():
        folded = token_type == "fold" and "position" in row.tensor
        added = theirs["bert.embeddings.token_type_embeddings.weight"][0] if folded else 0
        assert torch.equal(own[row.tensor], theirs[row.source] + added), row.tensor
    new = set(book[book.fate == "new"].tensor)
    assert all(n.startswith(("vocab_transform", "vocab_layer_norm")) for n in new) and bool(new) != transform


@settings(deadline=None, max_examples=15)
@given(shapes, st.booleans(), st.booleans())
def test_ledger_counts_equal_independent_counts(shape, headless, random):
    teacher = bert(*shape, kind=BertModel if headless else BertForMaskedLM)
    student, book = build_student(teacher, init="random" if random else "teacher")
    assert book[book.fate != "dropped"].parameters.sum() == distinct(student)
    taken = {s for s in book.source if s} - {"cls.predictions.decoder.weight"}  # tied to the embeddings, counted there
    kept = sum(teacher.state_dict()[s].numel() for s in taken)
    assert book[book.fate == "dropped"].parameters.sum() + kept == distinct(teacher)
    assert set(book[book.fate != "dropped"].tensor) == set(student.state_dict())


def test_a_student_of_full_depth_is_its_teacher():
    teacher = bert(layers=3)
    student, _ = build_student(teacher, (0, 1, 2), token_type="fold", mlm_transform=True)
    with torch.no_grad():
        own, theirs = student.eval()(IDS, REAL).logits, teacher(IDS, REAL).logits
    torch.testing.assert_close(own[REAL.bool()], theirs[REAL.bool()], rtol=1e-4, atol=1e-4)


def test_folding_equals_the_teachers_embeddings_and_dropping_does_not():
    teacher = bert()
    with torch.no_grad():
        want = teacher.bert.embeddings(IDS)
        fold, drop = (build_student(teacher, token_type=t)[0].eval().distilbert.embeddings(IDS) for t in ("fold", "drop"))
    torch.testing.assert_close(fold, want)
    assert not torch.allclose(drop, want, atol=1e-2)


def test_a_bert_without_head_gives_a_student_with_a_new_one():
    teacher = bert(kind=BertModel)
    student, book = build_student(teacher)
    fate = dict(zip(book.tensor, book.fate, strict=True))
    assert fate["vocab_transform.weight"] == fate["vocab_projector.bias"] == "new"
    assert torch.equal(student.distilbert.embeddings.word_embeddings.weight, teacher.embeddings.word_embeddings.weight)
    assert student.vocab_projector.weight.data_ptr() == student.distilbert.embeddings.word_embeddings.weight.data_ptr(), "tied"


def test_random_student_depends_on_its_seed_alone_and_leaves_the_generator():
    teacher, state = bert(), torch.get_rng_state()
    a, b, c = (build_student(teacher, init="random", seed=s)[0].state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["vocab_transform.weight"], c["vocab_transform.weight"])
    assert torch.equal(state, torch.get_rng_state())


def test_student_shares_no_memory_with_its_teacher():
    teacher = bert()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student, _ = build_student(teacher, token_type="fold", mlm_transform=True)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize("init", ["teacher", "random"])
@pytest.mark.parametrize("layers", [3, 4])
def test_stock_transformers_load_the_student(tmp_path, init, layers):
    tokenizer = load_tokenizer(Data())
    teacher = new_teacher(Teacher(path="", layers=layers, width=16, heads=2, ffn=24, max_pos=32), len(tokenizer), tokenizer.pad_token_id, 0)
    student, _ = student_from(teacher, Student(init=init))
    student.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, info = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded).__name__ == "DistilBertForMaskedLM"
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in loaded.state_dict().items())
    answers = pipeline("fill-mask", model=str(tmp_path), tokenizer=str(tmp_path), device="cpu")(f"the {tokenizer.mask_token} sleeps")
    assert len(answers) == 5 and all(0 <= a["score"] <= 1 for a in answers)


@pytest.mark.parametrize(("rule", "deep", "few", "words"), [
    ((0, 12), 12, 0, "layers 0 to 11"), ((-1,), 12, 0, "layers 0 to 11"), ((), 12, 0, "at least one"), ((0, 1), 12, 3, "3 of them"),
    ("paper", 4, 5, "only 4 layers"), ("papr", 12, 0, "did you mean 'paper'"),
])
def test_layer_maps_that_do_not_fit_are_named(rule, deep, few, words):
    with pytest.raises(UserError, match=words):
        layer_map(rule, deep, few)


@given(st.integers(1, 30), st.integers(0, 30), st.sampled_from(["paper", "every_other", "first", "last"]))
def test_rules_give_rising_layers_that_exist(deep, few, rule):
    if few > deep:
        return
    chosen = layer_map(rule, deep, few)
    assert len(chosen) == (few or (deep + 1) // 2)
    assert list(chosen) == sorted(set(chosen)) and 0 <= chosen[0] and chosen[-1] < deep
    if rule == "paper" and len(chosen) > 1:
        assert (chosen[0], chosen[-1]) == (0, deep - 1)


def test_vocabularies_that_differ_are_named():
    student, other = build_student(bert())[0], bert(vocab=19)
    rows = torch.ones(2, 8)
    heads = ((student.vocab_projector.weight, student.vocab_projector.bias),
             (other.cls.predictions.decoder.weight, other.cls.predictions.bias))
    with pytest.raises(UserError, match="23 and 19 words"):
        vocab_loss(rows, heads[0], rows, heads[1], torch.tensor([1, 2]), 2.0, 1.0, 1.0)


def test_a_model_that_is_no_bert_is_refused(tmp_path):
    student, _ = build_student(bert())
    with pytest.raises(UserError, match="BertForMaskedLM or a BertModel, got DistilBert"):
        build_student(student)
    student.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a distilbert model; expected bert"):
        load_teacher(str(tmp_path))


def test_a_bert_without_head_is_refused_unless_it_is_to_be_trained(tmp_path):
    model = bert(kind=BertModel)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cls.predictions.*teacher.train=true"):
        load_teacher(str(tmp_path))
    loaded = load_teacher(str(tmp_path), new_head=True)
    assert torch.equal(loaded.bert.encoder.layer[3].output.dense.weight, model.encoder.layer[3].output.dense.weight)


def test_folders_that_are_no_models_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for path, words in ((str(tmp_path / "empty"), "without config.json"), (str(tmp_path / "none"), "does not exist"),
                        ("package:no_such_package", "no_such_package.*pip install no-such-package")):
        with pytest.raises(UserError, match=words):
            model_folder(path)
        with pytest.raises(UserError, match=words):
            load_teacher(path)


def test_pickled_weights_are_never_opened(tmp_path):
    model = bert()
    model.config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04 whoever unpickles this runs foreign code")
    with pytest.raises(UserError, match="safetensors"):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize("name", ["nobody/no-such-bert", "no-such-bert"])
def test_a_hub_name_without_network_is_one_sentence(name):
    with pytest.raises(UserError, match=name) as error:
        load_teacher(name)
    assert "local folder" in str(error.value) and "\n" not in str(error.value)


def test_a_difference_of_one_value_is_found():
    teacher = bert()
    student, book = build_student(teacher)
    copies = {r.tensor: r.source for r in book.itertuples() if r.source}
    assert prove_copies(student, teacher, copies) == len(copies)
    with torch.no_grad():
        student.distilbert.transformer.layer[1].ffn.lin2.weight[0, 0] += 1e-3
    with pytest.raises(RuntimeError, match="layer.1.ffn.lin2.weight"):
        prove_copies(student, teacher, copies)


def test_settings_reach_the_student():
    args = load_settings("quick", sets=("student.layer_map=[1,3]", "student.layers=2", "student.dropout=0.25")).student
    student, book = student_from(bert(), args)
    assert student.config.dropout == student.config.attention_dropout == 0.25
    assert "bert.encoder.layer.3.output.dense.weight" in set(book.source)


@pytest.mark.parametrize("transform", [False, True])
def test_a_shorter_bert_holds_the_teachers_layers_and_token_types(transform):
    teacher = bert(layers=5)
    student, book = build_student(teacher, (1, 4), mlm_transform=transform, architecture="bert", dropout=0.25)
    assert isinstance(student, BertForMaskedLM) and student.config.num_hidden_layers == 2 and student.config.hidden_dropout_prob == 0.25
    own, theirs = student.state_dict(), teacher.state_dict()
    def source(name): return name.replace("layer.1.", "layer.4.").replace("layer.0.", "layer.1.")
    same = {name for name in own if torch.equal(own[name], theirs[source(name)])}
    assert set(own) - same == (set() if transform else {n for n in own if ".transform." in n})
    assert set(book[book.fate == "copied"].tensor) == same
    assert book[book.fate != "dropped"].parameters.sum() == distinct(student)
    assert {n.split(".")[3] for n in book[book.fate == "dropped"].tensor if "encoder" in n} == {"0", "2", "3"}


def test_a_random_bert_student_copies_nothing():
    teacher = bert()
    student, book = student_from(teacher, Student(architecture="bert", init="random"))
    assert not (book.fate == "copied").any() and distinct(student) == book[book.fate == "new"].parameters.sum()
    assert student.bert.embeddings.token_type_embeddings.weight.shape == (2, 8)
    with pytest.raises(UserError, match="token_type=fold.*architecture=bert keeps them"):
        build_student(teacher, architecture="bert", token_type="fold")
