"""Bad models through every door that opens one: a right model, or one sentence that names the folder and what is wrong. Never silence.

The expected words are what a user needs to mend it; `one_sentence` also holds every message to one line without a traceback.
"""
import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
)

from distilrepro import doctor as doctors
from distilrepro.answers import mark_model
from distilrepro.config import Data, SecondDistillation, Student, UserError, finetune_for, load_settings
from distilrepro.examples import outputs
from distilrepro.export import FORMS, INT8_FILE, open_form, open_int8, write_int8
from distilrepro.finetune import finetune, load_classifier, own_tokenizer, predict, prediction_table, task_rows
from distilrepro.likeness import load_encoder
from distilrepro.loading import load_model
from distilrepro.pair import load_eager
from distilrepro.sources import load_tokenizer
from distilrepro.squad import load_reader
from distilrepro.stages import soft_targets, tune_on
from distilrepro.student import load_teacher, student_from
from distilrepro.tasks import get_task

TOKENIZER = load_tokenizer(Data())
SIZE = dict(vocab_size=len(TOKENIZER), hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
            max_position_embeddings=64)
ARGS = finetune_for(load_settings("quick", "smoke", sets=("finetune.max_len=64", "finetune.max_train=8", "finetune.max_eval=8")), "sst2")
HEADS = {"mlm": BertForMaskedLM, "sst2": BertForSequenceClassification, "squad": BertForQuestionAnswering}


def make(folder: Path, kind=BertForMaskedLM, **more) -> Path:
    "A small BERT whose every number is drawn, with the tokenizer it reads."
    torch.manual_seed(0)
    model = kind(BertConfig(**SIZE | more)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1)
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    "A sound model of each head."
    folder = tmp_path_factory.mktemp("sound")
    return {name: make(folder / name, kind) for name, kind in HEADS.items()}


@pytest.fixture
def spoilt(sound, tmp_path):
    "Copies of a sound model, to be spoilt."
    def copy(head="mlm", **config):
        folder = tmp_path / f"{head}{len(list(tmp_path.iterdir()))}"
        shutil.copytree(sound[head], folder)
        return changed(folder, **config)
    return copy


def changed(folder: Path, **config) -> Path:
    "Change what a config says."
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def respelled(folder: Path, change) -> Path:
    "Write a model's tensors anew as a function of them says."
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@contextmanager
def one_sentence(*words, kinds=(UserError,)):
    "Expect one error that a user can read, with these words."
    with pytest.raises(kinds) as e:
        yield
    said = str(e.value)
    assert "\n" not in said and len(said) < 700 and ";" in said, said
    assert not [w for w in words if w not in said], said


def doors(head: str) -> dict:
    "What opens a model of each head, by name: every door of the package."
    data, job = Data(), get_task("sst2")
    second = SecondDistillation()
    return {
        "mlm": {"load_teacher": lambda f: student_from(load_teacher(str(f)), Student()), "load_encoder": load_encoder,
                "finetune": lambda f: finetune(f, "sst2", data, TOKENIZER, ARGS, 1),
                "load_classifier": lambda f: load_classifier(f, job, 1), "load_reader": lambda f: load_reader(f, seed=1)},
        "sst2": {"mark_model": lambda f: mark_model(f, "sst2", data, ARGS),
                 "soft_targets": lambda f: soft_targets(second, str(f), "sst2", TOKENIZER),
                 "load_eager": load_eager, "open_form": lambda f: open_form("eager", f, f / "forms")},
        "squad": {"mark_model": lambda f: mark_model(f, "squad", data, ARGS),
                  "soft_targets": lambda f: soft_targets(second, str(f), "squad", TOKENIZER)},
    }[head]


def bf16(folder):
    "The model in half precision, as it was shared."
    return halved(folder, torch.bfloat16)


def halved(folder, dtype=torch.float16):
    return changed(respelled(folder, lambda t: {k: v.to(dtype) for k, v in t.items()}), dtype=str(dtype).removeprefix("torch."))


def sharded(folder):
    "The weights in several files."
    model = {p.name: p for p in folder.glob("model*.safetensors")}["model.safetensors"]
    names = sorted(tensors := load_file(model))
    parts = {f"model-{i + 1:05}-of-00003.safetensors": names[i::3] for i in range(3)}
    for name, own in parts.items():
        save_file({k: tensors[k] for k in own}, folder / name, metadata={"format": "pt"})
    index = dict(metadata={}, weight_map={k: name for name, own in parts.items() for k in own})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model.unlink()
    return folder


def without(folder, *parts):
    return respelled(folder, lambda t: {k: v for k, v in t.items() if not any(p in k for p in parts)})


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def overwritten(name, content):
    def spoil(folder):
        target = folder / name
        target.write_bytes(content if isinstance(content, bytes) else content(target.read_bytes()))
        return folder
    return spoil


def nan(folder):
    def spoil(tensors):
        name = next(k for k in tensors if "layer.1.output.dense.weight" in k)
        tensors[name][0, 0] = float("nan")
        return tensors
    return respelled(folder, spoil)


def shard_gone(folder):
    next(sharded(folder).glob("model-00002*")).unlink()
    return folder


def shard_outside(folder):
    sharded(folder)
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00002", "../model-00002"))
    return folder


def renamed(folder):
    return respelled(folder, lambda t: {k.replace("layer.1.output", "layer.1.out"): v for k, v in t.items()})


def lie(**config):
    return lambda folder: changed(folder, **config)


REFUSED = {  # fault -> how a sound folder is spoilt, and words of the sentence
    "hidden_size too large": (lie(hidden_size=16), ["hidden_size 16, its weights have 8"]),
    "hidden_size too small": (lie(hidden_size=4), ["hidden_size 4, its weights have 8"]),
    "vocab_size too large": (lie(vocab_size=SIZE["vocab_size"] + 5), ["vocab_size"]),
    "vocab_size too small": (lie(vocab_size=SIZE["vocab_size"] - 5), ["vocab_size"]),
    "a layer too many in the config": (lie(num_hidden_layers=3), ["num_hidden_layers 3, its weights have 2"]),
    "a layer too few in the config": (lie(num_hidden_layers=1), ["num_hidden_layers 1, its weights have 2"]),
    "ten million layers in the config": (lie(num_hidden_layers=10**7), ["num_hidden_layers 10000000"]),
    "a width of a billion in the config": (lie(hidden_size=10**9), ["hidden_size 1000000000"]),
    "intermediate_size too large": (lie(intermediate_size=24), ["other shapes of", "intermediate.dense"]),
    "max_position_embeddings too large": (lie(max_position_embeddings=512), ["max_position_embeddings 512, its weights have 64"]),
    "type_vocab_size too small": (lie(type_vocab_size=1), ["token_type_embeddings"]),
    "heads that do not divide the width": (lie(num_attention_heads=3), ["multiple"]),
    "an unknown activation": (lie(hidden_act="nope"), ["nope"]),
    "a width that is a text": (lie(hidden_size="x"), ["hidden_size", "describes no bert model"]),
    "no vocab_size": (lie(vocab_size=None), ["vocab_size"]),
    "a negative width": (lie(hidden_size=-8), ["hidden_size -8"]),
    "a padding id outside the vocabulary": (lie(pad_token_id=10**6), ["adding"]),
    "a dtype that does not exist": (lie(dtype="nope"), ["nope"]),
    "another family in the config": (lie(model_type="gpt2"), ["is a gpt2 model; expected bert"]),
    "an unknown family in the config": (lie(model_type="own"), ["is a own model; expected bert"]),
    "NaN weights": (nan, ["no numbers in", "layer.1.output.dense.weight"]),
    "a layer under another name": (renamed, ["lacks tensors", "layer.1.output"]),
    "missing embeddings": (lambda f: without(f, "word_embeddings"), ["lacks tensors", "word_embeddings"]),
    "a pickle-only folder": (pickled, ["pytorch_model.bin", "never read", "safetensors"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink() or f, ["no model.safetensors"]),
    "garbage for weights": (overwritten("model.safetensors", b"garbage"), ["model.safetensors", "copy the file again"]),
    "empty weights": (overwritten("model.safetensors", b""), ["model.safetensors", "copy the file again"]),
    "truncated weights": (overwritten("model.safetensors", lambda b: b[:-50]), ["model.safetensors", "copy the file again"]),
    "a header of weights that asks for all memory": (overwritten("model.safetensors", b"\xff" * 8 + b"{}"), ["model.safetensors"]),
    "a shard that is gone": (shard_gone, ["model-00002-of-00003.safetensors"]),
    "a shard outside of the folder": (shard_outside, ["does not list files beside it"]),
    "an index of shards that is no JSON": (lambda f: overwritten("model.safetensors.index.json", b"{")(sharded(f)), ["not readable JSON"]),
    "no config.json": (lambda f: (f / "config.json").unlink() or f, ["without config.json"]),
    "a config.json that is no JSON": (overwritten("config.json", b"{"), ["config.json is not readable JSON"]),
    "a config.json that is a list": (overwritten("config.json", b"[1]"), ["holds a list"]),
    "a config.json of ten thousand brackets": (overwritten("config.json", b"[" * 10000), ["config.json"]),
    "a config.json that is not UTF-8": (overwritten("config.json", b"\xff\xfe\xfa"), ["config.json"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_does_not_fit_itself_is_refused_at_every_door(spoilt, fault, name):
    spoil, words = REFUSED[name]
    for head in HEADS:
        folder = spoil(spoilt(head))
        for door, load in list(doors(head).items())[:: 1 if fault.whole else 2]:
            if name == "no config.json" and door == "soft_targets":
                words = ["no model in"]
            with fault("models", name), one_sentence(str(folder), *words):
                load(folder)


SOUND = {"fp16 weights": halved, "bf16 weights": bf16, "sharded safetensors": sharded,
         "a config that says nothing of its dtype": lie(dtype=None)}


@pytest.mark.parametrize("name", SOUND)
def test_what_only_looks_odd_gives_the_same_model(sound, spoilt, fault, name):
    for head, kind in HEADS.items():
        folder = SOUND[name](spoilt(head))
        model, true = load_model(kind, folder), load_file(sound[head] / "model.safetensors")
        half = {"fp16 weights": torch.float16, "bf16 weights": torch.bfloat16}.get(name, torch.float32)
        with fault("models", name):
            assert {p.dtype for p in model.parameters()} == {torch.float32}
            assert all(torch.equal(model.state_dict()[k], v.to(half).float()) for k, v in true.items())
            for door, load in doors(head).items():
                assert load(folder) is not None, door


def test_half_precision_is_fine_tuned_in_full(sound, spoilt, fault):
    with fault("models", "fp16 weights"):
        tuned = finetune(halved(spoilt()), "sst2", Data(), TOKENIZER, ARGS, 1)
        assert {p.dtype for p in tuned.model.parameters()} == {torch.float32}
        assert tuned.predictions.filter(like="logit").notna().all().all()


@pytest.mark.parametrize("says", [True, False])
def test_an_untied_head_stays_untied_whatever_the_config_says(tmp_path, fault, says):
    folder = changed(make(tmp_path / "untied", tie_word_embeddings=False), tie_word_embeddings=says)
    true, ids = load_file(folder / "model.safetensors"), torch.randint(5, 90, (3, 12))
    assert not torch.equal(true["cls.predictions.decoder.weight"], true["bert.embeddings.word_embeddings.weight"])
    for shape in ("distilbert", "bert"):
        name = "a config that says an untied head is tied" if says else "an untied head"
        with fault("models", name):
            teacher = load_teacher(str(folder))
            args = Student(layer_map=(0, 1), token_type="drop" if shape == "bert" else "fold", mlm_transform=True, architecture=shape)
            student, book = student_from(teacher, args)
            own = student.state_dict()
            decoder = "vocab_projector.weight" if shape == "distilbert" else "cls.predictions.decoder.weight"
            words = f"{shape}.embeddings.word_embeddings.weight"
            assert torch.equal(own[decoder], true["cls.predictions.decoder.weight"])
            assert torch.equal(own[words], true["bert.embeddings.word_embeddings.weight"])
            with torch.inference_mode():
                assert torch.allclose(student.eval()(ids).logits, teacher(ids).logits, atol=1e-5), "a student of all layers is its teacher"
            assert book[book.fate != "dropped"].parameters.sum() == sum(p.numel() for p in student.parameters())
            student.save_pretrained(tmp_path / shape)
            again = load_model(type(student), tmp_path / shape)
            assert torch.equal(again.state_dict()[decoder], own[decoder]) and torch.equal(again.state_dict()[words], own[words])


def test_a_tied_head_without_a_matrix_of_its_own_is_tied(sound, fault):
    with fault("models", "a tied head"):
        assert "cls.predictions.decoder.weight" not in load_file(sound["mlm"] / "model.safetensors")
        teacher = load_teacher(str(sound["mlm"]))
        assert teacher.get_output_embeddings().weight is teacher.get_input_embeddings().weight
        student, _ = student_from(teacher, Student())
        assert student.vocab_projector.weight is student.distilbert.embeddings.word_embeddings.weight


def test_a_missing_head_is_never_made_up(sound, tmp_path, fault):
    bare = make(tmp_path / "bare", BertModel)
    with fault("models", "a missing MLM head"), one_sentence("cls.predictions", "teacher.train=true"):
        load_teacher(str(bare))
    trained = load_teacher(str(bare), new_head=True).bert.embeddings.LayerNorm.weight
    assert torch.equal(trained, load_file(bare / "model.safetensors")["embeddings.LayerNorm.weight"])
    for load in (doors("sst2") | doors("squad")).values():
        for folder in (sound["mlm"], bare):
            with fault("models", "a missing classifier"), one_sentence(str(folder), "lacks tensors"):
                load(folder)
    with fault("models", "a missing classifier"), one_sentence("lacks tensors"):
        outputs(sound["mlm"], "cola", [dict(sentence="a", label=1)], 64)


def test_another_head_is_refused(sound, tmp_path, fault):
    three = make(tmp_path / "three", BertForSequenceClassification, num_labels=3)
    with fault("models", "a head with other outputs"), one_sentence("3 outputs, sst2 needs 2", "another task"):
        mark_model(three, "sst2", Data(), ARGS)
    with fault("models", "a head with other outputs"), one_sentence("classifier", "2 outputs"):
        finetune(three, "sst2", Data(), TOKENIZER, ARGS, 1)
    with fault("models", "a head with other outputs"), one_sentence("3 outputs of 2"):
        soft_targets(SecondDistillation(), str(three), "sst2", TOKENIZER)
    for door in ("mark_model", "soft_targets"):
        with fault("models", "a classifier where a reader is needed"), one_sentence("qa_outputs"):
            doors("squad")[door](sound["sst2"])


def shuffled(folder: Path) -> Path:
    "The same words under other numbers."
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    plain = sorted((w for w in vocab if not w.startswith("[")), key=vocab.get)
    vocab |= dict(zip(plain, (vocab[w] for w in reversed(plain)), strict=True))
    path.write_text(json.dumps(tokenizer))
    return folder


def test_a_tokenizer_that_is_not_the_models_own(sound, tmp_path, spoilt, fault):
    small = make(tmp_path / "small", BertForSequenceClassification, vocab_size=len(TOKENIZER) - 7)
    for load in (own_tokenizer, lambda f: mark_model(f, "sst2", Data(), ARGS)):
        with fault("models", "a vocabulary smaller than the tokenizer's"), one_sentence(f"knows {len(TOKENIZER) - 7}", str(small)):
            load(small)
    with fault("models", "a vocabulary smaller than the tokenizer's"), one_sentence(f"knows {len(TOKENIZER) - 7} words"):
        soft_targets(SecondDistillation(), str(small), "sst2", TOKENIZER)
    with fault("models", "a teacher with another tokenizer"), one_sentence("other words"):
        soft_targets(SecondDistillation(), str(shuffled(spoilt("sst2"))), "sst2", TOKENIZER)
    large = make(tmp_path / "large", BertForSequenceClassification, vocab_size=len(TOKENIZER) + 7)
    with fault("models", "a vocabulary padded above the tokenizer's"):
        assert mark_model(large, "sst2", Data(), ARGS)[0] == 8


@pytest.mark.parametrize(("name", "content"), [
    ("garbage for a tokenizer", b"garbage"), ("an empty tokenizer", b""), ("a tokenizer that is a list", b"[]"),
    ("a tokenizer without a vocabulary", b'{"version":"1.0","model":{"type":"WordPiece","vocab":{},"unk_token":"[UNK]"}}'),
])
def test_tokenizers_that_are_none(spoilt, fault, name, content):
    folder = overwritten("tokenizer.json", content)(spoilt("sst2"))
    with fault("models", name), one_sentence(str(folder), "tokenizer"):
        mark_model(folder, "sst2", Data(), ARGS)


def test_code_in_a_folder_is_never_run(spoilt, tmp_path, fault, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask whoever sits there
    kinds = "AutoConfig AutoModel AutoModelForMaskedLM AutoModelForSequenceClassification AutoModelForQuestionAnswering".split()
    mark, places = tmp_path / "was-run", dict.fromkeys(kinds, "code.Own") | dict(AutoTokenizer=["code.Own", "code.Own"])
    for head in HEADS:
        for family in ("bert", "own"):
            folder = spoilt(head, auto_map=places, model_type=family, trust_remote_code=True)
            (folder / "code.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).write_text('here')\nclass Own: pass\n")
            path, own = folder / "tokenizer_config.json", dict(auto_map=places, tokenizer_class="Own")
            path.write_text(json.dumps(json.loads(path.read_text()) | own))
            for door, load in doors(head).items():
                with fault("models", "code in the folder (auto_map)"):
                    try:
                        assert load(folder) is not None and family == "bert", door
                    except UserError as e:
                        assert str(folder) in str(e) and "\n" not in str(e)
                    assert not mark.exists(), f"{door} ran the code of the folder"


def test_texts_longer_than_the_positions_of_a_model(tmp_path, fault, command):
    short = {name: make(tmp_path / name, kind, max_position_embeddings=8) for name, kind in HEADS.items()}
    words = ["tokens, the model reads 8", "finetune.max_len=8"]
    data = Data()
    reach = {
        "finetune": lambda: finetune(short["mlm"], "sst2", data, TOKENIZER, ARGS, 1),
        "finetune squad": lambda: tune_on("squad", short["mlm"], data, TOKENIZER, ARGS, 1),
        "evaluate": lambda: mark_model(short["sst2"], "sst2", data, ARGS),
        "evaluate squad": lambda: mark_model(short["squad"], "squad", data, ARGS),
        "teacher": lambda: finetune(make(tmp_path / "long"), "sst2", data, TOKENIZER, ARGS, 1,
                                    soft_targets(SecondDistillation(), str(short["sst2"]), "sst2", TOKENIZER)),
    }
    for run in reach.values():
        with fault("models", "a position table shorter than max_len"), one_sentence(*words):
            run()
    with fault("models", "a position table shorter than max_len"):
        toy = ("--set", "data.source=synthetic", "--set", "finetune.max_eval=8")
        code, _, err = command("evaluate", "sst2", "--model", short["sst2"], *toy)
        assert code == 2 and "the model reads 8" in err and "Traceback" not in err
    with fault("models", "a position table shorter than max_len"):
        args = ARGS.model_copy(update=dict(max_len=8))
        assert mark_model(short["sst2"], "sst2", data, args)[0] == 8, "as the sentence says"


def test_a_hub_id_without_network(fault):
    for name in ("nobody/nothing", "no-such-bert"):
        for load in [load for head in ("mlm", "sst2") for load in doors(head).values()]:
            with fault("models", "a hub id without network"), one_sentence(name, "local folder"):
                load(Path(name))


def test_answers_that_are_no_numbers_are_never_scored(fault):
    rows = [dict(id=i + 40, label=i % 2, input_ids=[2, 3], token_type_ids=[0, 0]) for i in range(4)]
    for value in (float("nan"), float("inf"), -float("inf")):
        logits = torch.zeros(4, 2).numpy()
        logits[2, 1] = value
        with fault("models", "answers that are no numbers"), one_sentence("example 42", "no number", kinds=(RuntimeError,)):
            prediction_table(get_task("sst2"), rows, logits)


def test_weights_so_large_that_answers_overflow(spoilt, fault):
    large = {"classifier.weight": 3e38, "bert.pooler.dense.bias": 10, "qa_outputs.weight": 3e38,
             "bert.encoder.layer.1.output.LayerNorm.bias": 10}
    for head in ("sst2", "squad"):
        folder = respelled(spoilt(head), lambda t: {k: torch.full_like(v, large[k]) if k in large else v for k, v in t.items()})
        with fault("models", "weights that overflow"), one_sentence("no number", "fine-tune it again", kinds=(RuntimeError,)):
            mark_model(folder, head, Data(), ARGS)


def test_int8_weights_that_are_damaged(sound, tmp_path, fault):
    folder = write_int8(sound["sst2"], tmp_path / "int8")
    whole = (folder / INT8_FILE).read_bytes()
    for content in (b"", b"garbage", whole[: len(whole) // 2]):
        (folder / INT8_FILE).write_bytes(content)
        with fault("models", "a damaged int8 form"), one_sentence(INT8_FILE, "write the form anew"):
            open_int8(folder, 1)
    assert "int8" in FORMS


def test_the_command_says_it_in_one_line(spoilt, tmp_path, fault, command):
    bad = lie(num_hidden_layers=3)(spoilt("sst2"))
    toy = ("--set", "data.source=synthetic", "--set", "finetune.max_train=8", "--set", "finetune.max_eval=8")
    (tmp_path / "a.txt").write_text("the cat sleeps .\n" * 40)
    calls = {
        "evaluate": ("evaluate", "sst2", "--model", bad, *toy),
        "finetune": ("finetune", "--model", bad, "--task", "sst2", "--out", tmp_path / "out", *toy),
        "distil": ("distil", "--teacher", bad, "--text", tmp_path / "a.txt", "--out", tmp_path / "out"),
    }
    for name, words in calls.items():
        code, _, err = command(*words)
        with fault("models", "a layer too many in the config"):
            assert code == 2 and "num_hidden_layers 3, its weights have 2" in err and "Traceback" not in err, (name, err)
            assert not (tmp_path / "out").exists()


def test_the_doctor_tells_of_a_bad_teacher(spoilt, fault):
    bad = {"its weights have 2": lie(num_hidden_layers=3), "not readable": overwritten("config.json", b"{"), "never read": pickled}
    for words, spoil in bad.items():
        folder = spoil(spoilt())
        with fault("models", "a bad teacher, shown to the doctor"):
            s = load_settings("quick", "smoke", sets=(f"teacher.path={folder}",))
            assert words in doctors.found(s)["teacher"] and doctors.found(s)["teacher"].startswith("missing")
            assert doctors.work_of(s)["distil"] > 0


def test_the_doctor_knows_a_task_that_has_no_size(monkeypatch, fault):
    monkeypatch.delitem(doctors.TRAIN_SIZE, "rte")
    monkeypatch.delitem(doctors.EVAL_SIZE, "rte")
    with fault("models", "a task of unknown size, shown to the doctor"):
        assert doctors.tuning_tokens(load_settings("sanh2019", sets=("data.source=local", "data.dir=x")), ("rte",)) > 0


def test_any_change_of_a_config_is_the_same_model_or_one_sentence(sound, tmp_path, fault):
    true = load_file(sound["mlm"] / "model.safetensors")
    fields = sorted(json.loads((sound["mlm"] / "config.json").read_text()))
    values = st.one_of(st.none(), st.booleans(), st.integers(-3, 10**6), st.text(max_size=4), st.floats(allow_nan=False),
                       st.lists(st.integers(), max_size=2))
    folder = tmp_path / "any"

    @settings(max_examples=fault.size(30, 300), deadline=None)
    @given(st.dictionaries(st.sampled_from(fields), values, min_size=1, max_size=2))
    def holds(config):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound["mlm"], folder)
        changed(folder, **config)
        with fault("models", "any value in a config"):
            try:
                model = load_teacher(str(folder))
            except UserError as e:
                assert "\n" not in str(e) and str(folder) in str(e) and len(str(e)) < 700
            else:
                assert all(torch.equal(model.state_dict()[k], v) for k, v in true.items())
    holds()


def test_any_damage_of_the_weights_is_noticed_or_changes_nothing_but_a_number(sound, tmp_path, fault):
    whole, folder = (sound["mlm"] / "model.safetensors").read_bytes(), tmp_path / "any"
    shutil.copytree(sound["mlm"], folder)
    head = int.from_bytes(whole[:8], "little")

    @settings(max_examples=fault.size(30, 300), deadline=None)
    @given(st.integers(0, head + 7), st.integers(1, 255))
    def holds(at, flip):
        (folder / "model.safetensors").write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1:])
        with fault("models", "a spoilt byte in the header of weights"):
            try:
                model = load_teacher(str(folder))
            except UserError as e:
                assert "\n" not in str(e) and str(folder) in str(e)
            else:
                assert [tuple(p.shape) for p in model.state_dict().values()], "only what the header says beside names and places"
    holds()


def test_a_distilbert_is_held_against_its_own_config(tmp_path, fault):
    shape = dict(vocab_size=len(TOKENIZER), dim=8, n_layers=2, n_heads=2, hidden_dim=12, max_position_embeddings=64)
    DistilBertForMaskedLM(DistilBertConfig(**shape)).save_pretrained(tmp_path / "d")
    TOKENIZER.save_pretrained(tmp_path / "d")
    rows = task_rows(Data(), get_task("sst2"), "validation", TOKENIZER, 64, 8)
    assert len(predict(load_classifier(tmp_path / "d", get_task("sst2"), 1), rows, 0)) == 8
    for name, value in dict(dim=16, n_layers=1, vocab_size=9, max_position_embeddings=32, hidden_dim=13).items():
        changed(tmp_path / "d", **shape | {name: value})
        with fault("models", "a DistilBERT whose config lies"), one_sentence(str(tmp_path / "d")):
            load_classifier(tmp_path / "d", get_task("sst2"), 1)
    with fault("models", "a DistilBERT given as teacher"), one_sentence("distilbert model; expected bert"):
        load_teacher(str(tmp_path / "d"))
