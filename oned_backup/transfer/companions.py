"""The small files that travel with the disks: what it takes to define the VM again.

vm.xml and domain.xml always; nvram.fd (UEFI variables) and tpm.tar (the state of
the emulated TPM) where the domain has them. Without these a guest with secure boot
or an encrypted disk would be restored and not start.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from oned_backup import xmldoc
from oned_backup.contract.companions import DOMAIN_XML, NVRAM, TPM, VM_XML
from oned_backup.hypervisor import domain as domains
from oned_backup.hypervisor.domain import Domain
from oned_backup.hypervisor.host import Host, packed, unpacked
from oned_backup.model.names import checked_name
from oned_backup.transfer.task import Task

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
    variables = task.host.read_file(nvram, max_bytes=_MAX_NVRAM_BYTES) if nvram else None
    if variables is not None:
        _write(directory / NVRAM, variables)
        names.append(NVRAM)
    if domains.tpm(xml) is not None:
        state = task.host.read_tree(task.swtpm_dir / domain.uuid, max_bytes=_MAX_TPM_BYTES)
        if state is not None:
            _write(directory / TPM, packed(state))
            names.append(TPM)
    return tuple(names)


def left_out(domain: Domain, names: Collection[str]) -> str:
    """What to tell of a running domain's firmware and TPM if their state was not found; else nothing."""
    xml = domain.xml()
    has = {"UEFI variables": (xml.find("os/nvram"), NVRAM), "TPM": (domains.tpm(xml), TPM)}
    lost = [what for what, (element, name) in has.items() if element is not None and name not in names]
    return f"the state of its {' and '.join(lost)} was not found: it is not in the backup" if lost else ""


def unpack_tpm(host: Host, archive: bytes, directory: Path) -> None:
    """Put the state of a TPM back into `directory` on the host, which must not exist."""
    files = unpacked(archive, max_bytes=_MAX_TPM_BYTES)
    for name in files:
        for part in name.split("/"):
            checked_name(part, TPM)
    host.write_tree(directory, files)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    path.chmod(0o600)
