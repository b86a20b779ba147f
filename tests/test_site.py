"""The built site in a real browser: links, search, formulas, words for pictures, contrast, phones, and nothing asked of the network.

`make docs` builds it, `make docs-test` runs this; without Chromium the browser's part is skipped and says so.
"""
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = pytest.mark.site
SITE = Path(__file__).resolve().parent.parent / "_docs"
PAGES = sorted(p.relative_to(SITE).as_posix() for p in SITE.rglob("*.html") if p.stem not in ("genindex", "search"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
NAMED = ["link-name", "button-name", "html-has-lang", "document-title", "label", "image-alt"]  # rules that hold in both themes or in none
DRESS = """theme => {
  document.body.dataset.theme = theme;
  const still = new CSSStyleSheet();
  still.replaceSync('* { transition: none !important }');
  document.adoptedStyleSheets = [still];
}"""
LOOKS = """known => {  // marks one text of every look that is not yet known; a look: element, colours and print, its own and of all around
  const seen = new Set(known), fresh = [], names = new Map([[null, '']]);
  const styles = ['color', 'backgroundColor', 'backgroundImage', 'opacity', 'fill', 'fontSize', 'fontWeight', 'textShadow', 'filter',
    'mixBlendMode', 'position', 'zIndex'];
  const hash = text => {
    let a = 0xdeadbeef, b = 0x41c6ce57;
    for (let i = 0; i < text.length; i++) {
      a = Math.imul(a ^ text.charCodeAt(i), 2654435761);
      b = Math.imul(b ^ text.charCodeAt(i), 1597334677);
    }
    return (a >>> 0).toString(36) + (b >>> 0).toString(36);
  };
  for (const e of document.querySelectorAll('html, body, body *')) {  // parents come before their children
    const around = names.get(e.parentElement), s = getComputedStyle(e);  // a formula is of one colour
    const own = () => hash([around, e.localName, ...styles.map(k => s[k])].join('|'));
    names.set(e, e.parentElement?.closest('mjx-container') ? around : own());
    const written = e.matches('input, select, textarea') || [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!written || !e.checkVisibility()) { e.removeAttribute('data-look'); continue; }
    e.dataset.look = seen.has(names.get(e)) ? 'known' : 'new';
    if (!seen.has(names.get(e))) { seen.add(names.get(e)); fresh.push(names.get(e)); }
  }
  return fresh;
}"""
JUDGE = """async ([context, rules]) => {
  const found = await axe.run(context, {runOnly: {type: 'rule', values: rules}, resultTypes: ['violations']});
  const said = n => `${n.html.slice(0, 120)} ${(n.failureSummary ?? '').slice(0, 200)}`;
  return found.violations.flatMap(v => v.nodes.slice(0, 3).map(n => `${v.id}: ${said(n)}`));
}"""
BARE = "[...document.querySelectorAll('.math')].filter(m => !m.querySelector('svg')).map(m => m.textContent)"  # formulas that stayed text
MUTE = "[...document.images].filter(i => !i.alt.trim() || /\\.(png|svg)$/.test(i.alt) || !i.naturalWidth).map(i => i.src.slice(0, 80))"
FOUND = "[...document.querySelectorAll('#search-results li a')].map(a => a.getAttribute('href').split(/[#?]/)[0])"
LOUD = r"Traceback \(most recent call last\)|(?:User|Deprecation|Future|Runtime|Tqdm)Warning|\[IPKernelApp\]"
PLACE = r"(?<![\w.])/(?:work|root|tmp|home|Users)/\w"
DESK, PHONE = {"width": 1400, "height": 1000}, {"width": 390, "height": 844}


class Links(HTMLParser):
    "The addresses that a page asks for, and the anchors that it has."
    def __init__(self, text: str):
        super().__init__()
        self.asked, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors |= {found[k] for k in ("id", "name") if found.get(k)}
        self.asked += [found[k] for k in ("href", "src") if found.get(k) and tag != "base"]


@pytest.fixture(scope="session")
def pages() -> dict[str, Links]:
    "Every page's links and anchors."
    assert PAGES, "no site in _docs; run `make docs`"
    return {p.relative_to(SITE).as_posix(): Links(p.read_text(encoding="utf-8")) for p in SITE.rglob("*.html")}


def broken(page: str, address: str, pages: dict[str, Links]) -> str:
    "Why an address on a page leads nowhere; empty when it leads somewhere, or out of the site."
    url = urlsplit(address)
    if url.scheme or url.netloc:
        return ""
    target = (SITE / page).parent / unquote(url.path) if url.path else SITE / page
    if not target.is_file():
        return f"{address}: no such file"
    name = target.resolve().relative_to(SITE).as_posix()
    return f"{address}: no such anchor" if url.fragment and name in pages and unquote(url.fragment) not in pages[name].anchors else ""


def test_every_internal_link_and_anchor_resolves(pages):
    assert not {f"{page}: {problem}" for page, links in pages.items() for a in links.asked if (problem := broken(page, a, pages))}


def test_a_missing_file_and_a_missing_anchor_are_found(pages):
    assert "no such file" in broken("index.html", "gone.html", pages) and "no such anchor" in broken("index.html", "#gone", pages)
    assert not broken("index.html", "https://arxiv.org/abs/1910.01108", pages) and not broken("index.html", "index.html", pages)


@pytest.mark.parametrize("path", PAGES)
def test_page_shows_no_traceback_no_warning_and_no_place(path):
    assert not re.findall(f"{LOUD}|{PLACE}", (SITE / path).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def browser():
    "Chromium, where there is one."
    if not CHROMIUM:
        pytest.skip("no Chromium here; `apt-get install chromium` brings one")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def chromium(browser):
    "A browser's page, used for all pages of the site."
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = browser.new_page(color_scheme="light")
    page.axe, page.judged, page.problems = axe.axe_script, set(), []
    page.on("console", lambda m: page.problems.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: page.problems.append(str(e)))
    page.on("request", lambda r: page.problems.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None)
    yield page
    page.close()


@pytest.fixture
def page(chromium):
    "The browser's page at a desk's width, which remembers what goes wrong and what it asks the network for."
    chromium.set_viewport_size(DESK)
    chromium.problems.clear()
    return chromium


def settle(page, path: str) -> None:
    "Open a page of the site and wait for its formulas."
    page.goto((SITE / path).as_uri(), wait_until="load")
    page.evaluate("window.MathJax?.startup?.promise")


def pale(page, theme: str) -> list[str]:
    "What text is hard to read in a theme, by `axe`; of texts that look alike and lie in what looks alike one is judged, on whatever page."
    page.emulate_media(color_scheme=theme)
    page.evaluate(DRESS, theme)
    fresh = page.evaluate(LOOKS, sorted(page.judged))
    context = {"include": [["[data-look=new]"]], "exclude": [["[data-look=known]"]]}
    found = page.evaluate(JUDGE, [context, ["color-contrast"]]) if fresh else []
    page.judged |= set() if found else set(fresh)
    return [f"{theme}: {fault}" for fault in found]


def unfair(page) -> list[str]:
    "What `axe` finds wrong for readers who see little or nothing, in both themes."
    page.evaluate(page.axe)
    return page.evaluate(JUDGE, [{"include": [["html"]]}, NAMED]) + pale(page, "light") + pale(page, "dark")


@pytest.mark.parametrize("path", PAGES)
def test_page(page, path):
    settle(page, path)
    assert not page.problems
    assert page.evaluate(BARE) == [] and page.evaluate(MUTE) == []
    assert unfair(page) == []
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], "wider than a phone"
    assert not page.problems


def test_search_finds_the_triple_loss(page):
    page.goto((SITE / "search.html").as_uri() + "?q=triple+loss")
    page.wait_for_selector("#search-results li a")
    assert "lib/losses.html" in page.evaluate(FOUND)[:10] and not page.problems
