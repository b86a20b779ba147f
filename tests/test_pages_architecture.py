"""The architecture page: docs/rooms.yaml, the picture and the table say what the modules import."""
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import architecture
import pytest
from matplotlib.patches import FancyArrowPatch

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(p.stem for p in (ROOT / "distilrepro").glob("*.py") if p.stem not in {"__init__", "_modidx"})
GROUPS = architecture.themes()
ROOMS = [room for group in GROUPS.values() for room in group["rooms"]]
THEME = {room: title for title, group in GROUPS.items() for room in group["rooms"]}
LINE = re.compile(r"^\s*(?:from (?:distilrepro)?\.(\w+) import|from (?:distilrepro|\.) import (\w+)|import distilrepro\.(\w+))", re.M)


def imported(room: str) -> set[str]:
    "Rooms that a module imports, read line by line and not from its syntax."
    return {next(filter(None, m.groups())) for m in LINE.finditer((ROOT / f"distilrepro/{room}.py").read_text(encoding="utf-8"))}


REAL = {room: imported(room) for room in ROOMS}
FOUND = architecture.imports(ROOMS)


def test_every_room_has_one_theme():
    assert sorted(ROOMS) == MODULES
    assert all(set(group) == {"about", "rooms"} and group["about"].endswith(".") for group in GROUPS.values())


def test_the_order_is_that_of_the_notebooks_and_no_import_goes_against_it():
    assert ROOMS == [p.stem.partition("_")[2] for p in sorted((ROOT / "nbs/lib").glob("*.ipynb"))]
    late = {room: sorted(used) for room in ROOMS if (used := {u for u in REAL[room] if ROOMS.index(u) >= ROOMS.index(room)})}
    assert not late


def test_imports_are_the_real_ones():
    assert {room: set(used) for room, used in FOUND.items()} == REAL
    assert all(ROOMS.index(a) < ROOMS.index(b) for used in FOUND.values() for a, b in pairwise(used))


def test_arrows_are_the_real_imports_as_wide_as_they_are_many():
    first = next(iter(GROUPS))
    real = Counter(f"{THEME[room]} > {THEME[u]}" for room in ROOMS for u in REAL[room] if THEME[u] not in (first, THEME[room]))
    (ax,) = architecture.figure(GROUPS, FOUND).axes
    arrows = {p.get_gid(): p.get_linewidth() for p in ax.patches if isinstance(p, FancyArrowPatch)}
    assert arrows == {gid: pytest.approx(0.8 * n) for gid, n in real.items()} and len(arrows) > 20


def test_the_picture_names_every_room_inside_its_theme():
    (ax,) = architecture.figure(GROUPS, FOUND).axes
    places, said = architecture.heights(GROUPS), {t.get_text(): t.get_position() for t in ax.texts}
    assert said.keys() == {*ROOMS, *GROUPS}
    assert all(places[THEME[room]][0] > said[room][1] > places[THEME[room]][1] for room in ROOMS)


def test_the_page_is_written_whole_and_the_same_each_time(tmp_path):
    page, again = architecture.write(tmp_path / "a"), architecture.write(tmp_path / "b")
    text = page.read_text(encoding="utf-8")
    assert architecture.MARK not in text and "](architecture.svg)" in text
    rows = dict(re.findall(r"^\| \[(\w+)\]\(/lib/\1\.ipynb\) \| .+ \| (.+) \|$", text, re.M))
    assert {room: set(re.findall(r"\[(\w+)\]", cell)) for room, cell in rows.items()} == REAL
    for name in ("architecture.md", "architecture.svg"):
        assert (page.parent / name).read_bytes() == (again.parent / name).read_bytes()


def test_a_page_without_the_marker_is_refused(tmp_path, monkeypatch):
    (tmp_path / "docs/pages").mkdir(parents=True)
    (tmp_path / "docs/pages/architecture.md").write_text("# Nothing\n", encoding="utf-8")
    monkeypatch.setattr(architecture, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="exactly once"):
        architecture.write(tmp_path)
