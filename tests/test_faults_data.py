"""Bad data through every loader and evaluator: a right result, held against plain Python, or one sentence that names what is wrong."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score

from distilrepro.answers import mark_answers
from distilrepro.config import Data, Mask, UserError, finetune_for, load_settings
from distilrepro.corpus import build_store
from distilrepro.finetune import finetune, measure, task_rows
from distilrepro.masking import mask_tokens, token_weights
from distilrepro.sources import load_split, load_tokenizer, read_table, text_files, texts
from distilrepro.squad import best_spans, check_squad, decode, encode_squad, squad_floor, squad_rows
from distilrepro.tasks import GlueMetric, check_rows, encode, get_task
from distilrepro.workflow import lay_out_text

TOKENIZER = load_tokenizer(Data())
GOOD = "the cat sleeps in the big house and the dog eats in the small garden ."
NASTY = {
    "an empty text": "",
    "blanks": " \t \u3000 ",
    "one token": "cat",
    "NUL": "the \x00 cat \x00sleeps",
    "right-to-left text": "שלום עולם " * 9,
    "right-to-left override": "the \u202ecat\u202c sleeps",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 the 👍🏽 cat " * 5,
    "only [UNK]": "☃ " * 30,
    "special tokens in a text": "[CLS] the [MASK] cat [SEP] [PAD] [UNK] " * 4,
    "combining marks": "e" + "\u0301" * 3000,
    "zero-width characters": "\u200bthe\u200d cat\ufeff sleeps\u2060",
    "control characters": "".join(map(chr, range(1, 32))) + "the cat",
    "line separators": "the\u2028cat\u2029sleeps\x85here\x0b\x0c",
    "characters outside the planes in use": "\U0010ffff\ue000\ufffe the cat",
    "a word of 5000 letters": "x" * 5000,
    "HTML": "<script>alert(1)</script><b>the cat",
    "a percent sign and braces": "%s %(x)s {} {0} $x",
}


def local(folder: Path, name: str = "", **splits) -> Data:
    "A folder in the local layout; a split is a table, columns, or the bytes of its file."
    (folder / name).mkdir(parents=True, exist_ok=True)
    for split, what in splits.items():
        path = folder / name / f"{split}.parquet"
        if isinstance(what, bytes):
            path.write_bytes(what)
        else:
            pq.write_table(what if isinstance(what, pa.Table) else pa.table(what), path)
    return Data(source="local", dir=str(folder), corpus=(name or "x",), max_len=32, min_len_exclusive=2)


@contextmanager
def one_sentence(*words):
    "Expect one error that a user can read, with these words."
    with pytest.raises(UserError) as e:
        yield
    said = str(e.value)
    assert "\n" not in said and len(said) < 900, said
    assert not [w for w in words if w not in said], said


def plain_lines(content: bytes) -> list[str]:
    "What a text file says, by plain Python."
    wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    text = content.decode("utf-16" if wide else "utf-8-sig", errors="replace")
    return [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n") if line.strip()]


def plain_pieces(lines, data: Data) -> list[tuple]:
    "What a corpus keeps of lines, by the slow tokenizer's call and plain slices."
    kept = []
    for line in lines:
        ids = TOKENIZER(line)["input_ids"]
        step, cls, sep = data.max_len - 2, TOKENIZER.cls_token_id, TOKENIZER.sep_token_id
        for piece in [ids] if len(ids) <= data.max_len else [ids[i : i + step] for i in range(0, len(ids), step)]:
            piece = ([] if piece[0] == cls else [cls]) + piece + ([] if piece[-1] == sep else [sep])
            if len(piece) > data.min_len_exclusive and 2 * piece.count(TOKENIZER.unk_token_id) < len(piece):
                kept.append(tuple(piece))
    return sorted(kept)


def stored(data: Data, folder: Path) -> list[tuple]:
    "The sequences of a store, in no order."
    store = build_store(data, TOKENIZER, data.corpus, "train", folder, 0)
    return sorted(tuple(store[i].tolist()) for i in range(len(store)))


@pytest.mark.parametrize("name", NASTY)
def test_a_nasty_text_in_a_corpus(tmp_path, fault, name):
    lines = [GOOD, NASTY[name], GOOD + " the end ."]
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8", newline="")
    files = Data(source="local", dir=str(tmp_path), corpus=(str(tmp_path / "*.txt"),), max_len=32, min_len_exclusive=2)
    table = local(tmp_path, "set", train=dict(text=lines))
    want = plain_lines((tmp_path / "a.txt").read_bytes())
    with fault("data", name):
        assert list(texts(files, files.corpus[0], "train")) == want
        assert stored(files, tmp_path / "s1") == plain_pieces(want, files) != []
    with fault("data", name):
        assert stored(table, tmp_path / "s2") == plain_pieces([t for line in lines for t in line.split("\n")], table)
    with fault("data", name):
        lay_out_text((str(tmp_path / "a.txt"),), tmp_path / "laid")
        laid = [
            t for split in ("validation", "train") for t in pq.read_table(tmp_path / f"laid/text/{split}.parquet")["text"].to_pylist()
        ]
        assert sorted(laid) == sorted(want)


FILES = {
    "CRLF": b"\r\n".join([GOOD.encode()] * 3),
    "CR alone": b"\r".join([GOOD.encode()] * 3),
    "BOM": b"\xef\xbb\xbf" + GOOD.encode(),
    "UTF-16": GOOD.encode("utf-16"),
    "UTF-16, big end first": b"\xfe\xff" + GOOD.encode("utf-16-be"),
    "Latin-1": f"{GOOD} café".encode("latin-1"),
    "lone surrogates": GOOD.encode() + b" \xed\xa0\x80\xed\xbf\xbf",
    "cut in a character": f"{GOOD} ö".encode()[:-1],
    "no line break at the end": GOOD.encode(),
    "binary": GOOD.encode() + b"\n" + bytes(range(256)) * 20,
}


@pytest.mark.parametrize("name", FILES)
def test_a_nasty_text_file(tmp_path, fault, name):
    (tmp_path / "a.txt").write_bytes(FILES[name])
    data = Data(source="local", dir=str(tmp_path), corpus=(str(tmp_path / "a.txt"),), max_len=32, min_len_exclusive=2)
    with fault("data", f"a text file: {name}"):
        want = plain_lines(FILES[name])
        assert list(texts(data, data.corpus[0], "train")) == want and "\ufeff" not in "".join(want)
        assert stored(data, tmp_path / "s") == plain_pieces(want, data)
    with fault("data", f"a text file: {name}"):
        assert lay_out_text((str(tmp_path / "a.txt"),), tmp_path / "laid") == len(want)
        laid = [
            t for split in ("validation", "train") for t in pq.read_table(tmp_path / f"laid/text/{split}.parquet")["text"].to_pylist()
        ]
        assert sorted(laid) == sorted(want)


def test_any_bytes_are_a_text_file(tmp_path, fault):
    parts = st.sampled_from([b"\r", b"\n", b"\r\n", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"the cat ", "ö".encode(), b"\x00", b"\xff\xfe"])

    @settings(max_examples=fault.size(40, 600), deadline=None)
    @given(st.lists(st.one_of(parts, st.binary(max_size=6)), max_size=12).map(b"".join))
    def holds(content):
        (tmp_path / "a.txt").write_bytes(content)
        with fault("data", "any bytes as a text file"):
            data = Data(source="local", dir=str(tmp_path), corpus=(str(tmp_path / "a.txt"),))
            assert list(texts(data, data.corpus[0], "train")) == plain_lines(content)

    holds()


def test_any_texts_are_a_corpus(tmp_path, fault):
    words = st.sampled_from([*GOOD.split(), "☃", "[SEP]", "\x00", "é", "👍🏽", "ש", "\u0301"])
    line = st.one_of(st.text(max_size=20), st.lists(words, max_size=60).map(" ".join), st.none())

    @settings(max_examples=fault.size(25, 300), deadline=None)
    @given(st.lists(line, min_size=1, max_size=6))
    def holds(lines):
        data = local(tmp_path, "set", train=pa.table({"text": pa.array(lines, pa.string())}))
        want = plain_pieces([t.strip() for line in lines for t in (line or "").split("\n") if t.strip()], data)
        with fault("data", "any texts as a corpus"):
            try:
                assert stored(data, tmp_path / "s") == want
            except UserError as e:
                assert "is empty" in str(e) and not want

    holds()


def test_no_text_at_all_is_said(tmp_path, fault):
    (tmp_path / "a.txt").write_text("\n \n")
    for patterns in ((str(tmp_path / "*.txt"),), (str(tmp_path / "*.none"),)):
        with fault("data", "no text at all"), one_sentence(patterns[0]):
            lay_out_text(patterns, tmp_path / "out")
    for rows in ([], [None], ["", " "]):
        data = local(tmp_path, "set", train=pa.table({"text": pa.array(rows, pa.string())}))
        with fault("data", "no text at all"), one_sentence("the corpus set (train) is empty"):
            stored(data, tmp_path / "s")
        assert not (tmp_path / "s").exists()


SST2 = dict(sentence=["a", "b"], label=[0, 1])
WHOLE = {
    "sst2": SST2,
    "set": dict(text=[GOOD, GOOD]),
    "squad": dict(
        id=["q1", "q2"], context=["the cat sleeps ."] * 2, question=["who ?"] * 2, answers=[dict(text=["cat"], answer_start=[4])] * 2
    ),
}


def routes(data: Data, folder: Path) -> dict:
    "What reads a split of the local layout, by the set that it reads."
    return {
        "sst2": lambda: task_rows(data, get_task("sst2"), "train", TOKENIZER, 32),
        "squad": lambda: squad_rows(data, "train"),
        "set": lambda: stored(data.model_copy(update=dict(corpus=("set",))), folder / "store"),
    }


def whole_file(folder: Path, name: str) -> bytes:
    pq.write_table(pa.table(WHOLE[name]), folder / "whole.parquet")
    return (folder / "whole.parquet").read_bytes()


def as_folder(path):
    path.mkdir()


def as_loop(path):
    os.symlink(path.name, path)


def as_dangling(path):
    os.symlink("nowhere", path)


NO_FILES = {
    "a truncated parquet": lambda path, whole: path.write_bytes(whole[: len(whole) // 2]),
    "an empty file": lambda path, whole: path.write_bytes(b""),
    "no parquet at all": lambda path, whole: path.write_bytes(b"<html>404</html>"),
    "a footer that asks for 4 GB": lambda path, whole: path.write_bytes(whole[:-8] + b"\xff\xff\xff\x7fPAR1"),
    "a footer of zeros": lambda path, whole: path.write_bytes(whole[:99] + bytes(len(whole) - 107) + whole[-8:]),
    "a folder called x.parquet": lambda path, whole: as_folder(path),
    "a link to itself": lambda path, whole: as_loop(path),
    "a link to nowhere": lambda path, whole: as_dangling(path),
}


@pytest.mark.parametrize("name", NO_FILES)
def test_a_file_that_is_no_table_is_named(tmp_path, fault, name):
    for what in WHOLE:
        data = local(tmp_path, what)
        NO_FILES[name](tmp_path / what / "train.parquet", whole_file(tmp_path, what))
        with fault("data", name), one_sentence(str(tmp_path / what / "train.parquet"), "fetch"):
            routes(data, tmp_path)[what]()
    path = tmp_path / "answers.parquet"
    NO_FILES[name](path, whole_file(tmp_path, "sst2"))
    data = local(tmp_path / "fine", "sst2", validation=SST2)
    with fault("data", name), one_sentence(str(path)):
        mark_answers(path, "sst2", data)


def test_any_damage_of_a_parquet_file(tmp_path, fault):
    whole = {what: whole_file(tmp_path, what) for what in WHOLE}

    @settings(max_examples=fault.size(60, 1500), deadline=None)
    @given(st.sampled_from(sorted(WHOLE)), st.floats(0, 1), st.integers(1, 255), st.booleans())
    def holds(what, where, flip, cut):
        at = int(where * (len(whole[what]) - 1))
        spoilt = whole[what][:at] if cut else whole[what][:at] + bytes([whole[what][at] ^ flip]) + whole[what][at + 1 :]
        data = local(tmp_path, what, train=spoilt)
        with fault("data", "a spoilt byte in a parquet file"):
            try:
                assert routes(data, tmp_path)[what]() is not None
            except UserError as e:
                assert "\n" not in str(e) and len(str(e)) < 900

    holds()


WIDE = {f"c{i}": [i, i] for i in range(10_000)}
UTF8 = pa.array([b"a", b"\xed\xa0\x80"], pa.binary()).view(pa.string())
TABLES = {  # fault -> set -> columns, and words of the sentence; no words: it is right
    "zero rows": {"sst2": ({k: pa.array([], pa.string() if k == "sentence" else pa.int64()) for k in SST2}, ["the split is empty"])},
    "no columns at all": {
        "sst2": ({}, ["no sentence, label"]),
        "set": ({}, ["no column 'text'"]),
        "squad": ({}, ["expected rows with id"]),
    },
    "a missing column": {
        "sst2": (dict(label=[0, 1]), ["no sentence", "found label"]),
        "set": (dict(txt=["a"]), ["no column 'text'", "txt"]),
        "squad": ({k: v for k, v in WHOLE["squad"].items() if k != "answers"}, ["expected rows with id"]),
    },
    "10 000 columns and not the one needed": {
        "sst2": (WIDE, ["no sentence", "9991 more"]),
        "set": (WIDE, ["no column 'text'", "9990 more"]),
    },
    "a null cell": {
        "sst2": (dict(sentence=["a", None], label=[0, 1]), ["row 1 has sentence = None"]),
        "set": (dict(text=[GOOD, None]), []),
    },
    "numbers for texts": {
        "sst2": (dict(sentence=[1, 2], label=[0, 1]), ["row 0 has sentence = 1; expected text"]),
        "set": (dict(text=[1, 2]), ["row 0 has text = 1; expected text"]),
    },
    "bytes for texts": {
        "sst2": (dict(sentence=[b"a", b"b"], label=[0, 1]), ["row 0 has sentence = b'a'"]),
        "set": (dict(text=[b"a"]), ["row 0 has text"]),
    },
    "lists for texts": {
        "sst2": (dict(sentence=[["a"], []], label=[0, 1]), ["row 0 has sentence = ['a']"]),
        "set": (dict(text=[["a"]]), ["row 0 has text"]),
    },
    "texts that are no UTF-8": {
        "sst2": (dict(sentence=UTF8, label=[0, 1]), ["train.parquet", "UTF8"]),
        "set": (dict(text=UTF8), ["train.parquet", "UTF8"]),
    },
    "texts in a dictionary": {
        "sst2": (dict(sentence=pa.array(["a", "b"]).dictionary_encode(), label=[0, 1]), []),
        "set": (dict(text=pa.array([GOOD]).dictionary_encode()), []),
    },
    "label -1 (GLUE's hidden labels)": {"sst2": (SST2 | dict(label=[0, -1]), ["row 1 has label -1", "GLUE test split"])},
    "a label outside the classes": {"sst2": (SST2 | dict(label=[0, 2]), ["row 1 has label 2; expected 0..1"])},
    "a label between classes": {"sst2": (SST2 | dict(label=[0, 0.5]), ["row 1 has label 0.5"])},
    "a label that is NaN": {"sst2": (SST2 | dict(label=[0.0, float("nan")]), ["row 1 has label"])},
    "a label that is text": {"sst2": (SST2 | dict(label=["0", "1"]), ["row 0 has label '0'"])},
    "a label that is true": {"sst2": (SST2 | dict(label=[True, False]), ["row 0 has label True"])},
    "a null label": {"sst2": (SST2 | dict(label=[None, None]), ["row 0 has label None"])},
    "labels as floats": {"sst2": (SST2 | dict(label=[0.0, 1.0]), [])},
    "duplicate ids": {
        "sst2": (SST2 | dict(idx=[4, 4]), ["row 1 repeats the idx 4 of row 0"]),
        "squad": (WHOLE["squad"] | dict(id=["q", "q"]), ["row 1 (id q) repeats the id of row 0"]),
    },
    "ids that are no numbers": {"sst2": (SST2 | dict(idx=["a", "b"]), ["row 0 has idx = 'a'"])},
    "a null id": {
        "sst2": (SST2 | dict(idx=[1, None]), ["row 1 has idx = None"]),
        "squad": (WHOLE["squad"] | dict(id=["q", None]), ["row 1", "no text"]),
    },
    "ids of a question that are numbers": {"squad": (WHOLE["squad"] | dict(id=[1, 2]), ["row 0 (id 1)", "no text"])},
    "an empty context": {"squad": (WHOLE["squad"] | dict(context=["", " "]), ["row 0 (id q1) has an empty context"])},
    "answers of another shape": {"squad": (WHOLE["squad"] | dict(answers=["cat", "cat"]), ["row 0 (id q1) has answers 'cat'"])},
    "answers as a list of mappings": {
        "squad": (WHOLE["squad"] | dict(answers=[[dict(text="cat", answer_start=4)]] * 2), ["row 0", "expected a mapping"])
    },
    "null answers": {"squad": (WHOLE["squad"] | dict(answers=[dict(text=None, answer_start=None)] * 2), ["row 0", "no answer"])},
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_does_not_fit(tmp_path, fault, name):
    for what, (columns, words) in TABLES[name].items():
        data = local(tmp_path, what, train=pa.table(columns))
        with fault("data", name):
            if words:
                with one_sentence(*words):
                    routes(data, tmp_path)[what]()
            else:
                assert len(routes(data, tmp_path)[what]()) in (1, 2)


def test_two_columns_of_one_name(tmp_path, fault):
    for what, column in {"sst2": "label", "set": "text"}.items():
        table = pa.table(WHOLE[what])
        data = local(tmp_path, what, train=table.append_column(column, table[column]))
        with fault("data", "two columns of one name"):
            try:
                assert routes(data, tmp_path)[what]()
            except UserError as e:
                assert f"such as '{column}'" in str(e)


@pytest.mark.parametrize(
    ("at", "text", "words"),
    [
        (999, "cat", "where its context has ''"),
        (-1, "cat", "where its context has ''"),
        (5, "cat", "where its context has 'at '"),
        (4, "CAT", "has the answer 'CAT' at 4"),
        (4, "", "has the answer ''"),
        (4, " ", "has the answer ' '"),
        (4.5, "cat", "expected a text and a whole"),
        ("4", "cat", "expected a text and a whole"),
        (None, "cat", "expected a text and a whole"),
        (4, None, "expected a text and a whole"),
        (4, 7, "expected a text and a whole"),
        (2**62, "cat", "where its context has ''"),
        (4, "x" * 100_000, "characters)"),
    ],
    ids=lambda v: repr(v)[:30],
)
def test_an_answer_that_is_not_where_it_should_be(fault, at, text, words):
    one = {k: v[:1] for k, v in WHOLE["squad"].items()}
    rows = Dataset.from_dict(one | dict(answers=[dict(text=[text], answer_start=[at])]))
    with fault("data", "an answer offset outside the context"), one_sentence("squad: row 0 (id q1)", words):
        check_squad(rows)


def test_any_context_gives_its_answer_back(fault):
    letters = st.text(st.sampled_from("abז👍é\u0301\u200b\x00 .☃\n"), min_size=1, max_size=40)

    @settings(max_examples=fault.size(40, 600), deadline=None)
    @given(letters, letters, letters, st.integers(8, 24))
    def holds(before, text, after, width):
        row = dict(id="q", context=before + text + after, question="who ?", answers=dict(text=[text], answer_start=[len(before)]))
        rows = Dataset.from_list([row])
        with fault("data", "any context of a question"):
            try:
                check_squad(rows)
            except UserError as e:
                assert not text.strip() and "\n" not in str(e)
                return
            windows = encode_squad(rows, TOKENIZER, width)
            logits = np.full((2, len(windows), max(1, *(len(w["offsets"]) for w in windows))), -np.inf)
            for i, w in enumerate(windows):
                logits[:, i, : len(w["offsets"])] = 0
                if w["label"][0]:
                    logits[0, i, w["label"][0] - w["first"]] = logits[1, i, w["label"][1] - w["first"]] = 9
            said = decode(logits, windows, rows)["q"]
            assert said in row["context"] and 0 <= squad_floor(rows) <= 1
            inside = [w for w in windows if w["label"][0]]
            if inside and best_spans(logits)[0].max() == 18:
                marks = "".join(c for c in text if c.isalnum() and c != "ז")
                assert all(c in said for c in marks), "the whole answer, perhaps with what clings to it"

    holds()


ANSWERS = {  # fault -> file name, bytes (or a table), words of the sentence; no words: both answers are right
    "BOM": ("a.csv", "\ufeffid,prediction\n0,0\n1,1\n".encode(), []),
    "CRLF": ("a.tsv", b"index\tprediction\r\n0\t0\r\n1\t1\r\n", []),
    "names of classes": ("a.csv", b"id,prediction\n0,negative\n1,positive\n", []),
    "spaces around": ("a.csv", b"id,prediction\n0, 0\n1, 1 \n", []),
    "numbers as floats": ("a.csv", b"id,prediction\n0,0.0\n1,1e0\n", []),
    "a NaN score": ("a.csv", b"id,prediction\n0,nan\n1,1\n", ["answer to '0' is 'nan'"]),
    "an infinite score": ("a.csv", b"id,prediction\n0,0\n1,inf\n", ["answer to '1' is 'inf'"]),
    "an empty cell": ("a.csv", b"id,prediction\n0,\n1,1\n", ["answer to '0' is ''", "0..1"]),
    "an answer outside the classes": ("a.csv", b"id,prediction\n0,0\n1,7\n", ["answer to '1' is '7'", "0..1"]),
    "an answer -1": ("a.csv", b"id,prediction\n0,0\n1,-1\n", ["answer to '1' is '-1'"]),
    "an answer between classes": ("a.csv", b"id,prediction\n0,0.5\n1,1\n", ["'0.5'"]),
    "duplicate ids": ("a.csv", b"id,prediction\n0,0\n0,1\n", ["there twice, such as '0'"]),
    "a missing id": ("a.csv", b"id,prediction\n0,0\n", ["missing ids: 1, such as 1"]),
    "an id that is empty": ("a.csv", b"id,prediction\n0,0\n,1\n", ["missing ids: 1"]),
    "no header": ("a.csv", b"0,0\n1,1\n", ["no column id and no column prediction"]),
    "a row too long": ("a.csv", b"id,prediction\n0,0\n1,1,2,3\n", ["could not read"]),
    "an open quote": ("a.csv", b'id,prediction\n0,"0\n1,1\n', ["a.csv"]),
    "an empty file": ("a.csv", b"", ["could not read"]),
    "only a header": ("a.csv", b"id,prediction\n", ["missing ids: 2"]),
    "Latin-1": ("a.csv", "id,prediction\n0,café\n1,1\n".encode("latin-1"), ["could not read"]),
    "NUL": ("a.csv", b"id,prediction\n0,0\x00\n1,1\n", ["a.csv"]),
    "a line of 1 MB": ("a.csv", b"id,prediction\n0," + b"x" * 10**6 + b"\n1,1\n", ["answer to '0'", "characters)"]),
    "10 000 columns": ("a.csv", (",".join(f"c{i}" for i in range(10_000)) + "\n").encode(), ["no column id", "9990 more"]),
    "another ending": ("a.xlsx", b"", [".tsv, .csv, .parquet"]),
    "a table for SQuAD's form": ("a.json", b"{}", [".tsv, .csv, .parquet"]),
    "lists in a column": ("a.parquet", dict(id=[0, 1], prediction=[[0], [1]]), ["the answer to '0' is"]),
    "null answers": ("a.parquet", dict(id=[0, 1], prediction=[None, 1]), ["the answer to '0' is"]),
    "null ids": ("a.parquet", dict(id=[0, None], prediction=[0, 1]), ["ids"]),
    "ids that are lists": ("a.parquet", dict(id=[[0], [1]], prediction=[0, 1]), ["missing ids: 2"]),
    "two columns of ids": ("a.parquet", dict(id=[0, 1], idx=[5, 6], prediction=[0, 1]), []),
    "true and false": ("a.parquet", dict(id=[0, 1], prediction=[False, True]), []),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_file_of_answers(tmp_path, fault, name):
    file, content, words = ANSWERS[name]
    data = local(tmp_path, "sst2", validation=SST2)
    if isinstance(content, bytes):
        (tmp_path / file).write_bytes(content)
    else:
        pq.write_table(pa.table(content), tmp_path / file)
    with fault("data", f"a file of answers: {name}"):
        if words:
            with one_sentence(*words):
                mark_answers(tmp_path / file, "sst2", data)
        else:
            assert mark_answers(tmp_path / file, "sst2", data)[1]["accuracy"] == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("BOM", '\ufeff{"q1": "cat", "q2": "Cat"}'.encode(), []),
        ("lone surrogates", b'{"q1": "cat", "q2": "\\ud800"}', ["half"]),
        ("duplicate ids", b'{"q1": "cat", "q1": "", "q2": "cat"}', ["there twice", "q1"]),
        ("a null answer", b'{"q1": "cat", "q2": null}', ["None"]),
        ("NaN for an answer", b'{"q1": "cat", "q2": NaN}', ["nan"]),
        ("ten thousand brackets", b"[" * 10_000, ["not JSON"]),
        ("an empty file", b"", ["not JSON"]),
        ("a list", b"[]", ["holds a list"]),
        ("bytes that are no text", b"\xff\xfe\xfa", ["not JSON"]),
        ("a number of ten thousand digits", b'{"q1": ' + b"1" * 10_000 + b"}", ["a.json"]),
        ("a missing id", b'{"q1": "cat"}', ["missing ids: 1, such as q2"]),
        ("an answer of 1 MB", b'{"q1": "cat", "q2": "' + b"cat " * 250_000 + b'"}', ["half"]),
    ],
    ids=lambda v: v if isinstance(v, str) and len(v) < 50 else "",
)
def test_a_file_of_answers_to_squad(tmp_path, fault, name, content, words):
    data = local(tmp_path, "squad", validation=WHOLE["squad"])
    (tmp_path / "a.json").write_bytes(content)
    with fault("data", f"a file of answers: {name}"):
        if words and words != ["half"]:
            with one_sentence(*words):
                mark_answers(tmp_path / "a.json", "squad", data)
        else:
            assert mark_answers(tmp_path / "a.json", "squad", data)[1]["exact_match"] == (0.5 if words else 1)


def test_splits_that_are_not_of_one_kind(tmp_path, fault):
    small, big = pa.table(SST2), pa.table(dict(sentence=pa.array(["a", "b"], pa.large_string()), label=pa.array([0, 1], pa.int8())))
    for other, words in ((dict(txt=["a"]), ["'sentence'", "validation"]), (SST2 | dict(label=["0", "1"]), ["different types"])):
        data = local(tmp_path / str(len(words)), "sst2", train=SST2, validation=other)
        with fault("data", "a validation split with other columns than train"), one_sentence(*words):
            load_split(data, "sst2_resplit", "train")
        args = finetune_for(load_settings("quick", "smoke"), "sst2")
        with fault("data", "a validation split with other columns than train"), one_sentence("sst2"):
            finetune(tmp_path, "sst2", data, TOKENIZER, args, 1)
    folder = tmp_path / "shards"
    for first, second, words in (
        (small, big, []),
        (small, pa.table(dict(sentence=["a"])), ["row 2 has label None"]),
        (small, pa.table(SST2 | dict(label=["x", "y"])), ["cannot be read as one table"]),
    ):
        data = local(folder, "sst2", **{"train-00000-of-00002": first, "train-00001-of-00002": second})
        with fault("data", "shards with other columns"):
            if words:
                with one_sentence(*words):
                    routes(data, tmp_path)["sst2"]()
            else:
                assert [r["label"] for r in routes(data, tmp_path)["sst2"]()] == [0, 1, 0, 1]
    local(folder, "sst2", train=small)
    with fault("data", "a file beside its shards"), one_sentence("files of two sets"):
        routes(data, tmp_path)["sst2"]()


def test_a_loop_of_links_is_walked_once(tmp_path, fault):
    for depth in ("a", "a/b"):
        (tmp_path / depth).mkdir()
        for name in ("one", "two", "three"):
            (tmp_path / depth / name).symlink_to(tmp_path)
    (tmp_path / "a/b/x.txt").write_text(GOOD)
    (tmp_path / "a/b/folder.txt").mkdir()
    (tmp_path / "a/b/loop.txt").symlink_to("loop.txt")
    (tmp_path / "a/[1] *.txt").write_text(GOOD)
    with fault("data", "a loop of links below a pattern"):
        assert [p.name for p in text_files(f"{tmp_path}/**/*.txt")] in (["x.txt", "[1] *.txt"], ["[1] *.txt", "x.txt"])
    with fault("data", "a file name that looks like a pattern"):
        assert text_files(f"{tmp_path}/a/[1] *.txt") == [tmp_path / "a/[1] *.txt"]


def test_any_answers_are_scored_as_others_score_them_or_refused(fault):
    value = st.one_of(st.integers(-2, 3), st.floats(), st.none(), st.booleans(), st.text(max_size=2), st.lists(st.integers(), max_size=2))

    @settings(max_examples=fault.size(80, 1500), deadline=None)
    @given(st.lists(st.tuples(value, st.integers(0, 1)), max_size=8), st.sampled_from(["sst2", "cola", "mrpc", "stsb"]))
    def holds(pairs, task):
        said, true = [p for p, _ in pairs], [t for _, t in pairs]
        with fault("data", "any predictions to a metric"):
            try:
                found = GlueMetric(task).compute(predictions=said, references=true)
            except UserError as e:
                assert "\n" not in str(e) and task in str(e)
                return
            assert all(-1.000001 <= v <= 1.000001 for v in found.values()), found
            if task == "sst2":
                assert found["accuracy"] == pytest.approx(accuracy_score(true, [int(p) for p in said]))

    holds()


def test_any_scores_are_correlated_as_their_multiples_are(fault):
    @settings(max_examples=fault.size(60, 800), deadline=None)
    @given(
        st.lists(st.tuples(st.integers(-50, 50), st.integers(0, 5)), min_size=2, max_size=9), st.sampled_from([1e300, 1e-300, 1e-5, 7.0])
    )
    def holds(pairs, scale):
        said, true = (np.array(v, float) for v in zip(*pairs, strict=True))
        with fault("data", "scores as large as numbers go"):

            def marks(p):
                return GlueMetric("stsb").compute(predictions=p, references=true)

            assert marks(said * scale) == {k: pytest.approx(v, abs=1e-9) for k, v in marks(said).items()}

    holds()


def test_a_table_of_predictions_with_what_is_no_number(fault):
    for bad in (np.nan, np.inf, -1, 2, 0.5, None, "x"):
        table = pd.DataFrame(dict(label=[0, 1], prediction=[0, bad]))
        with fault("data", "a table of predictions with a bad cell"), one_sentence("sst2: predictions"):
            measure(get_task("sst2"), table)


def test_any_row_of_a_task_is_encoded_or_named(fault):
    cell = st.one_of(st.text(max_size=10), st.none(), st.sampled_from(list(NASTY.values())))

    @settings(max_examples=fault.size(40, 500), deadline=None)
    @given(st.lists(st.tuples(cell, cell, st.integers(-1, 2)), min_size=1, max_size=4), st.integers(8, 40))
    def holds(rows, width):
        first, second, labels = zip(*rows, strict=True)
        data = Dataset.from_dict(dict(sentence1=list(first), sentence2=list(second), label=list(labels)))
        with fault("data", "any row of a task"):
            try:
                check_rows("rte", data)
            except UserError as e:
                assert "\n" not in str(e) and "row" in str(e)
                assert None in (*first, *second) or not set(labels) <= {0, 1}
                return
            encoded = encode("rte", data, TOKENIZER, width)
            assert [len(e["input_ids"]) <= width for e in encoded] == [True] * len(rows)
            for e, a, b in zip(encoded, first, second, strict=True):
                parts = [TOKENIZER(t)["input_ids"] for t in (a, b)]
                whole = parts[0] + parts[1][1:]
                assert e["input_ids"].tolist() == whole if len(whole) <= width else len(e["input_ids"]) == width

    holds()


def test_what_can_not_be_masked_is_left_alone(fault):
    special = [TOKENIZER.pad_token_id, TOKENIZER.cls_token_id, TOKENIZER.sep_token_id, TOKENIZER.mask_token_id, TOKENIZER.unk_token_id]
    weights = token_weights(np.ones(len(TOKENIZER)), Mask(), special)

    @settings(max_examples=fault.size(60, 800), deadline=None)
    @given(
        st.lists(st.lists(st.sampled_from([*special, 7, 8]), min_size=1, max_size=9), min_size=1, max_size=5),
        st.sampled_from(["batch", "example"]),
    )
    def holds(sequences, scope):
        width = max(map(len, sequences))
        ids = torch.tensor([s + [special[0]] * (width - len(s)) for s in sequences])
        real = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
        with fault("data", "only [UNK] and special tokens, masked"):
            out, labels = mask_tokens(ids, real, np.arange(len(ids)), weights, Mask(scope=scope), special[3], 1, 0, 0)
            hit = labels != -100
            assert not (hit & ((real == 0) | torch.isin(ids, torch.tensor(special)))).any(), "never a special token or padding"
            assert torch.equal(out[~hit], ids[~hit]) and torch.equal(labels[hit], ids[hit])

    holds()


MEASURE = """
import sys
from pathlib import Path
from distilrepro.config import Data
from distilrepro.corpus import build_store
from distilrepro.finetune import task_rows
from distilrepro.sources import load_tokenizer, texts
from distilrepro.tasks import get_task
from distilrepro.workflow import lay_out_text
tokenizer, (what, folder) = load_tokenizer(Data()), sys.argv[1:]
data = Data(source="local", dir=folder, corpus=("long",), max_len=128)
def peak(): return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1000
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, from what is resident now: imports had a higher one
before = peak()
{"store": lambda: build_store(data, tokenizer, ["long"], "train", folder + "/store", 0),
 "laid": lambda: lay_out_text((folder + "/*.txt",), Path(folder)),
 "task": lambda: task_rows(data, get_task("sst2"), "train", tokenizer, 128), "wide": lambda: list(texts(data, "wide", "train"))}[what]()
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("what", "name", "most"),
    [
        ("store", "a line of 1 MB in a corpus", 500),
        ("laid", "a line of 1 MB in a text file", 100),
        ("task", "a cell of 1 MB, 10 000 columns", 800),
        ("wide", "10 000 columns beside the text", 200),
    ],
)
def test_memory_is_bounded(tmp_path, fault, what, name, most):
    line = GOOD * (10**6 // len(GOOD))
    sets = dict(store=("long", dict(text=[line] * fault.size(1, 4))), task=("sst2", dict(sentence=[line, "a"], label=[0, 1]) | WIDE),
                wide=("wide", dict(text=["a", "b"]) | WIDE))
    if what in sets:
        local(tmp_path, sets[what][0], train=sets[what][1])
    (tmp_path / "a.txt").write_text(f"{line}\n" * 3)
    with fault("data", name):
        grown = float(
            subprocess.run([sys.executable, "-c", MEASURE, what, str(tmp_path)], capture_output=True, text=True, check=True).stdout
        )
        fault.measured("data", f"{name}: peak memory", grown, "MB")
        assert grown < most


def test_the_command_says_it_in_one_line(tmp_path, fault, command):
    data = local(tmp_path, "sst2", validation=SST2 | dict(label=[0, -1]))
    (tmp_path / "a.csv").write_text("id,prediction\n0,0\n1,1\n")
    with fault("data", "label -1 (GLUE's hidden labels)"):
        code, _, err = command("evaluate", "sst2", "--predictions", tmp_path / "a.csv", "--data", data.dir)
        assert code == 2 and "row 1 has label -1" in err and "Traceback" not in err
    (tmp_path / "empty.txt").write_text("")
    with fault("data", "no text at all"):
        code, _, err = command("distil", "--teacher", "./nowhere", "--text", tmp_path / "empty.txt", "--out", tmp_path / "out")
        assert code == 2 and "does not exist" in err and "Traceback" not in err


def test_notes_of_another_program_in_a_file_decide_nothing(tmp_path, fault):
    for note in (b"no json", json.dumps(dict(info=dict(features=dict(label=dict(_type="Nope"))))).encode()):
        table = pa.table(SST2).replace_schema_metadata({b"huggingface": note, b"pandas": b"{"})
        data = local(tmp_path, "sst2", train=table)
        with fault("data", "spoilt notes in a parquet file"):
            assert [r["label"] for r in routes(data, tmp_path)["sst2"]()] == [0, 1]
            assert read_table(tmp_path / "sst2/train.parquet").num_rows == 2
