"""The house rules, read from the sources: import direction, sizes, parameters, paths, pins; what is unsafe: test_faults_supply.py."""
import ast
import importlib
import json
import re
from configparser import ConfigParser
from pathlib import Path
from statistics import median

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
ORDER = [room for theme in yaml.safe_load((ROOT / "docs/rooms.yaml").read_text(encoding="utf-8")).values() for room in theme["rooms"]]
MODULES = sorted(p for p in (ROOT / "distilrepro").glob("*.py") if p.stem not in {"__init__", "_modidx"})
LIBRARY = sorted((ROOT / "nbs/lib").glob("*.ipynb"))
PAPERMILL = sorted(p for d in ("stages", "tables", "analysis") for p in (ROOT / "nbs" / d).glob("*.ipynb"))
PAPER = sorted((ROOT / "nbs/paper").glob("*.ipynb"))
NOTEBOOKS = [ROOT / "nbs/index.ipynb", *PAPER, *LIBRARY, *PAPERMILL]
SCRIPTS = [*sorted((ROOT / "docs").glob("*.py")), *sorted((ROOT / "tests").glob("*.py"))]
MAX_KB, MAX_CELLS, MAX_LINES, MEDIAN_LINES, MAX_FUNCTION = 60, 80, 40, 8, 50
PRIVATE = re.compile(r"(?<![\w.])/(?:work|root|tmp|home|Users)/\w|[\w.+-]+@[\w-]+\.(?:com|org|net|edu|io|ai|de|at|uk|gov)\b")
NBDEV = "config export clean test sync merge doclinks showdoc frontmatter process processors serve".split()


def name(path: Path) -> str:
    "Test id: the path in the repository."
    return path.relative_to(ROOT).as_posix()


def each(paths):
    "Parametrise over files, named by their path."
    return pytest.mark.parametrize("path", paths, ids=name)


def read(path: Path):
    "A notebook."
    return nbformat.read(path, as_version=4)


def code_lines(cell) -> list[str]:
    "Lines of a code cell that are neither empty nor directives."
    return [line for line in cell.source.splitlines() if line.strip() and not line.startswith("#|")]


def tree(cell) -> ast.Module:
    "Syntax of a code cell; magics are not Python and are left out."
    return ast.parse("\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in cell.source.splitlines()))


def directives(cell) -> set[str]:
    "Names of a cell's nbdev directives."
    return {m[1] for m in re.finditer(r"^#\|\s*([\w-]+)", cell.source, re.M)}


def imports(cell) -> list[ast.stmt]:
    "Top-level imports of a code cell."
    return [n for n in tree(cell).body if isinstance(n, ast.Import | ast.ImportFrom)]


def checks(cell) -> int:
    "Assertions in a code cell: `assert` and fastcore's `test_eq`, `test_close`, `test_fail`."
    calls = [n for n in ast.walk(tree(cell)) if isinstance(n, ast.Call) and dotted(n.func).startswith("test_")]
    return len(calls) + sum(isinstance(n, ast.Assert) for n in ast.walk(tree(cell)))


def dotted(node: ast.expr) -> str:
    "`a.b.c` of a name or attribute, empty for anything else."
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def rooms_imported(module: Path) -> set[str]:
    "Rooms of our package that a module imports, inside functions too."
    found = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("distilrepro.")}
        elif isinstance(node, ast.ImportFrom):
            source = "distilrepro." * bool(node.level) + (node.module or "")
            ours = source.rstrip(".") == "distilrepro"
            found |= {a.name for a in node.names if a.name in ORDER} if ours else set()
            found |= {source.split(".")[1]} if source.startswith("distilrepro.") and not ours else set()
    return found


# the package

@each(MODULES)
def test_a_module_imports_only_rooms_above_it(path):
    assert path.stem in ORDER, f"{path.stem} has no place in the order of rooms"
    below = {room for room in rooms_imported(path) if ORDER.index(room) >= ORDER.index(path.stem)}
    assert not below, f"{path.stem} imports {sorted(below)}, which come after it"


def test_the_direction_check_sees_every_form_of_import(tmp_path):
    text = "import distilrepro.stats\nfrom .config import a\nfrom distilrepro.cli import b\nfrom . import speed\n"
    (tmp_path / "x.py").write_text(text + "def f():\n    from .tables import c\n")
    assert rooms_imported(tmp_path / "x.py") == {"stats", "config", "cli", "speed", "tables"}


def test_every_module_has_its_notebook_and_the_numbers_follow_the_order():
    rooms = [p.stem.partition("_")[2] for p in LIBRARY]
    assert sorted(rooms) == sorted(p.stem for p in MODULES)
    assert rooms == sorted(rooms, key=ORDER.index), "notebook numbers do not follow the order of rooms"


@each(MODULES + SCRIPTS)
def test_functions_are_short(path):
    functions = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.FunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno + 1 > MAX_FUNCTION}
    assert not long, f"functions above {MAX_FUNCTION} lines: {long}"


@each(MODULES)
def test_public_names_have_docstrings(path):
    body = ast.parse(path.read_text(encoding="utf-8")).body
    body += [n for c in body if isinstance(c, ast.ClassDef) and not c.name.startswith("_") for n in c.body]
    public = [n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    bare = [n.name for n in public if not ast.get_docstring(n)]
    assert not bare, f"no docstring: {bare}"


# the notebooks

@each(NOTEBOOKS)
def test_notebook_is_valid_small_and_titled(path):
    nb = read(path)
    nbformat.validate(nb)
    assert path.stat().st_size <= MAX_KB * 1000, f"{path.stat().st_size // 1000} kB"
    assert len(nb.cells) <= MAX_CELLS
    assert len({c.id for c in nb.cells}) == len(nb.cells), "cell ids repeat"
    assert re.match(r"# .+\n+> .+", nb.cells[0].source), "the first cell is `# Title` and `> subtitle`"
    longest = max((len(code_lines(c)) for c in nb.cells if c.cell_type == "code"), default=0)
    assert longest <= MAX_LINES, f"a code cell of {longest} lines"


@each(NOTEBOOKS)
def test_notebook_shows_no_machine_and_no_person(path):
    for i, cell in enumerate(read(path).cells):
        text = cell.source
        for out in cell.get("outputs", []):
            data = {k: v for k, v in out.get("data", {}).items() if k.startswith("text/")}
            text += json.dumps([data, out.get("text", ""), out.get("traceback", "")])
        assert not (found := PRIVATE.search(text)), f"cell {i}: {found[0]}"


@each(NOTEBOOKS)
def test_notebook_stores_no_error_and_no_stderr(path):
    outputs = [o for c in read(path).cells for o in c.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


@each([ROOT / "nbs/index.ipynb", *PAPER, *LIBRARY])
def test_imports_stand_alone(path):
    mixed = [i for i, c in enumerate(read(path).cells) if c.cell_type == "code" and imports(c) and len(imports(c)) != len(tree(c).body)]
    assert not mixed, f"cells {mixed} hold imports and other code: the site would run them"


@each(LIBRARY)
def test_library_notebook_teaches_and_checks(path):
    cells = read(path).cells
    code = [c for c in cells if c.cell_type == "code" and code_lines(c)]
    told = [c for c in code if "hide" not in directives(c) and not imports(c)]
    exported = [c for c in code if directives(c) & {"export", "exports"} and not imports(c)]
    checked = sum(checks(c) for c in code if not directives(c) & {"export", "exports"})
    assert "default_exp" in {d for c in cells if c.cell_type == "code" for d in directives(c)}
    assert median(len(code_lines(c)) for c in code) <= MEDIAN_LINES
    assert 2 * sum(c.cell_type == "markdown" for c in cells) >= len(told), f"{len(told)} code cells ask for more prose"
    assert checked >= len(exported), f"{checked} checks for {len(exported)} exported cells"


@each(LIBRARY)
def test_exported_cells_are_plain_python(path):
    for i, cell in enumerate(read(path).cells):
        if cell.cell_type == "code" and directives(cell) & {"export", "exports"}:
            nodes = list(ast.walk(ast.parse(cell.source)))
            stars = [n for n in nodes if isinstance(n, ast.ImportFrom) and n.names[0].name == "*"]
            prints = [n for n in nodes if isinstance(n, ast.Call) and dotted(n.func) == "print"]
            assert not stars and not prints, f"cell {i}: star import or print in exported code"


@each(PAPER)
def test_chapter_of_the_paper_is_prose_with_short_live_code(path):
    cells = read(path).cells
    code = [c for c in cells if c.cell_type == "code"]
    sizes = [len(code_lines(c)) for c in code]
    assert 20 <= len(cells) <= 45 and 2 * len(code) <= len(cells), f"{len(code)} of {len(cells)} cells are code"
    assert median(sizes) <= 6 and max(sizes) <= 20, f"code cells of {sorted(sizes)} lines"
    assert sum(bool(imports(c)) for c in code) == 1 and sum(checks(c) for c in code) >= 5
    assert "- skip_showdoc: true" in cells[0].source and "skip_exec" not in cells[0].source, "the site shows, nbdev_test runs"
    assert not {d for c in code for d in directives(c)} & {"default_exp", "export", "exports", "eval"}
    assert re.search(r"\]\(\.\./lib/\w+\.ipynb\)", cells[-1].source), "the last cell leads to the rooms that hold the full story"


@each(PAPER)
def test_pictures_of_the_paper_are_told_in_words(path):
    cells = [c for c in read(path).cells if any("image/png" in o.get("data", {}) for o in c.get("outputs", []))]
    assert cells, "a chapter without a picture"
    untold = [c.source.splitlines()[0] for c in cells if not re.match(r"#\| fig-alt: \S.{20,}", c.source)]
    assert not untold, f"no fig-alt: {untold}"


def parameter_cells(path: Path) -> list:
    "The cells that papermill would set."
    return [c for c in read(path).cells if "parameters" in c.metadata.get("tags", [])]


@each(PAPERMILL)
def test_parameters_are_literals_that_papermill_finds(path):
    from papermill import inspect_notebook  # a second of imports, needed here alone

    (cell,) = parameter_cells(path)
    values = {}
    for node in ast.parse(cell.source).body:
        assert isinstance(node, ast.Assign | ast.AnnAssign), "a parameters cell holds assignments and nothing else"
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        values[target.id] = ast.literal_eval(node.value)
    assert values and set(inspect_notebook(str(path))) == set(values)


@each(PAPERMILL)
def test_papermill_notebook_is_not_run_by_the_site_nor_by_nbdev(path):
    nb = read(path)
    assert "- skip_showdoc: true" in nb.cells[0].source, "the title cell lacks `- skip_showdoc: true`: the site would run its imports"
    flags = [d for c in nb.cells if c.cell_type == "code" for d in directives(c) & {"eval", "slow", "gpu", "export", "exports"}]
    assert not flags, f"papermill does not obey {flags}"
    assert "nbdev_export" not in "".join(c.source for c in nb.cells)


@pytest.mark.parametrize("folder", ["stages", "tables", "analysis"])
def test_papermill_folders_are_left_out_of_nbdev_test(folder):
    assert (ROOT / "nbs" / folder / ".notest").exists()


# settings, pins, reference numbers

def settings():
    "The `DEFAULT` section of settings.ini."
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def pins() -> dict[str, str]:
    "Package name to version, from constraints.txt; every line is checked to be a plain pin."
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    wrong = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line)]
    assert not wrong, f"not a plain `name==version`: {wrong}"
    return {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines}


def test_every_requirement_is_pinned():
    pinned, cfg = pins(), settings()
    wanted = [Requirement(r) for key in cfg if key.endswith("requirements") for r in cfg[key].split()]
    assert len(wanted) > 20
    missing = [str(r) for r in wanted if canonicalize_name(r.name) not in pinned]
    assert not missing, f"not in constraints.txt: {missing}; run `make lock`"
    outside = [str(r) for r in wanted if not r.specifier.contains(pinned[canonicalize_name(r.name)])]
    assert not outside, f"pinned outside what settings.ini asks: {outside}; run `make lock`"


def test_every_dependency_of_a_dependency_is_pinned():
    from importlib.metadata import distribution, distributions

    installed = {canonicalize_name(d.metadata["Name"]) for d in distributions()}
    missing = set()
    for package in set(pins()) & installed:
        for text in distribution(package).requires or []:
            requirement = Requirement(text)
            if requirement.marker is None and canonicalize_name(requirement.name) not in pins():
                missing.add(f"{requirement.name} (of {package})")
    assert not missing


def test_tags_survive_cleaning_and_nothing_rewrites_pyproject():
    cfg = settings()
    assert cfg["allowed_cell_metadata_keys"] == "tags" and cfg["update_pyproject"] == "False" and cfg["doc_path"] == "_docs"


@pytest.mark.parametrize("module", NBDEV)
def test_the_frozen_nbdev_still_imports(module):
    importlib.import_module(f"nbdev.{module}")


def test_published_numbers_parse_and_line_up():
    published = yaml.safe_load((ROOT / "distilrepro/reference/published.yaml").read_text(encoding="utf-8"))
    for row in published["glue_dev"]:
        assert row["source"] and len(row["values"]) == len(published["glue_columns"]), row["model"]
        gaps = [c for c, v in zip(published["glue_columns"], row["values"], strict=True) if v is None]
        assert gaps == row.get("missing", []), row["model"]
