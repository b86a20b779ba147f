"""Package metadata, read from `settings.ini` so that it has one home."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
cfg = ConfigParser(delimiters=["="])
cfg.read(root / "settings.ini", encoding="utf-8")
c = cfg["DEFAULT"]
status = {"3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}[c["status"]]

setup(
    name=c["lib_name"],
    version=c["version"],
    description=c["description"],
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=c["author"],
    author_email=c["author_email"],
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=c["keywords"].split(),
    classifiers=[
        f"Development Status :: {status}",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    project_urls={"Repository": c["git_url"], "Documentation": c["doc_host"] + c["doc_baseurl"]},
    python_requires=f">={c['min_python']}",
    packages=find_packages(include=[c["lib_path"], c["lib_path"] + ".*"]),
    package_data={c["lib_path"]: ["py.typed", "presets/*.yaml", "reference/*.yaml"]},
    install_requires=c["requirements"].split(),
    extras_require={k: c[f"{k}_requirements"].split() for k in ("minilm", "bench", "export", "dev", "docs")},
    entry_points={
        "console_scripts": c["console_scripts"].split(),
        "nbdev": [f"{c['lib_path']}={c['lib_path']}._modidx:d"],
    },
)
