"""The sdist and the wheel: they build, hold what they should and nothing else, and the wheel works by itself."""
import os
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOP = ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt")
pytestmark = pytest.mark.packaging


def package_files() -> set[str]:
    "Everything of the package that belongs into a wheel."
    kept = ("*.py", "py.typed", "presets/*.yaml", "reference/*.yaml")
    return {p.relative_to(ROOT).as_posix() for pattern in kept for p in (ROOT / "distilrepro").glob(pattern)}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    "A folder with an sdist, and the wheel that was built from it."
    out = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source")
    for name in (*TOP, *package_files()):  # a copy: setuptools leaves its droppings beside the sources
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=source)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built) -> zipfile.ZipFile:
    "The wheel, opened."
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = {n for n in wheel.namelist() if ".dist-info/" not in n}
    assert names == package_files()


def test_sdist_holds_what_setup_reads(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as opened:
        names = {n.partition("/")[2] for n in opened.getnames()}
    assert set(TOP) | package_files() <= names
    assert not [n for n in names if n.split("/")[0] in {"nbs", "tests", "docs", "results", "runs"}]


def test_entry_points_and_metadata(wheel):
    folder = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")).rpartition("/")[0]
    points = ConfigParser(delimiters=["="])
    points.read_string(wheel.read(f"{folder}/entry_points.txt").decode())
    assert points["console_scripts"]["distilrepro"] == "distilrepro.cli:main"
    assert points["nbdev"]["distilrepro"] == "distilrepro._modidx:d"
    metadata = wheel.read(f"{folder}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata and "Requires-Python: >=3.11" in metadata
    extras = {line.split()[1] for line in metadata.splitlines() if line.startswith("Provides-Extra:")}
    assert extras == {"minilm", "bench", "export", "dev", "docs"}


@pytest.mark.skipif(not (ROOT / "distilrepro/student.py").exists(), reason="the room is not built yet")
def test_wheel_alone_builds_a_student_as_the_readme_shows(built, tmp_path):
    (path,) = built.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path / "site"), str(path)]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    program = f"""
import distilrepro
assert distilrepro.__file__.startswith({str(tmp_path)!r}), distilrepro.__file__
from transformers import BertConfig, BertForMaskedLM
from distilrepro.student import build_student
small = BertConfig(vocab_size=100, hidden_size=16, num_hidden_layers=12, num_attention_heads=2, intermediate_size=32)
student, ledger = build_student(BertForMaskedLM(small), layers="paper")
assert student.config.n_layers == 6
from importlib.resources import files
assert files("distilrepro").joinpath("reference/published.yaml").is_file()
"""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
