"""A SLURM on the loopback, for jobs on two of its nodes, with all its state in a folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
NODES = ("n1", "n2", "n3", "n4", "n5")
CORES = 32  # of a node, as far as SLURM believes
NODE_FAILS_AFTER = 10  # seconds
QUEUES = {
    "steady": "Nodes=n[1-2] PriorityTier=1 PreemptMode=OFF",
    # An urgent job takes their place: they are told and have a minute, or are queued again at once.
    "patient": "Nodes=n[1-2] PriorityTier=1 PreemptMode=REQUEUE GraceTime=60",
    "hasty": "Nodes=n[1-2] PriorityTier=1 PreemptMode=REQUEUE GraceTime=0",
    "urgent": "Nodes=n[1-2] PriorityTier=9 PreemptMode=OFF",
    # One of its nodes may fail without ending what runs in other queues, and one is left over.
    "fragile": "Nodes=n[3-5] PriorityTier=1 PreemptMode=OFF",
}
# Control groups are not there for processes in a container; cores and memory are promised, not held.
CONFIG = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=bf_interval=2,sched_interval=5
FirstJobId={first}
MpiDefault=none
ReturnToService=2
KillWait=30
SlurmdTimeout={timeout}
JobRequeue=1
{nodes}
{queues}
"""


def missing() -> str:
    """Returns why no such cluster can be started here; empty if it can."""
    if os.geteuid() != 0:
        return "its daemons are started as root"
    lacks = [name for name in DAEMONS if not shutil.which(name)]
    return f"`apt-get install slurmctld slurmd slurm-client munge`: no {', '.join(lacks)}" if lacks else ""


class Cluster:
    """Five nodes, each a daemon of this machine, and a controller.

    Args:
        folder: For everything that the daemons write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Submitting shells hand their environment to a job: `n1` is no name that resolves.
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
            "MASTER_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }

    def start(self) -> None:
        """Starts the daemons, and waits until all nodes are idle."""
        (self.folder / "state").mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        ports = _free_ports(1 + len(NODES))
        place = "NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory=64000 State=UNKNOWN"
        host = socket.gethostname()
        nodes = [
            f"NodeName={n} Port={p} {place.format(host=host, cores=CORES)}"
            for n, p in zip(NODES, ports[1:], strict=True)
        ]
        queues = [f"PartitionName={name} State=UP {facts}" for name, facts in QUEUES.items()]
        text = CONFIG.format(
            folder=self.folder,
            host=host,
            ports=ports,
            timeout=NODE_FAILS_AFTER,
            first=1 + secrets.randbelow(9000),  # processes of a job find each other at a port made of its number
            nodes="\n".join(nodes),
            queues="\n".join(queues),
        )
        (self.folder / "slurm.conf").write_text(text)
        at = [f"--{name}-file={self.folder / f'munged.{name}'}" for name in ("pid", "log", "seed")]
        socket_of = f"--socket={self.folder / 'munge.socket'}"
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", socket_of, *at)
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self.wait_until(lambda: self.ask("sinfo", "-hN", "-o", "%t").split() == ["idle"] * 11, 60)

    def fail_node(self, node: str) -> None:
        """Ends everything of a node at once, as a power cut does."""
        daemon = int((self.folder / f"{node}.pid").read_text())
        tasks = [pid for pid in self._processes() if _environment(pid).get("SLURMD_NODENAME") == node]
        steps = [parent for pid in tasks if _name(parent := _parent(pid)).startswith("slurmstepd")]
        for pid in (daemon, *steps, *tasks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def submit(self, script: Path, *options: str) -> str:
        """Returns the number of a new job."""
        words = [*options, "--parsable", str(script)]
        return self.ask("sbatch", f"--chdir={script.parent}", f"--output={script.with_suffix('.out')}", *words)

    def job(self, number: str) -> dict[str, str]:
        """Returns what the controller knows of a job."""
        words = self.ask("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ask(self, *command: str) -> str:
        """Returns what a client prints.

        Raises:
            AssertionError: If it fails.
        """
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def finish(self, numbers: Sequence[str], seconds: float) -> None:
        """Waits for the ends of jobs; those that are queued again do not wait for their two minutes.

        Raises:
            AssertionError: If one does not end in time.
        """

        def ended() -> bool:
            jobs = [self.job(number) for number in numbers]
            for job in jobs:
                if job["JobState"] == "PENDING" and job["Reason"] == "BeginTime":
                    self.ask("scontrol", "update", f"JobId={job['JobId']}", "StartTime=now")
            return all(job["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING") for job in jobs)

        self.wait_until(ended, seconds)

    def wait_until(self, ready: Callable[[], bool], seconds: float) -> None:
        """Waits for something.

        Raises:
            AssertionError: If it does not come; with what the queue says.
        """
        limit = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < limit, self.ask("squeue", "-l")
            time.sleep(0.5)

    def stop(self) -> None:
        """Ends all jobs and daemons."""
        for words in (["scancel", "--full", "--signal=KILL", "--state=RUNNING"], ["scontrol", "shutdown"]):
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                self.ask(*words)
        limit = time.monotonic() + 10
        while (left := self._processes()) and time.monotonic() < limit:
            time.sleep(0.2)
            for pid in left:
                if _name(pid) == "munged":
                    _kill(pid, signal.SIGTERM)
        while left := self._processes():
            for pid in left:
                _kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("a") as log:
            subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)

    def _processes(self) -> list[int]:
        """Daemons, steps and tasks alike name this cluster's file in their environment."""
        own = self.environment["SLURM_CONF"]
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
        return [pid for pid in pids if _environment(pid).get("SLURM_CONF") == own]


@contextlib.contextmanager
def loopback_slurm(folder: Path) -> Iterator[Cluster]:
    """Starts a cluster and stops it.

    Raises:
        Skipped: Where this machine has none.
    """
    if why := missing():
        pytest.skip(f"needs a SLURM of its own: {why}")
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _environment(pid: int) -> dict[str, str]:
    """Returns the variables that a process was started with; none of one that is over."""
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(word.split("=", 1) for word in words if "=" in word)


def _stat(pid: int) -> tuple[str, int]:
    """Returns name and parent of a process; empty and 0 if it is over."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "", 0
    return text[text.index("(") + 1 : text.rindex(")")], int(text[text.rindex(")") + 1 :].split()[1])


def _name(pid: int) -> str:
    return _stat(pid)[0]


def _parent(pid: int) -> int:
    return _stat(pid)[1]


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
