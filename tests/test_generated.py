"""Everything generated is what the notebooks say: export, clean and README, made in a copy, change nothing."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
COPIED = ("nbs", "distilrepro", "docs", "settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")
IGNORED = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "_nb")


def contents(root: Path) -> dict[str, bytes]:
    "Every generated file under `root` by its path: notebooks (cleaned), modules, README."
    files = [root / "README.md", *(root / "nbs").rglob("*"), *(root / "distilrepro").rglob("*")]
    return {f.relative_to(root).as_posix(): f.read_bytes() for f in files if f.is_file() and "__pycache__" not in f.parts
            and ".ipynb_checkpoints" not in f.parts}


def call(*command: str, cwd: Path) -> None:
    "Run a command in `cwd` and show its output when it fails."
    done = subprocess.run(command, cwd=cwd, env=os.environ | {"PYTHONPATH": str(cwd)}, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}"


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    "A copy of the checkout without its repository, so that nothing here can change the checkout."
    target = tmp_path_factory.mktemp("checkout")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=IGNORED)
        else:
            shutil.copy(source, target / name)
    return target


def test_export_clean_and_readme_change_nothing(copy):
    before = contents(copy)
    call(str(BIN / "nbdev_export"), cwd=copy)
    call(str(BIN / "nbdev_clean"), cwd=copy)
    call(sys.executable, "docs/readme.py", str(copy), cwd=copy)
    after = contents(copy)
    changed = sorted(p for p in before | after if before.get(p) != after.get(p))
    assert not changed, f"not what the notebooks say: {', '.join(changed)}; run `make export` and commit what it writes"


def test_a_module_edited_by_hand_is_noticed(copy):
    "The check can fail: an edited module comes back as the notebook says."
    module = next(p for p in sorted((copy / "distilrepro").glob("*.py")) if not p.name.startswith("_"))
    good = module.read_bytes()
    module.write_bytes(good + b"\nedited = True\n")
    call(str(BIN / "nbdev_export"), cwd=copy)
    assert module.read_bytes() == good
