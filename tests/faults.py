"""Faults injected by tests, counted: survived or lost. `make torture` runs the same tests with larger numbers and writes the table down."""
import json
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

BEGUN = pytest.StashKey[float]()
RECORDS = Path(__file__).resolve().parent.parent / "results/torture/faults.jsonl"


class Faults:
    "What a test injects: `with fault(GROUP, NAME): ...` is one fault, survived when the block ends without an error."

    def __init__(self, whole: bool):
        self.whole, self.rows = whole, []

    def size(self, short: int, whole: int) -> int:
        "How many, or how large: short in `make test`, whole in `make torture`."
        return whole if self.whole else short

    @contextmanager
    def __call__(self, group: str, name: str):
        "Inject one fault; whatever the block raises is a fault lost."
        self.rows.append(row := dict(group=group, fault=name, injected=1, survived=0))
        yield
        row["survived"] = 1

    def measured(self, group: str, name: str, value: float, unit: str) -> None:
        "Keep a figure that belongs to a fault, such as seconds until a run stopped."
        self.rows.append(dict(group=group, fault=name, value=round(float(value), 4), unit=unit))


@pytest.fixture
def fault(request):
    "Count the faults of a test."
    faults = Faults(request.config.getoption("--torture"))
    yield faults
    request.node.user_properties.append(("faults", json.dumps(faults.rows)))


def pytest_addoption(parser):
    parser.addoption("--torture", action="store_true", help="inject many faults, not a few, and write results/torture/faults.jsonl")


def counted(reports) -> list[dict]:
    "The faults of all tests: one row a fault with its numbers added up, one row a figure."
    rows = [r for report in reports for name, value in report.user_properties if name == "faults" for r in json.loads(value)]
    sums: dict[tuple, dict] = {}
    for row in (r for r in rows if "injected" in r):
        total = sums.setdefault((row["group"], row["fault"]), row | dict(injected=0, survived=0))
        total |= {k: total[k] + row[k] for k in ("injected", "survived")}
    return [*sums.values(), *(r for r in rows if "value" in r)]


def about(seconds: float) -> dict:
    "When, where and on what the faults were injected."
    from distilrepro.records import git_state, hardware_card, now

    return dict(created=now(), commit=git_state(RECORDS.parent.parent)["commit"], hardware=hardware_card()["name"], minutes=seconds / 60)


def pytest_configure(config):
    config.stash[BEGUN] = time.monotonic()


def pytest_terminal_summary(terminalreporter, config):
    "Print the table of faults, and write it down, when all of it was asked for."
    if not config.getoption("--torture"):
        return
    reports = [r for group in terminalreporter.stats.values() for r in group if getattr(r, "when", "") == "teardown"]
    rows = sorted(counted(reports), key=lambda r: (r["group"], r["fault"]))
    say = terminalreporter.write_line
    say(f"{'fault':<90} {'injected':>8} {'survived':>8} {'lost':>5}")
    for r in (r for r in rows if "injected" in r):
        say(f"{r['group'] + ': ' + r['fault']:<90} {r['injected']:>8} {r['survived']:>8} {r['injected'] - r['survived']:>5}")
    injected, survived = (sum(r.get(k, 0) for r in rows) for k in ("injected", "survived"))
    say(f"{'all':<90} {injected:>8} {survived:>8} {injected - survived:>5}")
    for r in (r for r in rows if "value" in r):
        say(f"{r['group'] + ': ' + r['fault']:<90} {r['value']:g} {r['unit']}")
    RECORDS.parent.mkdir(parents=True, exist_ok=True)
    lines = [about(time.monotonic() - config.stash[BEGUN]), *rows]
    RECORDS.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in lines), encoding="utf-8")
