"""What ssh's last words mean, also where only some of them were heard."""

from __future__ import annotations

import pytest

from oned_backup.errors import Misconfigured, OnedBackupError, PermissionDenied, Unavailable
from oned_backup.ssh.command import failure

UNKNOWN = "No ED25519 host key is known for backup and you have requested strict checking."


@pytest.mark.parametrize(
    ("stderr", "kind", "text"),
    [
        (f"{UNKNOWN}\r\nHost key verification failed.\r\n", Misconfigured, "is not known"),
        (f"{UNKNOWN}\r\n", Misconfigured, "is not known"),
        ("Host key verification failed.\r\n", Misconfigured, "is not known"),
        ("@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\r\n", Misconfigured, "has changed"),
        ("root@backup: Permission denied (publickey).\r\n", PermissionDenied, "publickey"),
        ("ssh: connect to host backup port 22: Connection refused\r\n", Unavailable, "refused"),
        ("", Unavailable, "the connection ended"),
    ],
)
def test_what_its_words_mean(stderr: str, kind: type[OnedBackupError], text: str) -> None:
    error = failure("root@backup", stderr)
    assert type(error) is kind
    assert text in error.message
    assert "backup" in error.message
