"""The page of what the package withstands, from the records that `make torture` wrote."""
import json
from collections import defaultdict
from pathlib import Path

from reference import table

GROUPS = {  # group of faults -> its heading, what is promised
    "kill": ("Killed", "A process group is killed at random moments and started again; it ends on what an unbroken run ends on."),
    "stop": ("Asked to stop", "SIGTERM or Ctrl-C: it ends within five seconds, with a checkpoint, and says how to go on."),
    "two at once": ("Two at once", "Two processes on one run folder: one works, the other waits or says so."),
    "disk": ("Bad disks", "A full disk, a folder that may not be written, a bit that flips: said by name, never silently wrong."),
    "data": ("Bad data", "Each nasty input gives a right result or one sentence that names file, column or row."),
    "models": ("Bad models", "A model that does not fit, lies about its shapes or brings code of its own is refused by name."),
    "outputs": ("Untrusted text", "Text and names that others wrote stay text: in the report, on this site, on a terminal, in a shell."),
    "numbers": ("Numbers", "A loss that is not finite stops the run by name, or is left out and counted; equal settings, equal bits."),
    "resources": ("Resources", "Memory stays flat, and files and processes return to where they were."),
    "supply": ("Supply", "Pinned packages, checked data, no code run from data, no secret written down."),
}
PAGE = """# What it withstands

Tests inject faults and count them. `make test` injects a few of each kind; `make torture` injects many and writes them down, and
this page is made from that record: {injected:,} faults, {survived:,} survived, {lost:,} lost ({created}, commit `{commit}`,
{hardware}, {minutes:.0f} minutes). A fault is survived when the result is right, compared with something independent, or when there is
one clear error that names the thing and nothing computed is lost.

{groups}
## What this does not show

The faults are injected into tiny runs on one Linux machine with a local disk; the code is that of long runs, the sizes are not. Power
that fails is imitated by killing processes: whether a disk keeps what it acknowledged is the disk's promise. Network file systems, other
operating systems and GPUs that fail were not tried.
"""


def group_text(name: str, rows: list[dict]) -> str:
    "The section of a group: its faults, and the figures measured with them."
    heading, about = GROUPS[name]
    counts = [(r["fault"], r["injected"], r["survived"]) for r in rows if "injected" in r]
    faults = [[name, f"{n:,}", f"{kept:,}", f"{n - kept:,}"] for name, n, kept in counts]
    figures = defaultdict(list)
    for r in (r for r in rows if "value" in r):
        figures[r["fault"], r["unit"]].append(r["value"])
    spans = [[fault, f"{min(v):.3g}" if len(v) == 1 else f"{min(v):.3g} to {max(v):.3g}", unit] for (fault, unit), v in figures.items()]
    measured = f"\n\n{table(['measured', 'value', 'unit'], spans)}" if spans else ""
    return f"## {heading}\n\n{about}\n\n{table(['fault', 'injected', 'survived', 'lost'], faults)}{measured}\n"


def page(records: Path) -> str:
    "The page, from a file of records."
    about, *rows = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
    injected, survived = (sum(r.get(k, 0) for r in rows) for k in ("injected", "survived"))
    groups = "\n".join(group_text(name, own) for name in GROUPS if (own := [r for r in rows if r["group"] == name]))
    return PAGE.format(**about, injected=injected, survived=survived, lost=injected - survived, groups=groups)


def lay_out(root: Path, stage: Path) -> None:
    "Write the page."
    (stage / "withstands.md").write_text(page(root / "results/torture/faults.jsonl"), encoding="utf-8")
