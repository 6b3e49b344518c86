"""A real Slurm on this machine: an array of four, one of them preempted, all complete.

`make test-slurm`; needs root and Debian.
Not collected by `make test`: it installs slurmctld, slurmd, slurm-client and munge, and takes about
four minutes, of which two are Slurm's own wait before it starts a requeued job.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_sweep import COUNTING, PARAMETERS, starts
from throwaway import make

from rspo_lab.runs.files import read_json
from rspo_lab.runs.run import alive

PACKAGES = ["slurmctld", "slurmd", "slurm-client", "munge"]
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} Gres=gpu:2 State=UNKNOWN
PartitionName=long Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(monkeypatch):
    """Slurm of one node with two pretended GPUs; SLURM_CONF points to it."""
    if os.getuid() != 0:
        pytest.skip("needs root, to install and to run Slurm's daemons")
    if not shutil.which("slurmctld"):
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        subprocess.run(
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES], check=True
        )
    folder = Path("/tmp") / f"slurm-{os.getpid()}"  # short: munge's socket
    for part in ("state", "spool"):
        (folder / part).mkdir(parents=True)
    (folder / "slurm.conf").write_text(
        CONF.format(folder=folder, host=socket.gethostname().split(".")[0], cpus=os.cpu_count())
    )
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    folder.chmod(0o755)
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    files = {name: f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "seed", "log")}
    munged = [
        "munged",
        "--foreground",
        "--force",
        f"--socket={folder}/munge.socket",
        *files.values(),
    ]
    daemons = [subprocess.Popen(munged)]
    try:
        wait(lambda: (folder / "munge.socket").exists(), 20)
        daemons += [subprocess.Popen(["slurmctld", "-D", "-c"]), subprocess.Popen(["slurmd", "-D"])]
        wait(
            lambda: (
                "idle"
                in subprocess.run(
                    ["sinfo", "-h", "-o", "%T"], capture_output=True, text=True
                ).stdout
            ),
            60,
        )
        yield
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(20)
        shutil.rmtree(folder)


def wait(true, seconds: float):
    """Until `true()`, or an error after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        time.sleep(0.2)
    return found


def test_an_array_of_four_with_one_preempted_completes(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
    (tmp_path / "notebooks").mkdir()
    notebook, root = (
        make(tmp_path / "notebooks", COUNTING, "run.finish()", parameters=PARAMETERS),
        tmp_path / "runs/demo_sweep",
    )
    words = [
        sys.executable,
        "-m",
        "rspo_lab.cli",
        "sweep",
        str(notebook),
        "--grid",
        "lam=1,2,3,4",
        "-p",
        "steps",
        "60",
    ]
    words += [
        "-p",
        "pace",
        "0.4",
        "--cluster",
        "slurm",
        "--gpus",
        "2",
        "--timeout",
        "10",
        "--slurm",
        "partition=long",
    ]
    first = subprocess.Popen(words)

    def far():
        going = [file.parent for file in root.rglob("at.json") if int(file.read_text() or 0) >= 10]
        return [path for path in going if read_json(path / "status.json").get("state") == "running"]

    preempted = wait(far, 120)[0]
    jobs = {Path(key).name: job for key, job in read_json(root / "jobs.json").items()}
    scancel = subprocess.Popen(["scancel", "--signal=USR2", jobs[preempted.name]])
    wait(
        lambda: (
            read_json(preempted / "status.json").get("state") != "running" or not alive(preempted)
        ),
        60,
    )
    scancel.kill()  # it repeats itself while the job is being requeued
    scancel.wait()
    first.send_signal(signal.SIGKILL)  # the laptop is closed; the jobs go on
    first.wait()
    said = subprocess.run(words, capture_output=True, text=True, timeout=400)
    print(said.stdout, said.stderr)
    assert said.returncode == 0 and said.stdout.rstrip().endswith("4 points: 4 done")
    points = sorted(root.glob("demo/*"))
    assert (
        len(points) == 4
        and {Path(key).name: job for key, job in read_json(root / "jobs.json").items()} == jobs
    )  # none twice
    for path in points:
        assert len(starts(path)) == (2 if path == preempted else 1), starts(path)
    assert int(starts(preempted)[1][1]) >= 10
    assert {start[2] for path in points for start in starts(path)} == {
        "0",
        "1",
    }  # one GPU a point, both used
    for job in jobs.values():
        assert (root / ".jobs" / f"{job}_0_log.out").is_file()
