"""Disks of kinds that few guests have: without an image format, of an old one, described by libvirt alone.

The domain has no operating system. What is backed up must restore to what it was; what cannot be
backed up is refused with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from uuid import uuid4

import libvirt
import pytest
from backed_up_vm import BackedUpVm, command
from lab import Guest, LabDisk, Libvirtd

from oned_backup.errors import Conflict, Unsupported
from oned_backup.model.backup_config import BackupConfig, Mode

pytestmark = pytest.mark.guest

BackUp = Callable[[Guest], BackedUpVm]
MakeGuest = Callable[..., Guest]
Observed = Callable[[str, object], None]
#: options of an image, quickly made
LUKS = "encrypt.format=luks,encrypt.iter-time=10"


def made(path: Path, *options: str, disk_format: str = "qcow2") -> LabDisk:
    """A new image with something in it."""
    command("qemu-img", "create", "-q", "-f", disk_format, *options, str(path), "16M")
    command("qemu-io", "-f", disk_format, "-c", "write -P 1 0 1M", str(path))
    return LabDisk(path, disk_format)


@pytest.mark.fault("guest", "with raw disks alone, starts while it is backed up off")
def test_a_raw_disk_is_kept_from_writers_while_it_is_read(
    make_guest: MakeGuest, back_up: BackUp, tmp_path: Path, record_property: Observed
) -> None:
    folder = tmp_path / "a b,c=d'e\"fü:%g\\h"
    folder.mkdir()
    disk = made(folder / "-one,ü.raw", disk_format="raw")
    vm = back_up(make_guest([disk], start=False, boot="disk", agent=False))
    refused: list[str] = []

    def start() -> None:
        with pytest.raises(libvirt.libvirtError, match='Failed to get "write" lock') as error:
            vm.guest.start()
        refused.append(str(error.value))

    vm.backup(meanwhile=start)
    vm.assert_restores("vda")
    record_property("observed", f"refused by QEMU: {refused[0].splitlines()[-1].replace(str(tmp_path), '…')}")


@pytest.mark.fault("odd inputs", "qcow2 of version 2, which has no bitmaps")
@pytest.mark.parametrize("running", [pytest.param(False, marks=pytest.mark.whole_matrix), True])
def test_an_old_image_is_stored_whole_beside_increments_of_others(
    make_guest: MakeGuest, back_up: BackUp, tmp_path: Path, record_property: Observed, running: bool
) -> None:
    disks = [made(tmp_path / "old.qcow2", "-o", "compat=0.10"), made(tmp_path / "new.qcow2")]
    vm = back_up(make_guest(disks, start=False, boot="disk", agent=False))
    if running:
        vm.guest.start()
    vm.backup()
    point = vm.backup()
    for target in ("vda", "vdb"):
        vm.assert_restores(target)
    assert (point.reason("vda"), point.reason("vdb")) == ("no-change-tracking", "increment")
    record_property("observed", f"{point.disk('vda').reason.value}: {point.disk('vda').text}")


class Edited(Guest):
    """A guest with a disk that is defined otherwise than the lab defines disks."""

    def __init__(
        self, libvirtd: Libvirtd, directory: Path, disks: Sequence[LabDisk], *edits: tuple[str, str]
    ) -> None:
        self._edits = edits
        super().__init__(libvirtd, directory, "edited", disks, boot="disk", agent=False)

    def xml(self) -> str:
        """The domain's definition."""
        xml = super().xml()
        for old, new in self._edits:
            assert old in xml
            xml = xml.replace(old, new)
        return xml


@pytest.fixture
def sharing(libvirtd: Libvirtd, tmp_path: Path) -> Iterator[list[Guest]]:
    """Two domains with one shareable disk; the first one has a disk of its own, too."""
    shared = made(tmp_path / "shared", disk_format="raw")

    class Sharing(Guest):
        def xml(self) -> str:
            source = f'{shared.path}"/>'
            return super().xml().replace(source, f"{source}<shareable/>")

    guests: list[Guest] = []
    for name, disks in (("alice", [shared, made(tmp_path / "own")]), ("bob", [shared])):
        guests.append(Sharing(libvirtd, tmp_path, name, disks, boot="disk", agent=False))
    yield guests
    for guest in guests:
        guest.destroy()


@pytest.mark.whole_matrix
@pytest.mark.fault("odd inputs", "shareable disk that another running VM has, too")
def test_a_shared_disk_is_refused_before_the_freeze_while_others_use_it(
    sharing: list[Guest], back_up: BackUp, record_property: Observed
) -> None:
    alice, bob = sharing
    vm = back_up(alice)
    alice.start()
    alone = vm.backup()
    assert (alone.reason("vda"), alone.reason("vdb")) == ("first-backup", "first-backup")
    bob.start()
    with pytest.raises(Conflict, match="vda is shared with domain bob, which runs") as refused:
        vm.backup(fs_freeze="SUSPEND")
    record_property("observed", f"{type(refused.value).__name__}: {refused.value}")
    assert not alice.is_paused()
    vm.assert_nothing_left("op-000000000001")
    vm.config = BackupConfig(mode=Mode.INCREMENT, disk_ids=(1,))
    assert vm.backup(fs_freeze="SUSPEND").reason("vdb") == "increment"
    bob.end()
    vm.config = BackupConfig(mode=Mode.INCREMENT)
    assert vm.backup().reason("vdb") == "increment"
    for target in ("vda", "vdb"):
        vm.assert_restores(target)


@pytest.fixture
def edited(libvirtd: Libvirtd, tmp_path: Path) -> Iterator[Callable[..., Guest]]:
    """Make such a guest."""
    guests: list[Guest] = []

    def make(disks: LabDisk | Sequence[LabDisk], *edits: tuple[str, str]) -> Guest:
        several = [disks] if isinstance(disks, LabDisk) else disks
        guests.append(Edited(libvirtd, tmp_path, several, *edits))
        return guests[0]

    yield make
    for guest in guests:
        guest.destroy()


@pytest.mark.fault("odd inputs", "disk that only libvirt can open, while off")
@pytest.mark.whole_matrix
@pytest.mark.parametrize("kind", ["slice", "luks", "chain"])
def test_what_only_libvirt_can_open_is_refused_while_off(
    edited: Callable[..., Guest], back_up: BackUp, tmp_path: Path, kind: str, record_property: Observed
) -> None:
    path = tmp_path / "one"
    source = f'{path}"/>'
    if kind == "slice":
        more = '"><slices><slice type="storage" offset="65536" size="1048576"/></slices></source>'
        disk = made(path, disk_format="raw")
    elif kind == "luks":
        owner = f'<secret type="passphrase" uuid="{uuid4()}"/>'
        more = f'"><encryption format="luks">{owner}</encryption></source>'
        options = f"{LUKS},encrypt.key-secret=s"
        command(
            *("qemu-img", "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=abc"),
            *("-o", options, str(path), "16M"),
        )
        disk = LabDisk(path)
    else:
        made(tmp_path / "base")
        disk = made(path, "-b", str(tmp_path / "base"), "-F", "qcow2")
        more = '"/><backingStore/>'
    vm = back_up(edited(disk, (source, f"{path}{more}")))
    with pytest.raises(Unsupported, match="only while the domain runs") as refused:
        vm.tm("pre_backup", vm.next_backup(), files=vm.directory, operation_id="op-00000000000a")
    vm.assert_nothing_left("op-00000000000a")
    record_property("observed", str(refused.value))
    if kind != "luks":
        vm.guest.start()
        vm.backup()
        vm.assert_restores("vda")


@pytest.mark.fault("guest", "disk with an iothread, and a QEMU that does not outlive its readers")
def test_a_guest_with_an_iothread_outlives_its_backups(
    edited: Callable[..., Guest], back_up: BackUp, tmp_path: Path, record_property: Observed
) -> None:
    threads = ("<vcpu>1</vcpu>", "<vcpu>1</vcpu><iothreads>1</iothreads>")
    vm = back_up(edited(made(tmp_path / "one"), threads, ("discard='unmap'", "discard='unmap' iothread='1'")))
    vm.guest.start()
    refused = ""
    try:
        for _ in range(3):  # by the second one at the latest the firmware has set up the disk
            vm.backup()
    except Unsupported as error:
        refused = str(error).replace(vm.guest.name, "…").splitlines()[0]
    assert vm.guest.is_active()
    record_property("observed", refused or "backed up: QEMU outlives its readers")
    vm.guest.end()
    vm.backup()
    vm.assert_restores("vda")


@pytest.fixture
def passphrase(libvirtd: Libvirtd) -> Iterator[str]:
    """The UUID of a secret of libvirt's: `abc`."""
    uuid = str(uuid4())
    secret = libvirtd.connection.secretDefineXML(f"<secret private='yes'><uuid>{uuid}</uuid></secret>")
    secret.setValue(b"abc")
    yield uuid
    secret.undefine()


@pytest.mark.fault("odd inputs", "disk that only libvirt can open, while it runs")
@pytest.mark.parametrize("kind", [pytest.param("luks", marks=pytest.mark.whole_matrix), "chain"])
def test_what_only_libvirt_can_open_is_backed_up_while_it_runs(
    edited: Callable[..., Guest],
    back_up: BackUp,
    tmp_path: Path,
    passphrase: str,
    record_property: Observed,
    kind: str,
) -> None:
    path = tmp_path / "one"
    if kind == "luks":
        key = ("--object", "secret,id=s,data=abc", "-o", f"{LUKS},encrypt.key-secret=s")
        command("qemu-img", "create", "-q", "-f", "qcow2", *key, str(path), "16M")
        secret = f'<secret type="passphrase" uuid="{passphrase}"/>'
        more = f'"><encryption format="luks">{secret}</encryption></source>'
    else:
        base = made(tmp_path / "base").path
        command("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(path))
        base = base.rename(tmp_path / "moved")  # the image names one that is not there any more
        below = f'<format type="qcow2"/><source file="{base}"/><backingStore/>'
        more = f'"/><backingStore type="file">{below}</backingStore>'
    vm = back_up(edited(LabDisk(path), (f'{path}"/>', f"{path}{more}")))
    vm.guest.start()
    said = [vm.backup().reason("vda") for _ in range(2)]
    vm.assert_restores("vda")
    vm.guest.end()
    ended = vm.next_backup()
    vm.tm("post_backup_live", ended, files=tmp_path, operation_id="op-00000000000a", KEEP_CHECKPOINT="")
    vm.guest.start()
    said.append(vm.backup().reason("vda"))
    vm.assert_restores("vda")
    assert said == ["first-backup", "increment", "increment"]
    record_property("observed", f"{', '.join(said)}; it had ended between the second one and its clean-up")


@pytest.mark.fault("change tracking", "image that takes no bitmap, off: backing image of a VM that runs")
def test_a_template_is_backed_up_while_its_clone_runs(
    make_guest: MakeGuest, back_up: BackUp, tmp_path: Path, record_property: Observed
) -> None:
    template, own = made(tmp_path / "template"), made(tmp_path / "own")
    vm = back_up(make_guest([template, own], start=False, boot="disk", agent=False))
    vm.backup()
    clone = LabDisk(tmp_path / "clone")
    backing = ("-b", str(template.path), "-F", "qcow2")
    command("qemu-img", "create", "-q", "-f", "qcow2", *backing, str(clone.path))
    other = make_guest([clone], start=False, boot="disk", agent=False)
    other.start()
    seen = []
    for _ in range(2):
        point = vm.backup()
        vm.assert_restores("vda")
        seen.append(f"{point.reason('vda')}, {point.reason('vdb')}")
    assert seen == ["increment, increment", "bitmap-missing, increment"]
    assert "vda is not tracked" in point.exports.freeze.warning
    other.end()
    vm.backup()
    vm.assert_survived()
    record_property("observed", f"{seen[0]}; then {seen[1]}")


@pytest.mark.fault("odd inputs", "transient disk that is to be backed up, while it runs")
def test_a_transient_disk_is_left_out_while_it_runs(
    edited: Callable[..., Guest], back_up: BackUp, tmp_path: Path, record_property: Observed
) -> None:
    own, volatile = made(tmp_path / "own"), made(tmp_path / "volatile")
    transient = (f'{volatile.path}"/>', f'{volatile.path}"/><transient/>')
    vm = back_up(edited([own, volatile], transient))
    vm.config = BackupConfig(mode=Mode.INCREMENT, backup_volatile=True)
    vm.guest.start()
    point = vm.backup(fs_freeze="SUSPEND")
    assert point.excluded() == {"vdb": "unsupported-source"}
    vm.guest.end()
    vm.backup()
    for target in ("vda", "vdb"):
        vm.assert_restores(target)
    record_property("observed", f"{point.exports.excluded[0].text}; with it while off")
