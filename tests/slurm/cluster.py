"""A throwaway Slurm on this machine for the tests: real daemons, one directory, loopback only, no
systemd, no cgroups.

`sacct` needs slurmdbd and that a MariaDB; without their programs the cluster starts without
accounting. Debian 12's Slurm is 22.05; what is said below of defaults was seen there.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
from pathlib import Path

from patience import PATIENCE, wait

PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
KILL_WAIT = 2  # s between SIGTERM and SIGKILL

SLURM = """
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={slurmd_port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job stays ineligible for cred_expire + 1 s, by default 121.
# Below KillWait + 3 it would meet its own end.
AuthInfo=socket={folder}/munge.socket,cred_expire={cred_expire}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
# Slurm ends a job that needs more memory than it asked for. What it gives by default is enough.
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
JobAcctGatherParams=OverMemoryKill
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=4000
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{preempt_signal}
JobRequeue=1
KillWait={kill_wait}
MinJobAge=300
SlurmdTimeout=6
GresTypes=gpu
AccountingStorageType={accounting}
{database}
NodeName={host} NodeAddr=127.0.0.1 Port={slurmd_port} CPUs=16 RealMemory=64000 Gres=gpu:2 \
    State=UNKNOWN
PartitionName=low        Nodes={host} Default=YES PriorityTier=1  GraceTime=5 State=UP
PartitionName=high       Nodes={host} PriorityTier=10 GraceTime=0 State=UP
PartitionName=gpu        Nodes={host} PriorityTier=1  GraceTime=5 State=UP
PartitionName=n1s16-t4-2 Nodes={host} PriorityTier=1  GraceTime=5 State=UP MaxTime=1-00:00:00
"""

DATABASE = """
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={folder}/munge.socket
"""

SLURMDBD = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdAddr=127.0.0.1
DbdHost=localhost
DbdPort={dbd_port}
SlurmUser={user}
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql_port}
StorageUser=slurm
StoragePass=slurm
CommunicationParameters=NoInAddrAny
"""


def missing() -> list[str]:
    return [program for program in NEEDED if shutil.which(program, path=PATH) is None]


class Cluster:
    def __init__(self, folder: Path) -> None:
        """folder: a short path, since Unix sockets are made in it."""
        self.folder = folder
        self.host = socket.gethostname().partition(".")[0]
        self.env = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("SLURM_", "SBATCH_"))
        }
        self.env |= {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": PATH, "OMP_NUM_THREADS": "1"}
        # A version ago this was another option.
        library = self(
            "bash", "-c", "ldd $(command -v slurmctld) | awk '/libslurmfull/ {print $3}'"
        ).strip()
        newer = b"PreemptParameters" in Path(library).read_bytes()
        ports = iter(_free_ports(4))
        values = {
            "folder": folder,
            "host": self.host,
            "user": self("id", "-un").strip(),
            "port": next(ports),
            "slurmd_port": next(ports),
            "dbd_port": next(ports),
            "sql_port": (sql_port := next(ports)),
            "kill_wait": KILL_WAIT,
            "cred_expire": KILL_WAIT + 4,
            "preempt_signal": f"{'PreemptParameters' if newer else 'SlurmctldParameters'}="
            + ("send_user_signal" if newer else "preempt_send_user_signal"),
            "accounting": "accounting_storage/none",
            "database": "",
        }
        accounting = all(
            shutil.which(program, path=PATH)
            for program in ("slurmdbd", "mariadbd", "mariadb-install-db")
        )
        if accounting:
            values |= {
                "accounting": "accounting_storage/slurmdbd",
                "database": DATABASE.format(**values),
            }
        (folder / "state").mkdir(parents=True)
        (folder / "spool").mkdir()
        self._write("slurm.conf", SLURM.format(**values))
        self._write("slurmdbd.conf", SLURMDBD.format(**values))
        for gpu in range(2):  # only with character devices does Slurm set CUDA_VISIBLE_DEVICES
            (folder / f"gpu{gpu}").symlink_to("/dev/null")
        self._write("gres.conf", f"AutoDetect=off\nName=gpu File={folder}/gpu0,{folder}/gpu1\n")
        self._write("cgroup.conf", "CgroupPlugin=autodetect\n")
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        socket_file, key = f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key"
        files = [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
        self("munged", socket_file, key, *files)
        if accounting:
            self._start_accounting(sql_port)
        self("slurmctld")
        wait(lambda: self.answers("scontrol", "ping"))
        self.start_node()

    def __call__(self, *command: str) -> str:
        return subprocess.run(
            command, env=self.env, check=True, capture_output=True, text=True, timeout=PATIENCE
        ).stdout

    def answers(self, *command: str) -> bool:
        said = subprocess.run(command, env=self.env, capture_output=True, timeout=PATIENCE)
        return said.returncode == 0

    def start_node(self) -> None:
        self("slurmd")
        wait(lambda: self("sinfo", "-h", "-p", "low", "-o", "%t").startswith("idle"))

    def kill_node(self) -> None:
        """The daemon of the node, without a warning. The tasks that it started live on until
        another one starts.
        """
        os.kill(int((self.folder / "slurmd.pid").read_text()), signal.SIGKILL)

    def jobs(self) -> dict[str, str]:
        """{job: state} of what is queued or runs."""
        return dict(
            line.split("|") for line in self("squeue", "-h", "-r", "-o", "%i|%T").splitlines()
        )

    def stop(self) -> None:
        self.answers("scancel", "--user", self("id", "-un").strip())
        names = ("slurmd", "slurmctld", "slurmdbd", "mariadbd", "munged")
        written = [self.folder / f"{name}.pid" for name in names]
        pids = [int(file.read_text()) for file in written if file.exists()]
        wait(lambda: not self.jobs())
        for pid in pids:  # each before the one it needs
            try:
                os.kill(pid, signal.SIGTERM)
                wait(lambda pid=pid: not Path(f"/proc/{pid}/cmdline").exists() or not _command(pid))
            except ProcessLookupError:
                pass
        shutil.rmtree(self.folder)

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o600 if name == "slurmdbd.conf" else 0o644)

    def _start_accounting(self, port: int) -> None:
        user, data = self("id", "-un").strip(), f"--datadir={self.folder}/mysql"
        options = [
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
            "--skip-name-resolve",
        ]
        self("mariadb-install-db", "--no-defaults", f"--user={user}", data, *options)
        self._write(
            "init.sql",
            "CREATE DATABASE slurm_acct_db;\n"
            "CREATE USER 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';\n"
            "GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';\n",
        )
        place = [
            f"--socket={self.folder}/mysql.socket",
            f"--pid-file={self.folder}/mariadbd.pid",
            f"--port={port}",
        ]
        place += [
            "--bind-address=127.0.0.1",
            "--skip-name-resolve",
            f"--init-file={self.folder}/init.sql",
        ]
        small = ["--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0"]
        with open(self.folder / "mariadbd.log", "w") as log:
            command = ["mariadbd", "--no-defaults", f"--user={user}", data, *place, *small]
            subprocess.Popen(command, env=self.env, stdout=log, stderr=log, start_new_session=True)
        wait(lambda: _listens(port))
        self("slurmdbd")
        wait(lambda: self.answers("sacctmgr", "-n", "show", "cluster"))
        self("sacctmgr", "-i", "add", "cluster", "throwaway")
        self("sacctmgr", "-i", "add", "account", "dl17", "Description=test", "Organization=test")
        self("sacctmgr", "-i", "add", "user", user, "account=dl17")


def _free_ports(count: int) -> list[int]:
    """Ports below 32768, where the system gives none to anyone before ours are bound."""
    ports = random.sample(range(25_000, 32_768), 100)
    return [port for port in ports if not _listens(port)][:count]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _command(pid: int) -> bytes:
    """Empty for a process that has ended and that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""
