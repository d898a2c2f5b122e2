"""A connection of paramiko by what OpenSSH's own client configuration says for a host."""

from __future__ import annotations

import contextlib
import math
import shlex
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import paramiko

from oned_backup.errors import Misconfigured, OnedBackupError, PermissionDenied, Unavailable
from oned_backup.ssh.command import changed_key, config_path, ssh_argv, unknown_key
from oned_backup.ssh.host_keys import seen_fingerprint


def connect(target: str, machine: str) -> paramiko.SSHClient:
    """A connection to the host, whose key must be known; `machine`: its name for people."""
    says = _configuration(target)
    timeout_s = float(says.get("connecttimeout", ["10"])[0])
    name = says.get("hostkeyalias", [""])[0] or says["hostname"][0]
    port = 22 if "hostkeyalias" in says else int(says["port"][0])
    client = paramiko.SSHClient()
    for path in shlex.split(says.get("userknownhostsfile", [""])[0]):
        with contextlib.suppress(OSError):
            client.load_host_keys(path)
    client.set_missing_host_key_policy(paramiko.RejectPolicy())
    named = [Path(path).expanduser() for path in says.get("identityfile", [])]
    keys: Any = [str(path) for path in named if path.is_file()]  # paramiko's own types forget lists
    keepalive_s = int(says.get("serveraliveinterval", ["5"])[0])
    dead_s = keepalive_s * int(says.get("serveralivecountmax", ["3"])[0])
    try:
        connection = _socket(says, timeout_s, dead_s)
        client.connect(
            name,
            port=port,
            username=says["user"][0],
            key_filename=keys,
            allow_agent=says.get("identityagent", [""])[0] != "none",
            look_for_keys=False,
            sock=connection,
            timeout=timeout_s,
            banner_timeout=timeout_s,
            auth_timeout=timeout_s,
            channel_timeout=timeout_s,
        )
    except (paramiko.SSHException, OSError, EOFError) as error:
        client.close()
        raise _connect_error(error, target, machine) from error
    transport = client.get_transport()
    if transport is not None:
        transport.set_keepalive(keepalive_s)
    return client


def _connect_error(error: Exception, target: str, machine: str) -> OnedBackupError:
    if isinstance(error, paramiko.BadHostKeyException):
        return changed_key(machine, error.key.fingerprint)
    if isinstance(error, paramiko.AuthenticationException):
        return PermissionDenied(
            f"ssh to {target}: {error}", hint="Put the public key into its authorized_keys."
        )
    if "not found in known_hosts" in str(error):
        return unknown_key(machine, seen_fingerprint(config_path(), target))
    return Unavailable(f"ssh to {target}: {error or 'the connection ended'}")


def _socket(
    says: Mapping[str, list[str]], timeout_s: float, dead_s: float
) -> socket.socket | paramiko.ProxyCommand:
    """The way to the host: directly, or as its configuration has it through another one."""
    if {"proxyjump", "proxycommand"} & says.keys():
        host, port = says["hostname"][0], says["port"][0]
        if "proxyjump" in says:
            argv = ssh_argv(f"{says['proxyjump'][0]}", options=["-W", f"{host}:{port}"])
            return paramiko.ProxyCommand(shlex.join(argv))
        return paramiko.ProxyCommand(says["proxycommand"][0].replace("%h", host).replace("%p", port))
    connection = socket.create_connection((says["hostname"][0], int(says["port"][0])), timeout_s)
    # paramiko sends keepalives and does not mind if nothing comes back: the kernel does
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(dead_s * 1000))
    return connection


def _configuration(target: str) -> dict[str, list[str]]:
    """What OpenSSH's client would do for the target: its own reading of the configuration."""
    argv = ssh_argv(target)
    argv[1:1] = ["-G"]
    try:
        done = subprocess.run(
            argv, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30
        )
    except FileNotFoundError as error:
        raise Misconfigured("ssh is not installed", hint="Run: apt-get install openssh-client") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise Misconfigured(f"ssh configuration: {lines[-1] if lines else 'not understood'}")
    says: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        key, _, value = line.partition(" ")
        says.setdefault(key, []).append(value)
    return says
