"""The two drawings: one mark a model, one box a layer, one arrow a copy, nothing over anything else, words that say what is seen."""
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import yaml
from matplotlib.text import Annotation, Text

from distilrepro.config import UserError, load_settings
from distilrepro.drawings import (
    COLUMNS,
    copied_layers,
    layer_heights,
    method_figure,
    own_sizes,
    sizes_figure,
    sizes_table,
    teacher_depth,
    words,
)
from distilrepro.figures import save_figure
from distilrepro.pictures import use_style
from distilrepro.records import create_run, write_records
from distilrepro.tables import COLOURS

REFERENCE = Path(__file__).resolve().parent.parent / "distilrepro/reference"
MODELS = yaml.safe_load((REFERENCE / "model_sizes.yaml").read_text())["models"]


def made_up(folder, preset="quick", scale="smoke", sets=()):
    "A run folder of a preset without any record."
    return create_run(folder, load_settings(preset, scale, tuple(sets)), folder)


def measured(run, teacher, student):
    "The run with the sizes of its models."
    for model, size in (("teacher", teacher), ("student", student)):
        write_records(run, f"speed-{model}", [dict(metric="parameters", value=size)], stage="speed", model=model)
    return run


def overlapping(fig, kinds=Text) -> list[tuple[str, str]]:
    "Pairs of texts in the picture that lie over one another."
    fig.canvas.draw()
    texts = [t for t in fig.axes[0].findobj(kinds) if t.get_text() and t.get_visible()]
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts]
    return [(a, b) for i, (a, x) in enumerate(boxes) for b, y in boxes[:i] if x.overlaps(y)]


def kinds(run) -> list[str]:
    "What the shapes of the diagram are."
    return [p.get_gid() for p in method_figure(run).axes[0].patches]


def test_one_mark_a_published_model_and_two_of_the_run(tmp_path):
    run = made_up(tmp_path / "a")
    def marks(): return [c for c in sizes_figure(run).axes[0].collections if c.get_gid() == "size"]
    assert len(marks()) == len(MODELS) and own_sizes(run) == []
    measured(run, 634_817, 334_785)
    places = sorted(tuple(c.get_offsets()[0]) for c in marks())
    assert len(places) == len(MODELS) + 2 and {634_817, 334_785} <= {y for _, y in places}
    assert {m["parameters"] for m in MODELS} <= {y for _, y in places}


@pytest.mark.parametrize("sizes", [(634_817, 334_785), (22_713_601, 17_389_441), (109_482_240, 66_955_010)])
def test_names_of_models_do_not_lie_on_each_other(tmp_path, sizes):
    use_style()
    assert overlapping(sizes_figure(measured(made_up(tmp_path / "a"), *sizes)), Annotation) == []


def test_size_rows_are_dated_as_their_papers_and_have_a_source():
    assert len({m["name"] for m in MODELS}) == len(MODELS) >= 15
    for m in MODELS:
        assert m["source"] and m["mark"] in ("sec", "mem", "calc", "code") and 1 <= m["month"] <= 12
        if arxiv := re.search(r"arXiv:(\d\d)(\d\d)\.", m["source"]):
            assert (2000 + int(arxiv[1]), int(arxiv[2])) == (m["year"], m["month"]), m["name"]
    sizes = {m["name"]: m["parameters"] for m in MODELS}
    published = yaml.safe_load((REFERENCE / "published.yaml").read_text())["size_speed"]
    for row in published:
        if row["model"] in ("BERT-base", "DistilBERT"):
            assert sizes[row["model"]] == row["params_m"] * 1e6


def test_alternative_text_names_every_model_and_says_toy(tmp_path):
    run = measured(made_up(tmp_path / "toy"), 634_817, 334_785)
    fig = sizes_figure(run)
    assert all(f"{m['name']} {m['year']}, {words(m['parameters'])}" in fig.get_label() for m in MODELS)
    assert "own student, toy 2" in fig.get_label() and "335 k" in fig.get_label() and "toys" in fig.axes[0].get_title()
    real = measured(made_up(tmp_path / "real", "sanh2019", "full"), 109_482_240, 66_955_010)
    assert "toy" not in sizes_figure(real).get_label() + sizes_figure(real).axes[0].get_title()
    assert save_figure(run, "cornell_f1", fig).alt == fig.get_label()


def test_the_table_of_sizes_keeps_own_rows_apart_and_names_what_is_missing(tmp_path):
    run = made_up(tmp_path / "a")
    table = sizes_table(run)
    assert len(table.blocks) == 1 and any("distilrepro reproduce" in n for n in table.notes)
    table = sizes_table(measured(run, 10, 5))
    assert [len(rows) for _, rows in table.blocks] == [len(MODELS), 2] and "toy" in table.blocks[1][0]


@pytest.mark.parametrize("rule, copies", [
    ("paper", [0, 2, 4, 7, 9, 11]), ("every_other", [0, 2, 4, 6, 8, 10]), ("first", [0, 1, 2, 3, 4, 5]), ("[11,3,5]", [11, 3, 5])])
def test_a_box_a_layer_and_an_arrow_a_copy(tmp_path, rule, copies):
    run = made_up(tmp_path / "a", "quick", "full", (f"student.layer_map={rule}", f"student.layers={len(copies)}"))
    found = kinds(run)
    assert (found.count("teacher-layer"), found.count("student-layer"), found.count("copy")) == (12, len(copies), len(copies))
    teacher, student = layer_heights(12, dict(first=2.0, last=10.8)), layer_heights(len(copies), dict(first=2.0, last=10.8))
    arrows = [p._posA_posB for p in method_figure(run).axes[0].patches if p.get_gid() == "copy"]
    assert [a[1] for a, _ in arrows] == pytest.approx([teacher[t] for t in copies]) and [b[1] for _, b in arrows] == pytest.approx(student)
    assert all(COLUMNS["teacher"] < a[0] < b[0] < COLUMNS["student"] for a, b in arrows)
    assert ", ".join(map(str, copies)) in method_figure(run).get_label()


def test_layers_without_a_copy_are_dashed(tmp_path):
    layers = [p for p in method_figure(made_up(tmp_path / "a", "quick", "full")).axes[0].patches if p.get_gid() == "teacher-layer"]
    assert [i for i, p in enumerate(layers) if p.get_linestyle() in ("-", "solid")] == [0, 2, 4, 7, 9, 11]


def test_a_random_student_has_no_arrow_of_a_copy(tmp_path):
    run = made_up(tmp_path / "a", "quick", "smoke", ("student.init=random",))
    assert not {"copy", "copy-embeddings"} & set(kinds(run)) and "random weights" in method_figure(run).get_label()


def test_parts_left_out_are_named(tmp_path):
    def texts(run): return " ".join(t.get_text() for t in method_figure(run).axes[0].texts)
    distil = made_up(tmp_path / "a")
    assert kinds(distil).count("dropped") == 2 and "token types:\nleft out" in texts(distil)
    assert "token types:\nfolded" in texts(made_up(tmp_path / "b", sets=("student.token_type=fold",)))
    bert = made_up(tmp_path / "c", sets=("student.architecture=bert", "student.init=random"))
    assert kinds(bert).count("dropped") == 1 and "token types" not in method_figure(bert).get_label()


def test_losses_carry_the_run_s_weights_and_temperature(tmp_path):
    run = made_up(tmp_path / "a", sets=("loss.w_ce=0.33", "loss.w_mlm=0", "loss.temperature=4"))
    texts = [t.get_text() for t in method_figure(run).axes[0].texts]
    assert "KL, weight 0.33\ntemperature 4" in texts and "MLM: not used" in texts and "cosine, weight 1\nsame direction" in texts
    assert kinds(run).count("loss") == 4, "two arrows into each loss that compares the models, none into one that is not used"


@pytest.mark.parametrize("preset, scale", [("quick", "full"), ("quick", "smoke"), ("tinydistilbert", "smoke")])
def test_nothing_in_the_diagram_overlaps(tmp_path, preset, scale):
    use_style()
    fig = method_figure(made_up(tmp_path / "a", preset, scale))
    assert overlapping(fig) == []
    boxes = [p for p in fig.axes[0].patches if hasattr(p, "get_boxstyle")]
    extents = [b.get_window_extent() for b in boxes]
    assert not [(i, j) for i, a in enumerate(extents) for j, b in enumerate(extents[:i]) if a.overlaps(b)]
    inside = {t.get_text(): t.get_window_extent() for t in fig.axes[0].texts}
    for box, extent in zip(boxes, extents, strict=True):
        held = [t for t in inside.values() if extent.x0 < (t.x0 + t.x1) / 2 < extent.x1 and extent.y0 < (t.y0 + t.y1) / 2 < extent.y1]
        assert all(extent.x0 < t.x0 and t.x1 < extent.x1 and extent.y0 < t.y0 and t.y1 < extent.y1 for t in held), box.get_gid()


def test_colours_are_those_of_teacher_and_student(tmp_path):
    from matplotlib.colors import to_hex
    edges = {p.get_gid(): to_hex(p.get_edgecolor()) for p in method_figure(made_up(tmp_path / "a")).axes[0].patches}
    assert edges["teacher-layer"] == COLOURS["teacher"] and edges["student-layer"] == COLOURS["student"]


def test_the_teacher_s_depth_is_its_own(tmp_path):
    run = made_up(tmp_path / "a", "sanh2019", "full", ("teacher.path=nowhere",))
    with pytest.raises(UserError, match="nowhere"):
        teacher_depth(run)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(model_type="bert", num_hidden_layers=8)))
    run = made_up(tmp_path / "b", "sanh2019", "full", (f"teacher.path={folder}",))
    assert run.settings.teacher.layers == 12 and teacher_depth(run) == 8, "the settings' shape is not that of a given teacher"
    assert len(copied_layers(run.settings, 8)) == kinds(run).count("copy")


def test_figures_are_closed(tmp_path):
    before = plt.get_fignums()
    method_figure(made_up(tmp_path / "a")), sizes_figure(made_up(tmp_path / "b"))
    assert plt.get_fignums() == before
