"""A Slurm of two nodes on this machine, with processes, names and addresses of its own."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from spawned import free_port

PROGRAMS = ("slurmctld", "slurmd", "munged", "unshare", "setpriv")
NAMESPACES = [
    "setpriv",
    "--pdeathsig=KILL",
    "unshare",
    "--mount",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
]
"""What it starts ends with it, and it ends with this process, however that ends. Mounts are its own."""
NODES = {"node1": "127.0.0.2", "node2": "127.0.0.3"}
CONFIG = """\
ClusterName=tests
SlurmctldHost=control(127.0.0.1)
SlurmctldPort={port}
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1
MailProg=/bin/true
PartitionName=main Nodes=ALL Default=YES
"""
"""The processes of a job are those of its process group: control groups may not be available."""


class Slurm:
    """Commands of the cluster, given in a folder whose `bin` is the first of its jobs' PATH."""

    def __init__(self, folder):
        self.folder = folder
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))
        }
        self.environment = kept | {
            "PATH": f"{folder / 'bin'}:/usr/sbin:{os.environ['PATH']}",
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    def command(self, *words, check=True):
        """What a command prints."""
        done = subprocess.run(
            list(map(str, words)), cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout

    def program(self, name, *words):
        """Have jobs find a program of a name that runs Python with some words."""
        file = self.folder / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, words))} "$@"\n')
        file.chmod(0o755)

    def submit(self, script):
        """Submit the text of a batch script; its job's ID."""
        (self.folder / "job.sh").write_text(script)
        return self.command("sbatch", "--parsable", "job.sh").strip()

    def job(self, name):
        """The fields of a job or a task of an array."""
        words = self.command("scontrol", "--oneliner", "show", "job", name).split()
        return dict(word.partition("=")[::2] for word in words)

    def wait_until(self, condition, seconds=200):
        """Wait for a condition."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited in vain:\n{self.written()}"
            time.sleep(0.05)

    def wait_for(self, name, *states):
        """Wait until a job or a task of an array is in one of some states."""
        self.wait_until(lambda: self.job(name)["JobState"] in states)

    def written(self):
        """What jobs and daemons have written."""
        return "".join(f"{file.name}:\n{file.read_text()}" for file in self.folder.glob("*.out"))


@contextmanager
def own_slurm(folder):
    """Start a cluster in a folder; skip the test where that is not possible."""
    missing = [
        name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None
    ]
    if missing:
        pytest.skip(f"there is no {missing[0]} on this machine: apt-get install slurm-wlm munge")
    if subprocess.run([*NAMESPACES, "--uts", "true"], capture_output=True).returncode:
        pytest.skip("this process may not create namespaces, in which a node has a name of its own")
    slurm = Slurm(folder)
    _write_files(folder)
    with (folder / "daemons.out").open("w") as out:
        daemons = subprocess.Popen(
            [*NAMESPACES, "sh", "-e", "start.sh"], cwd=folder, env=slurm.environment, stdout=out, stderr=out
        )
    try:
        idle = [f"{node} idle" for node in NODES]
        command = ("sinfo", "--noheader", "--Node", "--format=%N %t")
        slurm.wait_until(lambda: slurm.command(*command, check=False).splitlines() == idle, seconds=60)
        yield slurm
    finally:
        daemons.kill()
        daemons.wait()


def _write_files(folder):
    (folder / "state").mkdir()
    key = folder / "munge.key-file"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    lines = [
        f"NodeName={name} NodeAddr={address} Port={free_port()} CPUs=2\n" for name, address in NODES.items()
    ]
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, port=free_port()) + "".join(lines))
    hosts = {"localhost": "127.0.0.1", "control": "127.0.0.1"} | NODES
    (folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
    files = ("key-file", "socket", "pid-file", "log-file", "seed-file")
    munge = shlex.join(f"--{name}={folder}/munge.{name}" for name in files)
    start = ["mount --bind hosts /etc/hosts", f"munged --force {munge}"]
    start += [
        _named("control", "slurmctld", folder),
        *(_named(node, "slurmd", folder) for node in NODES),
        "wait",
    ]
    (folder / "start.sh").write_text("\n".join(start))


def _named(host, daemon, folder):
    """The line that starts a daemon on a host of its own name."""
    config = shlex.quote(str(folder / "slurm.conf"))
    return f"unshare --uts sh -c 'hostname {host}; exec {daemon} -D -f {config}' &"


def left_of(folder):
    """Command lines of processes that name a file of a folder."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(file.read_bytes().replace(b"\0", b" ").decode())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [line for line in lines if f"{folder}/" in line]
