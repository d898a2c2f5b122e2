import pytest

from oned_backup import xmldoc
from oned_backup.errors import Conflict, InvalidInput, NotFound
from oned_backup.model.document import section
from oned_backup.model.image import ImageState, image_name, new_image, with_increment, with_state
from oned_backup.model.increments import (
    Increment,
    chain_to,
    next_increment,
)
from oned_backup.model.selection import configure


def _chain(*sources):
    chain: list[Increment] = []
    for number, source in enumerate(sources):
        chain.append(next_increment(chain, date=number, size_mb=number + 1, source=source))
    return tuple(chain)


@pytest.fixture
def image(vm, datastore):
    def make(image_id=3, source="a", vm=vm):
        return new_image(
            image_id,
            vm=vm,
            datastore=datastore,
            name=image_name(vm.id, 1_700_000_000),
            source=source,
            date=1_700_000_000,
            size_mb=100,
            disk_ids=[1, 0],
            increment=next_increment((), date=1_700_000_000, size_mb=100, source=source),
        )

    return make


def test_a_chain_begins_full_and_each_increment_names_the_one_before(image, assert_valid):
    chain = _chain("a", "b", "c")

    assert [(i.id, i.parent_id, i.type) for i in chain] == [
        (0, -1, "FULL"),
        (1, 0, "INCREMENT"),
        (2, 1, "INCREMENT"),
    ]
    longer = with_increment(image(), chain[1], [2])
    assert longer.increments[1] == chain[1]
    assert (longer.size_mb, longer.disk_ids, longer.source) == (102, (0, 1, 2), "a")
    assert longer.owner.uname == "oneadmin"
    assert_valid(longer.element)


def test_ids_go_on_after_the_oldest_were_merged():
    merged = _chain("a", "b", "c")[1:]

    assert next_increment(merged, date=9, size_mb=1, source="d").id == 3
    with pytest.raises(Conflict, match="backup c is in the chain already"):
        next_increment(merged, date=9, size_mb=1, source="c")


def test_elements_of_others_in_the_chain_survive(image):
    first = image()
    first.element.find("BACKUP_INCREMENTS/INCREMENT").append(xmldoc.build("FUTURE", "x"))

    longer = with_increment(first, _chain("a", "b")[1], [])

    assert longer.element.findtext("BACKUP_INCREMENTS/INCREMENT/FUTURE") == "x"


def test_a_wrong_type_is_an_error():
    with pytest.raises(InvalidInput, match="INCREMENT/TYPE: 'HALF'"):
        Increment.from_element(xmldoc.parse("<INCREMENT><ID>0</ID><TYPE>HALF</TYPE></INCREMENT>"))


def test_a_full_backup_is_an_image_without_increments(vm, datastore, assert_valid):
    full = new_image(
        1,
        vm=configure(vm, {"DISK_IDS": "0", "MODE": "FULL"}),
        datastore=datastore,
        name="7 14-Nov 22.13.20",
        source="a",
        date=5,
        size_mb=3,
        disk_ids=[0],
    )

    assert_valid(full.element)
    assert (full.increments, full.has_selected_disks, full.size_mb) == ((), True, 3)
    assert (full.vm_id, full.datastore_id, full.datastore_name) == (7, 100, "nas")
    assert full.element.findtext("TYPE") == "6"
    assert full.is_ready


def test_names_are_opennebula_s_and_unique():
    first = image_name(7, 1_700_000_000)

    assert first == "7 14-Nov 22.13.20"
    assert image_name(7, 1_700_000_000, {first}) == "7 14-Nov 22.13.20 (2)"
    assert image_name(7, 1_700_000_000, {first, f"{first} (2)"}) == "7 14-Nov 22.13.20 (3)"


def test_states_and_errors_are_shown(image, assert_valid):
    failed = with_state(image(), ImageState.ERROR)
    xmldoc.put(section(failed.element, "TEMPLATE"), "ERROR", "disk.0.0 is damaged")

    assert (failed.state_name, failed.error, failed.is_ready) == ("ERROR", "disk.0.0 is damaged", False)
    assert failed.element.findtext("PREV_STATE") == "1"
    assert_valid(failed.element)


def test_a_restore_reads_up_to_the_increment_that_is_asked_for():
    chain = _chain("a", "b", "c")

    assert chain_to(chain) == chain
    assert chain_to(chain, 1) == chain[:2]
    with pytest.raises(NotFound, match="no increment 7") as caught:
        chain_to(chain, 7)
    assert caught.value.hint == "There are 0, 1, 2."
    with pytest.raises(NotFound):
        chain_to(())
