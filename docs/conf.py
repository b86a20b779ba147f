"""Settings of the site: Sphinx renders the notebooks that `build.py` laid into `docs/_nb`."""
import shutil
from importlib.util import find_spec
from pathlib import Path

from nbdev.config import get_config

cfg = get_config()
project = html_title = cfg.title
author, copyright, version = cfg.author, cfg.copyright, cfg.version
extensions = ["myst_nb", "sphinx_design", "sphinx_copybutton"]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
root_doc = "index"

nb_execution_mode = "off"  # pages show the outputs stored in the notebooks
nb_merge_streams = True
nb_output_stderr = "remove"
nb_render_image_options = {"align": "center"}
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist", "attrs_inline", "attrs_block", "tasklist"]
myst_dmath_double_inline = True
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a notebook may go from H2 to H4 (nbdev's headings of methods)

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_extra_path = ["_extra"]  # pages of examples: each stands for itself
html_copy_source = False
html_search_scorer = str(Path(__file__).with_name("scorer.js"))
html_show_search_summary = False  # its excerpts are fetched, which no browser allows for pages opened as files
copybutton_exclude = ".linenos, .gp, .go"
mathjax_path = "mathjax/tex-svg-full.js"  # MathJax 3 in one file: version 4 fetches its fonts from a CDN when a page is read
mathjax3_config = {"svg": {"fontCache": "global"}}


def copy_mathjax(app, error) -> None:
    "Ship MathJax with the site, so that its pages need no network."
    if error is None and app.builder.format == "html":
        source = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static/mathjax/tex-svg-full.js"
        target = Path(app.outdir) / "_static/mathjax"
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def setup(app) -> None:
    "Register the one hook of this site."
    app.connect("build-finished", copy_mathjax)
