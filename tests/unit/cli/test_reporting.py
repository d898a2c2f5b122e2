"""What the operator sees of backups that failed, fell back or wait, and what Prometheus sees."""

from __future__ import annotations

import json
import re
from pathlib import Path

from oned_backup.cli.follow import _description
from oned_backup.errors import NotFound

from .conftest import Stack


def assert_told_in_the_log(log: str, done: str) -> None:
    """Each line is one event of a named operation of a named VM."""
    assert re.search(rf" INFO {re.escape(done)}: begins$", log, re.MULTILINE), log
    assert re.search(rf" INFO {re.escape(done)}: DONE in \d+\.\d s: .*image_id=0 .*type=FULL", log), log
    assert re.search(r" WARNING backup op-\w+ of VM 1 \(web\): FAILED in \d+\.\d s: .* is not there", log), (
        log
    )
    assert all(re.match(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d,\d+ [A-Z]+ ", line) for line in log.splitlines()), (
        log
    )


def test_failed_backups_are_listed_with_cause_undoing_and_next_action(stack: Stack) -> None:
    done = stack.ok("vm", "backup", "web", "--json").json
    stack.store.rename(stack.store.with_name("away"))
    stack.store.write_text("no directory")
    failed = stack("vm", "backup", "web")
    assert failed.code != 0
    assert_told_in_the_log(stack.daemon.log.read_text(), f"backup {done['id']} of VM 1 (web)")
    (row,) = stack.ok("operation", "list", "--failed", "--json").json
    assert row["error"]["exit_code"] == failed.code
    assert row["failure"]["step"] in {"PLAN", "STORE"}
    assert row["failure"]["next"]
    assert stack.ok("operation", "list", "--failed", "--vm", "db", "--json").json == []
    listed = stack.ok("operation", "list", "--failed", "--vm", "web", "--kind", "backup").out
    assert "backup of VM 1 (web) failed" in listed
    for name in ("cause", "code", "undone", "next"):
        assert re.search(rf"^  {name} +\S", listed, re.MULTILINE), listed
    shown = stack.ok("operation", "show", row["id"]).out
    assert re.search(r"^next +\S", shown, re.MULTILINE)
    assert stack("operation", "show", row["id"], "--wait").code == failed.code
    vms = stack.ok("vm", "list")
    assert "FAILED" in vms.out
    assert "operation list --failed" in vms.err
    vm = stack.ok("vm", "show", "web")
    assert "last failed backup" in vm.out
    assert "(a later one succeeded)" not in vm.out
    stack.store.unlink()
    stack.store.with_name("away").rename(stack.store)
    stack.ok("datastore", "update", "store")
    stack.ok("vm", "backup", "web")
    assert "FAILED" not in stack.ok("vm", "list").out
    assert stack.ok("vm", "show", "web", "--json").json["last_failure"]["succeeded_since"] is True
    assert "(a later one succeeded)" in stack.ok("vm", "show", "web").out


def test_metrics_tell_of_every_vm_and_a_broken_point_proves_nothing(stack: Stack) -> None:
    stack.ok("vm", "backup", "web")
    stack.ok("image", "verify", "0")
    text = stack.ok("metrics").out
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['oned_backup_vm_last_success_timestamp_seconds{vm_id="1"}']) > 1e9
    assert float(values['oned_backup_vm_last_proved_timestamp_seconds{vm_id="1"}']) > 1e9
    assert 'oned_backup_vm_last_success_timestamp_seconds{vm_id="0"}' not in values
    assert values['oned_backup_vm_info{host="lab",name="db",vm_id="0"}'] == "1.0"
    assert values['oned_backup_operations_total{kind="backup",state="DONE"}'] == "1.0"
    assert values['oned_backup_vm_backup_seconds_count{vm_id="1"}'] == "1.0"
    assert float(values['oned_backup_vm_backup_bytes_sum{vm_id="1"}']) > 0
    assert values['oned_backup_datastore_enabled{datastore_id="100",name="store"}'] == "1.0"
    (stored,) = stack.store.glob("*/2*/disk.0.0")
    stored.write_bytes(stored.read_bytes()[:-1])
    assert stack("image", "verify", "0").code == 65
    (vm,) = [vm for vm in stack.ok("vm", "list", "--json").json if vm["name"] == "web"]
    assert vm["last_backup"] is None
    assert vm["last_verified_at"] is None
    assert "never" in stack.ok("vm", "show", "web").out
    assert 'oned_backup_vm_broken_points{vm_id="1"} 1.0' in stack.ok("metrics").out


def test_a_driver_that_waits_says_why_in_the_progress() -> None:
    view = {"kind": "backup", "progress": {"message": "bk: connection lost; the next attempt is in 4 s"}}
    assert _description(view, "STORE") == ("backup: storing: bk: connection lost; the next attempt is in 4 s")


def test_several_vms_are_backed_up_and_one_that_fails_keeps_no_other_from_it(stack: Stack) -> None:
    both = stack.ok("vm", "backup", "--all", "--json").json
    assert [(one["vm_id"], one["state"]) for one in both] == [(0, "DONE"), (1, "DONE")]
    assert re.search(r"VM 1: image \d, increment 1 ", stack.ok("vm", "backup", "db", "web").out)
    stack.disk("db").unlink()
    partly = stack("vm", "backup", "--all")
    assert re.search(r"VM 1: image \d, increment 2 ", partly.out)
    assert partly.code != 0
    assert "oned-backup: VM 0: " in partly.err
    assert "oned-backup: 1 of 2 failed" in partly.err
    assert stack("vm", "backup").code == 2
    assert stack("vm", "backup", "web", "--all").code == 2


def test_vms_without_a_disk_to_back_up_are_no_failure_of_all(stack: Stack) -> None:
    """At first the catalogue does not know that the disk has gone; later nothing is begun any more."""
    db = stack.host.find("db")
    definition = stack.host.root / f"{db.uuid}.json"
    with_disk = definition.read_text()
    definition.write_text(json.dumps({**json.loads(with_disk), "disks": []}))
    for _ in range(2):
        every = stack.ok("vm", "backup", "--all")
        assert "skipped: VM 0 (db) has no disk to back up: it has none" in every.err
        assert "VM 1: image " in every.out
    assert stack("vm", "backup", "db").code == 2
    assert len(stack.ok("operation", "list", "--vm", "db", "--json").json) == 1
    assert "FAILED" not in stack.ok("vm", "list").out
    definition.write_text(with_disk)
    assert "VM 0: image " in stack.ok("vm", "backup", "--all").out


def test_a_vm_that_is_gone_is_forgotten_and_its_backups_stay(stack: Stack, tmp_path: Path) -> None:
    stack.ok("vm", "backup", "--all")
    image = stack.ok("image", "list", "--vm", "db", "--json").json[0]["id"]
    db = stack.host.find("db")
    definition = stack.host.root / f"{db.uuid}.json"
    with_disk = definition.read_text()
    definition.unlink()
    gone = stack("vm", "backup", "--all")
    assert gone.code == NotFound.exit_code
    assert "oned-backup vm forget 0" in gone.err
    assert "its backups stay (1 image)" in stack.ok("vm", "forget", "db").out
    assert "FAILED" not in stack.ok("vm", "list").out
    told = stack.ok("metrics").out
    assert 'oned_backup_vm_restore_points{vm_id="0"}' in told
    for name in ("info", "last_success_timestamp_seconds", "last_backup_failed"):
        assert not re.search(rf'oned_backup_vm_{name}{{.*vm_id="0"', told)
        assert re.search(rf'oned_backup_vm_{name}{{.*vm_id="1"', told)
    assert "VM 0" not in stack.ok("vm", "backup", "--all").err
    stack.ok("image", "restore", str(image), "--to", str(tmp_path / "restored"))
    definition.write_text(with_disk)
    stack.ok("vm", "import", "lab", "db")
    assert "VM 0: image " in stack.ok("vm", "backup", "db").out
    stack.ok("vm", "forget", "db")
    for one in stack.ok("image", "list", "--vm", "db", "--json").json:
        stack.ok("image", "delete", str(one["id"]))
    assert [vm["name"] for vm in stack.ok("vm", "list", "--json").json] == ["web"]
