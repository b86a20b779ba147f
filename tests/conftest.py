"Every test runs offline and on one thread; set before anything imports torch or transformers."
import os
import sys

import pytest
from faults import fault, pytest_addoption, pytest_configure, pytest_terminal_summary  # noqa: F401  a fixture and hooks
from hypothesis import HealthCheck, settings

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
               "MPLBACKEND": "agg"}
# A busy machine is no fault of the code: how long an example takes to draw or to run decides nothing.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture
def command(monkeypatch, capfd):
    "Run `distilrepro WORDS` in this process; returns its exit code and what it said."
    from distilrepro import cli

    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)  # pytest listens itself

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["distilrepro", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as e:
            code = e.code or 0
        out = capfd.readouterr()
        return code, out.out, out.err
    return run
