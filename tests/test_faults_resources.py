"""Memory, files, threads and processes: what a run takes, it gives back; where a home, a cache or shared memory is missing, it works."""
import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from test_workflow import SMALL, teacher  # noqa: F401  a fixture

from distilrepro import plan, workflow
from distilrepro.config import load_settings
from distilrepro.corpus import write_offsets
from distilrepro.records import Run, create_run, read_predictions, read_records, write_predictions, write_records
from distilrepro.report import write_report

ROOT = Path(__file__).resolve().parent.parent
TEXT = """
import shutil, sys, time
from pathlib import Path
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
import distilrepro.corpus as corpus
from distilrepro.config import Data
from distilrepro.synthetic import documents
folder, kind, sizes = Path(sys.argv[1]), sys.argv[2], [int(s) for s in sys.argv[3:]]
words = " ".join(documents(0, 400)).split()
blob = "QmFzZTY0" * 1000 if kind == "blobs" else ""
block = "".join(" ".join(words[(i * 37 + k) % len(words)] for k in range(60)) + f" {blob}\\n" for i in range(200))
tokenizer = corpus.load_tokenizer(Data())
if kind == "blobs":  # a tokenizer without BERT's normaliser, which reads a gigabyte in half a minute
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(words))]
    raw = Tokenizer(models.WordPiece({w: i for i, w in enumerate(names)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
for size in sizes:
    wanted, written = size, 0
    if kind == "sequences":  # the store alone: as many sequences as asked for, whatever the text
        corpus.sequences = lambda *others: ([2, *range(5, 55), 3] for i in range(wanted))
        block, size = "a line", 1
    with open(folder / "a.txt", "w") as f:
        while written < size: written += f.write(block)
    begun = time.process_time()
    store = corpus.build_store(Data(source="local"), tokenizer, [str(folder / "a.txt")], "train", folder / "store", 0)
    assert len(store) == (wanted if kind == "sequences" else block.count("\\n") * -(-size // len(block)))
    most = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # ru_maxrss would be the parent's, from before exec
    print(int(most.split()[1]) / 1024, time.process_time() - begun)
    shutil.rmtree(folder / "store")
"""


def peaks(folder: Path, kind: str, *sizes: int) -> list[tuple[float, float]]:
    "MB of memory that a process took at most up to each of growing sizes, and seconds of processor; what it wrote is removed."
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    words = [sys.executable, "-c", TEXT, str(folder), kind, *map(str, sizes)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return [tuple(map(float, line.split())) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("kind", "short", "large"), [("blobs", (5, 20), (10, 1000)), ("sentences", None, (5, 60))])
def test_memory_of_tokenisation_does_not_grow_with_the_text(tmp_path, fault, kind, short, large):
    "Blobs: lines of sixty words and a word of 8 kB, as addresses and encoded pictures are; a gigabyte of them in half a minute."
    sizes = large if fault.whole else short
    if not sizes:
        pytest.skip("in `make torture`")
    with fault("resources", f"{sizes[1]} MB of text, {kind}"):
        (least, _), (most, seconds) = peaks(tmp_path / "text", kind, *(s * 10**6 for s in sizes))
        fault.measured("resources", f"peak memory after {sizes[0]} MB of text, {kind}", least, "MB")
        fault.measured("resources", f"peak memory after {sizes[1]} MB of text, {kind}", most, "MB")
        fault.measured("resources", f"tokenising {kind}", sizes[1] / seconds, "MB/s of one core")
        assert least < most + 1 < least + 40, "not flat: a list of the text or of its tokens would be far more"


def test_memory_of_a_store_is_little_a_sequence(tmp_path, fault):
    "A gigabyte of sentences of 250 letters has four million sequences; of each, start, length and place are held."
    few, many = fault.size(10_000, 40_000), fault.size(400_000, 4_000_000)
    with fault("resources", f"a token store of {many:,} sequences"):
        (least, _), (most, _) = peaks(tmp_path / "store", "sequences", few, many)
        each = (most - least) * 2**20 / (many - few)
        fault.measured("resources", f"memory of a token store of {many:,} sequences", each, "bytes a sequence")
        assert 8 < each < 48, "length and place alone are 16"


@pytest.mark.parametrize("n", [1, 5, (1 << 18) + 3])
def test_offsets_written_in_pieces_are_those_written_at_once(tmp_path, n):
    lengths = np.random.default_rng(1).integers(1, 500, n)
    write_offsets(lengths, tmp_path / "pieces.npy", 3)
    np.save(tmp_path / "once.npy", np.stack([np.cumsum(lengths) - lengths, lengths], 1)[np.random.default_rng(3).permutation(n)])
    assert (tmp_path / "pieces.npy").read_bytes() == (tmp_path / "once.npy").read_bytes()


# what is taken is given back

def taken() -> dict[str, int]:
    "Open files, threads and children of this process."
    gc.collect()
    me = psutil.Process()
    return dict(files=me.num_fds(), threads=me.num_threads(), children=len(me.children(recursive=True)))


def whole(teacher: Path, out: Path) -> Run:  # noqa: F811
    "From nothing to a student, its records and predictions."
    workflow.distil(str(teacher / "teacher"), (str(teacher / "*.txt"),), out, SMALL)
    run = Run(out.with_name(out.name + "-run"))
    write_predictions(run, "a", pd.DataFrame(dict(id=range(9), prediction=0)))
    write_records(run, "a", [dict(model="student", metric="score", value=0.5, stage="s")])
    assert len(read_records(run)) > 9 and len(read_predictions(run, "a")) == 9
    return run


def test_runs_give_back_what_they_took(teacher, tmp_path, fault):  # noqa: F811
    whole(teacher, tmp_path / "first")  # pools of threads and caches are made once
    before, memory = taken(), psutil.Process().memory_info().rss
    runs = fault.size(5, 20)
    for i in range(runs):
        with fault("resources", "a run in a process that had others"):
            whole(teacher, tmp_path / f"run{i}")
    assert taken() == before
    grown = (psutil.Process().memory_info().rss - memory) / 2**20
    fault.measured("resources", f"memory that {runs} runs in one process kept", grown, "MB")
    assert grown < 60


# a machine that lacks things

CHEAP = """
import sys
sys.path.insert(0, TESTS)
import test_faults_resources as t
from pathlib import Path
import matplotlib.pyplot as plt
from distilrepro.figures import save_figure
from distilrepro.pictures import use_style
run = t.whole(Path(sys.argv[1]), Path(sys.argv[2]))
use_style()
fig, ax = plt.subplots()
ax.plot([1, 2])
save_figure(run, "a", fig)
print("made", run.folder)
"""


def bare(folder: Path, *lacking: str) -> dict[str, str]:
    "An environment of almost nothing, in which places that programs write to cannot be made: they lie below a file."
    (folder / "file").write_text("x")
    kept = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return kept | {name: str(folder / "file" / name) for name in lacking}


CACHES = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_RUNTIME_DIR", "HF_HOME", "MPLCONFIGDIR", "TORCH_HOME", "IPYTHONDIR")
LACKING = {"no HOME at all": (), "a HOME that cannot be made": ("HOME",), "caches that cannot be made": CACHES,
           "neither HOME nor caches": ("HOME", *CACHES)}


@pytest.mark.parametrize("what", LACKING)
def test_a_run_without_home_or_caches_works(teacher, tmp_path, what, fault):  # noqa: F811
    if not fault.whole:
        pytest.skip("in `make torture`; a job of the workflow without them is below")
    with fault("resources", what):
        code = CHEAP.replace("TESTS", repr(str(ROOT / "tests")))
        done = subprocess.run([sys.executable, "-c", code, str(teacher), str(tmp_path / "s")], capture_output=True, text=True,
                              env=bare(tmp_path, *LACKING[what]), cwd=tmp_path)
        assert done.returncode == 0 and "made" in done.stdout, done.stderr[-2000:]
        assert (tmp_path / "s-run/tables/a.svg").is_file()


def test_a_run_without_shared_memory_works(teacher, tmp_path, fault):  # noqa: F811
    hide = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o ro,size=4k none /dev/shm && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*hide, "true"], capture_output=True).returncode:
        pytest.skip("/dev/shm can be hidden by root alone, where mounts may be made")
    if not fault.whole:
        pytest.skip("in `make torture`")
    with fault("resources", "no /dev/shm"):
        assert subprocess.run([*hide, "sh", "-c", "echo x > /dev/shm/x"], capture_output=True).returncode, "it was hidden"
        code = CHEAP.replace("TESTS", repr(str(ROOT / "tests")))
        done = subprocess.run([*hide, sys.executable, "-c", code, str(teacher), str(tmp_path / "s")], capture_output=True, text=True,
                              env=bare(tmp_path), cwd=tmp_path)
        assert done.returncode == 0 and "made" in done.stdout, done.stderr[-2000:]


# one job through Snakemake, in a folder of an odd name, without a home, with secrets around it

SECRETS = {
    "HF_TOKEN": "hf_planted0000000000000000000000000000", "AWS_SECRET_ACCESS_KEY": "wJalrPlantedSecretKey",
    "WANDB_API_KEY": "planted0wandb0key", "OPENAI_API_KEY": "sk-planted-openai", "MY_PASSWORD": "planted-pass-word",
    "DATABASE_URL": "postgres://u:plantedpassword@host/db", "GITHUB_TOKEN": "ghp_planted0github",
    "SSH_PRIVATE_KEY": "-----BEGIN PLANTED PRIVATE KEY-----"}
REMOTE = "https://user:planted-remote-token@example.org/repo.git"
ODD = """it's "a" run; {x} ü $(id) `id` & #1"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Run:
    "A run with its teacher made, a report, and its results published, all in surroundings full of secrets and without a home."
    root = tmp_path_factory.mktemp("odd")
    (root / "repo").mkdir()
    git = ["git", "-C", str(root / "repo"), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["remote", "add", "origin", REMOTE], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    sets = ("teacher.layers=2", "teacher.loop.max_updates=12", "data.documents=300")
    with pytest.MonkeyPatch.context() as patch:
        for key, value in SECRETS.items():
            patch.setenv(key, value)
        run = create_run(root / ODD, load_settings("quick", "smoke", sets), root / "repo")
        assert run.provenance["git"]["commit"], "read in the repository with the secret remote"
        plan.write_keys(run, ROOT)
        for key, value in bare(root, "HOME", *CACHES).items():
            patch.setenv(key, value)
        words = ["-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(run.folder), "--cores", "1", "--config",
                 f"root={ROOT}", "--quiet", "--", "notebooks/s01_teacher.ipynb"]
        with open(run.folder / "workflow.log", "ab") as log:
            done = subprocess.run([sys.executable, *words], env=os.environ | plan.places(run), stdout=log, stderr=log)
    assert done.returncode == 0, (run.folder / "workflow.log").read_text()[-3000:]
    write_report(run)
    workflow.publish(run, root / "published" / ODD)
    return run


def test_a_job_in_a_folder_of_an_odd_name_without_a_home_works(finished, fault):
    with fault("outputs", "a run folder with quotes, braces, commands and umlauts in its name"):
        assert {p.name for p in finished.folder.parent.iterdir()} == {ODD, "repo", "file", "published"}, "nothing was made beside it"
        records = read_records(finished, "teacher")
        assert set(records.run) == {ODD} and len(records) > 3
        assert len(json.loads((finished.folder / "notebooks/s01_teacher.ipynb").read_text())["cells"]) > 5
    with fault("resources", "a job of the workflow without HOME and caches"):
        assert (finished.folder / ".home/home").is_dir() and (finished.folder / "checkpoints/teacher").is_dir()


def test_no_secret_is_written_down(finished, fault):
    texts = {p: p.read_bytes() for top in (finished.folder, finished.folder.parent / "published") for p in top.rglob("*") if p.is_file()}
    assert len(texts) > 30 and any(b"quick" in t for t in texts.values())
    for name, value in (SECRETS | {"git remote": REMOTE, "token of the remote": "planted-remote-token"}).items():
        with fault("supply", "a secret in the surroundings of a run"):
            assert not [p for p, t in texts.items() if value.encode() in t], name
            assert name not in SECRETS or not [p for p, t in texts.items() if name.encode() in t and p.suffix != ".json"], name


def test_published_results_hold_no_place_of_an_odd_name(finished):
    published = finished.folder.parent / "published" / ODD
    places = [str(finished.folder), str(finished.folder).replace('"', '\\"'), str(finished.folder).encode("unicode-escape").decode()]
    for path in (p for p in published.rglob("*") if p.is_file()):
        assert not any(form.encode() in path.read_bytes() for form in places), path
        assert str(finished.folder.parent).encode() not in path.read_bytes(), path


