"""A real daemon: what anybody sends to its socket, who may open its files, and where secrets appear."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from product import Product

from oned_backup.client import Client
from oned_backup.errors import OnedBackupError
from oned_backup.hypervisor.dummy import DummyHost

SECRET = "correct-horse-battery-staple-42"  # noqa: S105 - made for this test
DRIVER = """#!/bin/sh
# a store that looks at its secret, and says all it knows
printf '<5>the secret has %s bytes\\n' "$(wc -c <"$ODB_SECRETS_DIR/KEY")" >&2
cat "$ODB_SECRETS_DIR/KEY" >&2
printf '%s' "$(tr '\\0' '\\n' </proc/$$/environ)" >"$ODB_DS_BASE_PATH/environ"
printf '%s' "$(tr '\\0' ' ' </proc/$$/cmdline)" >"$ODB_DS_BASE_PATH/cmdline"
stat -c '%a %n' "$ODB_SECRETS_DIR" "$ODB_SECRETS_DIR/KEY" . >"$ODB_DS_BASE_PATH/modes"
cat >"$ODB_DS_BASE_PATH/request"
case "$0" in */monitor) echo TOTAL_MB=999; echo USED_MB=1; echo FREE_MB=998; exit 0 ;; esac
echo "cannot open the vault with $(cat "$ODB_SECRETS_DIR/KEY")" >&2
exit 1
"""
TOML = """spec = 1
kind = "datastore"
name = "vault"
summary = "a store with a secret"

[parameters.BASE_PATH]
required = true
[parameters.KEY]
required = true
secret = true
"""


class Site:
    """A daemon with one simulated VM and a store whose driver talks too much."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        folder = directory / "drivers" / "datastore" / "vault"
        folder.mkdir(parents=True)
        (folder / "driver.toml").write_text(TOML)
        for action in ("backup", "backup_cancel", "restore", "download", "ls", "stat", "rm", "monitor"):
            (folder / action).write_text(DRIVER)
            (folder / action).chmod(0o755)
        self.store = directory / "store"
        self.store.mkdir()
        DummyHost(f"dummy://{directory}/host").create("web", {"vda": 1 << 20})
        self.product = Product(directory, driver_dirs=[directory / "drivers"])
        self.product.start()
        self.socket = self.product.run_dir / "api/daemon.sock"
        self.client = Client(self.socket)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    directory = Path(tempfile.mkdtemp(prefix="odb-", dir="/tmp"))
    site = Site(directory)
    try:
        yield site
    finally:
        site.product.stop()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.fault("security", "nonsense on the API's socket")
def test_no_bytes_bring_the_daemon_down(site: Site) -> None:
    chance = random.Random(11)
    words = [b"GET", b"POST", b" /v1/", b"vms", b"images/0/restore", b" HTTP/1.1\r\n", b"Content-Length: "]
    words += [
        b"99999999999",
        b"-1",
        b"\r\n\r\n",
        b'{"to": "',
        b"\0",
        b"\xff" * 9,
        b"[" * 5000,
        b"Host: x\r\n",
    ]
    for _ in range(150):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(str(site.socket))
            message = b"".join(chance.choices(words, k=chance.randrange(1, 12)))
            try:
                connection.sendall(message)
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(65536)
            except (BrokenPipeError, ConnectionResetError):
                continue
            assert b" 500 " not in answer.split(b"\r\n")[0], message
    assert site.client.get("status")["running"] == 0


@pytest.mark.fault("security", "nonsense on the API's socket")
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "hosts"),
        ("POST", "hosts/0/import"),
        ("PATCH", "vms/0/config"),
        ("POST", "vms/0/backup"),
        ("POST", "datastores"),
        ("POST", "images/0/restore"),
        ("POST", "images/0/verify"),
        ("POST", "downloads"),
        ("GET", "operations/op-%2e%2e%2f"),
        ("GET", "images/99999999999999999999"),
        ("GET", "resolve?kind=%00&ref=%ff"),
    ],
)
def test_every_wrong_body_is_the_callers_error(site: Site, method: str, path: str) -> None:
    values = [None, 5, "x" * 70_000, "\0", "../..", [], {}, {"a": {"b": 1}}, 1e400, -1, "é\ud800"]
    names = ["name", "uri", "to", "url", "target", "values", "percent", "increment_id", "all", "driver", "x"]
    bodies = [{name: value} for name in names for value in values]
    bodies += [
        {"name": "n", "driver": "fs", "values": {"BASE_PATH": value}} for value in ("..", "\0", "/" * 999)
    ]
    bodies += [
        {"url": "fs://1/-/0:a/0/disk.0", "target": value} for value in ("/proc/x/y", "relative", "/dev")
    ]
    for body in bodies:
        try:
            site.client._call(method, f"/v1/{path}", None if method == "GET" else body)
        except OnedBackupError as error:
            if type(error) is OnedBackupError or "internal error" in str(error):
                pytest.fail(f"{body}: {error}")
    assert site.client.get("status")["recovered"] is True


@pytest.mark.fault("security", "files and sockets open to others")
def test_files_and_sockets_are_the_daemons_own(site: Site) -> None:
    open_to_others = []
    for root in (site.product.state_dir, site.product.run_dir):
        for path in [root, *root.rglob("*")]:
            mode = stat.S_IMODE(path.stat(follow_symlinks=False).st_mode)
            inside = any(stat.S_IMODE(parent.stat().st_mode) & 0o077 == 0 for parent in path.parents)
            if (
                mode & 0o077
                and not inside
                and path not in {site.product.run_dir, site.product.run_dir / "nbd"}
            ):
                open_to_others.append(f"{mode:o} {path}")
    assert open_to_others == []
    for passage in (site.product.run_dir, site.product.run_dir / "nbd"):  # QEMU's sockets lie beneath
        assert stat.S_IMODE(passage.stat().st_mode) == 0o711
    assert stat.S_IMODE((site.product.state_dir / "secret.key").stat().st_mode) == 0o600


@pytest.mark.fault("security", "secrets in arguments, environment, log, journal, output")
def test_a_secret_appears_nowhere(site: Site) -> None:
    values = {"BASE_PATH": str(site.store), "KEY": SECRET}
    site.client.post("datastores", {"name": "vault", "driver": "vault", "values": values})
    host = {"name": "sim", "uri": f"dummy://{site.directory}/host", "vmm": "dummy", "tm": "dummy"}
    host_id = site.client.post("hosts", host)["id"]
    vm = site.client.post(f"hosts/{host_id}/import", {"all": True})[0]
    store = site.client.resolve("datastore", "vault")
    operation = site.client.post(f"vms/{vm['id']}/backup", {"datastore_id": store})["id"]
    ended = json.loads(site.product.call("operation", "show", operation, "--wait", "--json").stdout)
    assert ended["state"] == "FAILED"
    assert "***" in json.dumps(ended), "the driver's complaint has been lost"
    told = {
        "operation": json.dumps(ended),
        "table": site.product.call("operation", "show", operation).stdout.decode(),
        "datastore": json.dumps(site.client.get(f"datastores/{store}")),
        "measured": site.product.call("datastore", "monitor", "vault").stderr.decode(),
        "log": site.product.log.read_text(),
        **{name: (site.store / name).read_text() for name in ("environ", "cmdline", "request")},
    }
    for path in site.product.state_dir.rglob("*"):
        if path.is_file():
            told[str(path)] = path.read_bytes().decode("latin-1")
    assert [where for where, text in told.items() if SECRET in text] == []
    assert {line.split()[0] for line in (site.store / "modes").read_text().splitlines()} <= {"700", "600"}
    assert os.environ.get("KEY") is None
