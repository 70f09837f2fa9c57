"""Run a command beside a real Slurm of one node, which lives as long as the command: sbatch and squeue work in it.

Run: scripts/with_slurm.py pytest tests/service/test_slurm_cluster.py

Needs Debian's slurmctld, slurmd, slurm-client and munge, and root; listens on 127.0.0.1 alone, with a munge of its own.
Exit code: the command's; 77 where something is missing.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "sinfo")
PATH = f"{os.environ['PATH']}:/usr/sbin"
START_S = 120
MISSING = 77


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody uses."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def configuration(folder: Path) -> str:
    """slurm.conf of one node with all cores of this machine."""
    host, (controller, node) = socket.gethostname().partition(".")[0], free_ports(2)
    memory_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 * 3 // 4
    return f"""
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
ReturnToService=2
JobRequeue=1
KillWait=10
MinJobAge=3600
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory={memory_mb} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:2
"""


def start(folder: Path) -> list[subprocess.Popen[bytes]]:
    """munged, slurmctld and slurmd in the foreground, each a child of this process."""
    folder.chmod(0o755)
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir()
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    for path in (folder / "munge", key):
        shutil.chown(path, "munge", "munge")
    conf = folder / "slurm.conf"
    conf.write_text(configuration(folder))
    os.environ |= {"SLURM_CONF": str(conf), "PATH": PATH}
    munge = folder / "munge"
    places = [f"--{name}-file={munge}/{name}" for name in ("key", "log", "pid", "seed")]
    commands = [
        [
            "runuser",
            "-u",
            "munge",
            "--",
            shutil.which("munged", path=PATH),
            "--foreground",
            f"--socket={munge}/socket",
            *places,
        ],
        [shutil.which("slurmctld", path=PATH), "-D", "-i", "-f", str(conf)],
        [shutil.which("slurmd", path=PATH), "-D", "-f", str(conf)],
    ]
    started = []
    for command in commands:
        started.append(
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
        time.sleep(1)
    return started


def wait_until_idle() -> None:
    """TimeoutError where the node does not come up."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        shown = subprocess.run(["sinfo", "--noheader", "--format=%T"], capture_output=True, text=True, check=False)
        if shown.stdout.strip() == "idle":
            return
        time.sleep(0.5)
    raise TimeoutError(f"Slurm did not come up in {START_S} s: {shown.stdout}{shown.stderr}")


def end_other_controller(folder: Path, started: list[subprocess.Popen[bytes]]) -> None:
    """The command may have killed the controller, and started another one."""
    try:
        pid = int((folder / "slurmctld.pid").read_text())
    except (OSError, ValueError):
        return
    name = Path(f"/proc/{pid}/comm")
    is_own = pid in [process.pid for process in started]
    if not is_own and name.is_file() and name.read_text().strip() == "slurmctld":
        os.kill(pid, signal.SIGTERM)


def main(command: list[str]) -> int:
    """The exit code of the command."""
    missing = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
    if missing or os.getuid() != 0:
        print(f"no Slurm here: {', '.join(missing) or 'it needs root'}", file=sys.stderr)
        return MISSING
    with tempfile.TemporaryDirectory(prefix="slurm.") as name:
        started = start(Path(name))
        try:
            wait_until_idle()
            return subprocess.run(command, env=os.environ | {"LAMELLA_TEST_SLURM": "1"}, check=False).returncode
        finally:
            end_other_controller(Path(name), started)
            for process in reversed(started):
                process.terminate()
            for process in started:
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    process.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
