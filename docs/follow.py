"""`python docs/follow.py PAGE...` does what the pages say: each page's blocks in order, in a fresh folder, up to the first that fails.

A block of `sh` or `python` runs; a `{code-block}` with a caption is the content of the file of that name; `{.elsewhere}` on the line
before marks a block for another machine, which is skipped and counted. All else is for reading. CHECKOUT names the repository's folder.
"""
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^(?P<mark>\{[^}\n]*\}\n)?(?P<fence>`{3,})(?P<head>.*)\n(?P<text>(?:.*\n)*?)(?P=fence)$", re.M)
CAPTION = re.compile(r"\A(?::caption: (.+)\n)\n*")
SHELL = ["bash", "-euo", "pipefail", "-c"]


@dataclass(frozen=True)
class Block:
    "A fenced block of a page."
    line: int  # where its fence stands
    language: str  # `sh`, `python`, `yaml`, ...
    text: str
    file: str  # the caption: a file to be written; empty for others
    elsewhere: bool  # it cannot run on any one machine

    @property
    def runs(self) -> bool:
        "Is it a command, and not a file or something to read?"
        return not self.file and self.language in ("sh", "python")


def blocks(page: str) -> list[Block]:
    "The fenced blocks of a page's text, in order."
    out = []
    for m in BLOCK.finditer(page):
        name = CAPTION.match(m["text"])
        text, language = CAPTION.sub("", m["text"]), m["head"].replace("{code-block}", "").strip()
        line = page[: m.start("fence")].count("\n") + 1
        out.append(Block(line, language, text, name[1].strip() if name else "", ".elsewhere" in (m["mark"] or "")))
    return out


def run(block: Block, folder: Path) -> int:
    "Write the block's file, or run its commands in the folder; the exit code."
    if block.file:
        (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
        (folder / block.file).write_text(block.text, encoding="utf-8")
        return 0
    program = SHELL if block.language == "sh" else [sys.executable, "-c"]
    here = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run([*program, block.text], cwd=folder, env=os.environ | {"PATH": here, "CHECKOUT": str(ROOT)}).returncode


def follow(page: Path) -> bool:
    "Follow a page; says what was done, and whether all of it worked."
    start, found = time.perf_counter(), blocks(page.read_text(encoding="utf-8"))
    todo = [b for b in found if (b.runs or b.file) and not b.elsewhere]
    with tempfile.TemporaryDirectory() as folder:
        for b in todo:
            print(f"--- {page.name}:{b.line} {b.file or b.language}\n{b.text}", end="", flush=True)
            if code := run(b, Path(folder)):
                print(f"{page}:{b.line}: exit code {code}")
                return False
    print(f"{page}: {len(todo)} blocks done, {sum(b.elsewhere for b in found)} for elsewhere, {time.perf_counter() - start:.0f} s")
    return True


if __name__ == "__main__":
    sys.exit(not all([follow(Path(p)) for p in sys.argv[1:]]))
