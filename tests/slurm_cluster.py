"""A Slurm cluster of one node in a folder: its own munge, controller and daemon, on ports of its own.

Tried with Debian's Slurm 22.05, of which no cgroup is asked.
"""

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
# GPUs are files, cores and memory more than there are, so that the script's own requests are met as they stand; a job
# that is queued again waits until its credential expires, which takes two minutes elsewhere
SETTINGS = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller}
SlurmdPort={daemon}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=64 RealMemory=262144 Gres=gpu:4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be no cluster here; empty where there can."""
    lacking = [program for program in PROGRAMS if found(program) is None]
    if lacking:
        return f"needs Slurm and munge: no {', '.join(lacking)} (apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "needs root, as which slurmd runs"


def found(program: str) -> str | None:
    """Where a program is, also among those for administrators."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def wait_for(is_so: Callable[[], bool], seconds: float, what: str) -> None:
    """Raises AssertionError where something is not so in time."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"{what}: not in {seconds:.0f} s"
        time.sleep(0.05)


class Cluster:
    """Slurm's commands, for this cluster alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def says(self, *words: str) -> str:
        """The output of a command; raises AssertionError where it fails."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, folder: Path, *words: str) -> str:
        """The number of a job that is submitted in `folder`."""
        command = ["sbatch", "--parsable", "--chdir", str(folder), *words]
        return self.says(*command)

    def state(self, job: str) -> str:
        """As `scontrol show job` has it: RUNNING, PENDING, COMPLETED, CANCELLED and so on."""
        return self._field(job, "JobState")

    def restarts(self, job: str) -> int:
        """How often the job was started again."""
        return int(self._field(job, "Restarts"))

    def _field(self, job: str, name: str) -> str:
        words = self.says("scontrol", "--oneliner", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster that runs while entered, in an empty folder; its jobs end with it."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    names = {"host": socket.gethostname().partition(".")[0], "user": pwd.getpwuid(os.geteuid()).pw_name}
    numbers = {"controller": _free_port(), "daemon": _free_port()}
    (folder / "slurm.conf").write_text(SETTINGS.format(folder=folder, **names, **numbers))
    (folder / "gres.conf").write_text("".join(f"Name=gpu File={folder}/gpu{number}\n" for number in range(4)))
    for number in range(4):
        (folder / f"gpu{number}").touch()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    made = Cluster(folder)
    # --force: a test's folder lies below one that everybody may write to
    munge = ["--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
    munge += [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    with ExitStack() as running:
        running.enter_context(_daemon(made, "munged", *munge))
        wait_for(lambda: (folder / "munge.socket").exists(), 10, "munged")
        running.enter_context(_daemon(made, "slurmctld", "-D"))
        running.enter_context(_daemon(made, "slurmd", "-D"))
        wait_for(lambda: _is_idle(made), 30, "a node that takes jobs")
        try:
            yield made
        finally:
            made.says("scontrol", "update", "PartitionName=main", "State=DOWN")  # where nothing starts again
            wait_for(lambda: _is_empty(made), 60, "no job")


def _is_empty(made: Cluster) -> bool:
    """Whether there is no job left; those that are there are ended, with all their processes."""
    jobs = made.says("squeue", "--noheader", "--format=%i").split()
    for job in jobs:
        for words in (["--signal=KILL", "--full"], []):  # the second for one that waits
            subprocess.run(["scancel", *words, job], env=made.environment, capture_output=True, check=False)
    return not jobs


def _is_idle(made: Cluster) -> bool:
    done = subprocess.run(
        ["sinfo", "--noheader", "--format=%T"], env=made.environment, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() == "idle"


@contextmanager
def _daemon(made: Cluster, program: str, *words: str) -> Iterator[None]:
    path = found(program)
    assert path
    with (made.folder / f"{program}.out").open("w") as out:
        process = subprocess.Popen([path, *words], env=made.environment, stdout=out, stderr=out)
        try:
            yield
        finally:
            process.terminate()
            process.wait(30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
