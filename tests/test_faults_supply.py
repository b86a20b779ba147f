"""What comes from elsewhere: code that could be run by data, packages, files of data, secrets in the surroundings of a run."""
import ast
import hashlib
import importlib.metadata as metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from random import Random

import pandas as pd
import pytest
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from test_structure import MODULES, NOTEBOOKS, ROOT, dotted, name, pins, read, tree

from distilrepro.checksums import as_listed
from distilrepro.config import Data, UserError
from distilrepro.sources import load_split, texts

UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = set("eval exec compile __import__ os.system os.popen tempfile.mktemp pty.spawn runpy.run_path runpy.run_module".split())
UNSAFE_CALLS |= {f"yaml.{f}" for f in ("load", "load_all", "full_load", "unsafe_load")} | {"torch.load", "torch.hub.load"}
UNSAFE_CALLS |= {f"{p}.read_pickle" for p in ("pd", "pandas")} | {"np.fromregex", "numpy.load"}
UNSAFE_WHEN_TRUE = {"allow_pickle", "shell", "trust_remote_code"}
PROCESSES = {f"subprocess.{f}" for f in ("run", "call", "Popen", "check_call", "check_output", "getoutput", "getstatusoutput")}
DOORS = [*sorted((ROOT / "docs").glob("*.py")), ROOT / "setup.py", ROOT / "tests/run.py"]
STOCK = ("Tokenizer", "Config")  # what `from_pretrained` reads from JSON alone


def given(call: ast.Call, word: str):
    "The value of a keyword of a call, where it is written out; None where it is not there."
    return next((getattr(k.value, "value", "?") for k in call.keywords if k.arg == word), None)


def unsafe_call(call: ast.Call) -> str:
    "Why a call could run what data says; empty when it could not."
    called = dotted(call.func)
    if called in UNSAFE_CALLS:
        return called
    if wrong := [k.arg for k in call.keywords if k.arg in UNSAFE_WHEN_TRUE and getattr(k.value, "value", True)]:
        return wrong[0]
    if called == "np.load" and given(call, "allow_pickle") is not False:
        return "np.load without allow_pickle=False"
    if called in PROCESSES and call.args and not isinstance(call.args[0], ast.List | ast.Name | ast.Tuple | ast.Starred):
        return f"{called} of a string"
    whose = called.removesuffix(".from_pretrained")
    if whose != called and not whose.lower().endswith(tuple(s.lower() for s in STOCK)) and given(call, "use_safetensors") is not True:
        return f"{called} without use_safetensors=True"
    return ""


def unsafe(code: ast.AST) -> list[str]:
    "What in a piece of code could run what data says."
    found = []
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").split(".")[0] in UNSAFE_MODULES else []
            found += [a.name for a in node.names if f"{node.module}.{a.name}" in UNSAFE_CALLS]
        elif isinstance(node, ast.Call) and (why := unsafe_call(node)):
            found.append(why)
    return found


def snakefile() -> ast.AST:
    "The Python of the Snakefile: what stands outside of rules, and the values of their lines."
    lines = (ROOT / "Snakefile").read_text(encoding="utf-8").splitlines()
    plain = [line for line in lines if line and not line.startswith(("rule", "for", " "))]
    values = [f"_({line.strip().partition(': ')[2]})" for line in lines if re.match(r"\s+\w+: \S", line)]
    return ast.parse("\n".join([*plain, *values]))


@pytest.mark.parametrize("path", [*MODULES, *DOORS], ids=name)
def test_no_module_runs_what_data_says(path):
    assert not (found := unsafe(ast.parse(path.read_text(encoding="utf-8")))), f"unsafe: {found}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_no_notebook_runs_what_data_says(path):
    cells = [c for c in read(path).cells if c.cell_type == "code"]
    found = [why for c in cells for why in unsafe(tree(c))]
    stock = "without use_safetensors=True" if path.parent.name == "lib" else "\0"  # as a reader would open a model just saved
    assert not [why for why in found if not why.endswith(stock)]
    assert not [line for c in cells for line in c.source.splitlines() if line.startswith(("!", "%%bash", "%%sh", "%%!", "%run", "%load"))]


def test_the_workflow_gives_no_shell_a_text():
    text = (ROOT / "Snakefile").read_text(encoding="utf-8")
    assert not unsafe(snakefile())
    inserted = re.findall(r"\{([^{}]*)\}", "".join(line for line in text.splitlines() if "shell:" in line))
    assert inserted and all(i.endswith(":q") for i in inserted), "every value in a shell command is quoted"


@pytest.mark.parametrize("bad", [
    "eval(x)", "exec(x)", "import pickle", "from joblib import load", "torch.load(f, weights_only=True)", "yaml.load(f)", "os.system('x')",
    "subprocess.run(f'ls {x}')", "subprocess.Popen('ls ' + x)", "subprocess.run(x, shell=True)", "np.load(f)", "np.load(f, allow_pickle=y)",
    "tempfile.mktemp()", "AutoModel.from_pretrained(x)", "kind.from_pretrained(x, use_safetensors=False)", "f(trust_remote_code=y)",
    "from os import system", "def f():\n    import dill", "subprocess.check_output('ls')"])
def test_the_search_finds_what_it_is_for(bad, fault):
    with fault("supply", "code that would run what data says"):
        assert unsafe(ast.parse(bad))


def test_the_search_leaves_alone_what_is_fine():
    fine = ("re.compile(x); model.eval(); yaml.safe_load(f); np.load(f, allow_pickle=False); subprocess.run(['ls', x]); "
            "AutoTokenizer.from_pretrained(x); M.from_pretrained(x, use_safetensors=True); torch.compile(m); f(shell=False)")
    assert unsafe(ast.parse(fine)) == []


# packages

def installed() -> dict[str, metadata.Distribution]:
    "The pinned packages that are installed here in the pinned version."
    found = {canonicalize_name(d.metadata["Name"]): d for d in metadata.distributions()}
    return {n: found[n] for n, version in pins().items() if n in found and found[n].version.partition("+")[0] == version}


def test_every_pin_admits_the_python_of_debian(fault):
    assert len(installed()) > 100, "too few packages to say anything"
    with fault("supply", "pins that Python 3.11.2 may not have"):
        needs = {n: d.metadata["Requires-Python"] or "" for n, d in installed().items()}
        assert not {n: s for n, s in needs.items() if not SpecifierSet(s).contains("3.11.2")}


def test_pins_are_still_offered(fault):
    "A handful a day, drawn anew each day: a registry is asked for what is needed, never for everything."
    if not fault.whole:
        pytest.skip("asks an index; `make torture` does")
    small = sorted(n for n, d in installed().items() if sum(f.size or 0 for f in d.files or []) < 3e6)
    for one in Random(date.today().toordinal()).sample(small, 5):
        words = ["install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed", "--report", "-", f"{one}=={pins()[one]}"]
        done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, timeout=120)
        if done.returncode and ("No matching distribution" not in done.stderr or "(from versions: none)" in done.stderr):
            pytest.skip(f"no index here: {done.stderr.strip().splitlines()[-1:]}")
        with fault("supply", "a pin that is not offered or was withdrawn"):
            assert done.returncode == 0, done.stderr
            (offer,) = json.loads(done.stdout)["install"]
            assert not offer.get("is_yanked") and "yanked" not in done.stderr, f"{one} {pins()[one]} was withdrawn; pin another version"
            assert SpecifierSet(offer["metadata"].get("requires_python", "")).contains("3.11.2")


# files of data

@pytest.fixture
def listed(tmp_path) -> Path:
    "A folder in the local layout with two sets in three files, and the list that `sha256sum` would write."
    for place, column in (("cola/train", "sentence"), ("cola/validation", "sentence"), ("books/train", "text")):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        pd.DataFrame({column: ["a line of words"] * 20, "label": 1}).to_parquet(tmp_path / f"{place}.parquet")
    files = sorted(p for p in tmp_path.rglob("*.parquet"))
    said = (f"{hashlib.sha256(p.read_bytes()).hexdigest()}  ./{p.relative_to(tmp_path).as_posix()}\n" for p in files)
    (tmp_path / "SHA256SUMS").write_text("".join(said))
    return tmp_path


def read_all(folder: Path) -> int:
    "Read every row of every file, through the doors that runs use."
    data = Data(source="local", dir=str(folder))
    return sum(len(load_split(data, "cola", s)) for s in ("train", "validation")) + len(list(texts(data, "books", "train")))


def flip(path: Path) -> None:
    "Turn one bit in the middle of a file."
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_list_that_sha256sum_writes_is_understood(listed):
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=listed, check=True)
    assert read_all(listed) == 60


@pytest.mark.parametrize("place", ["cola/train", "cola/validation", "books/train"])
def test_a_file_that_is_not_the_listed_one_is_named(listed, place, fault):
    assert read_all(listed) == 60, "and read once already in this process"
    flip(listed / f"{place}.parquet")
    with fault("supply", "a flipped bit in a file of data that is listed"):
        with pytest.raises(UserError, match=f"{place}.parquet is not the file that .*SHA256SUMS lists.*fetch it again"):
            read_all(listed)


def test_a_file_that_is_not_listed_is_read(listed, fault):
    lines = (listed / "SHA256SUMS").read_text().splitlines(keepends=True)
    (listed / "SHA256SUMS").write_text("".join(line for line in lines if "books" not in line) + f"{'0' * 64}  gone.parquet\n")
    with fault("supply", "a file of data that is not listed, and a listed one that is gone"):
        assert read_all(listed) == 60
    (listed / "SHA256SUMS").unlink()
    assert read_all(listed) == 60


@pytest.mark.parametrize("text", ["not a list\n", "0" * 63 + "  a\n", "\x00\x01", "<html>404</html>\n", "\n\n"])
def test_a_list_that_is_none_is_named(listed, text, fault):
    (listed / "SHA256SUMS").write_text(text)
    with fault("supply", "a SHA256SUMS that is none"):
        with pytest.raises(UserError, match="SHA256SUMS has a line that is no checksum.*delete it"):
            read_all(listed)


def test_the_cost_of_checking_is_bounded(tmp_path, fault):
    size = fault.size(20, 100)
    (tmp_path / "a").mkdir()
    path = tmp_path / "a/train.parquet"
    path.write_bytes(os.urandom(size * 10**6))
    (tmp_path / "SHA256SUMS").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  a/train.parquet\n")
    begun = time.process_time()
    as_listed(tmp_path, path)
    first, begun = time.process_time() - begun, time.process_time()
    for _ in range(1000):
        as_listed(tmp_path, path)
    again = time.process_time() - begun
    fault.measured("supply", f"checking {size} MB of data once", first, "s")
    assert first < size * 0.02 and again < 0.5, "once in a process"
