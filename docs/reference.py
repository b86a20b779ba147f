"""The site's reference, made from the package itself: presets, settings, commands, records."""
import inspect
import re
import subprocess
import sys
from pathlib import Path

from pydantic import BaseModel

from distilrepro.config import Section, Settings, load_settings, preset_names
from distilrepro.records import Record

FIELD = re.compile(r"^    (\w+): (.+?)(?: = (.+?))?(?:  # (.*))?$")
BOUNDED = re.compile(r"Field\((?P<default>[^,]+), (?P<bound>[^)]+)\)")
BOUNDS = {"ge=": "≥ ", "gt=": "> ", "le=": "≤ "}
PRESETS = """# Presets

A preset is a recipe; `--scale smoke`, `small` or `full` lays a budget over it, `--set section.key=value` changes it. In the table each
preset stands with what it inherits (`extends`) resolved; the files below it hold only what differs.

"""
SETTINGS = """# Settings

What `--set section.key=value` can change; a preset is a YAML file of these keys. Types and defaults as in [](/lib/config.ipynb).

"""
RECORDS = """# Records

Every number lies in a run folder as a record. Aggregates are never stored, only computed; see [](/lib/records.ipynb) and
[](/howto/run_folder.md).

## A run folder

"""
LAYOUT = {
    "config.yaml": "the settings, resolved",
    "provenance.json": "commit, versions, machine",
    "checkpoints/": "models as `transformers` folders, and what resuming needs",
    "records/*.jsonl": "one measurement a line",
    "predictions/*.parquet": "one example a row: `id`, `label`, `prediction`, logits",
    "tables/": "tables as JSON, Markdown and HTML; pictures",
    "notebooks/*.ipynb": "executed notebooks",
    "report.html": "all of it on one page",
}
SHOWN = {  # column of the table of presets -> how it is read from the settings
    "teacher": lambda s: f"{s.teacher.path or 'random BERT'}{', trained in the run' if s.teacher.train else ''}",
    "student's layers": lambda s: str(s.student.layers or "half the teacher's"),
    "student starts from": lambda s: "random weights" if s.student.init == "random" else f"the teacher, map {s.student.layer_map}",
    "KL : MLM : cosine": lambda s: f"{s.loss.w_ce:g} : {s.loss.w_mlm:g} : {s.loss.w_cos:g}",
    "T": lambda s: f"{s.loss.temperature:g}",
    "text": lambda s: ", ".join(s.data.corpus),
    "sequences an update": lambda s: f"{s.distil.batch * s.distil.accumulation:,}",
    "epochs": lambda s: f"{s.distil.epochs:g}",
    "tasks": lambda s: str(len(s.grid.tasks)),
    "seeds": lambda s: str(len(s.grid.seeds)),
}


def table(head: list[str], rows: list[list[str]]) -> str:
    "A Markdown table."
    def line(cells): return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |\n"
    return line(head) + line(["---"] * len(head)) + "".join(map(line, rows)) + "\n"


def presets_page(root: Path) -> str:
    "Every preset at its own scale: the settings that tell them apart, and the file itself."
    names = preset_names()
    settings = {n: load_settings(n) for n in names}
    rows = [[f"[{n}](#preset-{n.replace('_', '-')})", *(show(s) for show in SHOWN.values())] for n, s in settings.items()]
    text = PRESETS + table(["preset", *SHOWN], rows)
    for name in names:
        source = (root / f"distilrepro/presets/{name}.yaml").read_text(encoding="utf-8").strip()
        text += f"(preset-{name.replace('_', '-')})=\n## {name}\n\n{settings[name].note}\n\n```yaml\n{source}\n```\n\n"
    return text


def field_row(name: str, kind: str, default: str, comment: str) -> list[str]:
    "A field's cells; a bound of its value is part of its type."
    if bounded := BOUNDED.fullmatch(default):
        default, bound = bounded["default"], bounded["bound"]
        kind += f" {next(sign + bound.removeprefix(k) for k, sign in BOUNDS.items() if bound.startswith(k))}"
    return [f"`{name}`", f"`{kind}`", f"`{default}`" if default else "", comment]


def fields(model: type[BaseModel]) -> list[list[str]]:
    "Name, type, default and comment of each field, as they stand in the source."
    source = re.sub(r"\(\n\s+(.+)\n\s+\)$", r"(\1)", inspect.getsource(model), flags=re.M)  # a default on lines of its own
    rows = [m for line in source.splitlines() if (m := FIELD.match(line)) and m[1] in model.model_fields]
    missing = set(model.model_fields) - {m[1] for m in rows}
    assert not missing, f"{model.__name__}: no line for {missing}"
    return [field_row(*m.groups("")) for m in rows]


def sections(model: type[BaseModel] = Settings, path: str = "") -> list[tuple[str, type[BaseModel]]]:
    "Every group of settings by its dotted name."
    own = [(f"{path}{name}", f.annotation) for name, f in model.model_fields.items()]
    groups = [(name, kind) for name, kind in own if inspect.isclass(kind) and issubclass(kind, Section)]
    return [pair for name, kind in groups for pair in [(name, kind), *sections(kind, f"{name}.")]]


def settings_page() -> str:
    "Every setting that `--set` can change."
    text = SETTINGS
    done: dict[type, str] = {}
    for name, kind in sections():
        text += f"## `{name}`\n\n{inspect.getdoc(kind)}\n\n"
        text += f"The keys of `{done[kind]}`.\n\n" if kind in done else table(["key", "type", "default", "what it is"], fields(kind))
        done.setdefault(kind, name)
    return text


def commands_page() -> str:
    "The commands, as Typer documents them, but each summary whole."
    command = [sys.executable, "-m", "typer", "distilrepro.cli", "utils", "docs", "--name", "distilrepro", "--title", "Commands"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    about = dict(re.findall(r"^## `distilrepro (\w+)`\n\n(.+)$", text, re.M))
    return re.sub(r"^\* `(\w+)`: .+$", lambda m: f"* `{m[1]}`: {about[m[1]]}" if m[1] in about else m[0], text, flags=re.M)


def records_page() -> str:
    "What a record holds, and where it lies."
    layout = table(["in `runs/RUN/`", "what it is"], [[f"`{path}`", about] for path, about in LAYOUT.items()])
    record = table(["field", "type", "default", "what it is"], fields(Record))
    return f"{RECORDS}{layout}## A record\n\n{inspect.getdoc(Record)}\n\n{record}"


def lay_out(root: Path, stage: Path) -> None:
    "Write the generated pages under `stage/reference`."
    (stage / "reference").mkdir(parents=True, exist_ok=True)
    made = {"presets": presets_page(root), "settings": settings_page(), "commands": commands_page(), "records": records_page()}
    for name, text in made.items():
        (stage / f"reference/{name}.md").write_text(text, encoding="utf-8")
