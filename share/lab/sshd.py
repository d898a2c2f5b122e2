"""A private sshd on a loopback port, and a client configuration that reaches it, for tests.

    with Sshd(directory) as sshd:
        os.environ["ODB_SSH_CONFIG"] = str(sshd.config)
        remote_run(sshd.target, ["true"])

It logs its own user in. Its host key is accepted already; `forget()` makes it unknown.
"""

from __future__ import annotations

import getpass
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Self

from lab import wait_for

from oned_backup.ssh.config_file import config_text, write_config

ALIAS = "lab-host"

_SETTINGS = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {directory}/host_key
PidFile {directory}/sshd.pid
AuthorizedKeysFile {directory}/id.pub
StrictModes no
UsePAM no
# the default of Debian's client costs a tenth of a second more for each connection
KexAlgorithms curve25519-sha256,curve25519-sha256@libssh.org
PasswordAuthentication no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
MaxStartups 200
MaxSessions 100
UseDNS no
"""


class Sshd:
    """One sshd, its keys and its client's configuration in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.target = f"{getpass.getuser()}@{ALIAS}"
        self.config = directory / "client" / "config"
        self.known_hosts = directory / "client" / "known_hosts"
        self.port = 0

    def __enter__(self) -> Self:
        self.directory.mkdir(exist_ok=True)
        self.new_host_key()
        _command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.directory / "id"))
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self.port = taken.getsockname()[1]
        snippet = self.directory / "hosts"
        snippet.write_text(f"Host {ALIAS}\n    HostName 127.0.0.1\n    Port {self.port}\n")
        text = config_text(
            self.config.parent,
            identity_file=self.directory / "id",
            include=snippet,
            connect_timeout_s=5,
            keepalive_s=2,
        )
        write_config(self.config.parent, text)
        self.accept()
        settings = self.directory / "sshd_config"
        settings.write_text(_SETTINGS.format(port=self.port, directory=self.directory))
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, and wait until it listens."""
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        _command(
            "/usr/sbin/sshd", "-f", str(self.directory / "sshd_config"), "-E", str(self.directory / "log")
        )
        wait_for("sshd", self._listens, 10)

    def stop(self) -> None:
        """End it with all its sessions."""
        pid_file = self.directory / "sshd.pid"
        if not pid_file.exists():
            return
        pid = int(pid_file.read_text())
        sessions = subprocess.run(
            ["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False
        ).stdout
        for one in (pid, *map(int, sessions.split())):
            try:
                os.kill(one, signal.SIGTERM)
            except ProcessLookupError:
                continue
            wait_for("end of sshd", lambda one=one: not Path(f"/proc/{one}").exists(), 10)  # type: ignore[misc]
        pid_file.unlink(missing_ok=True)

    def new_host_key(self) -> None:
        """Another host key: what a machine shows that stands in the place of this one."""
        key = self.directory / "host_key"
        key.unlink(missing_ok=True)
        _command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))

    @property
    def fingerprint(self) -> str:
        """Of the host key."""
        return _command("ssh-keygen", "-lf", str(self.directory / "host_key.pub")).split()[1]

    def accept(self) -> None:
        """Have the client know the host key."""
        key = " ".join((self.directory / "host_key.pub").read_text().split()[:2])
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {key}\n")

    def forget(self) -> None:
        """Have the client know no host key."""
        self.known_hosts.write_text("")

    def _listens(self) -> bool:
        pid_file = self.directory / "sshd.pid"
        if not (pid_file.exists() and pid_file.read_text()):
            return False
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


def _command(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=30).stdout
