"""The site's results: a page for each committed run, its executed notebooks below it, their code folded away."""
import hashlib
import html
import json
import re
import shutil
from pathlib import Path
from urllib.parse import quote

import nbformat
from dialect import OPTION, front_matter

from distilrepro.config import markdown
from distilrepro.records import Run
from distilrepro.report import EXPECTED, acts, lead_html, provenance_html, summary_markdown
from distilrepro.tables import TASKS, is_toy

PARTS = {  # heading of a run's page -> what its notebooks' names begin with
    "Tables and figures": ("t1", "t2", "t3", "t4", "forms", "f4", "f5", "cornell", "tiny", "sst2"),
    "Claims": ("claims",),
    "Looks inside": ("a1", "a2", "a3", "a4", "a5", "a6"),
    "Pretraining": ("s01", "s02"),
    "Benchmarks": ("b0",),
}
ABOUT = """Runs that are committed with this repository: settings, provenance, records, predictions and executed notebooks.
Every number here is computed from those records by the code that stands folded above it. Scores x100 with 95 % intervals over examples and
seeds; retention as ratio of macro means and as mean of per-task ratios. None of them is a run of BERT-base on the full data:
what each shows, and what it does not, stands on its pages.
"""
TOY = "{bdg-warning}`toy` A synthetic language: the machinery works; nothing is said of English."
WORDS = re.compile(r"<td>(?=[^<]{36})")  # a cell that holds a sentence: its lines may break
SETTING_UP = re.compile(r"\s*(run = start\(|(from|import) )")  # cells that a reader of results has no use for
FOLDED = {"code_prompt_show": "Show the code", "code_prompt_hide": "Hide the code"}


def line(text: str) -> str:
    "A text that a user gave, such as a run's name, as one line of Markdown that shows it as it is."
    return markdown(" ".join(text.split()))


def raw(text: str) -> str:
    "HTML as a block that no text in it can close."
    return f"```{{raw}} html\n{text.replace('`', '&#96;')}\n```\n"


def place(name: str) -> str:
    "The folder of a run's pages: its name, or what of it may stand in an address, told apart by a hash."
    plain = re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)
    return name if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def is_model_run(run: Run) -> bool:
    "Did the run train and fine-tune models? A benchmark did not."
    return (run.folder / "predictions").is_dir()


def about(run: Run) -> str:
    "What a run is, in a sentence."
    bench = "Benchmarks: how fast training, fine-tuning, reading and statistics are, beside other ways to do the same."
    return run.settings.note if is_model_run(run) else bench


def order(path: Path) -> tuple[int, str]:
    "Where a notebook stands among those of its run: as in the report."
    base = path.stem.split("-")[0]
    return (EXPECTED.index(base) if base in EXPECTED else len(EXPECTED)), path.stem


def title_of(nb, stem: str) -> tuple[str, str]:
    "Title and subtitle of an executed notebook; the task is part of the title where several were looked at."
    title, subtitle = front_matter(nb.cells[0].source)
    task = stem.partition("-")[2]
    return (f"{title}: {TASKS[task]}" if task in TASKS else title), subtitle


def told(out) -> bool:
    "Is an output for a reader: a table, a picture, prose? A bare name is not, nor is HTML that could act."
    if "text/html" in out.get("data", {}) and acts(out.data["text/html"]):
        return False
    return out.output_type == "stream" or any(kind in ("text/html", "text/markdown") or kind.startswith("image/") for kind in out.data)


def folded(cell, alt: str):
    "A code cell with its code folded away and its pictures described; None where it only sets up."
    source = OPTION.sub("", cell.source)
    if "injected-parameters" in cell.metadata.get("tags", []) or "parameters" in cell.metadata.get("tags", []) or SETTING_UP.match(source):
        return None
    outputs = [o for o in cell.outputs if told(o)]
    for o in outputs:
        if "text/html" in o.get("data", {}):
            o.data["text/html"] = WORDS.sub('<td class="words">', o.data["text/html"])
    return nbformat.v4.new_code_cell(source, outputs=outputs, metadata={"tags": ["hide-input"], "mystnb": FOLDED | {"image": {"alt": alt}}})


def joined(cells: list) -> list:
    "Code that shows nothing stands in one fold with the code below it."
    out: list = []
    for cell in cells:
        if cell.cell_type == "code" and out and out[-1].cell_type == "code" and not out[-1].outputs:
            cell.source = f"{out.pop().source.rstrip()}\n\n{cell.source}"
        out.append(cell)
    return out


def opening(run: Run, nb, stem: str, repo: str) -> str:
    "How the page of an executed notebook begins: title, subtitle, whose numbers these are and where the notebook itself lies."
    title, subtitle = title_of(nb, stem)
    toy = f" {TOY}" if is_model_run(run) and is_toy(run) else ""
    source = f"[notebook]({repo}/results/{quote(run.name)}/notebooks/{quote(stem)}.ipynb)"
    return f"# {title}\n\n{{.nb-subtitle}}\n{subtitle}\n\nRun [{line(run.name)}](/results/{place(run.name)}/index.md), {source}.{toy}"


def readable(path: Path, run: Run, repo: str) -> dict:
    "An executed notebook as a page: prose and outputs; code is folded, what only sets up is left out."
    nb = nbformat.read(path, as_version=4)
    cells, heading = [nbformat.v4.new_markdown_cell(opening(run, nb, path.stem, repo))], ""
    for cell in nb.cells[1:]:
        if cell.cell_type == "markdown":
            heading = cell.source.splitlines()[0].lstrip("# ") if cell.source.startswith("#") else heading
            cells.append(cell)
        elif shown := folded(cell, f"{title_of(nb, path.stem)[0]}: {heading}"):
            cells.append(shown)
    cells = joined(cells)
    for i, cell in enumerate(cells):
        cell.id = f"cell-{i}"
    page = nbformat.v4.new_notebook(cells=cells, metadata={"language_info": {"name": "python", "pygments_lexer": "ipython3"}})
    return json.loads(nbformat.writes(page))


def output(run: Run, stem: str, kind: str) -> str:
    "The last HTML output of a `kind` of object in an executed notebook of the run, as a raw block; empty when there is none."
    path = run.folder / f"notebooks/{stem}.ipynb"
    cells = nbformat.read(path, as_version=4).cells if path.exists() else []
    shown = [o.data for c in cells for o in c.get("outputs", []) if "data" in o]
    found = [data["text/html"] for data in shown if data.get("text/plain", "").startswith(f"{kind}(")]
    return raw(found[-1]) if found and not acts(found[-1]) else ""


def listed(run: Run, notebooks: list[Path]) -> str:
    "The notebooks of a run by part, with what each is about."
    text = ""
    for part, starts in PARTS.items():
        own = [p for p in notebooks if p.stem.startswith(starts)]
        titles = [(p, *title_of(nbformat.read(p, as_version=4), p.stem)) for p in own]
        text += f"\n## {part}\n\n" * bool(own) + "".join(f"- [{t}](notebooks/{p.stem}.ipynb): {s}\n" for p, t, s in titles)
    return text


def run_page(run: Run, notebooks: list[Path]) -> str:
    "The front page of a run: what came out, what it is, its notebooks, where its numbers come from."
    seen = output(run, "t1_glue", "Picture") + output(run, "t1_glue", "Findings")
    lead = f"{raw(lead_html(run))}{seen}" if is_model_run(run) else ""
    said, made = raw(f"<p>{html.escape(about(run))}</p>"), raw(f'<div class="provenance">{provenance_html(run)}</div>')
    names = "\n".join(f"notebooks/{p.stem}" for p in notebooks)
    return (f"# {line(run.name)}\n\n{said}\n{lead}\n{listed(run, notebooks)}\n## Provenance\n\n{made}\n"
            f"```{{toctree}}\n:hidden:\n\n{names}\n```\n")


def lay_out_run(folder: Path, stage: Path, extra: Path, repo: str) -> None:
    "Write the pages of one committed run under `stage`, and its pages of examples, which stand for themselves, under `extra`."
    run, target = Run(folder), stage / "results" / place(folder.name)
    notebooks = sorted((folder / "notebooks").glob("*.ipynb"), key=order)
    (target / "notebooks").mkdir(parents=True)
    for path in notebooks:
        (target / "notebooks" / path.name).write_text(json.dumps(readable(path, run, repo)), encoding="utf-8")
    (target / "index.md").write_text(run_page(run, notebooks), encoding="utf-8")
    for page in (folder / "tables").glob("*_browser.html"):
        beside = extra / "results" / place(folder.name) / "tables"
        beside.mkdir(parents=True, exist_ok=True)
        shutil.copy(page, beside)


def overview(runs: list[Run]) -> str:
    "The page that every result starts from: what was run, side by side."
    compared = [run for run in runs if is_model_run(run)]
    listed = "".join(f"- [{line(run.name)}]({place(run.name)}/index.md): {line(about(run))}\n" for run in runs)
    names = "\n".join(f"{place(run.name)}/index" for run in runs)
    return (f"# Results\n\n{ABOUT}\n{summary_markdown(compared) if compared else ''}\n{listed}\n```{{toctree}}\n:hidden:\n\n{names}\n```\n")


def lay_out(results: Path, stage: Path, extra: Path, repo: str) -> None:
    "Write the pages of all committed runs, real ones first."
    folders = sorted((p.parent for p in results.glob("*/config.yaml")), key=lambda p: (not is_model_run(Run(p)), is_toy(Run(p)), p.name))
    for folder in folders:
        lay_out_run(folder, stage, extra, repo)
    (stage / "results/index.md").write_text(overview([Run(f) for f in folders]), encoding="utf-8")
