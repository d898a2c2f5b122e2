"""Everything that a datastore with secrets can be used for, while somebody watches the whole machine.

No secret may be seen in any process's arguments or environment, in the log, the journal, the
catalogue, or what commands print, and no file or socket may be open to others.
"""

from __future__ import annotations

import base64
import http.server
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self

import pytest
from lab import wait_for
from product import Product
from sshd import Sshd

from oned_backup.hypervisor.dummy import DummyHost

SECRETS = {
    "password": "correct-horse-battery-staple-42",
    "wrong": "wrong-horse-battery-staple-43",
    "access": "AKIAODBTESTACCESSKEY",
    "key": "s3cr3t/key+of-the-bucket-44444",
}
FORMS = {
    form: name
    for name, secret in SECRETS.items()
    for form in (secret, base64.b64encode(secret.encode()).decode().rstrip("=")[:-1])
}
CLUSTER = 65536


class Watch:
    """Looks at all processes of the machine, and at the files of a daemon, as often as it can."""

    def __init__(self, directories: list[Path]) -> None:
        self.seen: set[str] = set()
        self.open_to_others: set[str] = set()
        self.rounds = 0
        self.programs: set[str] = set()
        self._directories = directories
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(30)

    def _run(self) -> None:
        while not self._end.is_set():
            for process in os.listdir("/proc"):  # noqa: PTH208 - quicker
                if process.isdecimal() and int(process) != os.getpid():
                    self._look_at(process)
            if self.rounds % 10 == 0:
                for directory in self._directories:
                    self._look_into(directory)
            self.rounds += 1
            self._end.wait(0.02)

    def _look_at(self, process: str) -> None:
        with suppress(OSError):  # it has ended meanwhile
            for name in ("cmdline", "environ"):
                with open(f"/proc/{process}/{name}", "rb") as file:  # noqa: PTH123 - quicker
                    text = file.read().replace(b"\0", b" ").decode("latin-1")
                if name == "cmdline":
                    self.programs.add(Path(text.partition(" ")[0]).name)
                self.seen |= {f"{FORMS[form]} in {name}: {text[:200]}" for form in FORMS if form in text}

    def _look_into(self, directory: Path) -> None:
        """Note what others could open: all that is not below a directory that is ours alone."""
        with suppress(FileNotFoundError):
            status = directory.lstat()
            mode = stat.S_IMODE(status.st_mode)
            passage = stat.S_ISDIR(status.st_mode) and mode == 0o711  # QEMU's sockets lie beneath
            if mode & 0o077 and not passage:
                self.open_to_others.add(f"{mode:o} {directory}")
            if passage:
                for entry in directory.iterdir():
                    self._look_into(entry)


class Refusing(http.server.BaseHTTPRequestHandler):
    """An S3 service that refuses everybody, and repeats what it was given."""

    def _refuse(self) -> None:
        repeated = self.headers.get("Authorization", "")[:200]
        said = f"The Access Key Id you provided does not exist in our records: {repeated}"
        body = f"<Error><Code>InvalidAccessKeyId</Code><Message>{said}</Message></Error>".encode()
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _refuse  # noqa: N815 - http.server's names

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def bucket() -> Iterator[str]:
    """The endpoint of a service that refuses."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


class Site:
    """A daemon with one simulated VM, and stores behind sshd and in a bucket."""

    def __init__(self, directory: Path, sshd: Sshd, bucket: str) -> None:
        self.directory = directory
        self.bucket = bucket
        self.account = dict(zip(("user", "host"), sshd.target.split("@"), strict=True))
        self.fingerprint = sshd.fingerprint
        self.said: list[str] = []
        host = DummyHost(f"dummy://{directory}/host")
        self.disk = Path(host.create("web", {"vda": 24 * CLUSTER}).disks[0].source)
        self.product = Product(directory)
        with (directory / "config.toml").open("a") as file:
            file.write("[retry]\nfor_s = 1\nfirst_wait_s = 0.1\n")
            file.write(f'[ssh]\nidentity_file = "{sshd.directory}/id"\ninclude = "{sshd.directory}/hosts"\n')
        for name, secret in SECRETS.items():
            (directory / name).write_text(secret)
            (directory / name).chmod(0o600)
        for name in ("vault", "offsite"):
            (directory / name).mkdir()

    def __call__(self, *words: str, fails: bool = False) -> str:
        """Run a command, whose words are kept."""
        done = self.product.call(*words)
        said = f"$ {' '.join(words)}\n{(done.stdout + done.stderr).decode('latin-1')}"
        self.said.append(said)
        print(said)
        assert (done.returncode != 0) is fails, f"{said}\n{self.product.log.read_text()[-3000:]}"
        return done.stdout.decode("latin-1")

    def write(self, number: int) -> None:
        """The guest writes."""
        with self.disk.open("r+b") as file:
            file.seek(number * CLUSTER)
            file.write(os.urandom(CLUSTER))

    def create(self, name: str, driver: str, **values: str) -> None:
        """A datastore on the server."""
        self(
            *("datastore", "create", name, "--driver", driver, "--accept-host-key", self.fingerprint),
            *(f"{key}={value}" for key, value in values.items()),
        )


@pytest.fixture
def site(tmp_path: Path, bucket: str) -> Iterator[Site]:
    directory = Path(tempfile.mkdtemp(prefix="odb-", dir="/tmp"))
    with Sshd(tmp_path / "server") as sshd:
        site = Site(directory, sshd, bucket)
        try:
            site.product.start()
            yield site
        finally:
            site.product.stop()
            shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.fault("security", "secrets in arguments, environment, log, journal, output")
@pytest.mark.fault("security", "files and sockets open to others")
@pytest.mark.timeout(600)
def test_no_secret_is_seen_anywhere_during_a_whole_run(site: Site) -> None:
    user, host = site.account["user"], site.account["host"]
    with Watch([site.product.state_dir, site.product.run_dir]) as watch:
        site(
            "host", "add", "sim", "--uri", f"dummy://{site.directory}/host", "--vmm", "dummy", "--tm", "dummy"
        )
        site("vm", "import", "sim", "--all")
        site("vm", "set", "0", "MODE=INCREMENT")
        vault = {
            "BASE_PATH": f"{site.directory}/vault",
            "RESTIC_SFTP_USER": user,
            "RESTIC_SFTP_SERVER": host,
            "RESTIC_PASSWORD": f"@{site.directory}/password",
        }
        site.create("vault", "restic", **vault)
        site.create(
            "offsite", "rsync", BASE_PATH=f"{site.directory}/offsite", RSYNC_USER=user, RSYNC_HOST=host
        )
        all_goes_well(site)
        much_goes_wrong(site)
        for words in (
            ("datastore", "show", "vault", "--json"),
            ("vm", "show", "0", "--json"),
            ("operation", "list", "--failed", "--json"),
            ("metrics",),
        ):
            site(*words)
    assert watch.rounds > 100
    assert {"restic", "ssh", "rsync"} <= watch.programs, "the programs that have the secrets were not seen"
    assert watch.seen == set()
    assert watch.open_to_others == set()
    assert [said for said in site.said if told(said)] == []
    assert not told(site.product.log.read_text())
    kept = [path for path in site.product.state_dir.rglob("*") if path.is_file()]
    assert [path for path in kept if told(path.read_bytes().decode("latin-1"))] == []


@pytest.mark.parametrize("where", ["cmdline", "environ"])
def test_the_watch_would_see_a_secret(tmp_path: Path, where: str) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    secret = SECRETS["password"]
    argv = [sys.executable, "-c", "import time; time.sleep(60)", *([secret] if where == "cmdline" else [])]
    with Watch([tmp_path / "open"]) as watch:
        process = subprocess.Popen(argv, env={"PASSWORD": secret} if where == "environ" else {})
        try:
            wait_for("sight of the secret", lambda: bool(watch.seen and watch.open_to_others), 20)
        finally:
            process.kill()
            process.wait()
    assert all(text.startswith(f"password in {where}") for text in watch.seen)


def told(text: str) -> set[str]:
    """The secrets in a text."""
    return {FORMS[form] for form in FORMS if form in text}


def all_goes_well(site: Site) -> None:
    for number, store in enumerate(("vault", "vault", "offsite")):
        site.write(number)
        site("vm", "backup", "0", "-d", store)
    site("image", "verify", "0")
    site("image", "restore", "0", "--increment", "1", "--to", f"{site.directory}/restored")
    (line, *_) = site("image", "ls", "0").splitlines()
    site("download", line.split()[-1], f"{site.directory}/disk.raw")
    site("image", "delete", "0", "--increment", "0")
    site("datastore", "prune", "vault")
    site("image", "delete", "1")


def much_goes_wrong(site: Site) -> None:
    create = ("datastore", "create", "bucket", "--driver", "restic", "RESTIC_BACKEND=S3")
    site(
        *create,
        "RESTIC_S3_BUCKET=backups",
        f"RESTIC_S3_ENDPOINT={site.bucket}",
        "RESTIC_S3_FORCE_PATH_STYLE=yes",
        f"RESTIC_PASSWORD=@{site.directory}/password",
        f"RESTIC_S3_ACCESS_KEY_ID=@{site.directory}/access",
        f"RESTIC_S3_SECRET_ACCESS_KEY=@{site.directory}/key",
        fails=True,
    )
    refused = site.said[-1]
    assert "do not open it (HTTP 403)" in refused, refused
    site("datastore", "update", "vault", f"RESTIC_PASSWORD=@{site.directory}/wrong", fails=True)
    assert "does not open" in site.said[-1], site.said[-1]
    (site.directory / "vault").rename(site.directory / "away")
    site("vm", "backup", "0", "-d", "vault", fails=True)
    (site.directory / "away").rename(site.directory / "vault")
