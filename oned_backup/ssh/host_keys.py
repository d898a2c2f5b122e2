"""Host keys: seen by asking the host, known once somebody has accepted their fingerprint.

A host is asked by ssh itself, with an empty file of known keys and no way to log
in, so that aliases, ports and jump hosts of the configuration count.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import hashlib
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from oned_backup.errors import InvalidInput, Misconfigured, OnedBackupError, Unavailable
from oned_backup.ssh.command import config_path, failure, host_of, ssh_argv, unknown_key
from oned_backup.ssh.config_file import replace_file

_FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
_TIMEOUT_S = 30.0
#: what a host is asked for, one after the other
_ALGORITHMS = (
    "ssh-ed25519",
    "ecdsa-sha2-nistp256,ecdsa-sha2-nistp384,ecdsa-sha2-nistp521",
    "rsa-sha2-512,rsa-sha2-256",
)


@dataclass(frozen=True)
class HostKey:
    """A key that a host showed; `line` is its entry in known_hosts."""

    name: str
    line: str
    fingerprint: str


def accept_host_key(config: Path, target: str, fingerprint: str) -> HostKey:
    """Enter the key of `target` that has `fingerprint` into known_hosts; older keys of it go.

    `Misconfigured` if the host shows no such key, and names those that it shows.
    """
    if not _FINGERPRINT.fullmatch(fingerprint):
        raise InvalidInput(
            f"'{fingerprint[:80]}' is not a fingerprint", hint="It is SHA256: and 43 characters."
        )
    seen = []
    for algorithms in _ALGORITHMS:
        key = _ask(config, target, algorithms)
        if key is not None and key.fingerprint == fingerprint:
            _enter(config.with_name("known_hosts"), key)
            return key
        seen += [key] if key is not None else []
    shown = ", ".join(key.fingerprint for key in seen)
    if not shown:
        raise Unavailable(f"ssh: {target} shows no host key")
    raise Misconfigured(
        f"ssh: {target} has no host key {fingerprint}; it shows {shown}",
        hint="Look at it on the host itself: `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub`.",
    )


def seen_fingerprint(config: Path, target: str) -> str:
    """The fingerprint of the key that `target` shows now; empty if it cannot be asked."""
    try:
        key = _ask(config, target, "")
    except Unavailable:
        return ""
    return "" if key is None else key.fingerprint


def explained(target: str, stderr: str, config: Path | None = None) -> OnedBackupError:
    """As `command.failure`; an unknown host's error names the key that it shows."""
    error = failure(target, stderr)
    if isinstance(error, Misconfigured) and "is not known" in error.message:
        return unknown_key(host_of(target), seen_fingerprint(config or config_path(), target))
    return error


def _ask(config: Path, target: str, algorithms: str) -> HostKey | None:
    """The key that the host shows if it may choose among `algorithms`; None if it has none of these."""
    with tempfile.TemporaryDirectory(prefix="oned-backup-") as directory:
        file = Path(directory, "known_hosts")
        options = ["-o", f"UserKnownHostsFile={file}", "-o", "StrictHostKeyChecking=accept-new"]
        options += ["-o", "PreferredAuthentications=none", "-o", "LogLevel=INFO"]
        if algorithms:
            options += ["-o", f"HostKeyAlgorithms={algorithms}"]
        argv = ssh_argv(target, options=["-N", *options], config=config)
        try:
            done = subprocess.run(
                argv, check=False, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_S
            )
        except FileNotFoundError as error:
            raise Misconfigured("ssh is not installed", hint="Run: apt-get install openssh-client") from error
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"ssh to {target}: no answer within {_TIMEOUT_S:g} s") from error
        lines = file.read_text().splitlines() if file.exists() else []
    if lines:
        return _host_key(lines[-1])
    words = done.stderr.decode("utf-8", "replace").strip().splitlines()
    if words and "no matching host key type" in words[-1]:
        return None
    raise Unavailable(f"ssh to {target}: {words[-1] if words else 'no host key'}")


def _host_key(line: str) -> HostKey:
    names, _, key = line.split(" ")[:3]
    try:
        blob = base64.b64decode(key, validate=True)
    except binascii.Error as error:
        raise Misconfigured(f"ssh: '{line[:80]}' is not a line of known_hosts") from error
    digest = base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
    return HostKey(names.partition(",")[0], line, f"SHA256:{digest}")


def _enter(known_hosts: Path, key: HostKey) -> None:
    """Add the key; the lock keeps two that are accepted at once."""
    lock = os.open(known_hosts.with_name(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lines = known_hosts.read_text().splitlines() if known_hosts.exists() else []
        kept = [line for line in lines if not _is_of(line, key.name)]
        replace_file(known_hosts, "".join(f"{line}\n" for line in [*kept, key.line]), mode=0o600)
    finally:
        os.close(lock)


def _is_of(line: str, name: str) -> bool:
    return name in line.partition(" ")[0].split(",")
