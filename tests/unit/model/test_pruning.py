import pytest

from oned_backup.errors import Conflict, NotFound
from oned_backup.model.image import new_image, with_increment
from oned_backup.model.increments import next_increment
from oned_backup.model.pruning import (
    pinned,
    to_remove,
    with_cut,
    with_merged,
    with_pin,
    with_to_remove,
    without_to_remove,
)


@pytest.fixture
def image(vm, datastore):
    """Increments 0 to 3, kept by the store as b0 to b3."""
    first = next_increment((), date=1, size_mb=10, source="b0")
    image = new_image(
        3,
        vm=vm,
        datastore=datastore,
        name="a",
        source="b0",
        date=1,
        size_mb=10,
        disk_ids=[0],
        increment=first,
    )
    for number in range(1, 4):
        increment = next_increment(image.increments, date=1 + number, size_mb=1, source=f"b{number}")
        image = with_increment(image, increment, [0])
    return image


def _chain(image):
    return [(i.id, i.parent_id, i.source, i.type.value, i.date, i.size_mb) for i in image.increments]


def test_merged_with_the_full_backup_it_is_one(image, assert_valid):
    merged = with_merged(image, [0, 1, 2], source="new", size_mb=11)

    assert_valid(merged.element)
    assert _chain(merged) == [(2, -1, "new", "FULL", 3, 11), (3, 2, "b3", "INCREMENT", 4, 1)]
    assert (merged.size_mb, merged.source, to_remove(merged)) == (12, "b0", ("b0", "b1", "b2"))


def test_merged_in_the_middle_it_continues_what_the_first_continued(image):
    merged = with_merged(image, [2, 3], source="new", size_mb=2)

    assert _chain(merged)[1:] == [(1, 0, "b1", "INCREMENT", 2, 1), (3, 1, "new", "INCREMENT", 4, 2)]
    assert with_merged(merged, [1, 3], source="newer", size_mb=2).increments[-1].parent_id == 0


@pytest.mark.parametrize("run", [[1, 3], [3, 4], [2, 1], [7, 8], [1], []])
def test_only_neighbours_are_merged(image, run):
    with pytest.raises(Conflict, match="do not follow each other"):
        with_merged(image, run, source="new", size_mb=1)


def test_the_end_is_cut_off(image, assert_valid):
    cut = with_cut(image, [2, 3])

    assert_valid(cut.element)
    assert [increment.id for increment in cut.increments] == [0, 1]
    assert (cut.size_mb, to_remove(cut)) == (11, ("b2", "b3"))


@pytest.mark.parametrize("end", [[2], [1, 2], [0, 1, 2, 3], [4], []])
def test_only_the_end_is_cut_off(image, end):
    with pytest.raises(Conflict, match="not the end"):
        with_cut(image, end)


def test_pins_are_those_of_increments_that_exist(image, assert_valid):
    held = with_pin(with_pin(image, 2, pin=True), 0, pin=True)

    assert_valid(held.element)
    assert pinned(held) == (0, 2)
    assert pinned(with_pin(with_pin(held, 0, pin=False), 2, pin=False)) == ()
    with pytest.raises(NotFound, match="no increment 9"):
        with_pin(image, 9, pin=True)


def test_what_is_to_be_removed_is_noted_until_it_has_gone(image):
    noted = with_to_remove(with_to_remove(image, ["x", "y"]), ["y", "z"])

    assert to_remove(noted) == ("x", "y", "z")
    assert to_remove(without_to_remove(noted, ["x", "z"])) == ("y",)
    assert without_to_remove(noted, ["x", "y", "z"]).element.find(".//TO_REMOVE") is None
