"""The parameters of a datastore of restic's, and what they become: a place, options, an environment.

Keys of S3 stand in a file that only we can read (AWS's "shared credentials"), whose
path is in the environment; the password in one that the daemon made.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from oned_backup.errors import InvalidInput, Misconfigured
from oned_backup.restic.program import Location, Repository
from oned_backup.restic.s3 import Bucket
from oned_backup.sdk.call import Call
from oned_backup.sdk.limits import Confined, confined
from oned_backup.ssh.command import checked_target, ssh_argv

PASSWORD = "RESTIC_PASSWORD"  # noqa: S105 - the parameter's name
ACCESS_KEY_ID, SECRET_ACCESS_KEY = "RESTIC_S3_ACCESS_KEY_ID", "RESTIC_S3_SECRET_ACCESS_KEY"
_S3_SECRETS = (ACCESS_KEY_ID, SECRET_ACCESS_KEY)
_DEFAULT_REGION = "us-east-1"
_DEFAULT_ENDPOINT = "s3.amazonaws.com"


@dataclass(frozen=True)
class Settings:
    """A datastore's parameters, checked; `base`: the directory or bucket with a repository per VM."""

    parameters: Mapping[str, str]
    base: PurePosixPath
    #: `user@host` for SFTP, empty for S3
    target: str = ""

    @property
    def s3(self) -> bool:
        """Whether it is in a bucket."""
        return not self.target

    @property
    def endpoint(self) -> str:
        """The S3 service, with its scheme."""
        endpoint = self.parameters.get("RESTIC_S3_ENDPOINT", _DEFAULT_ENDPOINT).rstrip("/")
        return endpoint if "://" in endpoint else f"https://{endpoint}"

    def location(self, vm: str) -> Location:
        """Where the repository of a VM is; `vm` may be another name beside them."""
        if self.s3:
            return self._in_bucket(vm)
        command = shlex.join(ssh_argv(self.target, ["sftp"], options=["-s"]))
        return Location(
            url=f"sftp:{self.target}:{self.base / vm}",
            target=self.target,
            options=("-o", f"sftp.command={command}", *self._connections("sftp")),
            environment=self._environment(),
        )

    def flags(self) -> list[str]:
        """Options of every call of restic."""
        flags = ["--cleanup-cache"]
        if limit := self.parameters.get("RESTIC_BWLIMIT"):
            flags += ["--limit-upload", limit, "--limit-download", limit]
        if mode := self.parameters.get("RESTIC_COMPRESSION"):
            flags += ["--compression", mode]
        if self.s3 and (path := self.parameters.get("RESTIC_S3_CACERT")):
            flags += ["--cacert", path]
        if self.s3 and _yes(self.parameters.get("RESTIC_S3_INSECURE_TLS")):
            flags.append("--insecure-tls")
        return flags

    @property
    def confined(self) -> Confined:
        """How restic is to run."""
        return confined(self.parameters, "RESTIC")

    def prune_flags(self) -> list[str]:
        """How much a prune may leave and move."""
        flags = ["--max-unused", self.parameters.get("RESTIC_PRUNE_MAX_UNUSED", "5%")]
        return [*flags, "--max-repack-size", self.parameters.get("RESTIC_PRUNE_MAX_REPACK", "1G")]

    def _in_bucket(self, vm: str) -> Location:
        lookup = "path" if _yes(self.parameters.get("RESTIC_S3_FORCE_PATH_STYLE")) else "auto"
        region = self.parameters.get("RESTIC_S3_REGION", _DEFAULT_REGION)
        return Location(
            url=f"s3:{self.endpoint}/{self.base / vm}",
            options=(
                "-o",
                f"s3.region={region}",
                "-o",
                f"s3.bucket-lookup={lookup}",
                *self._connections("s3"),
            ),
            environment=self._environment()
            | {"AWS_SHARED_CREDENTIALS_FILE": str(Path("aws-credentials").absolute())},
        )

    def _connections(self, backend: str) -> tuple[str, ...]:
        number = self.parameters.get("RESTIC_CONNECTIONS")
        return ("-o", f"{backend}.connections={number}") if number else ()

    def _environment(self) -> dict[str, str]:
        environment = {}
        if most := self.parameters.get("RESTIC_MAXPROC"):
            environment["GOMAXPROCS"] = most
        if path := self.parameters.get("RESTIC_TMP_DIR"):
            environment["TMPDIR"] = path
        return environment


def settings_of(call: Call) -> Settings:
    """The settings of the call's datastore; `Misconfigured` names what is missing or wrong."""
    parameters = call.parameters
    if parameters.get("RESTIC_BACKEND", "SFTP").upper() == "S3":
        bucket = parameters.get("RESTIC_S3_BUCKET", "")
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
            raise Misconfigured(f"RESTIC_S3_BUCKET '{bucket}' is not the name of a bucket")
        for name in _S3_SECRETS:
            call.secret(name)
        return Settings(parameters, PurePosixPath(bucket))
    server, user = parameters.get("RESTIC_SFTP_SERVER", ""), parameters.get("RESTIC_SFTP_USER", "oneadmin")
    if not server:
        raise Misconfigured(
            "RESTIC_SFTP_SERVER is missing", hint="It is the server that RESTIC_BACKEND=SFTP uses."
        )
    base = call.base_path
    if ".." in base.parts or any(ord(character) < 32 for character in str(base)):
        raise Misconfigured(f"BASE_PATH {str(base)!r} cannot be a directory on a server")
    try:
        return Settings(parameters, PurePosixPath(base), checked_target(f"{user}@{server}"))
    except InvalidInput as error:
        raise Misconfigured(error.message) from error


def repository(call: Call, settings: Settings, vm: str) -> Repository:
    """A VM's repository; `vm` may be another name beside them."""
    if settings.s3:
        _write_credentials(call)
    return Repository(
        settings.location(vm),
        call.secret_path(PASSWORD),
        prefix=settings.confined.prefix,
        flags=settings.flags(),
        alive=lambda: call.log("restic is at work"),
    )


def bucket(call: Call, settings: Settings) -> Bucket:
    """The bucket that holds the repositories."""
    parameters = settings.parameters
    return Bucket(
        endpoint=settings.endpoint,
        name=str(settings.base),
        region=parameters.get("RESTIC_S3_REGION", _DEFAULT_REGION),
        key_id=call.secret(ACCESS_KEY_ID),
        key=call.secret(SECRET_ACCESS_KEY),
        in_path=_yes(parameters.get("RESTIC_S3_FORCE_PATH_STYLE")),
        ca_file=parameters.get("RESTIC_S3_CACERT", ""),
        any_certificate=_yes(parameters.get("RESTIC_S3_INSECURE_TLS")),
    )


def _write_credentials(call: Call) -> None:
    path = Path("aws-credentials")
    if path.exists():
        return
    key_id, key = (call.secret(name).reveal() for name in _S3_SECRETS)
    if any(ord(character) < 33 for character in key_id + key):
        raise Misconfigured("the keys of S3 contain white space or control characters")
    text = f"[default]\naws_access_key_id = {key_id}\naws_secret_access_key = {key}\n"
    with open(path, "x", opener=lambda file, flags: os.open(file, flags, 0o600)) as file:
        file.write(text)


def _yes(value: str | None) -> bool:
    return (value or "").lower() in {"yes", "true", "1"}
