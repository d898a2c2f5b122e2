import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lxml import etree

from oned_backup import xmldoc
from oned_backup.errors import Conflict, InvalidInput, NotFound
from oned_backup.model.host import new_host
from oned_backup.store import BackupState, RestorePoint


def document(kind, name="a", **content):
    def build(document_id):
        return xmldoc.build(kind.upper(), {"ID": document_id, "NAME": name, "STATE": 1, **content})

    return build


def vm(uuid="", host=4, name="vm"):
    return document(
        "vm",
        name,
        TEMPLATE={"OS": {"UUID": uuid}},
        HISTORY_RECORDS={"HISTORY": {"HID": host}},
    )


def image(vm_id=7, datastore_id=100):
    return document("image", VMS={"ID": vm_id}, DATASTORE_ID=datastore_id)


def backup(backup_id="b", image_id=3, increment_id=0, **values):
    values = {"vm_id": 7, "datastore_id": 100, "manifest": "{}", "stored_at": 5.0, **values}
    return RestorePoint(backup_id=backup_id, image_id=image_id, increment_id=increment_id, **values)


def test_ids_begin_where_opennebula_s_do_and_are_not_used_twice(store):
    first = store.create("datastore", document("datastore", "a"))
    store.delete("datastore", 100)
    second = store.create("datastore", document("datastore", "a"))

    assert [xmldoc.integer(e, "ID") for e in (first, second)] == [100, 101]
    assert xmldoc.integer(store.create("vm", vm()), "ID") == 0


def test_who_writes_must_have_read_the_newest(store):
    store.create("image", image())
    read = store.get("image", 0)
    changed = xmldoc.copy(read.element)
    xmldoc.put(changed, "STATE", 5)

    written = store.update("image", 0, read.version, changed)

    assert (read.version, written.version, store.get("image", 0).version) == (1, 2, 2)
    with pytest.raises(Conflict, match="image 0 was changed meanwhile: version 1 was read, 2 is stored"):
        store.update("image", 0, read.version, changed)
    with pytest.raises(Conflict):
        store.delete("image", 0, read.version)
    store.delete("image", 0, 2)
    with pytest.raises(NotFound, match="there is no image 0"):
        store.get("image", 0)
    with pytest.raises(NotFound):
        store.update("image", 0, 2, changed)
    with pytest.raises(NotFound):
        store.delete("image", 0)


def test_no_change_of_many_threads_is_lost(store):
    store.create("vm", vm())

    def count(element):
        xmldoc.put(element, "COUNT", xmldoc.integer(element, "COUNT", 0) + 1)
        return element

    def work():
        for _ in range(20):
            store.change("vm", 0, count)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert xmldoc.integer(store.get("vm", 0).element, "COUNT") == 80
    assert store.get("vm", 0).version == 81


def test_documents_are_found_by_what_they_say(store):
    store.create("image", image(7, 100))
    store.create("image", image(8, 100))
    store.create("vm", vm("u", 4, 'it\'s "x"'))

    def ids(kind, **columns):
        return [xmldoc.integer(found.element, "ID") for found in store.find(kind, **columns)]

    assert ids("image") == [0, 1]
    assert ids("image", vm_id=8) == [1]
    assert ids("image", vm_id=8, datastore_id=101) == []
    assert ids("vm", name='it\'s "x"', host_id=4, uuid="u") == [0]
    with pytest.raises(InvalidInput, match="cannot search by xml"):
        store.find("vm", xml="x")


def test_columns_follow_a_change(store):
    store.create("image", image(7))
    changed = store.get("image", 0).element
    xmldoc.put(changed, "STATE", 5)
    store.update("image", 0, 1, changed)

    assert len(store.find("image", state=5)) == 1
    assert store.find("image", state=1) == []


def test_names_of_hosts_and_datastores_are_unique(store):
    for kind in ("host", "datastore"):
        store.create(kind, document(kind, "a"))
        store.create(kind, document(kind, "b"))
        with pytest.raises(Conflict, match=f"{kind} .* is already named 'a'"):
            store.create(kind, document(kind, "a"))
    with pytest.raises(Conflict, match="host 0 is already named 'a'"):
        store.change("host", 1, lambda _: document("host", "a")(1))
    assert len([store.create("vm", vm()) for _ in range(2)]) == 2


def test_a_domain_is_one_vm_on_its_host(store):
    store.create("vm", vm("u", 4))
    store.create("vm", vm("u", 5))

    with pytest.raises(Conflict, match="domain u on host 4 is VM 0 already"):
        store.create("vm", vm("u", 4))


@pytest.mark.parametrize("text", ["<VM><ID>0</ID></VM>", "<IMAGE><ID>5</ID></IMAGE>", "<IMAGE/>"])
def test_a_document_must_be_what_it_is_stored_as(store, text):
    with pytest.raises(InvalidInput, match="image 0"):
        store.create("image", lambda _: xmldoc.parse(text))
    with pytest.raises(InvalidInput, match="no documents of kind 'user'"):
        store.create("user", image())


def test_a_transaction_is_all_or_nothing(store):
    def half_way():
        with store.transaction() as tx:
            tx.create("image", image())
            tx.add_backup(backup())
            tx.journal.enqueue("backup", "vm:7", {})
            assert len(tx.find("image")) == len(tx.backups()) == len(tx.journal.list()) == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half_way()

    assert (store.find("image"), store.backups(), store.journal.list()) == ([], [], [])
    assert xmldoc.integer(store.create("image", image()), "ID") == 0


def test_readers_see_the_last_commit_while_one_writes(store):
    store.create("host", document("host", "a"))
    seen = []
    with store.transaction() as tx:
        tx.create("host", document("host", "b"))
        reader = threading.Thread(target=lambda: seen.append(len(store.find("host"))))
        reader.start()
        reader.join(10)

    assert seen == [1]
    assert len(store.find("host")) == 2


def test_writing_past_one_s_own_transaction_is_a_bug_and_does_not_hang(store):
    with store.transaction(), pytest.raises(RuntimeError, match="use it instead"):
        store.create("host", document("host"))


texts = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffe\uffff"), max_size=30
)


@settings(max_examples=40)
@given(name=texts, value=texts.map(lambda text: f"a\n\t{text}\r\nb"))
def test_every_document_comes_back_as_it_was(store, name, value):
    element = new_host(0, name="x").element
    element.append(xmldoc.build("FUTURE", {"DEEP": [xmldoc.build("DEEP", value), xmldoc.build("DEEP", "")]}))
    xmldoc.put(element, "NAME", name)
    with store.transaction() as tx:
        created = tx.create("host", lambda new_id: (xmldoc.put(element, "ID", new_id), element)[1])
        new_id = xmldoc.integer(created, "ID")
        back = tx.get("host", new_id).element
        found = tx.find("host", name=name)
        tx.delete("host", new_id)

    assert etree.tostring(back, method="c14n") == etree.tostring(element, method="c14n")
    assert back.findtext("FUTURE/DEEP") == value
    assert len(found) == 1


def test_restore_points_are_kept_changed_and_forgotten(store):
    first, second = backup("b1"), backup("b2", increment_id=1, manifest='{"a": "ü"}')
    store.add_backup(second)
    store.add_backup(first)

    assert store.backups(image_id=3) == [first, second]
    store.mark_backup("b1", state=BackupState.BROKEN, failure="disk.0.0 is truncated")
    store.mark_backup("b2", verified_at=9.5)
    assert store.backups(state=BackupState.BROKEN)[0].failure == "disk.0.0 is truncated"
    assert (store.backup("b2").verified_at, store.backup("b2").manifest) == (9.5, '{"a": "ü"}')
    assert store.backups(vm_id=7, datastore_id=101) == []
    store.forget_backup("b1")
    store.forget_backup("b1")
    assert store.backups(vm_id=7) == [store.backup("b2")]


def test_a_restore_point_is_recorded_once(store):
    store.add_backup(backup("b1"))

    for double in (backup("b1", image_id=9), backup("b2")):
        with pytest.raises(Conflict, match="b1 is recorded already"):
            store.add_backup(double)
    with pytest.raises(NotFound, match="no backup zz"):
        store.mark_backup("zz", failure="x")
    with pytest.raises(NotFound, match="no backup zz"):
        store.backup("zz")
    with pytest.raises(InvalidInput, match="nothing to change"):
        store.mark_backup("b1")
