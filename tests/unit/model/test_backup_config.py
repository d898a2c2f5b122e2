import pytest
from hypothesis import given
from hypothesis import strategies as st

from oned_backup import xmldoc
from oned_backup.errors import InvalidInput
from oned_backup.model.backup_config import (
    BackupConfig,
    FsFreeze,
    IncrementMode,
    Mode,
    imported_config,
    updated,
)

CHAIN = BackupConfig(mode=Mode.INCREMENT, incremental_backup_id=12, last_increment_id=3)

numbers = st.integers(-1, 2**31)
words = st.text(
    st.characters(min_codepoint=33, max_codepoint=0xFFF, exclude_categories=["C", "Z"]), max_size=8
)
configs = st.builds(
    BackupConfig,
    mode=st.sampled_from(Mode),
    increment_mode=st.sampled_from(IncrementMode),
    fs_freeze=st.sampled_from(FsFreeze),
    keep_last=st.integers(0, 1_000_000),
    backup_volatile=st.booleans(),
    disk_ids=st.sets(st.integers(0, 99_999), max_size=5).map(lambda ids: tuple(sorted(ids))),
    interactive=st.booleans(),
    incremental_backup_id=numbers,
    last_increment_id=numbers,
    backup_job_id=st.none() | numbers,
    last_datastore_id=st.none() | numbers,
    last_backup_id=words,
    last_backup_size=words,
    last_backup_format=words,
    last_bridge=words,
    active_flatten=st.booleans(),
    keep_daily=st.integers(0, 1_000_000),
    keep_monthly=st.integers(0, 2),
    chain_length=st.integers(0, 2),
    unknown=st.sampled_from([(), ("<ZZ>a &amp; b</ZZ>",), ("<AA/>", "<ZZ><B>1</B></ZZ>")]),
)


@given(configs)
def test_every_configuration_survives_xml(config):
    element = xmldoc.parse(xmldoc.serialize(config.to_element()))
    own = [xmldoc.parse(xmldoc.serialize(child)) for child in config.to_own_elements()]

    assert (
        BackupConfig.from_element(element, [*own, xmldoc.parse("<NEXT_DISK_ID>1</NEXT_DISK_ID>")]) == config
    )
    assert [child.tag for child in element] == sorted(child.tag for child in element)


def test_opennebula_s_empty_element_means_its_defaults():
    config = BackupConfig.from_element(xmldoc.parse("<BACKUP_CONFIG/>"))

    assert config == BackupConfig.from_element(None) == BackupConfig()
    assert (config.mode, config.fs_freeze, config.keep_last) == ("FULL", "NONE", 0)


@pytest.mark.parametrize(("agent", "freeze"), [(True, "AGENT"), (False, "NONE")])
def test_an_imported_vm_is_backed_up_incrementally(agent, freeze):
    config = imported_config(has_agent_channel=agent)

    assert (config.mode, config.fs_freeze, config.keep_last) == ("INCREMENT", freeze, 0)
    assert config.to_element().find("KEEP_LAST") is None


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("FS_FREEZE", "AGNET", "Use NONE, AGENT, SUSPEND."),
        ("MODE", "INCREMENTAL", "Use FULL, INCREMENT."),
        ("INCREMENT_MODE", "BITMAP", "Use CBT, SNAPSHOT."),
        ("INCREMENT_MODE", "SNAPSHOT", "CBT tracks"),
        ("KEEP_LAST", "-1", "from 0 to"),
        ("KEEP_LAST", "five", "from 0 to"),
        ("KEEP_LAST", "1e3", "from 0 to"),
        ("KEEP_LAST", "٣", "from 0 to"),
        ("BACKUP_VOLATILE", "maybe", "Use YES or NO."),
        ("DISK_IDS", "0;1", "commas"),
        ("DISK_IDS", "-1", "commas"),
        ("DISK_IDS", "0,", "commas"),
        ("INTERACTIVE", "YES", "driver"),
        ("LAST_INCREMENT_ID", "4", "What can: MODE"),
        ("COLOUR", "red", "What can: MODE"),
    ],
)
def test_a_value_that_opennebula_would_turn_into_a_default_is_an_error(name, value, hint):
    with pytest.raises(InvalidInput, match=name) as caught:
        updated(CHAIN, {"KEEP_LAST": "3", name: value})

    assert hint in (caught.value.hint or "")


def test_values_are_taken_in_any_case_and_others_stay():
    config = updated(CHAIN, {"FS_FREEZE": "agent", "KEEP_LAST": " 5 "})

    assert (config.fs_freeze, config.keep_last, config.mode) == (FsFreeze.AGENT, 5, Mode.INCREMENT)
    assert config.has_chain


def test_an_empty_value_restores_the_default():
    config = updated(
        updated(CHAIN, {"DISK_IDS": "2, 0,2", "KEEP_LAST": "5"}), {"DISK_IDS": "", "KEEP_LAST": ""}
    )

    assert (config.disk_ids, config.keep_last) == ((), 0)


def test_disk_ids_are_sorted_and_each_once():
    assert updated(CHAIN, {"DISK_IDS": "2, 0,2"}).disk_ids == (0, 2)


@pytest.mark.parametrize(
    "values",
    [{"MODE": "FULL"}, {"DISK_IDS": "0"}, {"BACKUP_VOLATILE": "YES"}, {"MODE": "FULL", "KEEP_LAST": "2"}],
)
def test_the_chain_ends_when_mode_or_disks_change(values):
    config = updated(CHAIN, values)

    assert (config.incremental_backup_id, config.last_increment_id) == (-1, -1)


@pytest.mark.parametrize("values", [{"MODE": "INCREMENT"}, {"FS_FREEZE": "SUSPEND"}, {"KEEP_LAST": "1"}, {}])
def test_the_chain_goes_on_when_nothing_that_matters_changes(values):
    config = updated(CHAIN, values)

    assert (config.incremental_backup_id, config.last_increment_id) == (12, 3)


def test_a_damaged_document_is_an_error_and_not_a_default():
    with pytest.raises(InvalidInput, match="FS_FREEZE=YES"):
        BackupConfig.from_element(xmldoc.parse("<BACKUP_CONFIG><FS_FREEZE>YES</FS_FREEZE></BACKUP_CONFIG>"))
