"Sources, filters, token store and batch plans against loops, faults and other processes."
import json
import os
import subprocess
import sys
from bisect import bisect_right
from collections import Counter, defaultdict

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distilrepro import corpus
from distilrepro.config import Data, UserError
from distilrepro.corpus import (
    TokenStore,
    build_store,
    collate,
    load_split,
    load_tokenizer,
    padding_share,
    plan_epoch,
    read_batch,
    split_long,
    texts,
)
from distilrepro.lookalikes import TASKS

TOY = Data(documents=300, heldout_tokens=1000)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOY)


@pytest.fixture(scope="module")
def whole_store(tokenizer, tmp_path_factory):
    return build_store(TOY, tokenizer, ["synthetic"], "train", tmp_path_factory.mktemp("store") / "s", 0)


def write(root, name, split, rows, **columns):
    (root / name).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": rows, **columns} if rows is not None else columns), root / name / f"{split}.parquet")


def local(root, **changes):
    return Data(source="local", dir=str(root), corpus=("a",), min_len_exclusive=3, **changes)


# sources


def test_shards_are_read_in_order_and_a_gap_is_an_error(tmp_path):
    for i in (10, 2, 0, 1, *range(3, 10)):
        write(tmp_path, "a", f"train-{i:05}-of-00011", [f"row {i}"])
    data = local(tmp_path)
    assert load_split(data, "a", "train")["text"][:] == [f"row {i}" for i in range(11)] == list(texts(data, "a", "train"))
    (tmp_path / "a" / "train-00004-of-00011.parquet").unlink()
    with pytest.raises(UserError, match="10 of the 11 shards of train"):
        load_split(data, "a", "train")


def test_lines_are_stripped_and_blank_ones_dropped(tmp_path):
    write(tmp_path, "a", "train", [" one \n\n two\n", None, "", "three"])
    assert list(texts(local(tmp_path), "a", "train")) == ["one", "two", "three"]


def test_blank_rows_stay_where_the_recipe_kept_them(tmp_path, tokenizer):
    write(tmp_path, "a", "train", [" the . \n", "", " the dog . the dog . the dog . \n", ""])
    changes = {"drop_blank": False, "long_lines": "truncate", "max_len": 8, "min_len_exclusive": 0, "max_unk_exclusive": 1.0}
    data = local(tmp_path).model_copy(update=changes)
    assert list(texts(data, "a", "train")) == ["the .", "", "the dog . the dog . the dog .", ""], "four rows, four sequences"
    store = build_store(data, tokenizer, ["a"], "train", tmp_path / "store", 0)
    assert sorted(store.lengths.tolist()) == [2, 2, 4, 8]
    ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert all((s[0], s[-1]) == ends for s in store), "a truncated line ends with [SEP] too"
    other = build_store(data.model_copy(update={"drop_blank": True}), tokenizer, ["a"], "train", tmp_path / "store", 0)
    assert sorted(other.lengths.tolist()) == [4, 8], "another setting, another store in the same folder"


def test_a_fixed_width_pads_further_and_never_cuts():
    batch = [np.array([2, 7, 3], np.uint16), np.array([2, 3], np.uint16)]
    for pad_to, width in ((0, 3), (2, 3), (9, 9)):
        ids_bl, attention_bl = collate(batch, 0, pad_to)
        assert ids_bl.shape == attention_bl.shape == (2, width)
        assert [row[m.bool()].tolist() for row, m in zip(ids_bl, attention_bl, strict=True)] == [[2, 7, 3], [2, 3]]


@pytest.mark.parametrize(("name", "split", "words"), [
    ("b", "train", ["'b'", "there is: a"]), ("a", "dev", ["'dev'", "there is: train", "distilrepro fetch --to DIR"])])
def test_what_is_missing_locally_is_named(tmp_path, name, split, words):
    write(tmp_path, "a", "train", ["x"])
    with pytest.raises(UserError) as e:
        load_split(local(tmp_path), name, split)
    assert all(w in str(e.value) for w in [*words, str(tmp_path)])


def test_a_set_without_text_is_named(tmp_path):
    write(tmp_path, "a", "train", None, sentence=["x"], label=[1])
    with pytest.raises(UserError, match="no column 'text' in split 'train' of a; there is: label, sentence"):
        list(texts(local(tmp_path), "a", "train"))


def test_a_broken_file_is_named(tmp_path):
    write(tmp_path, "a", "train", ["x"])
    (tmp_path / "a" / "train.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="train.parquet is not a readable parquet file"):
        load_split(local(tmp_path), "a", "train")
    with pytest.raises(UserError, match="train.parquet is not a readable parquet file"):
        list(texts(local(tmp_path), "a", "train"))


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach the Hub"), datasets.exceptions.DatasetNotFoundError("not found")])
def test_no_network_is_one_sentence(monkeypatch, error):
    def refuse(*args, **kwargs):
        raise error
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match="could not get cola .nyu-mll/glue. from the hub.*distilrepro fetch --to DIR"):
        load_split(Data(source="hub"), "cola", "train")


def test_a_split_the_hub_does_not_have(monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("Unknown split \"dev\". Should be one of ['train', 'validation'].")
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match="split 'dev' of cola.*'validation'"):
        load_split(Data(source="hub"), "cola", "dev")


def test_synthetic_truth_is_json_and_columns_are_those_of_glue():
    rows = load_split(TOY, "mrpc", "validation")
    assert {"sentence1", "sentence2", "label", "truth"} <= set(rows.column_names)
    assert all(isinstance(json.loads(t), dict) for t in rows["truth"][:])


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_look_alike_loads(name):
    for split, size in TASKS[name][1].items():
        rows = load_split(TOY, name, split)
        assert rows.num_rows == size and "truth" in rows.column_names


def test_held_out_documents_come_from_another_stream():
    train, held = (load_split(TOY, "synthetic", s)["text"][:] for s in ("train", "validation"))
    assert held[:20] != train[:20]
    assert sum(len(d.split()) for d in held) > TOY.heldout_tokens


# tokenizer


def test_the_vocabulary_is_really_loaded(tokenizer):
    from distilrepro.language import vocabulary
    assert tokenizer.get_vocab() == {t: i for i, t in enumerate(vocabulary())}


def test_tokenizer_places(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = local(tmp_path)
    want = tokenizer.get_vocab()
    assert load_tokenizer(data).get_vocab() == want
    assert load_tokenizer(Data(), str(tmp_path / "tokenizer")).get_vocab() == want
    assert load_tokenizer(data.model_copy(update={"tokenizer": "tokenizer"})).get_vocab() == want


def test_tokenizer_faults(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="could not open a tokenizer at .*empty.*data.tokenizer"):
        load_tokenizer(Data(tokenizer=str(tmp_path / "empty")))
    with pytest.raises(UserError, match="there is no folder .*nowhere"):
        load_tokenizer(Data(tokenizer=str(tmp_path / "nowhere")))


# filters


def chunks_of_the_original(ids, max_len, cls_id, sep_id):
    "lm_seqs_dataset.py `remove_long_sequences`, in numpy as it stands there."
    if len(ids) <= max_len:
        return [list(ids)]
    out = []
    for i in range(0, len(ids), max_len - 2):
        sub = np.array(ids[i:i + max_len - 2])
        if sub[0] != cls_id:
            sub = np.insert(sub, 0, cls_id)
        if sub[-1] != sep_id:
            sub = np.insert(sub, len(sub), sep_id)
        out.append(sub.tolist())
    return out


@given(st.integers(0, 200), st.integers(4, 64))
def test_long_sequences_are_cut_as_the_original_does(n, max_len):
    ids = [1, *range(10, 10 + n), 2]
    pieces = split_long(ids, max_len, 1, 2)
    assert pieces == chunks_of_the_original(ids, max_len, 1, 2)
    assert all(len(p) <= max_len for p in pieces)


def test_store_equals_a_plain_loop(tmp_path, tokenizer):
    words = [t for t in tokenizer.get_vocab() if t.isalpha()][:40]
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice([*words, "☃"], n, p=[*[0.6 / len(words)] * len(words), 0.4])) for n in rng.integers(1, 60, 500)]
    write(tmp_path, "a", "train", ["\n".join(lines[i:i + 7]) for i in range(0, len(lines), 7)])
    data = Data(source="local", dir=str(tmp_path), max_len=24, min_len_exclusive=11, max_unk_exclusive=0.5)
    want, dropped = [], Counter()
    for line in lines:
        for ids in chunks_of_the_original(tokenizer(line)["input_ids"], 24, tokenizer.cls_token_id, tokenizer.sep_token_id):
            if len(ids) <= 11:
                dropped["short"] += 1
            elif ids.count(tokenizer.unk_token_id) / len(ids) >= 0.5:
                dropped["unknown"] += 1
            else:
                want.append(ids)
    store = build_store(data, tokenizer, ["a"], "train", tmp_path / "store", 0)
    got = [s.tolist() for s in store]
    assert sorted(got) == sorted(want) and got != want, "the same sequences, shuffled"
    counts = store.manifest["counts"]
    assert {k: counts[k] for k in ("short", "unknown", "kept", "lines")} == {**dropped, "kept": len(want), "lines": 500}
    assert store.lengths.tolist() == [len(s) for s in got]
    assert store.counts(len(tokenizer)).tolist() == np.bincount(np.concatenate(want), minlength=len(tokenizer)).tolist()


# the store


def test_the_cut_takes_the_first_sequences_whole_before_the_shuffle(tmp_path, tokenizer):
    whole = build_store(TOY, tokenizer, ["synthetic"], "train", tmp_path / "whole", 0)
    places = np.load(whole.folder / "offsets.npy")
    in_order = [whole[i].tolist() for i in np.argsort(places[:, 0])]
    part = build_store(TOY, tokenizer, ["synthetic"], "train", tmp_path / "part", 1000)
    n = len(part)
    assert sorted(s.tolist() for s in part) == sorted(in_order[:n])
    assert part.lengths.sum() <= 1000 < part.lengths.sum() + len(in_order[n])


def test_a_cut_corpus_holds_lines_of_all_its_sets(tmp_path, tokenizer):
    write(tmp_path, "a", "train", ["the dog loves the cat ."] * 4)
    write(tmp_path, "b", "train", ["the cat loves the dog ."] * 2)
    data, words = local(tmp_path), {"a": "the dog loves the cat.", "b": "the cat loves the dog."}
    for names, tokens, want in ((["b", "a"], 3 * 8, "bba"), (["a", "b"], 3 * 8, "aab"), (["a", "b"], 0, "aaaabb"), (["b"], 0, "bb")):
        store = build_store(data, tokenizer, names, "train", tmp_path / "s", tokens)
        found = Counter(tokenizer.decode(s, skip_special_tokens=True) for s in store)
        assert found == Counter(words[name] for name in want), "a line of each in turn; the longer one goes on alone"


def test_a_store_is_reopened_not_rebuilt(tmp_path, tokenizer, monkeypatch):
    store = build_store(TOY, tokenizer, ["synthetic"], "train", tmp_path / "s", 0)
    monkeypatch.setattr(corpus, "sequences", None)
    assert build_store(TOY, tokenizer, ["synthetic"], "train", tmp_path / "s", 0).content_hash == store.content_hash


CHANGES = [{"seed": 5}, {"max_len": 16}, {"min_len_exclusive": 20}, {"max_unk_exclusive": 0.1}, {"documents": 301}]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_makes_another_store(tmp_path, tokenizer, change):
    key = build_store(TOY, tokenizer, ["synthetic"], "train", tmp_path / "s", 0).manifest["key"]
    assert build_store(TOY.model_copy(update=change), tokenizer, ["synthetic"], "train", tmp_path / "s", 0).manifest["key"] != key


def test_changed_input_is_noticed_and_the_folder_of_data_may_move(tmp_path, tokenizer):
    for root in ("x", "y"):
        write(tmp_path / root, "a", "train", ["the dog loves the cat ."] * 4)
    key = build_store(local(tmp_path / "x"), tokenizer, ["a"], "train", tmp_path / "s", 0).manifest["key"]
    assert build_store(local(tmp_path / "y"), tokenizer, ["a"], "train", tmp_path / "s", 0).manifest["key"] == key
    write(tmp_path / "y", "a", "train", ["the cat loves the dog ."] * 4)
    assert build_store(local(tmp_path / "y"), tokenizer, ["a"], "train", tmp_path / "s", 0).manifest["key"] != key


@pytest.mark.parametrize("fault", ["truncate", "flip", "manifest", "offsets"])
def test_a_damaged_store_is_rebuilt(tmp_path, tokenizer, fault):
    store = build_store(TOY, tokenizer, ["synthetic"], "train", tmp_path / "s", 0)
    want, path = store.content_hash, store.folder / {"manifest": "manifest.json", "offsets": "offsets.npy"}.get(fault, "tokens.bin")
    content = path.read_bytes()
    path.write_bytes({"flip": bytes([content[0] ^ 1]) + content[1:]}.get(fault, content[:len(content) // 2]))
    again = build_store(TOY, tokenizer, ["synthetic"], "train", tmp_path / "s", 0)
    assert again.content_hash == want and path.read_bytes() == content


def test_an_interrupted_build_leaves_the_old_store_and_no_litter(tmp_path, tokenizer):
    old = build_store(TOY, tokenizer, ["synthetic"], "train", tmp_path / "s", 0).content_hash

    def interrupt(tokens, budget):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        build_store(TOY, tokenizer, ["synthetic"], "train", tmp_path / "s", 500, on_progress=interrupt)
    assert TokenStore(tmp_path / "s").content_hash == old
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_no_disk_space_is_a_failure_that_names_the_folder(tmp_path, tokenizer, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(corpus, "write_tokens", full)
    with pytest.raises(RuntimeError, match="store.*No space left on device"):
        build_store(TOY, tokenizer, ["synthetic"], "train", tmp_path / "store", 0)


def test_an_empty_corpus_says_what_was_dropped(tmp_path, tokenizer):
    write(tmp_path, "a", "train", ["yes", "no", "☃ ☃ ☃ ☃ ☃ ☃"])
    with pytest.raises(UserError, match="a .train. is empty: of 3 lines, 2 pieces had 3 tokens or fewer.*, 1 were .UNK. to 50% or more"):
        build_store(local(tmp_path), tokenizer, ["a"], "train", tmp_path / "s", 0)
    with pytest.raises(UserError, match="1 did not fit into 5 tokens"):
        build_store(TOY, tokenizer, ["synthetic"], "train", tmp_path / "s", 5)
    assert not (tmp_path / "s").exists()


def test_large_vocabularies_take_four_bytes(tmp_path):
    from transformers import BertTokenizer
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(70000))]
    tokenizer = BertTokenizer(vocab={w: i for i, w in enumerate(words)})
    write(tmp_path, "a", "train", ["w1 w2 w69999 w69998"])
    store = build_store(local(tmp_path), tokenizer, ["a"], "train", tmp_path / "s", 0)
    assert store[0].tolist() == [2, 6, 7, 70004, 70003, 3] and store.manifest["dtype"] == "<u4"


def test_same_bytes_in_another_process(tmp_path, tokenizer):
    here = build_store(TOY, tokenizer, ["synthetic"], "train", tmp_path / "here", 3000).content_hash
    code = ("import sys; from distilrepro.config import Data; from distilrepro.corpus import build_store, load_tokenizer; "
            "d = Data(documents=300, heldout_tokens=1000); "
            "print(build_store(d, load_tokenizer(d), ['synthetic'], 'train', sys.argv[1], 3000).content_hash)")
    env = {**os.environ, "PYTHONHASHSEED": "77"}
    command = [sys.executable, "-c", code, str(tmp_path / "there")]
    assert subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.strip() == here


# batches

LENGTHS = st.lists(st.integers(2, 130), min_size=1, max_size=300)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 17), st.integers(0, 5), st.booleans())
def test_each_example_once_an_epoch_in_few_batches(lengths, batch, epoch, grouped):
    plan = plan_epoch(np.array(lengths), batch, 3, epoch, grouped)
    assert sorted(np.concatenate(plan).tolist()) == list(range(len(lengths)))
    assert sorted(map(len, plan), reverse=True)[:len(lengths) // batch] == [batch] * (len(lengths) // batch)
    assert len(plan) == -(-len(lengths) // batch)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 17))
def test_groups_are_those_of_the_original(lengths, batch):
    bins = np.arange(start=3, stop=512, step=4).tolist()  # create_lengths_groups(lengths, k=512)
    group = [bisect_right(bins, n) for n in lengths]
    members = defaultdict(int)
    for g in group:
        members[g] += 1
    plan = plan_epoch(np.array(lengths), batch, 0, 0, True)
    pure = Counter(group[ids[0]] for ids in plan if len(ids) == batch and len({group[i] for i in ids}) == 1)
    assert all(pure[g] >= n // batch for g, n in members.items()), "as many batches from a bin as it fills"
    rest = len(lengths) - sum(n // batch * batch for n in members.values())
    assert sum(len({group[i] for i in ids}) > 1 for ids in plan) <= -(-rest // batch)


def test_plans_differ_by_seed_and_epoch_alone():
    lengths = np.random.default_rng(0).integers(12, 128, 500)
    plans = {(s, e): np.concatenate(plan_epoch(lengths, 8, s, e, True)).tolist() for s in (0, 1) for e in (0, 1)}
    assert len({tuple(p) for p in plans.values()}) == 4
    assert np.concatenate(plan_epoch(lengths, 8, 1, 1, True)).tolist() == plans[1, 1]


def test_long_and_short_batches_are_mixed():
    lengths = np.sort(np.random.default_rng(0).integers(12, 128, 4000))
    means = [lengths[ids].mean() for ids in plan_epoch(lengths, 8, 0, 0, True)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.15


def test_padding_share_equals_collated_padding():
    lengths = np.random.default_rng(0).integers(2, 40, 97)
    plan = plan_epoch(lengths, 8, 0, 0, False)
    masks = [collate([np.ones(n, np.uint16) for n in lengths[ids]], 0)[1] for ids in plan]
    assert padding_share(lengths, plan) == pytest.approx(1 - sum(m.sum().item() for m in masks) / sum(m.numel() for m in masks))


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=12), st.sampled_from([0, 9, 200]), st.integers(0, 9))
def test_a_batch_of_the_store_is_its_sequences_collated(whole_store, numbers, pad_to, pad_id):
    examples = np.array(numbers) % len(whole_store)
    want = collate([whole_store[i] for i in examples], pad_id, pad_to)
    got = read_batch(whole_store, examples, pad_id, pad_to)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))


@given(st.lists(st.lists(st.integers(1, 65535), min_size=1, max_size=20), min_size=1, max_size=9))
def test_collate_keeps_every_token(batch):
    ids_bl, attention_bl = collate([np.array(s, np.uint16) for s in batch], pad_id=0)
    assert [row[mask.bool()].tolist() for row, mask in zip(ids_bl, attention_bl, strict=True)] == batch
    assert (ids_bl[attention_bl == 0] == 0).all()
