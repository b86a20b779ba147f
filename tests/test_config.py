"Settings against the published recipes, and every way to misspell them."
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from distilrepro.config import Loss, UserError, finetune_for, job_groups, load_settings, merge, preset_names, read_preset, seeds_for
from distilrepro.distill import planned_updates
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


PRESETS = {"sanh2019": "paper_hf_code", "cornell": "s0_poster", "tinydistilbert": "s1_as_run", "tinydistilbert_repaired": "s1_repaired",
           "sst2_random": "s2_poster"}
SPELT = {  # fact -> setting, and what it is called there
    "data.pad": ("data.pad", {"max_length": "max_len", "dynamic": "longest"}), "data.drop_blank": ("data.drop_blank", {}),
    "mask.smoothing": ("mask.smoothing", {"none": 0.0}),
    "student.token_type": ("student.architecture", {True: "bert", False: "distilbert"}),
    "loss.kl_reduction": ("loss.kl_mean_over", {"batchmean_on_3d": "sequences", "mean_over_selected_tokens": "tokens"}),
    "loss.kl_positions": ("loss.positions", {"all_including_padding": "padded", "attention_mask": "all"}),
    "loss.cos_positions": ("loss.cos_tokens", {"cls_only": "cls", "attention_mask": "all"}),
    "batch.accumulation": ("distil.accumulation", {}), "batch.per_device": ("distil.batch", {}),
}


def recipe(preset, name=""):
    "The facts of a preset's recipe, laid over those it inherits."
    facts = dict(FACTS[name or PRESETS[preset]])
    parent = facts.pop("inherits", None)
    return merge(recipe(preset, parent), facts) if parent else facts


def stated(preset, places):
    "The facts that a recipe states."
    return [(preset, fact) for fact in places if at(recipe(preset), fact) is not None]


@pytest.mark.parametrize(("preset", "fact"), [pair for preset in PRESETS for pair in stated(preset, PLACES) if pair[1] not in SPELT])
def test_presets_hold_the_published_values(preset, fact):
    ours = load_settings(preset).model_dump(mode="json")
    assert at(ours, PLACES[fact]) == at(recipe(preset), fact)


@pytest.mark.parametrize(("preset", "fact"), [pair for preset in [*PRESETS][2:] for pair in stated(preset, SPELT)])
def test_presets_hold_the_published_values_by_our_names(preset, fact):
    place, names = SPELT[fact]
    theirs = at(recipe(preset), fact)
    assert at(load_settings(preset).model_dump(mode="json"), place) == names.get(theirs, theirs)


def test_the_released_code_states_every_value_that_is_compared():
    assert stated("sanh2019", PLACES) == [("sanh2019", fact) for fact in PLACES]


@pytest.mark.parametrize("preset", ["tinydistilbert", "tinydistilbert_repaired"])
@pytest.mark.parametrize(("kind", "tasks"), [("glue", ("cola", "mnli", "wnli")), ("imdb", ("imdb",)), ("squad", ("squad",))])
def test_tinydistilberts_fine_tuning_is_as_stated(preset, kind, tasks):
    s, facts = load_settings(preset), recipe(preset)["finetune"]
    for task in tasks:
        args = finetune_for(s, task)
        ours = dict(max_len=args.max_len, batch=args.loop.batch, lr=args.loop.lr, epochs=args.loop.epochs,
                    weight_decay=args.loop.weight_decay, select={"best": "best_dev"}[args.select], runs=len(seeds_for(s, task)))
        assert {k: ours[k] for k in facts[kind]} == facts[kind]
    d = facts["squad_d"]
    assert s.second.tasks == ("squad",) and s.second.teacher == d["teacher"] and s.second.temperature == d["temperature"]
    assert s.second.alpha_ce == s.second.alpha_task == d["alpha"]


def test_faults_are_settings_of_tinydistilbert_alone():
    faults = dict(positions="padded", kl_mean_over="sequences", cos_tokens="cls")
    for preset in preset_names():
        s = load_settings(preset)
        loss = s.loss.model_dump(include=set(faults))
        assert loss == (faults if preset == "tinydistilbert" else Loss().model_dump(include=set(faults))), preset
        assert (s.data.pad == "max_len") == (not s.data.drop_blank) == (preset == "tinydistilbert")


def test_the_repair_spends_the_same_text_on_many_more_updates():
    run, repaired = (load_settings(p, "smoke").distil for p in ("tinydistilbert", "tinydistilbert_repaired"))
    batches = -(-1500 // 16)
    assert planned_updates(run, batches) == (9, recipe("tinydistilbert")["expected_updates"])
    assert planned_updates(repaired, batches)[1] > 100


def test_the_ablation_has_every_subset_of_the_losses_from_both_starts():
    s = load_settings("ablation")
    found = set()
    for name, change in s.ablation.students.items():
        assert change.keys() <= {"loss", "student"} and change.get("student", {"init": "random"}) == {"init": "random"}
        loss = Loss(**merge(s.loss.model_dump(), change.get("loss", {})))
        left = [k for k in ("ce", "cos", "mlm") if getattr(loss, f"w_{k}")]
        assert all(getattr(loss, f"w_{k}") == getattr(s.loss, f"w_{k}") for k in left)
        words = name.removesuffix("_random")
        assert sorted(words.split("_")) == left or (words == "triple" and len(left) == 3)
        assert name.endswith("_random") == ("student" in change)
        found.add((*left, "student" in change))
    assert len(found) == len(s.ablation.students) == 14


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
        recipe = load_settings(preset).loss.model_copy(update=dict(compile=s.loss.compile))  # how it is computed is no part of it
        assert s.loss == recipe, "a scale changes the budget, never the recipe"


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
