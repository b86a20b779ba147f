"""The site, `python docs/build.py [OUT]`: nbdev documents the notebooks, `dialect` makes them MyST, Sphinx renders; warnings are errors."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from dialect import convert, link, page_name
from nbdev.config import get_config
from nbdev.serve import proc_nbs

SECTIONS = {"Library": "lib", "Stages": "stages", "Tables and figures": "tables", "Analysis": "analysis"}  # caption -> folder of nbs/


def toctrees(pages: list[str]) -> str:
    "The sidebar: one caption a folder, pages in the order of the notebooks' numbers."
    here = {caption: [p for p in pages if p.startswith(folder + "/")] for caption, folder in SECTIONS.items()}
    return "\n".join(f"```{{toctree}}\n:hidden:\n:caption: {c}\n\n" + "\n".join(p) + "\n```\n" for c, p in here.items() if p)


def convert_all(cache: Path) -> tuple[dict[str, dict], set[str]]:
    "Every notebook under `cache` in MyST's dialect, by its path there, and all targets."
    books, targets = {}, set()
    for f in sorted(cache.rglob("*.ipynb")):
        path = f.relative_to(cache).as_posix()
        books[path], defined = convert(json.loads(f.read_text(encoding="utf-8")), page_name(path))
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


def stage_pages(cache: Path, stage: Path, cfg) -> None:
    "Write every page under `stage`, links resolved, the sidebar on the index."
    books, targets = convert_all(cache)
    pages = {path: page_name(path) for path in books}
    base, repo = (cfg.doc_host + cfg.doc_baseurl).rstrip("/"), f"{cfg.git_url}/blob/{cfg.branch}"
    for path, nb in books.items():
        target = stage / f"{pages[path]}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        for cell in (c for c in nb["cells"] if c["cell_type"] == "markdown"):
            linked = link(cell["source"], path, base, repo, set(pages.values()), targets)
            cell["source"] = picture_links(linked, cfg.config_path, repo, stage)
        if path == "index.ipynb":
            nb["cells"].append({"cell_type": "markdown", "metadata": {}, "id": "toctree", "source": toctrees(list(pages.values()))})
        target.write_text(json.dumps(nb), encoding="utf-8")


def main(out: str = "_docs") -> int:
    "Build the site into `out`; the exit code is Sphinx's."
    cfg = get_config()
    root, stage = cfg.config_path, cfg.config_path / "docs/_nb"
    cache = proc_nbs(n_workers=0)
    shutil.rmtree(stage, ignore_errors=True)
    stage_pages(Path(cache), stage, cfg)
    options = ["-W", "--keep-going", "-n", "-q", "-b", "html", "-c", str(root / "docs")]
    status = subprocess.call([sys.executable, "-m", "sphinx", *options, str(stage), str(root / out)])
    shutil.rmtree((root / out).parent / "jupyter_execute", ignore_errors=True)  # myst-nb's copies of the outputs
    if status == 0:
        sys.stdout.write(f"{root / out / 'index.html'}\n")
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
