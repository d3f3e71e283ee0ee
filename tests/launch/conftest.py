"""A real SLURM of two nodes on this machine, for as long as the tests run."""

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

CONFIGURATION = """
ClusterName=t
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket=/run/munge/munge.socket.2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=1
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
KillWait=10
SlurmdParameters=config_overrides
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """The commands of a running SLURM."""

    ALIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")

    def __init__(self, folder):
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def call(self, *words, **environment):
        """Run one command and return what it prints."""
        return subprocess.run(
            words, env=self.environment | environment, cwd=ROOT, check=True, timeout=30,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ).stdout  # fmt: skip

    def submit(self, *words, **environment):
        """Submit a job and return its number."""
        return re.search(r"Submitted batch job (\d+)", self.call("sbatch", *words, **environment))[
            1
        ]

    def state(self, job):
        """Return the state of a job, and how often it has been restarted."""
        text = self.call("scontrol", "show", "job", job)
        return re.search(r"JobState=(\w+)", text)[1], int(re.search(r"Restarts=(\d+)", text)[1])

    def wait_until(self, condition, timeout):
        """Wait until `condition` holds."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout} s: {self.call('squeue')}"
            time.sleep(0.2)

    def wait(self, job, timeout):
        """Wait for the end of a job; a requeued one starts at once, not after two minutes."""
        deadline, ended, hurried = time.monotonic() + timeout, 0, 0
        while time.monotonic() < deadline:
            state, restarts = self.state(job)
            # A job that is being requeued shows for a moment how it would have ended.
            ended = ended + 1 if state not in self.ALIVE else 0
            if ended > 6:
                return state, restarts
            if state == "PENDING" and restarts > hurried:
                hurried = restarts
                self.hurry(job)
            time.sleep(0.5)
        raise AssertionError(f"job {job} is {self.state(job)} after {timeout} s")

    def hurry(self, job):
        """Start a requeued job now, not after two minutes."""
        time.sleep(3)  # or the nodes take the job for the one they were to forget
        subprocess.run(
            ["scontrol", "update", f"JobId={job}", "StartTime=now"],
            env=self.environment, check=False, capture_output=True,
        )  # fmt: skip


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """Start SLURM, or skip with the reason why that is not possible here."""
    needed = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    if missing := [name for name in needed if shutil.which(name, path=path) is None]:
        pytest.skip(f"needs SLURM: {', '.join(missing)} not installed (slurm-wlm, munge)")
    if os.geteuid() != 0:
        pytest.skip("needs to be root, to start SLURM's daemons")
    try:
        munge = pwd.getpwnam("munge")
    except KeyError:
        pytest.skip("needs the user munge, whom the package of that name brings")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    slurm = Slurm(folder)
    slurm.environment["PATH"] = path
    ports = _free_ports(3)
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, ports=ports))
    Path("/run/munge").mkdir(exist_ok=True)
    os.chown("/run/munge", munge.pw_uid, munge.pw_gid)
    os.chmod("/run/munge", 0o755)
    own_munge = subprocess.run(["pgrep", "-x", "munged"], check=False).returncode != 0
    if own_munge:
        slurm.call("su", "-s", "/bin/sh", "munge", "-c", shutil.which("munged", path=path))
    slurm.call("slurmctld", "-c")
    for node in ("n1", "n2"):
        slurm.call("slurmd", "-N", node)
    try:
        _wait_for_nodes(slurm)
        yield slurm
    finally:
        pids = [int(path.read_text()) for path in folder.glob("*.pid")]
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 20
        while any(map(_runs, pids)) and time.monotonic() < deadline:
            time.sleep(0.1)
        if own_munge:
            subprocess.run(["pkill", "-x", "munged"], check=False)


def _runs(pid):
    """Whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _free_ports(count):
    """Return ports in a row that nobody listens on."""
    for first in range(16800, 17800, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return list(range(first, first + count))
    raise AssertionError("no free ports")


def _wait_for_nodes(slurm, timeout=30):
    deadline = time.monotonic() + timeout
    while slurm.call("sinfo", "-h", "-N", "-o", "%T").split() != ["idle", "idle"]:
        if time.monotonic() > deadline:
            logs = "\n".join(p.read_text()[-2000:] for p in sorted(slurm.folder.glob("*.log")))
            raise AssertionError(f"no two idle nodes: {slurm.call('sinfo', '-N')}\n{logs}")
        time.sleep(0.2)
