import json

import pytest

from oned_backup import xmldoc
from oned_backup.errors import InvalidInput
from oned_backup.model import datastore as datastores
from oned_backup.model import host as hosts
from oned_backup.model.datastore import Datastore
from oned_backup.model.host import HostState
from oned_backup.model.views import to_json

SEALED = "sealed:v1:AAAA"


def test_a_datastore_is_opennebula_s_document(datastore, assert_valid):
    assert_valid(datastore.element)
    assert (datastore.id, datastore.ds_mad, datastore.base_path) == (100, "fs", "/srv/backup")
    assert datastore.is_enabled
    assert datastore.element.findtext("TM_MAD") == "-"


def test_parameters_are_replaced_and_elements_of_others_stay(datastore):
    datastore.element.find("TEMPLATE").append(xmldoc.parse("<NESTED><A>1</A></NESTED>"))

    changed = datastores.with_parameters(
        datastores.disabled(datastore, "no space"), {"BASE_PATH": "/other", "LIMIT": "5"}
    )

    assert changed.parameters == {"BASE_PATH": "/other", "LIMIT": "5"}
    assert changed.base_path == "/other"
    assert (changed.is_enabled, changed.disabled_reason) == (False, "no space")
    assert changed.element.findtext("TEMPLATE/NESTED/A") == "1"
    assert datastores.with_parameters(changed, {}).base_path == ""
    enabled = datastores.enabled(changed)
    assert (enabled.is_enabled, enabled.disabled_reason) == (True, "")


def test_a_parameter_cannot_take_the_place_of_an_attribute(datastore):
    with pytest.raises(InvalidInput, match="DS_MAD is not a parameter"):
        datastores.with_parameters(datastore, {"DS_MAD": "evil"})


def test_people_see_stars_and_drivers_see_nothing_of_a_secret(datastore):
    secret = datastores.with_parameters(datastore, {"BASE_PATH": "/b", "PASSWORD": SEALED})

    assert secret.sealed_parameters == {"PASSWORD": SEALED}
    shown = datastores.masked(secret)
    assert shown.findtext("TEMPLATE/PASSWORD") == "***"
    for element in (shown, datastores.without_secrets(secret)):
        assert SEALED not in xmldoc.serialize(element)
    assert Datastore(datastores.without_secrets(secret)).parameters == {"BASE_PATH": "/b"}


def test_images_and_capacity_are_kept(datastore, assert_valid):
    full = datastores.with_capacity(datastore, total_mb=10, used_mb=7, free_mb=3)
    full = datastores.with_image(datastores.with_image(full, 9), 2)

    assert (full.total_mb, full.used_mb, full.free_mb, full.image_ids) == (10, 7, 3, (2, 9))
    assert datastores.without_image(full, 2).image_ids == (9,)
    assert datastores.with_name(full, "a 'b'").name == "a 'b'"
    assert_valid(full.element)


def test_a_host_is_opennebula_s_document(host, assert_valid):
    assert_valid(host.element)
    assert (host.uri, host.vm_mad, host.tm_mad, host.state_name) == ("qemu:///system", "kvm", "qcow2", "INIT")
    assert (host.placement.host_id, host.placement.host_name) == (4, "node 1")


def test_a_host_s_state_error_and_vms_are_kept(host, assert_valid):
    failed = hosts.with_state(hosts.with_vms(host, [7, 3]), HostState.ERROR, "no answer")

    assert (failed.state_name, failed.error, failed.vm_ids) == ("ERROR", "no answer", (3, 7))
    assert_valid(failed.element)
    well = hosts.with_state(hosts.without_vm(failed, 3), HostState.MONITORED)
    assert (well.error, well.vm_ids, well.element.findtext("PREV_STATE")) == ("", (7,), "3")


def test_a_host_s_directories_are_set_and_set_back(host, assert_valid):
    moved = hosts.with_paths(host, {"REMOTE_DIR": "/srv/odb", "SWTPM_DIR": "/srv/tpm"})

    assert (str(host.path("REMOTE_DIR")), str(moved.path("REMOTE_DIR"))) == ("/run/oned-backup", "/srv/odb")
    assert_valid(moved.element)
    assert hosts.with_paths(moved, {"REMOTE_DIR": ""}).path("REMOTE_DIR") == host.path("REMOTE_DIR")


@pytest.mark.parametrize(
    "values", [{"URI": "/x"}, {"REMOTE_DIR": "srv"}, {"REMOTE_DIR": "/srv/../etc"}, {"SWTPM_DIR": "/a\nb"}]
)
def test_what_is_no_directory_of_a_host_is_refused(host, values):
    with pytest.raises(InvalidInput, match=next(iter(values))):
        hosts.with_paths(host, values)


def test_json_has_lists_where_there_may_be_many(vm, host, datastore):
    vm_json = to_json(vm.element)

    assert [disk["TARGET"] for disk in vm_json["TEMPLATE"]["DISK"]] == ["vda", "vdb", "sda"]
    assert vm_json["BACKUPS"]["BACKUP_IDS"] == {"ID": []}
    assert len(vm_json["TEMPLATE"]["NIC"]) == 1
    assert to_json(datastore.element)["CLUSTERS"] == {"ID": ["0"]}
    assert to_json(host.element)["HOST_SHARE"]["DATASTORES"]["DS"] == []
    assert to_json(xmldoc.parse("<IMAGE><BACKUP_INCREMENTS/><PATH/></IMAGE>")) == {
        "BACKUP_INCREMENTS": {"INCREMENT": []},
        "PATH": "",
    }
    assert json.loads(json.dumps(vm_json)) == vm_json


def test_json_keeps_spaces_and_any_script():
    assert to_json(xmldoc.parse("<VM><NAME> a  ü </NAME></VM>"))["NAME"] == " a  ü "
