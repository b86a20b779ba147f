"Start and How-to pages do what they say: the quick ones are followed, and on all of them commands, options, settings and links exist."
import re
import shlex
import subprocess

import follow
import pytest
import typer
from dialect import page_name
from follow import ROOT, blocks

from distilrepro.cli import app
from distilrepro.config import UserError, load_settings, preset_names

PAGES = sorted(p for folder in ("start", "howto") for p in (ROOT / "docs/pages" / folder).glob("*.md"))
QUICK = ("howto/loss", "howto/nbdev3", "howto/run_folder")  # the others take minutes: `python docs/follow.py`
COMMANDS = typer.main.get_command(app).commands
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: f"{p.parent.name}/{p.stem}")


def words(page):
    "The words of each call of distilrepro in a page's shell blocks."
    text = "".join(b.text for b in blocks(page.read_text(encoding="utf-8")) if b.language == "sh" and not b.file)
    calls = re.findall(r"^(?:\w+=\S* )*distilrepro (.+)$", text.replace("\\\n", " "), re.M)
    return [shlex.split(call.split("&")[0]) for call in calls]


def values(call, name):
    "What a call gives to an option."
    return [after for word, after in zip(call, call[1:], strict=False) if word == name]


@pytest.mark.parametrize("name", QUICK)
def test_a_quick_page_can_be_followed(name, capfd):
    assert follow.follow(ROOT / f"docs/pages/{name}.md"), capfd.readouterr().out


def test_a_page_that_fails_stops_at_its_line(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("# A\n\n```sh\ntrue\n```\n\n{.elsewhere}\n```sh\nfalse\n```\n\n```sh\nfalse | true\n```\n\n```sh\necho never\n```\n")
    assert not follow.follow(page)
    out = capsys.readouterr().out
    assert f"{page}:12: exit code 1" in out and "never" not in out


def test_a_file_is_written_and_blocks_to_read_are_left_alone(tmp_path, capfd):
    page = tmp_path / "page.md"
    page.write_text("```{code-block} yaml\n:caption: a/b.yaml\n\nx: 1\n```\n\n```text\nno command\n```\n\n```sh\ngrep x a/b.yaml\n```\n")
    assert follow.follow(page) and "2 blocks done, 0 for elsewhere" in capfd.readouterr().out


@every_page
def test_shell_blocks_parse(page):
    for b in blocks(page.read_text(encoding="utf-8")):
        if b.language == "sh":
            done = subprocess.run(["bash", "-n"], input=b.text, text=True, capture_output=True)
            assert done.returncode == 0, f"{page.name}:{b.line}: {done.stderr}"
        elif b.language == "python":
            compile(b.text, f"{page.name}:{b.line}", "exec")


@every_page
def test_commands_and_options_exist(page):
    for call in words(page):
        assert call[0] in COMMANDS, call
        known = {name for option in COMMANDS[call[0]].params for name in option.opts} | {"--help"}
        assert {w.split("=")[0] for w in call if w.startswith("--")} <= known, call
    named = re.findall(r"`distilrepro ([a-z]+)", page.read_text(encoding="utf-8"))
    assert set(named) - {"needs"} <= set(COMMANDS)  # "distilrepro needs Python 3.11", says the Makefile


@every_page
def test_presets_and_settings_exist(page):
    for call in words(page):
        preset = (values(call, "--preset") or ["own" if call[0] == "distil" else "sanh2019"])[0]
        sets = [s if re.search(r"=.", s) else s + '""' for s in values(call, "--set")]
        load_settings(preset, (values(call, "--scale") or [""])[0], tuple(sets))
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"PRESET=(\w+)", text)) <= set(preset_names())


def test_a_wrong_setting_would_be_found():
    with pytest.raises(UserError, match="did you mean"):
        load_settings("own", sets=("distil.epoch=1",))


@every_page
def test_links_lead_somewhere(page):
    notebooks = {page_name(p.relative_to(ROOT / "nbs").as_posix()) for p in (ROOT / "nbs").rglob("*.ipynb")}
    for target in re.findall(r"\]\(/([^)#]+)", page.read_text(encoding="utf-8")):
        found = target.removesuffix(".ipynb") in notebooks if target.endswith(".ipynb") else (ROOT / "docs/pages" / target).is_file()
        assert found, f"{page.name}: {target}"
