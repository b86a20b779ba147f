"""All checks, each to its end: lint, types, library notebooks, pytest. Prints how many tests ran and how long they took."""
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import nbformat

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
WORKERS = str(min(2, os.cpu_count() or 1))
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg"}


def tested_notebooks() -> list[Path]:
    "The notebooks that `nbdev_test` runs: those without a `.notest` beside them."
    return sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not p.name.startswith(("_", ".")) and not (p.parent / ".notest").exists())


def count_cells(paths: list[Path]) -> int:
    "Code cells in the notebooks at `paths`."
    return sum(c.cell_type == "code" and bool(c.source.strip()) for p in paths for c in nbformat.read(p, as_version=4).cells)


def run(*command: str) -> tuple[bool, float]:
    "Did the command succeed, and its seconds; it runs in the root, offline, with one thread."
    sys.stdout.write(f"\n$ {' '.join(command)}\n")
    sys.stdout.flush()
    start = time.perf_counter()
    program = [sys.executable, "-m", *command] if command[0] == "pytest" else [str(BIN / command[0]), *command[1:]]
    ok = subprocess.call(program, cwd=ROOT, env=os.environ | QUIET) == 0
    return ok, time.perf_counter() - start


def count_tests(report: Path) -> int:
    "Tests in a JUnit report, 0 when pytest wrote none."
    return sum(int(s.get("tests", 0)) for s in ElementTree.parse(report).getroot().iter("testsuite")) if report.exists() else 0


def main() -> int:
    "Run everything; 0 when all of it passed."
    books, begun = tested_notebooks(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as beside:
        report, types = Path(folder) / "pytest.xml", beside.submit(run, "mypy")  # one core for a minute, beside notebooks of uneven length
        steps = {
            "lint": run("ruff", "check"),
            "notebooks": run("nbdev_test", "--n_workers", WORKERS, "--timing"),
            "types": types.result(),
            "pytest": run("pytest", "-n", WORKERS, "--dist", "loadfile", "--durations", "15", f"--junitxml={report}"),
        }
        counts = {"notebooks": f"{len(books)} notebooks, {count_cells(books)} code cells", "pytest": f"{count_tests(report)} tests"}
    steps["total"] = all(ok for ok, _ in steps.values()), time.perf_counter() - begun
    sys.stdout.write("\n")
    for name, (ok, seconds) in steps.items():
        sys.stdout.write(f"{name:<10} {'ok' if ok else 'FAILED':<7} {seconds:7.1f} s  {counts.get(name, '')}\n")
    return int(not steps["total"][0])


if __name__ == "__main__":
    sys.exit(main())
