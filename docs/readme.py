"""README.md from the stored cells and outputs of nbs/index.ipynb: `python docs/readme.py [ROOT]`."""
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

NOTE = "<!-- Generated from nbs/index.ipynb by docs/readme.py: edit the notebook, then `make export`. -->\n\n"
DIRECTIVE = re.compile(r"^#\|\s*(\S+?):?(?:\s+(.*))?$", re.M)
ECHO = re.compile(r"^#\|\s*echo:\s*false", re.M)
LINK = re.compile(r"(\]\()(?![a-z]+:|#|/)([^)\s]+)(\))")


def shown(cell) -> bool:
    "Is the cell part of the page? nbdev's `#| hide` cells, front matter and empty cells are not."
    return cell.cell_type != "raw" and bool(cell.source.strip()) and "hide" not in {m[1] for m in DIRECTIVE.finditer(cell.source)}


def from_root(match: re.Match) -> str:
    "A link that was relative to `nbs/`, relative to the root of the repository."
    target = match[2].removeprefix("../") if match[2].startswith("../") else f"nbs/{match[2]}"
    return match[1] + target + match[3]


def front(source: str) -> str:
    "The title cell without nbdev's `- key: value` lines; `> subtitle` stays a quotation."
    head, *rest = source.split("\n\n")
    return "\n\n".join([head, *(p for p in rest if not re.fullmatch(r"(- \w+: .*\n?)+", p))])


def readme(root: Path) -> str:
    "The text of README.md."
    nb = nbformat.read(root / "nbs/index.ipynb", as_version=4)
    nb.cells = [c for c in nb.cells if shown(c)]
    nb.metadata.language_info = {"name": "python"}
    nb.cells[0].source = front(nb.cells[0].source)
    for c in nb.cells:
        c.metadata["transient"] = {"remove_source": bool(ECHO.search(c.source))}
        c.source = LINK.sub(from_root, c.source) if c.cell_type == "markdown" else DIRECTIVE.sub("", c.source).strip()
    text, resources = MarkdownExporter().from_notebook_node(nb)
    if resources["outputs"]:
        raise SystemExit("nbs/index.ipynb holds a picture in an output: save it under results/ and link it from a markdown cell")
    return NOTE + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    (root / "README.md").write_text(readme(root), encoding="utf-8")
