"Every test runs offline and on one thread; set before anything imports torch or transformers."
import os

from hypothesis import HealthCheck, settings

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
               "MPLBACKEND": "agg"}
# A busy machine is no fault of the code: how long an example takes to draw or to run decides nothing.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_configure(config):
    config.addinivalue_line("markers", "story: the whole story from an empty folder, several processes, minutes")
