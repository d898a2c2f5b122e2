"""What the daemon makes before anything else: its directories, and its configuration of SSH."""

from __future__ import annotations

import os

from oned_backup.config import Settings
from oned_backup.errors import Misconfigured
from oned_backup.ssh.config_file import config_text, write_config, write_shared


def make_directories(settings: Settings) -> None:
    """Create the daemon's directories with their modes; what exists is set right."""
    for path, mode in (
        (settings.state_dir, 0o700),
        (settings.work_dir, 0o700),
        (settings.run_dir, 0o711),
        (settings.api_dir, 0o700),
        (settings.ssh_sockets_dir, 0o700),
        (settings.nbd_dir, 0o711),
    ):
        try:
            path.mkdir(mode=mode, parents=True, exist_ok=True)
        except OSError as error:
            raise Misconfigured(
                f"directory {path} cannot be made: {error.strerror}",
                hint="Set state_dir and run_dir to where the daemon may write.",
            ) from error
        if path.stat().st_uid == os.geteuid():
            path.chmod(mode)


def write_ssh_config(settings: Settings) -> None:
    """Make the client configuration that all drivers use for SSH; accepted host keys stay."""
    ssh = settings.ssh
    directory = settings.ssh_config.parent
    text = config_text(
        directory,
        identity_file=ssh.identity_file,
        include=ssh.include,
        connect_timeout_s=ssh.connect_timeout_s,
        keepalive_s=ssh.keepalive_s,
    )
    write_config(directory, text)
    write_shared(directory, settings.ssh_sockets_dir)
