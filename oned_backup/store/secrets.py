"""Secret parameters at rest: sealed with a key that lies in a file of its own.

A sealed text is `sealed:v1:` and the base64 of nonce (12 bytes) and AES-256-GCM
ciphertext. What a secret belongs to (its context, `datastore/100/PASSWORD`) is
authenticated with it, so that a sealed text copied elsewhere does not open
there. The key file holds 32 random bytes, mode 0600; without it the secrets are
lost, the backups are not.
"""

from __future__ import annotations

import base64
import binascii
import os
import secrets
import stat
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from oned_backup.errors import Misconfigured, PermissionDenied
from oned_backup.model.datastore import SEALED_PREFIX

_KEY_BYTES = 32
_NONCE_BYTES = 12


class SecretBox:
    """Seals and opens secrets; prints as nothing but its class."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def __repr__(self) -> str:
        return "SecretBox(***)"

    @classmethod
    def open(cls, path: Path) -> SecretBox:
        """The box for the key file `path`, which is made if it does not exist.

        `Misconfigured` if the file can be read by others or holds no key.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return cls(_make_key(path))
        except OSError as error:
            raise PermissionDenied(f"key file {path}: {error.strerror}") from error
        with os.fdopen(descriptor, "rb") as file:
            if os.fstat(file.fileno()).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise Misconfigured(f"key file {path} is open to other users", hint=f"Run: chmod 600 {path}")
            key = file.read(_KEY_BYTES + 1)
        if len(key) != _KEY_BYTES:
            raise Misconfigured(f"key file {path}: {len(key)} bytes, a key has {_KEY_BYTES}")
        return cls(key)

    def seal(self, secret: str, context: str) -> str:
        """The text to store for `secret`."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed = nonce + self._cipher.encrypt(nonce, secret.encode(), context.encode())
        return SEALED_PREFIX + base64.b64encode(sealed).decode()

    def unseal(self, text: str, context: str) -> str:
        """The secret in a stored text; `Misconfigured` if key or context are not those it was sealed with."""
        try:
            sealed = base64.b64decode(text.removeprefix(SEALED_PREFIX), validate=True)
            nonce = sealed[:_NONCE_BYTES]
            return self._cipher.decrypt(nonce, sealed[_NONCE_BYTES:], context.encode()).decode()
        except (InvalidTag, binascii.Error, ValueError) as error:
            raise Misconfigured(
                f"{context} cannot be decrypted with this key",
                hint="Bring back secret.key of the state directory and start the daemon again; or set all"
                " secrets of the datastore again: `oned-backup datastore update DATASTORE KEY=@FILE …`.",
            ) from error


def _make_key(path: Path) -> bytes:
    """A new key, durable under `path` before it is used."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = secrets.token_bytes(_KEY_BYTES)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(key)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(partial, path)  # unlike a rename, does not replace a key that was made meanwhile
    finally:
        partial.unlink()
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return key
