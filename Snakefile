# One rule a notebook. What there is to do, and in which order, is said by distilrepro.plan.jobs; this file hands it to Snakemake.
#
#   distilrepro reproduce ...                        makes the run folder and calls this on one machine
#   distilrepro reproduce ... --prepare              makes the run folder; then, the same on a cluster (gpu=0: one without GPUs):
#   snakemake --directory runs/RUN --config root=$PWD gpu=1 --executor slurm --jobs 20 ...
import sys
from pathlib import Path

from distilrepro.records import Run
from distilrepro.plan import jobs

ROOT = Path(config["root"])
JOBS = {job.name: job for job in jobs(Run(Path.cwd()).settings)}
TOOL = Path(sys.executable).with_name("distilrepro")


rule report:
    input: expand("notebooks/{job}.ipynb", job=JOBS), key="keys/report.key"
    output: "report.html"
    params: tool=TOOL
    shell: "{params.tool:q} report --run ."


for job in JOBS.values():
    rule:
        name: job.name
        input:
            key=f"keys/{job.name}.key",
            needs=[f"notebooks/{name}.ipynb" for name in job.needs],
        output: f"notebooks/{job.name}.ipynb"
        params: tool=TOOL, job=job.name, root=ROOT
        threads: workflow.cores if job.alone else job.threads
        resources: gpu=0 if job.notebook.startswith("tables/") else int(config.get("gpu", 1))
        shell: "{params.tool:q} notebook {params.job:q} --run . --root {params.root:q}"
