"""The operator's commands against a real daemon, with the dummy hypervisor and the fs store."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from lab import wait_for

from oned_backup.client import Client, wait_for_end
from oned_backup.model.manifest import parse_manifest

from .conftest import Stack


def test_backup_verify_restore(stack: Stack, tmp_path: Path) -> None:
    listed = stack.ok("vm", "list", "--json").json
    assert [(vm["name"], vm["backups"], vm["last_backup"]) for vm in listed] == [
        ("db", 0, None),
        ("web", 0, None),
    ]
    said = stack.ok("vm", "backup", "web").out
    assert "image 0, increment 0 (FULL" in said
    assert "vda FULL (first-backup)" in said
    assert stack.ok("vm", "list", "--json").json[1]["last_backup"]["image_id"] == 0
    assert "1 backup whole" in stack.ok("image", "verify", "0").out
    assert stack.ok("vm", "list", "--json").json[1]["last_verified_at"] is not None
    target = tmp_path / "restored"
    stack.ok("image", "restore", "0", "--to", str(target), "--format", "raw")
    assert (target / "disk.0.raw").read_bytes() == stack.disk("web").read_bytes()
    assert sorted(path.name for path in target.iterdir()) == ["disk.0.raw", "domain.xml", "vm.xml"]
    assert stat.S_IMODE((target / "domain.xml").stat().st_mode) == 0o600


def test_a_restore_replaces_nothing(stack: Stack, tmp_path: Path) -> None:
    stack.ok("vm", "backup", "web")
    target = tmp_path / "restored"
    target.mkdir()
    (target / "disk.0.qcow2").write_text("precious")
    refused = stack("image", "restore", "0", "--to", str(target))
    assert refused.code == 4
    assert refused.err.splitlines()[0].endswith("disk.0.qcow2 exists already")
    assert [path.name for path in target.iterdir()] == ["disk.0.qcow2"]
    assert (target / "disk.0.qcow2").read_text() == "precious"


def test_download_to_file_and_stdout(stack: Stack, tmp_path: Path) -> None:
    stack.ok("vm", "backup", "db")
    (disk,) = stack.ok("image", "ls", "0", "--json").json
    stack.ok("download", disk["url"], str(tmp_path / "db.copy"))
    expected = stack.disk("db").read_bytes()
    assert (tmp_path / "db.copy").read_bytes() == expected
    again = stack("download", disk["url"], str(tmp_path / "db.copy"))
    assert again.code == 4
    assert "--overwrite" in again.err
    stack.ok("download", disk["url"], str(tmp_path / "db.copy"), "--overwrite")
    program = [sys.executable, "-m", "oned_backup", "--config", str(stack.daemon.config)]
    streamed = subprocess.run([*program, "download", disk["url"], "-"], capture_output=True, check=False)
    assert streamed.returncode == 0, streamed.stderr
    assert streamed.stdout == expected
    # When nobody reads it any more, it ends as if it were cancelled, without a word.
    headed = subprocess.run(
        ["sh", "-c", '"$@" | head -c 1', "sh", *program, "download", disk["url"], "-"],
        capture_output=True,
        check=False,
    )
    assert (headed.stdout, headed.stderr) == (expected[:1], b"")
    (operation,) = stack.ok("operation", "list", "--limit", "1", "--json").json
    assert stack("operation", "show", operation["id"], "--wait", "--json").json["state"] == "CANCELLED"
    # Interrupted, it goes on in nobody's name: nobody would read it.
    with subprocess.Popen([*program, "download", disk["url"], "-"], stdout=subprocess.PIPE) as streaming:
        assert streaming.stdout is not None
        assert streaming.stdout.read(1)  # the rest is more than a pipe holds
        streaming.send_signal(signal.SIGINT)
        assert streaming.wait(30) == 130
    (operation,) = stack.ok("operation", "list", "--limit", "1", "--json").json
    ended = stack("operation", "show", operation["id"], "--wait", "--json").json
    assert (ended["kind"], ended["state"]) == ("download", "CANCELLED")


def test_damage_is_found_named_and_ends_the_chain(stack: Stack, tmp_path: Path) -> None:
    stack.ok("vm", "backup", "web")
    (stored,) = stack.store.glob("*/2*/disk.0.0")
    data = bytearray(stored.read_bytes())
    data[-100] ^= 1
    stored.write_bytes(data)
    found = stack("image", "verify", "0")
    assert found.code == 65
    assert "disk.0.0" in found.err
    assert "oned-backup: image 0: backup " in found.err
    assert "note: the damaged chain is closed" in found.err
    shown = stack.ok("image", "show", "0", "--json").json
    assert shown["state"] == "BROKEN"
    assert shown["increments"][0]["state"] == "BROKEN"
    assert "disk.0.0" in shown["increments"][0]["failure"]
    refused = stack("image", "restore", "0", "--to", str(tmp_path / "out"))
    assert refused.code == 65
    assert not (tmp_path / "out").exists()
    saved = stack("image", "restore", "0", "--to", str(tmp_path / "out"), "--salvage")
    assert saved.code == 79, saved
    assert (tmp_path / "out" / "disk.0.qcow2").exists()
    again = stack.ok("vm", "backup", "web", "--json").json["result"]
    assert again["image_id"] == 1
    assert stack.ok("image", "verify", "1").code == 0


@pytest.mark.fault("daemon", "catalogue lost")
def test_a_lost_catalogue_is_rebuilt_from_the_store(stack: Stack, tmp_path: Path) -> None:
    stack.ok("vm", "set", "web", "MODE=FULL")
    for name in ("web", "db", "web"):
        stack.ok("vm", "backup", name)
    before = {path.parent.name for path in stack.store.glob("*/*/manifest.json")}
    assert stack.daemon.end() == 0
    for path in (tmp_path / "state").glob("*"):
        path.unlink() if path.is_file() else None
    stack.daemon.start()
    assert stack.ok("image", "list", "--json").json == []
    stack.ok("datastore", "create", "found", "--driver", "fs", f"BASE_PATH={stack.store}")
    said = stack.ok("datastore", "import", "found").out
    assert said == "3 backups imported into 3 images, 2 new VMs; known already: 0\n"
    images = stack.ok("image", "list", "--json").json
    known = {
        point["backup_id"]
        for image in images
        for point in stack.ok("image", "show", str(image["id"]), "--json").json["increments"]
    }
    assert known == before
    assert stack.ok("datastore", "import", "found").out.endswith("known already: 3\n")
    assert {vm["state"] for vm in stack.ok("vm", "list", "--json").json} == {"DONE"}
    newest = max(images, key=lambda image: image["id"])
    stack.ok("image", "verify", str(newest["id"]))
    stack.ok("image", "restore", str(newest["id"]), "--to", str(tmp_path / "out"), "--format", "raw")
    assert (tmp_path / "out" / "disk.0.raw").read_bytes() == stack.disk("web").read_bytes()
    root = stack.host.root
    stack.ok("host", "add", "lab", "--uri", f"dummy://{root}", "--vmm", "dummy", "--tm", "dummy")
    adopted = stack.ok("vm", "import", "lab", "--all", "--json").json
    assert {vm["result"] for vm in adopted} == {"adopted"}
    assert stack.ok("vm", "backup", "web").code == 0


def test_a_host_has_directories_of_its_own(shared: Stack) -> None:
    changed = shared.ok("host", "update", "lab", "REMOTE_DIR=/srv/odb", "--json").json
    assert changed["paths"]["REMOTE_DIR"] == "/srv/odb"
    assert "/srv/odb" in shared.ok("host", "show", "lab").out
    refused = shared("host", "update", "lab", "URI=qemu:///system")
    assert (refused.code, "REMOTE_DIR, SWTPM_DIR" in refused.err) == (2, True)
    shared.ok("host", "update", "lab", "REMOTE_DIR=")
    assert shared.ok("host", "show", "lab", "--json").json["paths"]["REMOTE_DIR"] == "/run/oned-backup"


def test_delete_forgets_and_removes(stack: Stack) -> None:
    stack.ok("vm", "backup", "web")
    refused = stack("datastore", "delete", "store")
    assert refused.code == 4
    stack.ok("image", "delete", "0")
    assert list(stack.store.glob("*/2*")) == []
    assert stack("image", "show", "0").code == 66
    stack.ok("datastore", "delete", "store")
    assert (stack.store / ".oned-backup-store").exists()


def test_a_datastore_that_compresses(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    create = ("datastore", "create", "packed", "--driver", "fs", f"BASE_PATH={tmp_path}/packed/")
    refused = stack(*create, "COMPRESSION=gzip")
    assert refused.code == 2
    assert "COMPRESSION='gzip' does not fit" in refused.err
    made = stack.ok(*create, "COMPRESSION=zstd:1", "--json").json
    assert made["base_path"] == f"{tmp_path}/packed"
    stack.ok("vm", "backup", "web", "-d", "packed")
    shown = stack.ok("image", "show", "0", "--json").json["increments"][0]["disks"][0]
    (stored,) = (tmp_path / "packed").glob("*/*/disk.0.0")
    assert shown["stored_bytes"] == stored.stat().st_size < shown["uncompressed_bytes"]
    assert " of " in stack.ok("image", "show", "0").out
    assert stack.ok("image", "verify", "0").code == 0
    stack.ok("image", "restore", "0", "--to", str(tmp_path / "out"), "--format", "raw")
    assert (tmp_path / "out" / "disk.0.raw").read_bytes() == stack.disk("web").read_bytes()


def test_two_vms_are_backed_up_side_by_side(shared: Stack) -> None:
    first = shared.ok("vm", "backup", "web", "--no-wait").out.strip()
    second = shared.ok("vm", "backup", "db", "--no-wait").out.strip()
    for operation in (first, second):
        assert shared.ok("operation", "show", operation, "--wait", "--json").json["state"] == "DONE"


def test_nothing_to_cancel(shared: Stack) -> None:
    refused = shared("vm", "backup-cancel", "web")
    assert refused.code == 4
    assert refused.err == "oned-backup: VM 1: no backup in progress\n"


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["vm", "show", "nobody"], 66, "there is no VM 'nobody'"),
        (["vm", "set", "web", "FS_FREEZE=MAYBE"], 2, "FS_FREEZE=MAYBE is not valid"),
        (["vm", "set", "web", "COLOUR=red"], 2, "COLOUR"),
        (["vm", "set", "web", "KEEP_LAST"], 2, "'KEEP_LAST' is not KEY=VALUE"),
        (["vm", "import", "lab"], 2, "name the domains"),
        (["vm", "import", "lab", "ghost"], 66, "no domain 'ghost'"),
        (["datastore", "create", "x", "--driver", "fs"], 2, "BASE_PATH is missing"),
        (["datastore", "create", "x", "--driver", "tape"], 66, "no datastore driver 'tape'"),
        (["datastore", "create", "x", "--driver", "fs", "BASE_PATH=/nowhere/at/all"], 69, "is not there"),
        (["download", "nonsense", "/nowhere/x"], 2, "not a pseudo-URL"),
        (["download", "0:1", "-"], 2, "is several files"),
        (["operation", "show", "op-none"], 66, "there is no operation op-none"),
        (["image", "restore", "9", "--to", "/nowhere/x"], 66, "there is no image 9"),
        (["host", "add", "x", "--uri", "dummy:///none", "--vmm", "dummy", "--tm", "dummy"], 69, "not there"),
        (["vm", "frobnicate"], 2, "No such command"),
        (["image", "show", "NaN"], 2, "IMAGE"),
        (["image", "show", "9" * 20], 2, "too large"),
        (["vm", "show", "9" * 5000], 66, "there is no VM"),
        (["vm", "backup", "web", "-d", "9" * 20], 66, "there is no datastore"),
        (["operation", "show", "a b/ü"], 66, "operations/a%20b/%C3%BC: Not Found"),
        (["operation", "show", ""], 2, "not empty"),
    ],
)
def test_errors_are_one_line_with_a_code(shared: Stack, arguments: list[str], code: int, text: str) -> None:
    ran = shared(*arguments)
    assert ran.code == code, ran
    first, *rest = ran.err.splitlines()
    assert first.startswith("oned-backup: ")
    assert text in first
    assert len(rest) <= 1
    assert "Traceback" not in ran.err
    assert ran.out == ""


def test_tables_fit_80_columns(shared: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shared.ok("vm", "backup", "web")
    for command in (
        ["vm", "list"],
        ["vm", "show", "web"],
        ["image", "list"],
        ["image", "show", "0"],
        ["host", "list"],
        ["datastore", "list"],
        ["operation", "list"],
        ["driver", "list"],
    ):
        lines = shared.ok(*command).out.splitlines()
        assert lines
        assert max(len(line) for line in lines if "00000" not in line and "/" not in line) <= 80, command
    monkeypatch.delenv("COLUMNS")
    summaries = shared.ok("driver", "list", "--json").json["drivers"]
    piped = shared.ok("driver", "list").out.splitlines()
    assert len(piped) == 2 + len(summaries), "a row is a line for who reads it from a pipe"


def test_vm_show_tells_why_a_disk_is_left_out(shared: Stack) -> None:
    shared.ok("vm", "set", "web", "DISK_IDS=0")
    (disk,) = shared.ok("vm", "show", "web", "--json").json["disks"]
    assert disk["included"] is True
    refused = shared("vm", "set", "web", "DISK_IDS=7")
    assert refused.code == 2
    assert "has no disk 7" in refused.err


def test_the_socket_is_private(shared: Stack) -> None:
    run_dir = shared.daemon.directory / "run"
    assert stat.S_IMODE(run_dir.stat().st_mode) == 0o711
    assert stat.S_IMODE((run_dir / "api").stat().st_mode) == 0o700
    assert stat.S_IMODE((run_dir / "api/daemon.sock").stat().st_mode) == 0o600
    assert stat.S_IMODE((shared.daemon.directory / "state").stat().st_mode) == 0o700


def test_one_daemon_for_a_state_directory(shared: Stack) -> None:
    program = [sys.executable, "-m", "oned_backup", "--config", str(shared.daemon.config), "serve"]
    second = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode == 4, second
    shared.ok("host", "list")


def test_a_killed_daemon_comes_back_and_tells_systemd(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    stack.ok("vm", "backup", "web")
    assert stack.daemon.end(signal.SIGKILL) == -signal.SIGKILL
    unreachable = stack("host", "list")
    assert unreachable.code == 5
    assert "oned-backup serve" in unreachable.err
    work = stack.daemon.directory / "state/work"
    left = [work / name for name in ("op-0123456789ab-x1", "query-0123456789ab-x1")]
    for path in left:
        path.mkdir()
    address = stack.daemon.directory / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(address))
        systemd.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(address))
        stack.daemon.start()
        assert systemd.recv(100) == b"READY=1"
    assert not any(path.exists() for path in left)
    assert stack.ok("vm", "list", "--json").json[1]["backups"] == 1
    assert stack.daemon.end() == 0
    assert not (stack.daemon.directory / "run/api/daemon.sock").exists()


def test_a_document_of_each_kind_in_json(stack: Stack) -> None:
    stack.ok("vm", "backup", "web")
    image = stack.ok("image", "show", "0", "--json").json
    assert image["document"]["TYPE"] == "6"
    assert stack.ok("vm", "show", "1", "--json").json["document"]["BACKUPS"]["BACKUP_IDS"]["ID"] == ["0"]
    assert stack.ok("datastore", "show", "store", "--json").json["document"]["DS_MAD"] == "fs"
    operations = stack.ok("operation", "list", "--json").json
    shown = stack.ok("operation", "show", operations[0]["id"], "--json").json
    assert [step["name"] for step in shown["steps"]] == ["PLAN", "PREPARE", "STORE", "RECORD", "CLEAN"]
    (manifest,) = stack.store.glob("*/2*/manifest.json")
    assert parse_manifest(manifest.read_text()).id == image["increments"][0]["backup_id"]
    assert json.loads(json.dumps(shown)) == shown


def test_many_who_wait_keep_nobody_from_being_answered(shared: Stack, tmp_path: Path) -> None:
    shared.ok("vm", "backup", "web")
    (url,) = {disk["url"] for disk in shared.ok("image", "ls", "0", "--json").json}
    os.mkfifo(tmp_path / "fifo")
    client = Client(shared.daemon.directory / "run/api/daemon.sock")
    running = client.post("downloads", {"url": url, "target": str(tmp_path / "fifo")})["id"]
    version, step = 0, ""
    while step != "DOWNLOAD":  # from then on nothing changes: nobody reads the FIFO
        view = client.get(f"operations/{running}", wait_s=20, seen=version)
        version, step = view["version"], (view["progress"] or {}).get("step")
    with ThreadPoolExecutor(60) as pool:
        waiting = [
            pool.submit(client.get, f"operations/{running}", wait_s=20, seen=version) for _ in range(60)
        ]
        # by then there are more connections than the 40 threads that answer everything else
        wait_for("connections", lambda: shared.daemon.open_files() > len(waiting))
        client.get("status")
        answered_first = not any(one.done() for one in waiting)
        shared.ok("operation", "cancel", running)
        for one in waiting:
            one.result()
    assert answered_first


def test_a_full_standard_output(shared: Stack) -> None:
    shared.ok("vm", "backup", "web")
    url = shared.ok("image", "ls", "0", "--json").json[0]["url"]
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "oned_backup", "download", url, "-"],
            stdout=full,
            stderr=subprocess.PIPE,
            env={**os.environ, "ODB_CONFIG": str(shared.daemon.config)},
            check=False,
        )
    assert ended.returncode == 73
    assert ended.stderr.decode() == "oned-backup: standard output: No space left on device\n"


def test_groups_of_commands_show_what_there_is(shared: Stack) -> None:
    ran = shared("vm")
    assert ran.code == 2
    assert "backup-cancel" in ran.err
    assert not ran.err.startswith("oned-backup:")


def test_retention_says_why_and_does_it(stack: Stack) -> None:
    for _ in range(3):
        stack.ok("vm", "backup", "web")
    stack.ok("vm", "set", "web", "KEEP_LAST=1")
    assert stack.ok("image", "pin", "0", "--increment", "0").out == "image 0: pinned: 0\n"
    dry = stack.ok("vm", "retention", "web", "--dry-run").out.splitlines()
    assert [" ".join(line.split()[6:]) for line in dry[1:]] == [
        "kept pinned",
        "merged into 2 no rule keeps it",
        "kept newest good one; the next increment continues it; KEEP_LAST 1 of 1",
    ]
    assert len(stack.ok("image", "show", "0", "--json").json["increments"]) == 3
    done = stack.ok("vm", "retention", "web").out.splitlines()
    assert done[:4] == dry
    assert done[4].startswith("image 0: 1 merged into 2 (")
    shown = stack.ok("image", "show", "0", "--json").json["increments"]
    assert [(point["increment_id"], point["parent_id"], point["pinned"]) for point in shown] == [
        (0, -1, True),
        (2, 0, False),
    ]
    assert "GOOD, pinned" in stack.ok("image", "show", "0").out
    assert "2 backups whole" in stack.ok("image", "verify", "0").out
    refused = stack("image", "delete", "0")
    assert refused.code == 4
    assert "image unpin 0 --increment 0" in refused.err


def test_an_increment_is_deleted(stack: Stack) -> None:
    for _ in range(4):
        stack.ok("vm", "backup", "web")
    assert "increment 1 merged into increment 2" in stack.ok("image", "delete", "0", "--increment", "1").out
    assert "deleted" in stack.ok("image", "delete", "0", "--increment", "3").out
    chain = stack.ok("image", "show", "0", "--json").json["increments"]
    assert [point["increment_id"] for point in chain] == [0, 2]
    missing = stack("image", "delete", "0", "--increment", "3")
    assert (missing.code, "It has 0, 2." in missing.err) == (66, True)
    assert "FULL" in stack.ok("vm", "backup", "web").out
    stack.ok("image", "delete", "1", "--increment", "0")
    assert len(stack.ok("image", "list", "--json").json) == 1


def test_what_can_be_seen_to_be_wrong_at_once_begins_nothing(stack: Stack, tmp_path: Path) -> None:
    stack.ok("vm", "backup", "web")
    url = stack.ok("image", "ls", "0", "--json").json[0]["url"]
    to = str(tmp_path / "out")
    stack.ok("datastore", "update", "store", "SCRUB_GB_PER_DAY=0")
    begun = {one["id"] for one in stack.ok("operation", "list", "--json").json}
    for code, words, said in (
        (66, ("image", "restore", "0", "--to", to, "--increment", "9"), "there is no increment 9"),
        (2, ("image", "restore", "0", "--to", to, "--format", "vmdk"), "'vmdk' is none of qcow2, raw"),
        (2, ("image", "restore", "0", "--to", ""), "--to names no directory"),
        (66, ("image", "verify", "0", "--increment", "9"), "there is no increment 9"),
        (2, ("image", "verify", "0", "--percent", "0"), "percent"),
        (66, ("image", "show", "0", "--increment", "9"), "there is no increment 9"),
        (2, ("download", url, to, "--format", "vdi"), "'vdi' is none of qcow2, raw"),
        (2, ("download", url.replace("fs:", "restic:"), to), "has driver fs, not restic"),
        (64, ("datastore", "prune", "store"), "nothing to prune"),
        (4, ("datastore", "scrub", "store"), "its budget for scrubbing is 0"),
        (2, ("operation", "list", "--kind", "foo"), "no operations of kind 'foo'"),
        (66, ("vm", "show", "99"), "there is no VM 99"),
    ):
        ran = stack(*words)
        assert (ran.code, ran.out) == (code, ""), (words, ran)
        assert said in ran.err, words
    assert {one["id"] for one in stack.ok("operation", "list", "--json").json} == begun


def test_who_waits_for_an_operation_outlives_a_restart_of_the_daemon(stack: Stack) -> None:
    api = Client(stack.daemon.directory / "run/api/daemon.sock")
    queued = api.post("vms/1/backup")
    assert stack.daemon.end(signal.SIGKILL) == -signal.SIGKILL
    lost = threading.Event()
    with ThreadPoolExecutor(1) as beside:
        waiting = beside.submit(wait_for_end, api, queued, lost=lost.set)
        assert lost.wait(30)
        stack.daemon.start()
        ended = waiting.result(60)
    assert ended["id"] == queued["id"]
    assert ended["state"] in {"DONE", "FAILED"}
