"""What takes bytes from outside, as functions that must end with a value or one of our errors, and soon.

`TARGETS[name].run(data)` raises nothing but what is a fault. `seeds()` are real files and
documents: made by qemu-img, by our own writers, and by hand. `test_fuzz.py` tries each for a
moment, `make fuzz SECONDS=…` as long as you like.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from oned_backup import xmldoc
from oned_backup.api.app import make_app
from oned_backup.config import Settings
from oned_backup.contract.actions import ACTIONS
from oned_backup.contract.documents import Catalogue, Listing, RestorePlan, VerifyReport
from oned_backup.contract.exports import Exports
from oned_backup.contract.request import Request
from oned_backup.contract.result import parse_result
from oned_backup.contract.url import parse_url
from oned_backup.daemon.service import Service
from oned_backup.disk.blocks import BlockDigests
from oned_backup.disk.chain import ChainReader, Layer
from oned_backup.disk.scrub import verify_blocks
from oned_backup.errors import OnedBackupError
from oned_backup.hypervisor import domain as domains
from oned_backup.model.domain import rebuild_domain
from oned_backup.model.manifest import dump_manifest, parse_manifest
from oned_backup.runner.stderr import MAX_LINES, SHOWN_CHARACTERS, StderrReader
from oned_backup.sdk.opennebula import plain_vm_xml

_SECRET = "hunter2-hunter2"  # noqa: S105 - made for this
_MOST_READ = 4 << 20
_CLUSTER = 65536


@dataclass(frozen=True)
class Target:
    """`run` takes anything; `seeds` is what it is made for."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


# --- texts


def _url(data: bytes) -> None:
    with suppress(OnedBackupError):
        found = parse_url(data.decode("utf-8", "replace"))
        assert parse_url(str(found)) == found, "the canonical form is another one"
        assert ".." not in {part for _, source in found.chain for part in source.split("/")}


def _result(data: bytes) -> None:
    actions = sorted(ACTIONS.values(), key=lambda action: (action.kind, action.name))
    action = actions[data[0] % len(actions)] if data else actions[0]
    with suppress(OnedBackupError):
        assert set(parse_result(action, data[1:])) <= {*action.required, *action.optional}


def _stderr(data: bytes) -> None:
    lines: list[str] = []
    reader = StderrReader(secrets=[_SECRET], log=lambda _level, line: lines.append(line))
    size = 1 + (data[0] if data else 0)
    for start in range(0, len(data), size):
        reader.feed(data[start : start + size])
    reader.feed(f"\nthe password is {_SECRET}\n".encode())
    reader.close()
    assert len(lines) <= MAX_LINES + 1
    for line in [*lines, reader.message]:
        assert _SECRET not in line
        assert len(line) <= SHOWN_CHARACTERS + 2
        assert "\n" not in line
        assert "\x1b" not in line


def _manifest(data: bytes) -> None:
    with suppress(OnedBackupError):
        parse_manifest(data)
    with suppress(OnedBackupError, ValueError, TypeError, RecursionError):  # ours to make, not to read
        whole = dump_manifest(json.loads(data))
        with suppress(OnedBackupError):
            parse_manifest(whole)
            return


_FROM_XML: dict[str, Callable[[xmldoc.Element], Any]] = {
    "LISTING": Listing.from_xml,
    "PLAN": RestorePlan.from_xml,
    "REPORT": VerifyReport.from_xml,
    "CATALOGUE": Catalogue.from_xml,
    "EXPORTS": Exports.from_xml,
    "REQUEST": Request.from_xml,
}


def _document(data: bytes) -> None:
    with suppress(OnedBackupError):
        plain_vm_xml(data)
    with suppress(OnedBackupError):
        root = xmldoc.parse(data, max_bytes=1 << 20)
        typed = _FROM_XML.get(str(root.tag))
        if typed is not None:
            typed(root)


def _domain(data: bytes) -> None:
    with suppress(OnedBackupError):
        root = xmldoc.parse(data, max_bytes=1 << 20)
        with suppress(OnedBackupError):
            domains.disks(root)
        with suppress(OnedBackupError):
            domains.nvram_path(root)
        rebuilt = rebuild_domain(root, name="b", disks={}, allowed_roots=["/srv"]).element
        assert not {"commandline", "hostdev", "emulator", "filesystem"} & {
            str(one.tag) for one in rebuilt.iter()
        }
        for element in rebuilt.iter():
            values = [str(value) for value in element.attrib.values()]
            assert not any(value.startswith(("/", "../")) or value == ".." for value in values), values
            assert element.tag != "source" or not {"file", "path"} & {str(name) for name in element.attrib}


# --- files


@contextmanager
def _file(data: bytes) -> Iterator[Path]:
    descriptor = os.memfd_create("fuzz")
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _image(data: bytes) -> None:
    for foreign in (False, True):
        with _file(data) as path, suppress(OnedBackupError):
            _read_disk(Layer(path=path, blocks=None, name="x", foreign=foreign))


def _read_disk(layer: Layer) -> None:
    with ChainReader([layer]) as chain:
        chain.data()
        buffer = memoryview(bytearray(_CLUSTER))
        for offset in range(0, min(chain.guest_bytes, _MOST_READ), _CLUSTER):
            chain.read_into(offset, buffer[: min(_CLUSTER, chain.guest_bytes - offset)])


def _blocks(data: bytes) -> None:
    """Damaged checksums of a good image: what is read must be what the image holds, or an error."""
    image = _images()[0]
    with _file(image) as path, _file(data) as blocks, suppress(OnedBackupError):
        verify_blocks(path, blocks)
        with ChainReader([Layer(path=path, blocks=blocks, name="x")]) as chain:
            buffer = memoryview(bytearray(_CLUSTER))
            chain.read_into(0, buffer)


# --- the API


@cache
def _app() -> Callable[..., Any]:
    directory = Path(tempfile.mkdtemp(prefix="odb-fuzz-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    service = Service.open(Settings(state_dir=directory / "state", run_dir=directory / "run"))
    app: Callable[..., Any] = make_app(service)  # never started: nothing that is queued is run
    return app


def _api(data: bytes) -> None:
    """`METHOD path?query\\nbody` as an HTTP server hands it over; 500 is a fault."""
    line, _, body = data.partition(b"\n")
    method, _, rest = line.decode("latin-1").partition(" ")
    path, _, query = rest.partition("?")
    method = method if method in {"GET", "POST", "PATCH", "DELETE", "PUT"} else "GET"
    assert asyncio.run(_status(method, path, query, body)) not in {500, None}, data


async def _status(method: str, path: str, query: str, body: bytes) -> int | None:
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": "/" + path.lstrip("/"),
        "raw_path": path.encode("latin-1"),
        "query_string": query.encode("latin-1"),
        "root_path": "",
        "headers": [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ],
        "client": None,
        "server": ("localhost", 80),
    }
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await _app()(scope, receive, send)
    return statuses[0] if statuses else None


# --- seeds


@cache
def _images() -> list[bytes]:
    """Small images as qemu-img writes them: plain, compressed in both ways, with a backing file, old."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw = folder / "raw"
        with raw.open("wb") as file:
            file.truncate(1 << 20)
            file.seek(65536)
            file.write(bytes(range(256)) * 256)
            file.seek(9 * 65536 + 512)
            file.write(b"odd" * 1000)
        for number, options in enumerate(
            (
                ["convert", "-f", "raw", "-O", "qcow2"],
                ["convert", "-f", "raw", "-O", "qcow2", "-c"],
                ["convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd"],
                ["convert", "-f", "raw", "-O", "qcow2", "-o", "compat=0.10"],
                ["convert", "-f", "raw", "-O", "qcow2", "-o", "data_file=x,data_file_raw=on"],
                ["convert", "-f", "raw", "-O", "qcow2", "-o", "extended_l2=on,cluster_size=128k"],
            )
        ):
            image = folder / f"{number}.qcow2"
            argv = ["qemu-img", *options, str(raw), str(image)]
            subprocess.run(argv, check=True, capture_output=True, cwd=folder)
            found.append(image.read_bytes())
        for backing in ("raw", "json:{}", "/etc/passwd"):
            image = folder / "overlay.qcow2"
            argv = ["qemu-img", "create", "-u", "-f", "qcow2", "-F", "raw", "-b", backing, str(image), "1M"]
            subprocess.run(argv, check=True, capture_output=True, cwd=folder)
            found.append(image.read_bytes())
    # Fits a header and not the byte behind it that the header announces.
    return [*found, *(image[:104] for image in found[2:3])]


def _block_files() -> list[bytes]:
    digests = BlockDigests()
    digests.update(memoryview(_images()[0]))
    digests.finish()
    found = b"".join(digests.file_bytes())
    digests.close()
    return [found, found[:64]]


_MANIFEST: dict[str, Any] = {
    "id": "20261121-000000-abcdef",
    "chain_id": "20261121-000000-abcdef",
    "parent_id": "",
    "increment_id": 0,
    "type": "FULL",
    "date": 1_800_000_000,
    "vm_id": 1,
    "vm": {"id": 1, "name": "web", "uuid": "9a1c2b3d-0000-4000-8000-000000000001"},
    "disks": [
        {
            "disk_id": 0,
            "target": "vda",
            "type": "FULL",
            "reason": "first-backup",
            "file": "disk.0.0",
            "parent_id": "",
            "size_bytes": 5,
            "format": "qcow2",
            "source": "/srv/a",
        }
    ],
    "files": [{"name": "disk.0.0", "size_bytes": 5, "blake3": "ab" * 32}],
}

_DISK = (
    "<DISK><DISK_ID>0</DISK_ID><URL>fs://100/-/0:a/3/disk.0</URL><SIZE_BYTES>5</SIZE_BYTES>"
    "<FILE>disk.0.0</FILE></DISK>"
)
_DOCUMENTS = [
    f"<LISTING>{_DISK}</LISTING>",
    (
        f"<PLAN><BACKUP_ID>a</BACKUP_ID><INCREMENT_ID>1</INCREMENT_ID>{_DISK}"
        "<FILE><NAME>vm.xml</NAME><CONTENT>PFZNLz4=</CONTENT></FILE></PLAN>"
    ),
    (
        "<REPORT><BACKUP><ID>a</ID><READ_BYTES>5</READ_BYTES>"
        "<FAILURE><FILE>f</FILE><TEXT>t</TEXT></FAILURE></BACKUP></REPORT>"
    ),
    '<CATALOGUE><MANIFEST>{"a": 1}</MANIFEST><UNREADABLE><ID>b</ID><TEXT>t</TEXT></UNREADABLE></CATALOGUE>',
    (
        "<EXPORTS><CHECKPOINT>odb-1</CHECKPOINT><DISK><DISK_ID>0</DISK_ID><TARGET>vda</TARGET>"
        "<FILE>disk.0.0</FILE><TYPE>FULL</TYPE><REASON>reset</REASON><SIZE_BYTES>5</SIZE_BYTES>"
        "<FORMAT>qcow2</FORMAT><SOURCE>/a</SOURCE></DISK><FILE>vm.xml</FILE></EXPORTS>"
    ),
    (
        "<REQUEST><SPEC>1</SPEC><OPERATION><ID>op-1</ID><KIND>backup</KIND></OPERATION>"
        "<OPTIONS><URL>x</URL></OPTIONS></REQUEST>"
    ),
    '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><VM><NAME>&x;</NAME></VM>',
    "<VM><ID>1</ID><NAME>web</NAME><TEMPLATE><DISK><DISK_ID>0</DISK_ID></DISK></TEMPLATE></VM>",
]
_DOMAIN = """<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>a</name>
<memory unit='KiB'>5</memory><os><type arch='x86_64'>hvm</type><loader>/etc/x</loader>
<nvram template='/etc/y'>/etc/z</nvram></os><devices><emulator>/etc/evil</emulator>
<disk type='file' device='disk'><source file='/etc/shadow'/><target dev='vdb'/></disk>
<disk type='file' device='cdrom'><source file='/etc/shadow'/><target dev='sda'/></disk>
<hostdev mode='subsystem' type='pci'><source><address domain='0'/></source></hostdev>
<interface type='network'><mac address='52:54:00:00:00:01'/><source network='default'/></interface>
<serial type='file'><source path='/etc/passwd'/></serial></devices>
<qemu:commandline><qemu:arg value='-s'/></qemu:commandline></domain>"""
_REQUESTS = [
    b"GET v1/status\n",
    b"GET metrics\n",
    b"GET v1/vms\n",
    b"GET v1/operations?limit=5&failed=true&vm_id=1\n",
    b"GET v1/operations/op-1?seen=0\n",
    b"GET v1/resolve?kind=vm&ref=web\n",
    b"GET v1/no\x0a\xff\x1bpath?a=\xff\xff\n",
    b'POST v1/hosts\n{"name": "a", "uri": "dummy:///x", "vmm": "no", "tm": "no"}',
    b'POST v1/hosts\n{"name": "a", "uri": "dummy://elsewhere/x"}',
    b'PATCH v1/vms/0/config\n{"values": {"MODE": "FULL"}}',
    b'POST v1/images/0/restore\n{"to": "/srv/x", "increment_id": 1, "salvage": true}',
    b'POST v1/downloads\n{"url": "fs://1/-/0:a/0/disk.0", "target": "/srv/x"}',
    b'POST v1/datastores\n{"name": "n", "driver": "../fs", "values": {"BASE_PATH": "/srv"}}',
    b"DELETE v1/images/0?increment_id=1&force=true\n",
]

TARGETS: dict[str, Target] = {
    "url": Target(
        _url,
        lambda: [
            b"fs://100/-/0:20261121-023700-1f2e3d,1:20261121-030000-4c5b6a/7/disk.0",
            b"rsync://100//0:a78156,1:c1a00b/var/lib/one/datastores/100/13/c1a00b/disk.0.1",
            b"restic://100/12/0:25f4b298,1:6968545c/var/lib/one/datastores/0/53/backup/disk.0",
            b"fs://100/-/0:..,1:a/7/disk.0",
        ],
    ),
    "driver-result": Target(_result, lambda: [b"\0TOTAL_MB=1\nUSED_MB=1\nFREE_MB=3\n", b"\3PLAN=<PLAN/>\n"]),
    "driver-stderr": Target(
        _stderr, lambda: [b"\7<4>slow\nPROGRESS 1 2\n\x1b[2Jx\n", b"\1" + b"<9>\xff\0" * 50, b"\xff" * 40_000]
    ),
    "manifest": Target(
        _manifest, lambda: [dump_manifest(_MANIFEST), json.dumps(_MANIFEST).encode(), b"[" * 5000, b"0"]
    ),
    "document": Target(_document, lambda: [text.encode() for text in _DOCUMENTS]),
    "domain": Target(_domain, lambda: [_DOMAIN.encode()]),
    "image": Target(_image, _images),
    "blocks": Target(_blocks, _block_files),
    "api": Target(_api, lambda: _REQUESTS),
}
