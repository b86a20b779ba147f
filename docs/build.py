"""The site, `python docs/build.py [OUT]`: nbdev documents the notebooks, `dialect` makes them MyST, Sphinx renders; warnings are errors."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import architecture
import reference
import withstands
import yaml
from dialect import TOP, convert, link, page_name
from nbdev.config import get_config
from nbdev.serve import proc_nbs

import results

SIDEBAR = {  # caption -> pages in their order; a folder stands for its pages by name
    "Start": ["start/index", "start/install", "start/first"],
    "The paper, retold": ["paper/"],
    "Results": ["results/index", "withstands"],
    "How to": [f"howto/{name}" for name in (
        "teacher", "data", "papermill", "run_folder", "task", "loss", "gpus", "cluster", "slurm", "nbdev3")],
    "Library": ["library/"],
    "Reference": [
        "reference/presets", "reference/settings", "reference/commands", "reference/records", "notebooks/stages", "notebooks/tables",
        "notebooks/analysis", "reference/glossary", "architecture", "contributing", "changelog"],
}
TEMPLATES = {  # notebooks with parameters: folder of nbs/ -> title, what they are
    "stages": ("Notebooks: stages", "Each stage of a run, and the benchmarks: parameters in, records out."),
    "tables": ("Notebooks: tables and figures", "One a published table or figure: records in, a table or picture out."),
    "analysis": ("Notebooks: looks inside", "What a fine-tuned student and its teacher look at, where they err, and whether they agree."),
}
TITLE = re.compile(r"^# (.+)$", re.M)
SUBTITLE = re.compile(r"^\{\.nb-subtitle\}\n(.+)$", re.M)


def toctree(pages: list[str], caption: str = "") -> str:
    "A hidden table of contents."
    return "```{toctree}\n:hidden:\n" + (f":caption: {caption}\n" if caption else "") + "\n" + "\n".join(f"/{p}" for p in pages) + "\n```\n"


def room_sources(module: Path) -> dict[str, str]:
    "The source of every function and class of a module by its name; empty for what is no module."
    text = module.read_text(encoding="utf-8") if module.is_file() else ""
    named = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    first = {n: min([n.lineno, *(d.lineno for d in n.decorator_list)]) for n in named}
    return {n.name: "\n".join(text.splitlines()[first[n] - 1:n.end_lineno]) for n in named}


def convert_all(cache: Path, package: Path) -> tuple[dict[str, dict], set[str]]:
    "Every notebook under `cache` in MyST's dialect, by its path there, and all targets."
    books, targets = {}, set()
    for f in sorted(cache.rglob("*.ipynb")):
        path = f.relative_to(cache).as_posix()
        page = page_name(path)
        sources = room_sources(package / f"{page.removeprefix('lib/')}.py")
        books[path], defined = convert(json.loads(f.read_text(encoding="utf-8")), page, sources)
        targets |= defined
    return books, targets


def picture_links(text: str, root: Path, repo: str, stage: Path) -> str:
    "Pictures of the repository are copied beside the pages: a site shows them without the network."
    def copy(m: re.Match) -> str:
        target = stage / "_pictures" / m[2].replace("/", "-")
        target.parent.mkdir(exist_ok=True)
        shutil.copy(root / m[2], target)
        return f"{m[1]}/_pictures/{target.name})"
    return re.sub(r"(!\[[^\]]*\]\()" + re.escape(repo) + r"/([^)\s]+)\)", copy, text)


def write(page: Path, content: str | dict) -> None:
    "Write a page, Markdown or notebook."
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def lay_out_notebooks(books: dict[str, dict], targets: set[str], stage: Path, cfg) -> None:
    "Write the pages of `nbs/` under `stage`, links resolved."
    pages = {page_name(path) for path in books}
    base, repo = (cfg.doc_host + cfg.doc_baseurl).rstrip("/"), f"{cfg.git_url}/blob/{cfg.branch}"
    for path, nb in books.items():
        for cell in (c for c in nb["cells"] if c["cell_type"] == "markdown"):
            cell["source"] = picture_links(link(cell["source"], path, base, repo, pages, targets), cfg.config_path, repo, stage)
        write(stage / f"{page_name(path)}.ipynb", nb)


def head(nb: dict) -> tuple[str, str]:
    "Title and subtitle of a converted notebook."
    found = TITLE.search(nb["cells"][0]["source"]), SUBTITLE.search(nb["cells"][0]["source"])
    return tuple(m[1] if m else "" for m in found)


def contents(title: str, about: str, pages: dict[str, tuple[str, str]]) -> str:
    "A page that lists pages with their titles and subtitles."
    listed = "".join(f"- [{name}](/{page}.ipynb): {subtitle}\n" for page, (name, subtitle) in pages.items())
    return f"# {title}\n\n{about}\n\n{listed}\n{toctree(list(pages))}"


def lay_out_contents(books: dict[str, dict], root: Path, stage: Path) -> list[str]:
    "Write the pages that list rooms by theme and notebooks by folder; the names of the themes' pages."
    heads = {page_name(path): head(nb) for path, nb in books.items()}
    themes = yaml.safe_load((root / "docs/rooms.yaml").read_text(encoding="utf-8"))
    for theme, group in themes.items():
        rooms = {f"lib/{room}": (room, heads[f"lib/{room}"][1]) for room in group["rooms"]}
        write(stage / f"library/{theme.lower().replace(' ', '_')}.md", contents(theme, group["about"], rooms))
    for folder, (title, about) in TEMPLATES.items():
        own = {page: said for page, said in heads.items() if page.startswith(f"{folder}/")}
        write(stage / f"notebooks/{folder}.md", contents(title, about, own))
    return [f"library/{theme.lower().replace(' ', '_')}" for theme in themes]


def lay_out_pages(root: Path, stage: Path, repo: str, pages: set[str]) -> None:
    "Copy the written pages, and the two that lie at the top of the repository."
    shutil.copytree(root / "docs/pages", stage, dirs_exist_ok=True)
    for source, page in TOP.items():
        write(stage / page.lstrip("/"), link((root / source).read_text(encoding="utf-8"), f"../{source}", "", repo, pages, set()))


def sidebar(pages: list[str]) -> str:
    "The tables of contents of the front page; `pages` are those that a folder stands for."
    def of(entry: str) -> list[str]: return [p for p in pages if p.startswith(entry)] if entry.endswith("/") else [entry]
    return "\n".join(toctree([p for e in entries for p in of(e)], caption) for caption, entries in SIDEBAR.items())


def lay_out(cache: Path, stage: Path, cfg) -> None:
    "Write every page of the site under `stage`, the sidebar on the front page."
    root, repo = cfg.config_path, f"{cfg.git_url}/blob/{cfg.branch}"
    books, targets = convert_all(cache, cfg.lib_path)
    lay_out_notebooks(books, targets, stage, cfg)
    themes = lay_out_contents(books, root, stage)
    lay_out_pages(root, stage, repo, set(map(page_name, books)))
    reference.lay_out(root, stage)
    architecture.write(stage)
    withstands.lay_out(root, stage)
    results.lay_out(root / "results", stage, root / "docs/_extra", repo)
    front = stage / "index.ipynb"
    nb = json.loads(front.read_text(encoding="utf-8"))
    nb["cells"].append({"cell_type": "markdown", "metadata": {}, "id": "toctree", "source": sidebar([*map(page_name, books), *themes])})
    write(front, nb)


def main(out: str = "_docs") -> int:
    "Build the site into `out`; the exit code is Sphinx's."
    cfg = get_config()
    root, stage = cfg.config_path, cfg.config_path / "docs/_nb"
    os.environ["OMP_NUM_THREADS"] = "1"
    cache = Path(proc_nbs(n_workers=2))
    for folder in (stage, root / "docs/_extra", root / out):
        shutil.rmtree(folder, ignore_errors=True)
    (root / "docs/_extra").mkdir()
    lay_out(cache, stage, cfg)
    options = ["-W", "--keep-going", "-n", "-q", "-j", "2", "-b", "html", "-d", str(cache / "_doctrees"), "-c", str(root / "docs")]
    status = subprocess.call([sys.executable, "-m", "sphinx", *options, str(stage), str(root / out)])
    shutil.rmtree((root / out).parent / "jupyter_execute", ignore_errors=True)  # myst-nb's copies of the outputs
    if status == 0:
        sys.stdout.write(f"{root / out / 'index.html'}\n")
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
