import pytest
from hypothesis import given
from hypothesis import strategies as st

from oned_backup import xmldoc
from oned_backup.errors import Conflict, InvalidInput
from oned_backup.model import datastore as datastores
from oned_backup.model import host as hosts
from oned_backup.model.backup_config import Mode
from oned_backup.model.disk import Disk, domain_disks, with_ids
from oned_backup.model.document import checked_title
from oned_backup.model.retention import Rules
from oned_backup.model.selection import configure
from oned_backup.model.vm import (
    DomainState,
    Vm,
    backup_begun,
    backup_ended,
    new_vm,
    sync_domain,
    with_backup,
    with_config,
    with_error,
    with_power,
    with_state,
    without_backup,
    without_error,
)


def _sync(vm, domain, state=DomainState.RUNNING, **capacity):
    return sync_domain(vm, domain, state, capacity, date=1_700_000_100)


def _disk(source, target, *, disk_id=-1, kind="FILE"):
    return Disk(disk_id, target, source, "qcow2", kind)


def test_an_imported_domain_is_a_valid_document(vm, assert_valid):
    assert_valid(vm.element)
    assert (vm.id, vm.name, vm.deploy_id) == (7, "web 1", "web 1")
    assert vm.uuid == "0f8cf0ae-0f3f-4b62-a2f2-8c6a2a6d2f6a"
    assert (vm.host_id, vm.host_name, vm.vm_mad, vm.tm_mad) == (4, "node 1", "kvm", "qcow2")
    assert (vm.state, vm.lcm_state, vm.state_name) == (3, 3, "RUNNING")
    assert (vm.config.mode, vm.config.fs_freeze) == ("INCREMENT", "AGENT")
    assert xmldoc.text(vm.element, "TEMPLATE/MEMORY") == "2048"
    assert xmldoc.text(vm.element, "TEMPLATE/NIC/BRIDGE") == "br0"
    assert vm.element.findtext("PERMISSIONS/OWNER_M") == "1"
    assert vm.element.findtext("PERMISSIONS/GROUP_U") == "0"


def test_its_disks_are_told_by_their_sources(vm):
    assert [(d.disk_id, d.target, d.type, d.format, d.size_mb, d.read_only) for d in vm.disks] == [
        (0, "vda", "FILE", "qcow2", 10240, False),
        (1, "vdb", "BLOCK", "raw", 2, False),
        (2, "sda", "CDROM", "raw", 0, True),
    ]
    assert vm.disks[0].source == "/srv/vm/web 1.qcow2"


@pytest.mark.parametrize(
    ("disk", "kind", "source"),
    [
        ("<disk type='file'><source file='/a'/><target dev='a'/></disk>", "FILE", "/a"),
        ("<disk type='file' device='lun'><source file='/a'/><target dev='a'/></disk>", "FILE", "/a"),
        (
            "<disk type='network'><source protocol='rbd' name='p/i'/><target dev='a'/></disk>",
            "NETWORK",
            "p/i",
        ),
        ("<disk type='volume'><source pool='p' volume='v'/><target dev='a'/></disk>", "VOLUME", "v"),
        ("<disk type='file' device='floppy'><target dev='a'/></disk>", "FLOPPY", ""),
        ("<disk type='network' device='cdrom'><source name='x'/><target dev='a'/></disk>", "CDROM", "x"),
        ("<disk type='file'><source file='/a'/><target dev='a'/><transient/></disk>", "FS", "/a"),
        ("<disk/>", "FILE", ""),
    ],
)
def test_each_kind_of_source_is_recognised(disk, kind, source):
    found = domain_disks(xmldoc.parse(f"<domain><devices>{disk}</devices></domain>"), {})

    assert [(d.type, d.source) for d in found] == [(kind, source)]


def test_an_added_disk_gets_an_id_that_no_disk_ever_had(vm, domain, assert_valid):
    devices = domain.find("devices")
    devices.remove(domain.findall("devices/disk")[1])
    without = _sync(vm, domain)
    devices.append(xmldoc.parse("<disk type='file'><source file='/new'/><target dev='vdb'/></disk>"))
    again = _sync(without, domain)

    assert [d.disk_id for d in without.disks] == [0, 2]
    assert [(d.disk_id, d.source) for d in again.disks if d.target == "vdb"] == [(3, "/new")]
    assert again.next_disk_id == 4
    assert_valid(again.element)


def test_a_disk_keeps_its_id_under_another_target_and_after_a_snapshot():
    known = [_disk("/a", "vda", disk_id=0), _disk("/b", "vdb", disk_id=1)]

    swapped, _ = with_ids([_disk("/b", "vda"), _disk("/a", "vdb")], known, 2)
    overlay, next_id = with_ids([_disk("/a.snap", "vda"), _disk("/b", "vdb")], known, 2)
    removable, _ = with_ids([_disk("/a", "vda", kind="CDROM")], known, 2)

    assert [(d.disk_id, d.source) for d in swapped] == [(0, "/a"), (1, "/b")]
    assert [(d.disk_id, d.source) for d in overlay] == [(0, "/a.snap"), (1, "/b")]
    assert next_id == 2
    assert [d.disk_id for d in removable] == [2]


sources = st.sampled_from(["", "/a", "/b", "/c", "/d"])
targets = st.lists(st.sampled_from(["vda", "vdb", "vdc", "vdd"]), unique=True)
domains = targets.flatmap(
    lambda names: st.tuples(*(st.builds(_disk, sources, st.just(name)) for name in names))
)


@given(st.lists(domains, max_size=6))
def test_ids_stay_unique_and_never_return(history):
    known: tuple[Disk, ...] = ()
    next_id = 0
    gone: set[int] = set()
    for found in history:
        numbered, after = with_ids(found, known, next_id)
        ids = {disk.disk_id for disk in numbered}
        assert len(ids) == len(numbered) == len(found)
        assert not ids & gone
        assert after >= next_id
        assert all(disk_id < after for disk_id in ids)
        gone |= {disk.disk_id for disk in known} - ids
        known, next_id = numbered, after


def test_elements_of_others_survive_every_change(vm, domain):
    element = xmldoc.copy(vm.element)
    element.append(xmldoc.build("FUTURE", "x"))
    element.find("TEMPLATE/DISK").append(xmldoc.build("DEV_PREFIX", "vd"))
    element.find("USER_TEMPLATE").append(xmldoc.build("LABELS", "a,b"))
    element.find("BACKUPS/BACKUP_CONFIG").append(xmldoc.build("ZZZ", "1"))

    changed = with_backup(with_error(_sync(Vm(element), domain), "no", "now"), 5)
    changed = with_config(changed, changed.config.without_chain())

    for path in ("FUTURE", "TEMPLATE/DISK/DEV_PREFIX", "USER_TEMPLATE/LABELS", "BACKUPS/BACKUP_CONFIG/ZZZ"):
        assert changed.element.findtext(path) == element.findtext(path)


def test_changes_leave_the_old_document_alone(vm, domain):
    before = xmldoc.serialize(vm.element)

    _sync(vm, domain, DomainState.OFF)
    with_backup(backup_begun(vm), 3)
    with_error(vm, "y", "z")

    assert xmldoc.serialize(vm.element) == before


def test_a_size_that_is_not_told_stays_as_it_was(vm, domain):
    assert _sync(vm, domain).disks[0].size_mb == 10240
    assert _sync(vm, domain, vda=1024**2).disks[0].size_mb == 1


def test_the_name_follows_a_rename_unless_it_was_given_here(vm, domain):
    domain.find("name").text = 'w "2" ü'
    renamed = _sync(vm, domain)
    element = xmldoc.copy(vm.element)
    xmldoc.put(element, "NAME", "mine")
    own = _sync(Vm(element), domain)

    assert (renamed.name, renamed.deploy_id) == ('w "2" ü', 'w "2" ü')
    assert (own.name, own.deploy_id) == ("mine", 'w "2" ü')


@pytest.mark.parametrize("name", ["x" * 200, "a\u200bb"])
def test_a_domain_with_a_name_that_is_too_much_for_a_document_is_followed(vm, domain, name):
    domain.find("name").text = name
    renamed = _sync(vm, domain)
    assert (renamed.name, renamed.deploy_id) == (name[:128].replace("\u200b", " "), name)
    domain.find("name").text = "short"
    assert _sync(renamed, domain).name == "short"


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "x" * 129, "a\x1bb"])
def test_a_name_that_cannot_be_shown_is_refused(name):
    with pytest.raises(InvalidInput, match="name"):
        checked_title(name)


def test_a_domain_without_name_is_refused(vm):
    with pytest.raises(InvalidInput, match="no name"):
        _sync(vm, xmldoc.parse("<domain/>"))


@pytest.mark.parametrize(
    ("state", "begun", "name"),
    [
        (DomainState.RUNNING, (3, 69), "BACKUP"),
        (DomainState.PAUSED, (3, 69), "BACKUP"),
        (DomainState.OFF, (3, 70), "BACKUP_POWEROFF"),
    ],
)
def test_a_backup_begins_and_ends_in_the_state_it_found(vm, state, begun, name, assert_valid):
    vm = with_power(vm, state)
    during = backup_begun(vm)

    assert (during.state, during.lcm_state) == begun
    assert during.state_name == name
    assert during.in_backup
    after = backup_ended(during)
    assert (after.state, after.lcm_state) == (vm.state, vm.lcm_state)
    assert (after.element.findtext("PREV_LCM_STATE")) == str(begun[1])
    assert_valid(after.element)


def test_no_second_backup_and_no_backup_of_what_is_gone(vm):
    with pytest.raises(Conflict, match="VM 7, wrong state BACKUP"):
        backup_begun(backup_begun(vm))
    with pytest.raises(Conflict, match="wrong state DONE"):
        backup_begun(with_state(vm, 6, 0))


def test_what_the_hypervisor_says_does_not_end_a_backup(vm, domain):
    assert _sync(backup_begun(vm), domain, DomainState.OFF).state_name == "BACKUP"
    assert _sync(vm, domain, DomainState.OFF).state_name == "POWEROFF"


def test_deleting_the_active_chain_ends_it_and_deleting_another_does_not(vm, assert_valid):
    chain = xmldoc.parse(
        "<BACKUP_CONFIG><MODE>INCREMENT</MODE><INCREMENTAL_BACKUP_ID>9</INCREMENTAL_BACKUP_ID>"
        "<LAST_INCREMENT_ID>2</LAST_INCREMENT_ID></BACKUP_CONFIG>"
    )
    vm = with_config(vm, vm.config.from_element(chain))
    vm = with_backup(with_backup(vm, 9), 4)

    assert vm.backup_ids == (4, 9)
    assert without_backup(vm, 4).config.incremental_backup_id == 9
    ended = without_backup(vm, 9)
    assert (ended.backup_ids, ended.config.has_chain, ended.config.mode) == ((4,), False, Mode.INCREMENT)
    assert_valid(ended.element)


def test_an_error_is_shown_and_taken_away(vm, assert_valid):
    failed = with_error(vm, "x" * 1000, "2026-11-21 02:37")

    assert failed.error.startswith("2026-11-21 02:37: xxx")
    assert len(failed.error) < 450
    assert_valid(failed.element)
    assert without_error(failed).error == ""


HOSTILE = "a\x00b\x1b[31m\ud800 \ufffe\nnext " + "x" * 9000


def test_whatever_a_program_printed_can_be_recorded(vm, host, datastore, assert_valid):
    assert with_error(vm, HOSTILE, "now").error.startswith("now: a b [31m next xxx")
    assert len(with_error(vm, HOSTILE, "now").error) < 450
    assert hosts.with_state(host, hosts.HostState.ERROR, HOSTILE).error.startswith("a b [31m next xxx")
    assert datastores.disabled(datastore, HOSTILE).disabled_reason.startswith("a b [31m next xxx")
    assert_valid(with_error(vm, HOSTILE, "now").element)


@pytest.mark.parametrize(
    ("memory", "mb"),
    [
        ("<memory unit='KiB'>2048</memory>", "2"),
        ("<memory>2048</memory>", "2"),
        ("<memory unit='G'>1</memory>", "1024"),
    ],
)
def test_memory_is_counted_in_mebibytes(host, memory, mb):
    domain = xmldoc.parse(f"<domain><name>a</name>{memory}</domain>")
    vm = new_vm(
        0, name="a", placement=host.placement, domain=domain, state=DomainState.OFF, capacity_bytes={}, date=0
    )

    assert vm.element.findtext("TEMPLATE/MEMORY") == mb


def test_settings_that_opennebula_does_not_have_keep_its_schema(vm, assert_valid):
    values = {"KEEP_LAST": "3", "KEEP_DAILY": "7", "CHAIN_LENGTH": "30"}
    configured = configure(vm, values)
    read_again = Vm(xmldoc.parse(xmldoc.serialize(configured.element)))

    assert_valid(configured.element)
    assert read_again.config.rules == Rules(keep_last=3, keep_daily=7)
    assert (read_again.config.chain_length, read_again.next_disk_id) == (30, vm.next_disk_id)
    assert configure(configured, dict.fromkeys(values, "")).element.find(".//KEEP_DAILY") is None
