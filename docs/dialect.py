"""From nbdev's dialect of a notebook (Quarto's) to MyST's: front matter, cell directives, callouts, `show_doc`, links between notebooks."""
import posixpath
import re

import yaml

OPTION = re.compile(r"^#\|.*\n?", re.M)
DIRECTIVE = re.compile(r"^#\|\s*([\w-]+)\s*:?\s*(.*)$")
CALLOUT = re.compile(r"^(:{3,})\s*\{\.callout-(\w+)[^}]*\}\s*\n+(?:#+ +(.+)\n)?", re.M)
SOURCE = re.compile(r"\[source\]\((\S+)\)\{[^}]*\}")
FENCED = re.compile(r"^```python\n.*?^```", re.M | re.S)
OPEN = re.compile(r"\(\s*(?:\*args, )?\*\*\w+(?::Any)?\s*\)")  # a class that is given anything: its source says what it takes
LINKED = re.compile(r"\[(`[^`]+`)\]\([^)]*\)")
HEADING = re.compile(r"^(#+ )(\S+)", re.M)
TOP = {"CONTRIBUTING.md": "/contributing.md", "CHANGELOG.md": "/changelog.md"}  # pages that lie at the top of the repository
RELATIVE = re.compile(r"(\]\()(?![a-z]+:|[#/{])([^)\s]+)(\))")


def page_name(path: str) -> str:
    "The page of a notebook: `lib/07_losses.ipynb` is `lib/losses`, as in nbdev's links."
    folder, name = posixpath.split(path)
    return posixpath.join(folder, re.sub(r"^\d+[a-zA-Z0-9]*_", "", name.lower().removesuffix(".ipynb")))


def label(page: str, name: str) -> str:
    "The target of a documented name; the page is part of it, since two modules may use one name."
    return f"{page}-{name}".replace("/", "-").replace(".", "-").lower()


def front_page(source: str) -> tuple[str, dict]:
    "Title and subtitle as Markdown, and the front matter."
    found = re.match(r"^---\s*\n(.*?)\n---\s*$", source.strip(), re.S)
    front = yaml.safe_load(found[1]) if found else {}
    subtitle = front.get("description")
    return f"# {front.get('title', '')}\n" + (f"\n{{.nb-subtitle}}\n{subtitle}\n" if subtitle else ""), front


def front_matter(source: str) -> tuple[str, str]:
    "Title and subtitle of a title cell as it is written: `# title`, `> subtitle`."
    found = [re.search(rf"^{mark} (.+)$", source, re.M) for mark in ("#", ">")]
    return tuple(m[1] if m else "" for m in found)


def callouts(text: str) -> str:
    "Quarto's callouts are MyST's admonitions."
    return CALLOUT.sub(lambda m: f"{m[1]}{{admonition}} {m[3]}\n:class: {m[2]}\n\n" if m[3] else f"{m[1]}{{{m[2]}}}\n", text)


def folded(code: str) -> str:
    "Source code that a reader may open."
    return f"\n\n::::{{dropdown}} Source\n```python\n{code}\n```\n::::\n" if code else ""


def signed(text: str, name: str, source: str) -> tuple[str, str]:
    "A signature that calls a class one, or shows it whole where it is given anything; and the source that is left to fold away."
    text = FENCED.sub(lambda m: LINKED.sub(r"\1", m[0]).replace("__main__.", ""), text)
    if not re.search(rf"^class {name}\b", source, re.M):
        return text, source
    if any(OPEN.search(m[0]) for m in FENCED.finditer(text)):
        return FENCED.sub(lambda m: f"```python\n{source}\n```", text, count=1), ""
    return FENCED.sub(lambda m: re.sub(r"\)(?:->None)?:", ")", m[0].replace("def ", "class ", 1)), text, count=1), source


def show_doc(cell: dict, page: str, sources: dict[str, str]) -> tuple[str, str]:
    "Markdown of a `show_doc` output under a target of its own with the source below it, and that target; code holds no links."
    found = (o["data"]["text/markdown"] for o in cell["outputs"] if "text/markdown" in o.get("data", {}))
    text = SOURCE.sub(r"[source](\1){.nb-source}", re.sub(r"^---\n+", "", "".join(next(found, ""))))
    heading = HEADING.search(text)
    if not heading:
        return text, ""
    target = label(page, heading[2])
    text, source = signed(text, heading[2], sources.get(heading[2], ""))
    return HEADING.sub(lambda m: f"({target})=\n{m[1]}`{m[2]}`", text, count=1) + folded(source), target


def code(cell: dict, source: str) -> dict | None:
    "A code cell without its directives, which become tags; None when nothing of it is shown."
    options = {m[1]: m[2].strip().strip('"') for line in source.splitlines() if (m := DIRECTIVE.match(line))}
    body = "\n".join(line for line in source.splitlines() if not DIRECTIVE.match(line)).strip()
    if options.get("include") == "false" or not body:
        return None
    tags = set(cell["metadata"].get("tags", []))
    tags |= {"remove-input"} if options.get("echo") == "false" else set()
    tags |= {"remove-output"} if options.get("output") == "false" else set()
    shown = {f"code_prompt_{k}": options["code-summary"] for k in ("show", "hide")} if "code-summary" in options else {}
    if "fig-alt" in options:
        shown["image"] = {"alt": options["fig-alt"]}
    tags |= {"hide-input"} if options.get("code-fold") == "true" else set()
    metadata = {"tags": sorted(tags)} | ({"mystnb": shown} if shown else {})
    return {"source": body, "metadata": metadata, "outputs": cell["outputs"], "execution_count": None}


def convert(nb: dict, page: str, sources: dict[str, str]) -> tuple[dict, set[str]]:
    "The notebook in MyST's dialect with the `sources` of what it documents, links still as they were, and the targets it defines."
    cells, targets = [], set()
    for i, cell in enumerate(nb["cells"]):
        source = "".join(cell["source"])
        new = {"cell_type": cell["cell_type"], "metadata": {}, "id": cell.get("id") or f"cell-{i}", "source": source}
        if cell["cell_type"] == "raw":
            new |= {"cell_type": "markdown", "source": front_page(source)[0]}
        elif cell["cell_type"] == "markdown":
            new["source"] = "" if "AUTOGENERATED" in source else callouts(source)
        elif (shown := code(cell, source)) and shown["source"].startswith("show_doc("):
            text, target = show_doc(cell, page, sources)
            new |= {"cell_type": "markdown", "source": text}
            targets |= {target} - {""}
        else:
            new |= shown or {"source": ""}
        if new["source"]:
            cells.append(new)
    language = {"name": "python", "pygments_lexer": "ipython3"}
    return {"cells": cells, "metadata": {"language_info": language}, "nbformat": 4, "nbformat_minor": 5}, targets


def link(text: str, path: str, base: str, repo: str, pages: set[str], targets: set[str]) -> str:
    "Links of Markdown `text` in notebook `path`: nbdev's absolute ones and relative ones become cross-references, files point to `repo`."
    def absolute(m: re.Match) -> str:
        page, target = m[1], label(m[1], (m[2] or "#")[1:])
        return f"#{target}" if target in targets else f"/{page}.ipynb" if page in pages else m[0]

    def relative(m: re.Match) -> str:
        target = posixpath.normpath(posixpath.join("nbs", posixpath.dirname(path), m[2]))
        page = page_name(target.removeprefix("nbs/")) if target.startswith("nbs/") else ""
        written = f"/{target.removeprefix('docs/pages/')}" if target.startswith("docs/pages/") else TOP.get(target)
        return m[1] + (f"/{page}.ipynb" if page in pages else written or f"{repo}/{target}") + m[3]

    text = re.sub(re.escape(base) + r"/([\w./-]+)\.html(#[\w.]+)?", absolute, text)
    return RELATIVE.sub(relative, text)
