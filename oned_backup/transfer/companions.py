"""The small files that travel with the disks: what it takes to define the VM again.

vm.xml and domain.xml always; nvram.fd (UEFI variables) and tpm.tar (the state of
the emulated TPM) where the domain has them. Without these a guest with secure boot
or an encrypted disk would be restored and not start.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from oned_backup import xmldoc
from oned_backup.hypervisor import domain as domains
from oned_backup.hypervisor.domain import Domain
from oned_backup.model.names import checked_name
from oned_backup.transfer.task import Task

VM_XML = "vm.xml"
DOMAIN_XML = "domain.xml"
NVRAM = "nvram.fd"
TPM = "tpm.tar"

_MAX_NVRAM_BYTES = 64 << 20
_MAX_TPM_BYTES = 16 << 20


def write_definitions(task: Task, domain: Domain, directory: Path) -> tuple[str, ...]:
    """Write vm.xml and domain.xml; returns their names."""
    _write(directory / VM_XML, xmldoc.serialize(task.vm.element, pretty=True).encode())
    _write(directory / DOMAIN_XML, domain.inactive_xml().encode())
    return VM_XML, DOMAIN_XML


def write_firmware(task: Task, domain: Domain, directory: Path) -> tuple[str, ...]:
    """Write the state of firmware and TPM as it is now; returns the names of what there is."""
    xml = domain.xml()
    names = []
    nvram = domains.nvram_path(xml)
    if nvram and Path(nvram).exists():
        _write(directory / NVRAM, task.host.read_file(nvram, max_bytes=_MAX_NVRAM_BYTES))
        names.append(NVRAM)
    state = task.swtpm_dir / domain.uuid
    if domains.has_tpm_state(xml) and state.is_dir():
        _write(directory / TPM, _tar(task, state))
        names.append(TPM)
    return tuple(names)


def unpack_tpm(archive: bytes, directory: Path) -> None:
    """Put the state of a TPM back into `directory`, which must not exist."""
    directory.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    directory.mkdir(mode=0o700)
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
        for entry in tar:
            content = tar.extractfile(entry) if entry.isreg() else None
            if content is None:
                continue
            path = directory.joinpath(*(checked_name(part, TPM) for part in entry.name.split("/")))
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write(path, content.read())


def _tar(task: Task, state: Path) -> bytes:
    """The directory as a tar archive: regular files only, each read whole (swtpm replaces them by rename)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in sorted(state.rglob("*")):
            if path.is_file() and not path.is_symlink() and path.name != ".lock":
                data = task.host.read_file(str(path), max_bytes=_MAX_TPM_BYTES)
                entry = tarfile.TarInfo(str(path.relative_to(state)))
                entry.size, entry.mode = len(data), 0o600
                tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    path.chmod(0o600)
