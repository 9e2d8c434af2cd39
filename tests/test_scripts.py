"""The jobs of a cluster: what they start, and what they do when their time is up; SLURM's own programs are stood in for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).resolve().parents[1]
# srun gives a signal to what it has started.
SRUN = """#!/bin/bash
"$@" & step=$!
trap 'kill -USR1 $step' USR1
trap 'kill -TERM $step' TERM
while true; do wait $step; status=$?; kill -0 $step 2>/dev/null || exit $status; done
"""
# Stands for python and torchrun: leaves its command line, and ends as our programs do.
PROGRAM = """#!/bin/bash
trap 'exit 138' USR1
trap 'exit 143' TERM
echo "$(basename "$0")" "$@" > "$FOLDER/command"
while [ -e "$FOLDER/long" ]; do sleep 0.02; done
exit "${ENDS_WITH:-0}"
"""


@pytest.fixture
def cluster(tmp_path) -> Path:
    for name, text in {
        "srun": SRUN,
        "python": PROGRAM,
        "torchrun": PROGRAM,
        "scontrol": '#!/bin/bash\necho "$@" > "$FOLDER/requeued"\n',
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def start(cluster: Path, script: str, **environment: str) -> subprocess.Popen:
    path = {"PATH": f"{cluster}:{os.environ['PATH']}", "FOLDER": str(cluster), "SLURM_JOB_ID": "17"}
    command = ["bash", str(ROOT / "scripts" / script), "--run_name", "a b"]
    process = subprocess.Popen(command, env={**os.environ, **path, **environment})
    deadline = time.monotonic() + 20
    while not (cluster / "command").exists() or not (cluster / "command").read_text():
        assert time.monotonic() < deadline and (process.poll() is None or (cluster / "command").exists())
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("script", ["slurm_train.sh", "slurm_extract.sh"])
def test_a_job_starts_one_process_for_each_gpu(cluster, script):
    assert start(cluster, script, ENDS_WITH="3").wait() == 3
    ours = (
        "main.py --mode train --parallel folds"
        if "train" in script
        else "preprocess/extract_features_uni.py --parallel"
    )
    assert (cluster / "command").read_text().startswith(f"python {ours}")
    assert (cluster / "command").read_text().endswith("--run_name a b\n")
    (cluster / "command").unlink()
    assert start(cluster, script, SLURM_GPUS_ON_NODE="4").wait() == 0
    assert (
        f"--nproc_per_node 4 --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 {ours}"
        in (cluster / "command").read_text()
    )
    assert not (cluster / "requeued").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGUSR1, 138), (signal.SIGTERM, 143)])
def test_a_job_whose_time_is_up_ends_in_order_and_is_queued_again(cluster, number, status):
    (cluster / "long").touch()
    process = start(cluster, "slurm_train.sh")
    process.send_signal(number)
    assert process.wait(timeout=20) == status
    assert (cluster / "requeued").exists() == (number == signal.SIGUSR1)
    if number == signal.SIGUSR1:
        assert (cluster / "requeued").read_text() == "requeue 17\n"


@pytest.mark.skipif(sys.platform != "linux", reason="what a job is granted is asked of Linux")
def test_torchrun_takes_the_flags_of_the_scripts():
    said = get_args_parser().format_help()
    assert "--signals-to-handle" in said and "--standalone" in said
