"""Several machines on one machine, for tests: each has its own network, processes, mounts and a real sshd.

    with Netlab(["daemon", "hv1", "backup"]) as lab:
        lab["daemon"].run(["ssh", "backup", "mkdir", "/srv/store"])
        lab["backup"].link(up=False)

A machine is a set of namespaces (net, uts, pid, mount) on the system's own files.
Its own are its address, host key, /run, /srv, /root/.ssh, /root/.cache,
/var/lib/oned-backup-lab, and `own`: a directory that has the same path inside and
outside, and that the other machines cannot see. `root` shows all its files from
outside. They are joined by a bridge that has a namespace of its own, too: nothing
of the system's network is touched, and no address can collide.

        switch:  br0 ── daemon-port   hv1-port   backup-port
                            │            │            │
        machines:         eth0         eth0         eth0      192.0.2.11, .12, .13

Any root may log in by the lab's key. Inside, `ssh NAME` works as it is; for others
`ssh_config` has the same. A machine ends with all its processes when its init
does, and that ends with the process that made it, however that ends: nothing
is left but a directory, which the next lab removes. Needs root.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lab import LabError, Libvirtd, wait_for

_PREFIX = "odb-net-"
_NETWORK = "192.0.2"  # TEST-NET-1: for documentation, routed nowhere
_OWN_PLACES = ("/srv", "/root/.ssh", "/root/.cache", "/var/lib/oned-backup-lab")
_NAMESPACES = ("--net", "--uts", "--mount", "--pid")


class Process(subprocess.Popen[bytes]):
    """A program in a machine; signals go to the program, not to the nsenter that waits for it."""

    def send_signal(self, sig: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            for pid in _children(self.pid) or [self.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sig)

    @property
    def program_pid(self) -> int:
        """The program's process id, as seen from outside."""
        return int(wait_for("start of the program", lambda: _children(self.pid), 10)[0])


class Machine:
    """One of the lab's machines."""

    def __init__(self, lab: Netlab, name: str, number: int) -> None:
        self.name = name
        self.address = f"{_NETWORK}.{10 + number}"
        self.directory = lab.directory / name
        self.own = self.directory / "own"
        self.pid = 0
        self._lab = lab
        self._outer: subprocess.Popen[bytes] | None = None
        self._libvirtd: Libvirtd | None = None

    # --- programs

    def argv(self, argv: Sequence[str | Path]) -> list[str]:
        """The same command, run in the machine; it ends when its nsenter is killed."""
        enter = ["nsenter", f"--target={self.pid}", *_NAMESPACES, "--root", "--wdns=/"]
        return [*enter, "setpriv", "--pdeathsig", "KILL", *map(str, argv)]

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        stdin: bytes = b"",
        timeout_s: float = 60,
        check: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        """A command that has ended in the machine; `LabError` if it fails and `check` is set."""
        done = subprocess.run(
            self.argv(argv),
            check=False,
            input=stdin,
            capture_output=True,
            timeout=timeout_s,
            env={**os.environ, **self._environment(), **(environment or {})},
        )
        if check and done.returncode != 0:
            complaint = done.stderr.decode(errors="replace").strip()[-2000:]
            raise LabError(f"{self.name}: {shlex.join(map(str, argv))}: exit {done.returncode}: {complaint}")
        return done

    def popen(
        self, argv: Sequence[str | Path], *, environment: Mapping[str, str] | None = None, **options: Any
    ) -> Process:
        """A command that runs in the machine; without `stdin` among the options it has none."""
        options = {"stdin": subprocess.DEVNULL, **options}
        env = {**os.environ, **self._environment(), **(environment or {})}
        return Process(self.argv(argv), env=env, **options)

    def processes(self, *words: str) -> dict[int, list[str]]:
        """Command lines in the machine that have all these words, by process id as seen from outside."""
        namespace = Path(f"/proc/{self.pid}/ns/pid").readlink()
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                argv = (entry / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
                line = " ".join(argv)
                if (entry / "ns/pid").readlink() == namespace and all(word in line for word in words):
                    found[int(entry.name)] = argv
        return found

    def outer_pid(self, pid: int) -> int:
        """The process id, as seen from outside, of the one that is `pid` in the machine."""
        for outer in self.processes():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{outer}/status").read_text().splitlines():
                    if line.startswith("NSpid:") and int(line.split()[-1]) == pid:
                        return outer
        raise LabError(f"{self.name} has no process {pid}")

    @property
    def root(self) -> Path:
        """Its file system, mounts included, as seen from outside."""
        return Path(f"/proc/{self.pid}/root")

    # --- the network

    def link(self, *, up: bool) -> None:
        """Pull its network cable, or put it back: the machine sees no carrier, the others silence."""
        self._lab.in_switch(["ip", "link", "set", self._port, "up" if up else "down"])

    def rate(self, rate: str) -> None:
        """Limit what it sends and receives, each, to `rate`, as tc has it ("8mbit"); "" for no limit."""
        for run, interface in ((self.run, "eth0"), (self._lab.in_switch, self._port)):
            run(["tc", "qdisc", "del", "dev", interface, "root"], check=False)
            if rate:
                limit = ["tbf", "rate", rate, "burst", "64k", "latency", "400ms"]
                run(["tc", "qdisc", "add", "dev", interface, "root", *limit])

    def drop(self, *peers: Machine) -> None:
        """Lose all packets to and from `peers`, without a word; from now on no others."""
        self.run(["nft", "delete", "table", "inet", "netlab"], check=False)
        if peers:
            addresses = ", ".join(peer.address for peer in peers)
            self.run(["nft", "-f", "-"], stdin=_DROP.format(addresses=addresses).encode())

    def calm(self) -> None:
        """Make the network, and sshd, as they were at the start."""
        self.link(up=True)
        self.rate("")
        self.drop()
        if not self._sshd_pid():
            self.start_sshd()

    @property
    def _port(self) -> str:
        return f"{self.name[:9]}-port"

    # --- sshd

    @property
    def host_key(self) -> Path:
        """Its sshd's private key; the public one lies beside it with `.pub`."""
        return self.directory / "ssh" / "host_key"

    @property
    def fingerprint(self) -> str:
        """Its host key's, as OpenSSH shows it: "SHA256:…"."""
        return _command(["ssh-keygen", "-l", "-f", f"{self.host_key}.pub"]).split()[1]

    def known_hosts_line(self) -> str:
        """What the others know about its host key."""
        kind, key, *_ = Path(f"{self.host_key}.pub").read_text().split()
        return f"{self.name},{self.address} {kind} {key}"

    def change_host_key(self) -> None:
        """Give its sshd a new host key that nobody knows."""
        self.stop_sshd()
        self.host_key.unlink()
        self._make_host_key()
        self.start_sshd()

    def stop_sshd(self) -> None:
        """End its sshd and all sessions: connections are refused."""
        for pid in self.processes("sshd"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for(f"end of {self.name}'s sshd", lambda: not self.processes("sshd"), 10)

    def start_sshd(self) -> None:
        """Start its sshd, and wait until it listens."""
        (self.directory / "sshd.pid").unlink(missing_ok=True)
        self.run(
            ["/usr/sbin/sshd", "-f", self.directory / "ssh/sshd_config", "-E", self.directory / "sshd.log"]
        )
        wait_for(f"{self.name}'s sshd", self._sshd_pid, 10)

    def _sshd_pid(self) -> int:
        """Its process id in the machine; 0 if it does not run."""
        with contextlib.suppress(OSError, ValueError, LabError):
            pid = int((self.directory / "sshd.pid").read_text())
            self.outer_pid(pid)
            return pid
        return 0

    # --- libvirt

    @property
    def libvirtd(self) -> Libvirtd:
        """Its libvirtd, started at the first use.

        It is qemu:///system inside, and qemu+ssh://root@NAME/system for the other machines.
        """
        if self._libvirtd is None:
            self._libvirtd = Libvirtd(machine=self)
            self._libvirtd.start()
        return self._libvirtd

    # --- its life

    def start(self, switch: int) -> None:
        """Make its namespaces, plug it in, start its sshd."""
        self._outer = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", *_NAMESPACES, "--fork", "--kill-child=KILL",
             *_propagation(), "--mount-proc", "bash", self.directory / "init"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(self.directory / "init.log").open("wb"),
        )  # fmt: skip
        wait_for(f"machine {self.name}", self._is_made, 20)
        self.pid = _children(self._outer.pid)[0]
        enter = ["nsenter", f"--target={switch}", "--net", "ip"]
        peer = ["type", "veth", "peer", "name", "eth0", "netns", str(self.pid)]
        _command([*enter, "link", "add", self._port, "mtu", "1500", *peer])
        _command([*enter, "link", "set", self._port, "master", "br0", "up"])
        enter[1] = f"--target={self.pid}"
        _command([*enter, "address", "add", f"{self.address}/24", "dev", "eth0"])
        _command([*enter, "link", "set", "eth0", "up"])
        _command([*enter, "link", "set", "lo", "up"])
        self.start_sshd()

    def kill(self) -> None:
        """Pull the plug: all its processes are killed, and its namespaces go with them."""
        if self._libvirtd is not None:
            self._libvirtd.disconnect()
        if self._outer is not None:
            self._outer.kill()
            self._outer.wait(10)

    def wait(self) -> None:
        """Wait until it has ended."""
        if self.pid:
            wait_for(f"end of {self.name}", lambda: not Path(f"/proc/{self.pid}").exists(), 20)

    def _is_made(self) -> bool:
        if self._outer is None or self._outer.poll() is not None:
            raise LabError(f"machine {self.name}: {(self.directory / 'init.log').read_text().strip()}")
        return (self.directory / "made").exists()

    def make_files(self) -> None:
        """Make what lies in its directory."""
        for place in ("own", "ssh", *(place.lstrip("/") for place in _OWN_PLACES)):
            (self.directory / place).mkdir(parents=True)
        (self.directory / "root/.ssh").chmod(0o700)
        (self.directory / "init").write_text(self._init())
        (self.directory / "ssh/sshd_config").write_text(
            _SSHD_CONFIG.format(directory=self.directory, key=self._lab.identity)
        )
        shadow = [line.split(":") for line in Path("/etc/shadow").read_text().splitlines()]
        # without PAM, sshd lets nobody in whose password begins with "!"
        lines = [":".join([name, "*", *rest] if name == "root" else [name, password, *rest])
                 for name, password, *rest in shadow]  # fmt: skip
        (self.directory / "shadow").touch(0o600)
        (self.directory / "shadow").write_text("\n".join(lines) + "\n")
        self._make_host_key()

    def _make_host_key(self) -> None:
        _command(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", self.name, "-f", str(self.host_key)])

    def _init(self) -> str:
        """Its first process: mounts, then collects the dead."""
        here = shlex.quote(str(self.directory))
        others = [shlex.quote(str(one.directory)) for one in self._lab.machines if one is not self]
        lines = ["set -e", f"hostname {self.name}", "umask 022"]
        lines += ["mount -t tmpfs -o mode=755 tmpfs /run", "mkdir -p /run/sshd /run/lock"]
        for place in _OWN_PLACES:
            lines += [f"mkdir -p {place}", f"mount --bind {here}{place} {place}"]
        lines += [f"mount --bind {here}/shadow /etc/shadow"]
        lines += ["[ ! -e /root/.bashrc ] || mount --bind /dev/null /root/.bashrc"]
        lines += [f"mount --bind {shlex.quote(str(self._lab.directory))}/hosts /etc/hosts"]
        lines += [f"mount -t tmpfs -o ro,size=4k,mode=000 tmpfs {other}" for other in others]
        lines += [f"touch {here}/made", "while :; do sleep 86400 & wait $! || true; done"]
        return "\n".join(lines) + "\n"

    def _environment(self) -> dict[str, str]:
        return {"HOME": "/root", "USER": "root", "LOGNAME": "root"}


class Netlab:
    """Machines and the switch that joins them, in a new directory below /tmp with a short path."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._switch: subprocess.Popen[bytes] | None = None
        self._lock = -1
        self._made_places: list[Path] = []
        self.directory = Path()
        self.machines: list[Machine] = []

    def __getitem__(self, name: str) -> Machine:
        return next(machine for machine in self.machines if machine.name == name)

    def __iter__(self) -> Iterator[Machine]:
        return iter(self.machines)

    @property
    def identity(self) -> Path:
        """The private key that every machine's root trusts."""
        return self.directory / "id_ed25519"

    @property
    def known_hosts(self) -> Path:
        """All machines' host keys, as they were at the start."""
        return self.directory / "known_hosts"

    @property
    def ssh_config(self) -> Path:
        """A configuration for OpenSSH clients with the key, the host keys and a keepalive."""
        return self.directory / "ssh_config"

    def calm(self) -> None:
        """Put back all cables, lift all limits."""
        for machine in self.machines:
            machine.calm()

    def in_switch(self, argv: Sequence[str], *, check: bool = True) -> None:
        """Run a command where the bridge is."""
        _command(["nsenter", f"--target={self._switch_pid}", "--net", *argv], check=check)

    def start(self) -> None:
        """Start everything."""
        if os.geteuid() != 0:
            raise LabError("machines in namespaces need root")
        remove_leftovers()
        self.directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp"))
        self.directory.chmod(0o711)
        self._lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._made_places = [Path(place) for place in _OWN_PLACES if not Path(place).exists()]
        self.machines = [Machine(self, name, number) for number, name in enumerate(self._names, 1)]
        _command(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "netlab", "-f", str(self.identity)])
        hosts = ["127.0.0.1 localhost", *(f"{one.address} {one.name}" for one in self.machines)]
        (self.directory / "hosts").write_text("\n".join(hosts) + "\n")
        self.ssh_config.write_text(_SSH_CONFIG.format(lab=self))
        try:
            self._start_switch()
            for machine in self.machines:
                machine.make_files()
            for machine in self.machines:
                machine.start(self._switch_pid)
            self.known_hosts.write_text("".join(f"{one.known_hosts_line()}\n" for one in self.machines))
            for machine in self.machines:
                for source, name in ((self.identity, "id_ed25519"), (self.ssh_config, "config")):
                    shutil.copy(source, machine.directory / "root/.ssh" / name)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End everything that runs in the machines, and remove all traces."""
        for machine in self.machines:
            machine.kill()
        for machine in self.machines:
            machine.wait()
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait(10)
            self._switch = None
        self.machines = []
        for place in self._made_places:
            with contextlib.suppress(OSError):
                place.rmdir()
        if self._lock >= 0:
            shutil.rmtree(self.directory, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def _switch_pid(self) -> int:
        if self._switch is None:
            raise LabError("the lab is not up")
        return self._switch.pid

    def _start_switch(self) -> None:
        argv = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"]
        self._switch = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        own = Path("/proc/self/ns/net").readlink()
        wait_for("switch", lambda: Path(f"/proc/{self._switch_pid}/ns/net").readlink() != own, 10)
        self.in_switch(["ip", "link", "add", "br0", "type", "bridge"])
        self.in_switch(["ip", "link", "set", "br0", "up"])


def remove_leftovers() -> None:
    """Remove the directories of labs whose makers were killed; their machines ended with them."""
    for directory in Path("/tmp").glob(f"{_PREFIX}*"):  # noqa: S108
        try:
            lock = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # just being made, or not ours
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # its maker lives
        else:
            shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(lock)


def _propagation() -> list[str]:
    """The option of unshare that keeps our mounts from the system."""
    mounted_at = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    # below a chroot that is no mount point there is nothing that could be made private
    return [] if "/" in mounted_at else ["--propagation", "unchanged"]


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _command(argv: Sequence[str], *, check: bool = True) -> str:
    done = subprocess.run(
        argv, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    if check and done.returncode != 0:
        raise LabError(f"{shlex.join(argv)}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout


_DROP = """\
table inet netlab {{
  chain in {{ type filter hook input priority 0; ip saddr {{ {addresses} }} drop; }}
  chain out {{ type filter hook output priority 0; ip daddr {{ {addresses} }} drop; }}
}}
"""

_SSHD_CONFIG = """\
Port 22
HostKey {directory}/ssh/host_key
PidFile {directory}/sshd.pid
AuthorizedKeysFile {key}.pub
StrictModes no
UsePAM no
# the default of Debian's client costs a tenth of a second more for each connection
KexAlgorithms curve25519-sha256,curve25519-sha256@libssh.org
PasswordAuthentication no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
ClientAliveInterval 5
ClientAliveCountMax 3
MaxStartups 200
MaxSessions 100
UseDNS no
PrintMotd no
"""

_SSH_CONFIG = """\
Host *
  User root
  IdentityFile {lab.identity}
  IdentitiesOnly yes
  UserKnownHostsFile {lab.known_hosts}
  StrictHostKeyChecking yes
  BatchMode yes
  ConnectTimeout 5
  ServerAliveInterval 2
  ServerAliveCountMax 3
"""
