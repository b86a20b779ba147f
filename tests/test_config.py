"Settings against the published recipes, and every way to misspell them."
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from distilrepro.config import UserError, finetune_for, job_groups, load_settings, merge, preset_names, read_preset
from distilrepro.student import layer_map

FACTS = yaml.safe_load(Path(__file__).with_name("recipes.yaml").read_text())
PLACES = {  # fact -> setting of the same value
    "student.layers": "student.layers", "student.dim": "teacher.width", "student.ffn": "teacher.ffn", "student.heads": "teacher.heads",
    "student.dropout": "student.dropout", "student.attn_dropout": "student.dropout", "student.max_pos": "teacher.max_pos",
    "init.from": "student.init", "init.mlm_transform": "student.mlm_transform",
    "data.max_len": "data.max_len", "data.min_len_exclusive": "data.min_len_exclusive",
    "data.max_unk_ratio_exclusive": "data.max_unk_exclusive",
    "mask.rate": "mask.rate", "mask.scope": "mask.scope", "mask.smoothing": "mask.smoothing", "mask.mask": "mask.mask",
    "mask.keep": "mask.keep", "mask.random": "mask.random",
    "loss.temperature": "loss.temperature", "loss.w_ce": "loss.w_ce", "loss.w_mlm": "loss.w_mlm", "loss.w_cos": "loss.w_cos",
    "optim.lr": "distil.lr", "optim.betas": "distil.betas", "optim.eps": "distil.eps", "optim.weight_decay": "distil.weight_decay",
    "optim.clip": "distil.clip", "schedule.warmup_fraction": "distil.warmup", "schedule.epochs": "distil.epochs",
}


def at(tree, path):
    "Follow a dotted path through mappings; None where it ends."
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def recipe(name):
    "The facts of a recipe, the poster's over those of the code."
    return FACTS["paper_hf_code"] if name == "sanh2019" else merge(FACTS["paper_hf_code"], FACTS["s0_poster"])


@pytest.mark.parametrize("preset", ["sanh2019", "cornell"])
@pytest.mark.parametrize("fact", PLACES)
def test_presets_hold_the_published_values(preset, fact):
    ours = load_settings(preset).model_dump(mode="json")
    assert at(ours, PLACES[fact]) == at(recipe(preset), fact)


@pytest.mark.parametrize("preset", ["sanh2019", "cornell"])
def test_presets_hold_the_values_that_are_spelt_otherwise(preset):
    s, facts = load_settings(preset), recipe(preset)
    assert list(layer_map(s.student.layer_map, s.teacher.layers, s.student.layers)) == facts["init"]["teacher_layers"]
    assert s.student.token_type == "drop" and facts["student"]["token_type"] is False
    assert s.loss.positions == "all" and facts["loss"]["kl_positions"] == "attention_mask"
    assert s.distil.length_groups and s.distil.seed == s.student.seed == facts["seed"]
    assert len(s.data.corpus) == len(facts["data"]["corpus"])
    assert all(theirs.startswith(ours.split("-")[0]) for ours, theirs in zip(s.data.corpus, facts["data"]["corpus"], strict=True))


def test_an_update_of_the_released_code_sees_two_thousand_sequences():
    loop, facts = load_settings("sanh2019").distil, FACTS["paper_hf_code"]["batch"]
    assert loop.batch == facts["per_device"]
    assert loop.batch * loop.accumulation == facts["per_device"] * facts["accumulation"] * facts["devices"] == 2000


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_validates_at_every_scale(preset):
    for scale in ("full", *read_preset(preset).get("scales", {})):
        s = load_settings(preset, scale)
        assert s.scale == scale and s.preset == preset
        assert sorted(t for group in job_groups(s) for t in group) == sorted(s.grid.tasks)
        assert all(finetune_for(s, task).loop.epochs > 0 for task in s.grid.tasks)
        layer_map(s.student.layer_map, s.teacher.layers, s.student.layers)
        assert s.loss == load_settings(preset).loss, "a scale changes the budget, never the recipe"


@pytest.mark.parametrize(("arguments", "words"), [
    (("quik",), ["unknown preset 'quik'", "did you mean 'quick'", "sanh2019"]),
    (("nowhere.yaml",), ["nowhere.yaml"]),
    (("quick", "smal"), ["unknown scale 'smal'", "did you mean 'small'", "full"]),
    (("quick", "", ("loss.temprature=4",)), ["loss.temprature", "did you mean 'loss.temperature'", "loss.w_ce"]),
    (("quick", "", ("los.temperature=4",)), ["'los'", "did you mean 'loss'"]),
    (("quick", "", ("teacher.loop.lrr=1",)), ["teacher.loop.lrr", "did you mean 'teacher.loop.lr'"]),
    (("quick", "", ("loss.temperature=-1",)), ["loss.temperature", "greater than 0", "-1"]),
    (("quick", "", ("data.source=web",)), ["data.source", "'synthetic'", "'local'", "'hub'", "'web'"]),
    (("quick", "", ("loss.positions=some",)), ["loss.positions", "'masked'", "'some'"]),
    (("quick", "", ("mask.keep=0.3",)), ["mask", "must be 1"]),
    (("quick", "", ("loss={w_ce: 0, w_mlm: 0, w_cos: 0}",)), ["at least one of w_ce, w_mlm, w_cos"]),
    (("quick", "", ("distil.batch=2.5",)), ["distil.batch", "integer", "2.5"]),
    (("quick", "", ("distil.batch=null",)), ["distil.batch", "None"]),
    (("quick", "", ("loss.temperature",)), ["loss.temperature", "section.key=value"]),
    (("quick", "", ("=4",)), ["section.key=value"]),
])
def test_mistakes_are_named_with_what_is_allowed(arguments, words):
    with pytest.raises(UserError) as error:
        load_settings(*arguments)
    assert [w for w in words if w not in str(error.value)] == []


def test_all_faults_are_said_at_once():
    with pytest.raises(UserError) as error:
        load_settings("quick", sets=("loss.temperature=0", "mask.rate=2"))
    assert "loss.temperature" in str(error.value) and "mask.rate" in str(error.value)


def test_a_tasks_own_settings_are_checked():
    with pytest.raises(UserError, match="cola.*max_lenn"):
        finetune_for(load_settings("quick", sets=("finetune.tasks.cola.max_lenn=3",)), "cola")


@pytest.mark.parametrize(("assignment", "path", "value"), [
    ("distil.lr=1e-4", "distil.lr", 1e-4), ("distil.lr=0.0001", "distil.lr", 1e-4), ("distil.epochs=3", "distil.epochs", 3.0),
    ("distil.bf16=true", "distil.bf16", True), ("distil.length_groups=no", "distil.length_groups", False),
    ("student.layer_map=[0, 3]", "student.layer_map", (0, 3)), ("student.layer_map=first", "student.layer_map", "first"),
    ("grid.tasks=[cola]", "grid.tasks", ("cola",)), ("grid.seeds=[7,8]", "grid.seeds", (7, 8)),
    ("distil.betas=[0.8, 0.9]", "distil.betas", (0.8, 0.9)), ("data.dir=", "data.dir", ""),
    ("teacher.path=a=b", "teacher.path", "a=b"), ("data.tokenizer='12'", "data.tokenizer", "12"),
])
def test_assignments_become_typed_values(assignment, path, value):
    got = load_settings("quick", sets=(assignment,)).model_dump()
    assert at(got, path) == value and type(at(got, path)) is type(value)


def test_the_last_assignment_wins_and_leaves_its_neighbours():
    s = load_settings("sanh2019", sets=("loss.temperature=3", "loss.temperature=4"))
    assert (s.loss.temperature, s.loss.w_ce) == (4, 5)


def test_settings_are_frozen():
    s = load_settings("quick")
    for thing, name in ((s, "preset"), (s.loss, "temperature"), (s.teacher.loop, "lr")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(thing, name, 1)


def test_a_preset_file_extends_one_of_the_package(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: sanh2019\nloss: {temperature: 7}\n")
    s = load_settings(str(tmp_path / "mine.yaml"))
    assert (s.preset, s.loss.temperature, s.loss.w_ce) == ("mine", 7, 5)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", "loss: {temperature: [\n"])
def test_a_preset_file_that_is_no_mapping_is_refused(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match="mine.yaml"):
        load_settings(str(tmp_path / "mine.yaml"))


def test_hash_follows_values_not_places():
    base = load_settings("quick")
    assert base.hash() == load_settings("quick", sets=("data.dir=/elsewhere", "note=other words")).hash()
    other = load_settings("quick", sets=("loss.w_cos=0.5",))
    assert base.hash("loss") != other.hash("loss") and base.hash() != other.hash() and base.hash("data") == other.hash("data")


values = st.one_of(st.integers(), st.text(max_size=3), st.none(), st.lists(st.integers(), max_size=2))
leaves = st.dictionaries(st.sampled_from("abc"), values)
sections = st.dictionaries(st.sampled_from(["s", "t"]), leaves)
trees = st.tuples(leaves, sections, st.dictionaries(st.just("u"), sections)).map(lambda p: p[0] | p[1] | p[2])


@given(trees, trees, trees)
def test_merging_is_associative_where_sections_stay_sections(a, b, c):
    assert merge(merge(a, b), c) == merge(a, merge(b, c))


@given(trees, trees)
def test_merging_twice_changes_nothing_and_arguments_are_left_alone(a, b):
    before = repr((a, b))
    once = merge(a, b)
    assert merge(once, b) == once and merge(a, a) == a and merge(a, {}) == a == merge({}, a)
    for value in once.values():
        value.clear() if isinstance(value, dict) else None
    assert repr((a, b)) == before
