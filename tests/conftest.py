"Every test runs offline and on one thread; set before anything imports torch or transformers."
import os

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
               "MPLBACKEND": "agg"}


def pytest_configure(config):
    config.addinivalue_line("markers", "story: the whole story from an empty folder, several processes, minutes")
