"""SSH for drivers: OpenSSH with the daemon's client configuration, which is strict about host keys.

    remote_run("root@backup", ["mkdir", "-p", "/backups"], timeout_s=30)
    run(["rsync", "-e", str(wrapper_path()), …])

`target` is `user@host`; ports, keys and jump hosts stand in the client configuration.
"""

from __future__ import annotations

from collections.abc import Sequence

from oned_backup.errors import DriverFailed, Misconfigured, OnedBackupError
from oned_backup.sdk.process import MAX_OUTPUT_BYTES, Completed, run
from oned_backup.ssh.command import FAILED, config_path, shared_config_path, ssh_argv, watched, wrapper_path
from oned_backup.ssh.host_keys import explained

__all__ = ["config_path", "failed", "remote_run", "ssh_argv", "wrapper_path"]


def remote_run(
    target: str,
    remote_argv: Sequence[str],
    *,
    stdin: bytes = b"",
    timeout_s: float = 60.0,
    check: bool = True,
    max_output_bytes: int = MAX_OUTPUT_BYTES,
) -> Completed:
    """What a program on `target` answered; it ends with us, however we end.

    `DriverFailed` for its exit code (unless `check` is false), `Unavailable` if the host cannot be
    reached or the program takes longer, `Misconfigured` for an unknown or changed host key and for a
    program that is not installed, `PermissionDenied` for a refused login.
    """
    command = watched(remote_argv, timeout_s=timeout_s, stdin_bytes=len(stdin))
    done = run(
        ssh_argv(target, command, config=shared_config_path()),
        stdin=stdin,
        timeout_s=timeout_s,
        check=False,
        hold_stdin=True,
        max_output_bytes=max_output_bytes,
    )
    if done.returncode == FAILED:
        raise failed(target, done.stderr)
    name = remote_argv[0]
    if done.returncode == 127 and f"{name}: not found" in done.last_words:
        raise Misconfigured(f"{name} is not installed on {target}")
    if check and done.returncode != 0:
        raise DriverFailed(
            f"{name} on {target}: {done.last_words or 'no message'} (exit code {done.returncode})"
        )
    return Completed(tuple(remote_argv), done.returncode, done.stdout, done.stderr)


def failed(target: str, stderr: bytes) -> OnedBackupError:
    """The error for an ssh, or a program that uses it, which ended with 255 and these last words."""
    return explained(target, stderr.decode("utf-8", "replace"))
