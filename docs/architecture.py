"""The architecture page, `python docs/architecture.py FOLDER`: a picture and a table of the rooms, made from the real imports."""
import ast
import sys
from collections import Counter
from pathlib import Path

import matplotlib
import yaml
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as MplPath

from distilrepro.pictures import GREY

ROOT = Path(__file__).resolve().parent.parent
MARK = "<!-- rooms: written by docs/architecture.py -->"
COLOURS = ["#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc"]  # seaborn's colour-blind palette
WIDE, HIGH, GAP, EACH_LINE = 1.5, 0.5, 0.12, 6  # a room's box, in the picture's units; rooms a line


def themes() -> dict[str, dict]:
    "The themes of docs/rooms.yaml in order: title -> about, rooms."
    return yaml.safe_load((ROOT / "docs/rooms.yaml").read_text(encoding="utf-8"))


def module(room: str) -> ast.Module:
    "The syntax of a room's module."
    return ast.parse((ROOT / f"distilrepro/{room}.py").read_text(encoding="utf-8"))


def imports(rooms: list[str]) -> dict[str, list[str]]:
    "For each room the rooms it imports, inside functions too, in the order of `rooms`."
    found = {}
    for room in rooms:
        froms = [n for n in ast.walk(module(room)) if isinstance(n, ast.ImportFrom)]
        ours = [n for n in froms if n.level or (n.module or "").startswith("distilrepro")]
        names = {(n.module or "").removeprefix("distilrepro").strip(".") or a.name for n in ours for a in n.names}
        found[room] = [r for r in rooms if r in names]
    return found


def between(groups: dict[str, dict], found: dict[str, list[str]]) -> Counter[tuple[str, str]]:
    "How many imports go from one theme to another: (importing, imported) -> count."
    theme = {room: title for title, group in groups.items() for room in group["rooms"]}
    pairs = Counter((theme[room], theme[used]) for room, all_used in found.items() for used in all_used)
    return Counter({pair: n for pair, n in pairs.items() if pair[0] != pair[1]})


def heights(groups: dict[str, dict]) -> dict[str, tuple[float, float]]:
    "Top and bottom of each theme's frame; the first theme is on top."
    y, places = 0.0, {}
    for title, group in groups.items():
        lines = -(-len(group["rooms"]) // EACH_LINE)
        low = y - 0.55 - lines * (HIGH + GAP)
        places[title] = (y, low)
        y = low - 0.3
    return places


def draw_theme(ax, title: str, rooms: list[str], place: tuple[float, float], colour: str) -> None:
    "A frame with a title and a box for each room."
    top, low = place
    wide = EACH_LINE * (WIDE + GAP) + GAP
    ax.add_patch(FancyBboxPatch((0, low), wide, top - low, boxstyle="round,pad=0,rounding_size=0.15", fc=colour + "1f", ec=colour, lw=1.2))
    ax.text(GAP, top - 0.27, title, va="center", weight="bold", fontsize=10, color=GREY)
    for i, room in enumerate(rooms):
        x, y = GAP + i % EACH_LINE * (WIDE + GAP), top - 0.5 - (i // EACH_LINE + 1) * (HIGH + GAP) + GAP
        ax.add_patch(FancyBboxPatch((x, y), WIDE, HIGH, boxstyle="round,pad=0,rounding_size=0.1", fc="none", ec=GREY, lw=0.7))
        ax.text(x + WIDE / 2, y + HIGH / 2, room, ha="center", va="center", fontsize=9.5, color=GREY)


def draw_arrow(ax, start: tuple[float, float], end: tuple[float, float], bulge: float, n: int, colour: str, gid: str) -> None:
    "A bow on the right from the theme that imports up to the theme that is imported, as wide as there are imports."
    bow = MplPath([start, (start[0] + bulge, start[1]), (end[0] + bulge, end[1]), end], [MplPath.MOVETO] + 3 * [MplPath.CURVE4])
    style = f"-|>,head_width={2 + 0.45 * n:.2f},head_length={3 + 0.35 * n:.2f}"
    look = dict(lw=0.8 * n, color=colour, alpha=0.75, capstyle="butt", joinstyle="miter")
    ax.add_patch(FancyArrowPatch(path=bow, arrowstyle=style, gid=gid, **look))


def figure(groups: dict[str, dict], found: dict[str, list[str]]) -> Figure:
    "The rooms by theme, with arrows for the imports between themes; those of the first theme, which all others use, are left out."
    places, titles, right = heights(groups), list(groups), EACH_LINE * (WIDE + GAP) + GAP
    fig = Figure(figsize=(9, 9.6))
    ax = fig.add_axes((0, 0, 1, 1))
    for i, (title, group) in enumerate(groups.items()):
        draw_theme(ax, title, group["rooms"], places[title], COLOURS[i % len(COLOURS)])
    for (importing, imported), n in between(groups, found).items():
        i, j = titles.index(importing), titles.index(imported)
        if j > 0:
            (top, low), (high, bottom) = places[importing], places[imported]
            start = low + (j + 0.5) / len(titles) * (top - low)  # bows inside bows: a far theme's starts low and ends high
            end = bottom + (i + 0.5) / len(titles) * (high - bottom)
            draw_arrow(ax, (right, start), (right, end), 0.6 + 0.42 * (i - j), n, COLOURS[j % len(COLOURS)], f"{importing} > {imported}")
    ax.set(xlim=(-0.1, right + 3.3), ylim=(places[titles[-1]][1] - 0.1, 0.1))
    ax.axis("off")
    return fig


def describe(groups: dict[str, dict], found: dict[str, list[str]]) -> str:
    "What the picture shows, in one sentence."
    pairs = between(groups, found)
    widest = max((pair for pair in pairs if pair[1] != next(iter(groups))), key=pairs.__getitem__)
    return (f"{len(found)} rooms in {len(groups)} themes, one below the other in import order; arrows on the right go up from a theme to "
            f"those it imports from, the widest from {widest[0]} to {widest[1]} with {pairs[widest]} imports.")


def table(groups: dict[str, dict], found: dict[str, list[str]]) -> str:
    "Every room with its purpose and what it imports, a table for each theme."
    def link(room): return f"[{room}](/lib/{room}.ipynb)"
    parts = []
    for title, group in groups.items():
        rows = [f"| {link(r)} | {(ast.get_docstring(module(r)) or '').replace('|', '/')} | {', '.join(map(link, found[r])) or 'none'} |"
                for r in group["rooms"]]
        parts += [f"### {title}\n\n{group['about']}\n", "| room | what it is for | imports |\n|---|---|---|", *rows, ""]
    return "\n".join(parts)


def write(stage: Path) -> Path:
    "Write `architecture.md`, its marker replaced by picture and table, and `architecture.svg` into `stage`; returns the page."
    text = (ROOT / "docs/pages/architecture.md").read_text(encoding="utf-8")
    if text.count(MARK) != 1:
        raise ValueError(f"docs/pages/architecture.md needs the line {MARK} exactly once")
    groups = themes()
    found = imports([room for group in groups.values() for room in group["rooms"]])
    stage.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "distilrepro"}):  # the same picture, the same bytes
        figure(groups, found).savefig(stage / "architecture.svg", transparent=True, metadata={"Date": None})
    picture = f"![{describe(groups, found)}](architecture.svg)"
    page = stage / "architecture.md"
    page.write_text(text.replace(MARK, f"{picture}\n\n## Every room\n\n{table(groups, found)}"), encoding="utf-8")
    return page


if __name__ == "__main__":
    sys.stdout.write(f"{write(Path(sys.argv[1]))}\n")
