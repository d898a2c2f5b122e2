"""What surrounds a driver's call: its environment variables and the files of its secrets.

A driver in shell needs nothing else: besides the variables of the specification
there is one for each option (ODB_OPT_URL, ODB_OPT_TARGET, …), for the backup's
place in its chain and for its disks, so that it can leave the request on stdin
unread:

    ODB_CHAIN_ID, ODB_PARENT_ID, ODB_INCREMENT_ID    of the backup at hand
    ODB_DISKS=0:disk.0.3:INCREMENT:8589934592,…      its disks: id, file, type, bytes of the disk
    ODB_CHAIN=0:ID,1:ID                              of IMAGE, up to the increment that is meant;
                                                     empty if IMAGE does not have that increment
    ODB_IMAGES=2                                     how many images the catalogue has in this store
"""

from __future__ import annotations

import os
import pwd
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from oned_backup import failpoints, xmldoc
from oned_backup.contract.actions import SPEC_VERSION
from oned_backup.contract.request import Backup, Request
from oned_backup.errors import InvalidInput
from oned_backup.model.names import checked_name
from oned_backup.runner.drivers import Driver
from oned_backup.runner.process import Limits

#: where drivers find programs
DRIVER_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: of the daemon's own; a user's libvirt (qemu:///session) is found by the second
_PASSED_ON = (failpoints.VARIABLE, "XDG_RUNTIME_DIR")
#: Linux takes 128 KiB for one variable (MAX_ARG_STRLEN)
_MAX_VALUE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Invocation:
    """The surroundings of a call.

    `work_root`: an existing directory of the daemon's own, for the call's private directory.
    `source_dir`: holds the files of the backup. `secrets`: values of the secret parameters.
    `lock_fd`: a descriptor with a lock that the driver inherits and so holds as long as it lives.
    `environment`: further variables, named ODB_….
    """

    work_root: Path
    source_dir: Path | None = None
    secrets: Mapping[str, str] = field(default_factory=dict)
    transfer: str = "stream"
    lock_fd: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def action_environment(
    driver: Driver, request: Request, invocation: Invocation, directory: Path, limits: Limits
) -> dict[str, str]:
    """All variables of a call; writes the secrets into `directory`/secrets."""
    environment = base_environment() | {
        "ODB_OPERATION_ID": request.operation_id,
        "ODB_TRANSFER": invocation.transfer,
        "ODB_SECRETS_DIR": str(_write_secrets(directory / "secrets", invocation.secrets)),
    }
    if limits.deadline_s is not None:
        environment["ODB_DEADLINE"] = str(int(time.time() + limits.deadline_s))
    if invocation.source_dir is not None:
        environment["ODB_SOURCE_DIR"] = str(invocation.source_dir)
    if request.datastore is not None:
        environment |= _of_datastore(driver, request.datastore)
    if request.vm is not None:
        environment["ODB_VM_ID"] = xmldoc.text(request.vm, "ID")
    if request.image is not None:
        environment |= _of_image(request.image, request.options.get("INCREMENT_ID", ""))
    if request.backup is not None:
        environment |= _of_backup(request.backup)
    if request.exports is not None:
        environment["ODB_DISKS"] = ",".join(
            f"{disk.disk_id}:{disk.file}:{disk.type}:{disk.size_bytes}" for disk in request.exports.disks
        )
    for name, value in request.options.items():
        if len(value.encode()) <= _MAX_VALUE_BYTES and "\0" not in value:  # a document stays on stdin
            environment[f"ODB_OPT_{name}"] = value
    environment |= invocation.environment
    for name, value in environment.items():
        if "\0" in value or len(value.encode()) > _MAX_VALUE_BYTES:
            raise InvalidInput(f"{name}: {len(value)} characters, or one that no variable can hold")
    return environment


def base_environment() -> dict[str, str]:
    """The variables that every call has, whatever it is about."""
    return {
        "PATH": f"{Path(sys.executable).parent}:{DRIVER_PATH}",
        "HOME": os.environ.get("HOME") or pwd.getpwuid(os.geteuid()).pw_dir,
        "LC_ALL": "C.UTF-8",
        "ODB_SPEC": str(SPEC_VERSION),
    } | {name: os.environ[name] for name in _PASSED_ON if name in os.environ}


def _of_backup(backup: Backup) -> dict[str, str]:
    return {
        "ODB_BACKUP_ID": backup.id,
        "ODB_CHAIN_ID": backup.chain_id,
        "ODB_PARENT_ID": backup.parent_id,
        "ODB_INCREMENT_ID": str(backup.increment_id),
    }


def _of_image(image: xmldoc.Element, increment_id: str) -> dict[str, str]:
    """ODB_CHAIN: the backups up to the increment that is meant, as in a pseudo-URL: `0:ID,1:ID`."""
    chain = [
        (xmldoc.integer(element, "ID"), xmldoc.text(element, "SOURCE"))
        for element in image.iterfind("BACKUP_INCREMENTS/INCREMENT")
    ] or [(0, xmldoc.text(image, "SOURCE"))]
    wanted = int(increment_id) if increment_id.isdecimal() else max(number for number, _ in chain)
    listed = ",".join(f"{number}:{source}" for number, source in sorted(chain) if number <= wanted)
    if wanted not in dict(chain):
        listed = ""
    vm_id = xmldoc.text(image, "VMS/ID")
    return {"ODB_CHAIN": listed} | ({"ODB_VM_ID": vm_id} if vm_id else {})


def _of_datastore(driver: Driver, datastore: xmldoc.Element) -> dict[str, str]:
    base_path = xmldoc.text(datastore, "TEMPLATE/BASE_PATH") or xmldoc.text(datastore, "BASE_PATH")
    environment = {
        "ODB_DS_ID": xmldoc.text(datastore, "ID"),
        "ODB_DS_BASE_PATH": base_path,
        "ODB_IMAGES": str(len(datastore.findall("IMAGES/ID"))),
    }
    for parameter in driver.manifest.parameters.values():
        value = xmldoc.text(datastore, f"TEMPLATE/{parameter.name}") or parameter.default
        if value and not parameter.secret and parameter.name not in {"ID", "BASE_PATH"}:
            environment[f"ODB_DS_{parameter.name}"] = value
    return environment


def _write_secrets(directory: Path, secrets: Mapping[str, str]) -> Path:
    directory.mkdir(mode=0o700)
    for name, value in secrets.items():
        path = directory / checked_name(name, "secret parameter")
        with open(path, "x", opener=lambda file, flags: os.open(file, flags, 0o600)) as file:
            file.write(value)
    return directory
