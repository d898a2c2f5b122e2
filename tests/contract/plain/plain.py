"""A datastore driver without the SDK: it reads the environment only, and copies files.

    BASE_PATH/.plain                    marker: the digest of the password
    BASE_PATH/<vm>/<backup>/            a finished backup: its files, `facts` and `sums`
    BASE_PATH/<vm>/.new-<backup>/       one in the making

It is correct; the drivers in ../broken each change one method of it.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.sax.saxutils import escape

UNAVAILABLE, NOT_FOUND, CORRUPT, NO_SPACE, DENIED = 69, 66, 65, 73, 77
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
URL = re.compile(r"plain://(\d+)/-/([^/]+)/(\d+)/disk\.(\d+)")


class Failure(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def option(name: str) -> str:
    return os.environ.get(f"ODB_OPT_{name}", "")


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Plain:
    def main(self) -> None:
        action = Path(sys.argv[0]).name
        try:
            getattr(self, action)()
        except Failure as failure:
            self.fail(failure.code, str(failure))
        except OSError as error:
            full = error.errno in {errno.ENOSPC, errno.EDQUOT}
            self.fail(NO_SPACE if full else 1, f"{action}: {error}")

    def fail(self, code: int, text: str) -> None:
        print(text, file=sys.stderr)
        sys.exit(code)

    # the store

    @property
    def base(self) -> Path:
        return Path(os.environ["ODB_DS_BASE_PATH"])

    @property
    def password(self) -> str:
        path = Path(os.environ["ODB_SECRETS_DIR"]) / "PASSWORD"
        return path.read_text() if path.exists() else ""

    def open_store(self, *, create: bool = False) -> None:
        if not self.base.is_dir():
            raise Failure(UNAVAILABLE, f"{self.base} is not there")
        marker = self.base / ".plain"
        digest = hashlib.sha256(self.password.encode()).hexdigest()
        if not marker.exists():
            if not create or os.environ["ODB_IMAGES"] != "0":
                raise Failure(UNAVAILABLE, f"{self.base} is no store: is it mounted?")
            new = self.base / f".plain.{os.environ['ODB_OPERATION_ID']}"
            new.write_text(digest)
            new.rename(marker)
        self.check_password(marker.read_text() == digest)

    def check_password(self, is_right: bool) -> None:
        if not is_right:
            raise Failure(DENIED, "the password is wrong")

    def checked(self, name: str) -> str:
        if not NAME.fullmatch(name):
            raise Failure(2, f"{name!r} is not a valid id")
        return name

    def folder(self, backup_id: str, vm: str = "") -> Path:
        return self.base / (vm or os.environ["ODB_VM_ID"]) / self.checked(backup_id)

    def partial(self, backup_id: str) -> Path:
        return self.folder(backup_id).with_name(f".new-{backup_id}")

    # writing

    def backup(self) -> None:
        self.open_store(create=True)
        backup_id = os.environ["ODB_BACKUP_ID"]
        final, partial = self.folder(backup_id), self.partial(backup_id)
        if not final.exists():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            try:
                self.store(partial)
            except BaseException:
                self.clean_up(partial)
                raise
            self.publish(partial, final)
        self.answer(final)

    def store(self, partial: Path) -> None:
        source = Path(os.environ["ODB_SOURCE_DIR"])
        disks = [disk.split(":") for disk in os.environ["ODB_DISKS"].split(",")]
        names = {path.name for path in source.iterdir()} | {file for _, file, _, _ in disks}
        for name in sorted(names):
            self.copy(source / name, partial / name)
        facts = {"increment": os.environ["ODB_INCREMENT_ID"], "disks": disks}
        (partial / "facts").write_text(json.dumps(facts))
        self.write_sums(partial)

    def copy(self, source: Path, target: Path) -> None:
        shutil.copyfile(source, target)
        sync(target)

    def write_sums(self, partial: Path) -> None:
        lines = [f"{self.sum_of(path)} {path.name}\n" for path in sorted(partial.iterdir())]
        (partial / "sums").write_text("".join(lines))
        sync(partial / "sums")

    def sum_of(self, path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def publish(self, partial: Path, final: Path) -> None:
        partial.rename(final)
        sync(final.parent)

    def clean_up(self, partial: Path) -> None:
        shutil.rmtree(partial, ignore_errors=True)

    def answer(self, final: Path) -> None:
        size = sum(path.stat().st_size for path in final.iterdir())
        print(f"BACKUP_ID={final.name}\nSIZE_MB={-(-size >> 20)}\nFORMAT=raw")

    def backup_cancel(self) -> None:
        self.open_store()
        shutil.rmtree(self.partial(os.environ["ODB_BACKUP_ID"]), ignore_errors=True)

    def rm(self) -> None:
        self.open_store()
        for backup_id in self.meant():
            self.remove(self.folder(backup_id))

    def remove(self, folder: Path) -> None:
        gone = folder.with_name(f".gone-{folder.name}")
        with contextlib.suppress(FileNotFoundError):
            folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    # merging

    def increment_flatten(self) -> None:
        self.open_store()
        backup_id = os.environ["ODB_BACKUP_ID"]
        ids = self.ids_to_merge()
        final, partial = self.folder(backup_id), self.partial(backup_id)
        if not final.exists():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                self.merge(ids, partial)
            except BaseException:
                self.clean_up(partial)
                raise
            self.publish(partial, final)
        self.answer(final)
        kept = [(number, name) for number, name in self.chain() if name not in ids[:-1]]
        chain = [f"{number}:{backup_id if name == ids[-1] else name}" for number, name in kept]
        print(f"CHAIN={','.join(chain)}")

    def ids_to_merge(self) -> list[str]:
        ids, known = option("MERGE_IDS").split(","), [name for _, name in self.chain()]
        place = known.index(ids[0]) if ids[0] in known else 0
        if len(ids) < 2 or known[place : place + len(ids)] != ids:
            raise Failure(2, f"{', '.join(ids)} do not follow each other in {', '.join(known)}")
        return ids

    def merge(self, ids: list[str], partial: Path) -> None:
        newest, disks = self.folder(ids[-1]), []
        facts = self.facts(newest)
        for name, content in self.small_files(newest):
            (partial / name).write_bytes(content)
            sync(partial / name)
        for disk_id, file, _, size in facts["disks"]:
            beneath, inside = self.layers_to_merge(ids, disk_id)
            self.merge_disk(beneath, inside, partial / file)
            disks.append([disk_id, file, "INCREMENT" if beneath else "FULL", size])
        (partial / "facts").write_text(json.dumps({**facts, "disks": disks}))
        self.write_sums(partial)

    def layers_to_merge(self, ids: list[str], wanted: str) -> tuple[list[Path], list[Path]]:
        """Files of a disk up to the newest to merge: beneath the oldest to merge, and from there on."""
        beneath: list[Path] = []
        inside: list[Path] = []
        names = [name for _, name in self.chain()]
        for name in reversed(names[: names.index(ids[-1]) + 1]):
            layer = self.layer(name, os.environ["ODB_VM_ID"], wanted)
            (inside if name in ids else beneath).insert(0, layer)
            kinds = {disk_id: kind for disk_id, _, kind, _ in self.facts(layer.parent)["disks"]}
            if kinds[wanted] == "FULL":
                break
        return beneath, inside

    def merge_disk(self, beneath: list[Path], inside: list[Path], target: Path) -> None:
        copies = [Path(f"{target.name}.{number}") for number in range(len(beneath) + len(inside))]
        for source, copy in zip([*beneath, *inside], copies, strict=True):
            shutil.copyfile(source, copy)
        for below, copy in itertools.pairwise(copies):
            self.qemu_img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", str(below), str(copy))
        merged = copies[len(beneath)]
        for top in copies[len(beneath) + 1 :]:
            self.qemu_img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", str(merged), str(top))
            self.qemu_img("commit", "-q", "-f", "qcow2", str(top))
        self.qemu_img("rebase", "-u", "-f", "qcow2", "-b", "", str(merged))
        self.copy(merged, target)

    def qemu_img(self, *argv: str) -> None:
        done = subprocess.run(["qemu-img", *argv], capture_output=True, check=False)
        if done.returncode != 0:
            raise Failure(1, done.stderr.decode().strip())

    # reading

    def meant(self) -> list[str]:
        listed = option("BACKUP_IDS").split(",") if option("BACKUP_IDS") else [i for _, i in self.chain()]
        return [self.checked(backup_id) for backup_id in listed]

    def chain(self) -> list[tuple[str, str]]:
        entries = [entry.partition(":") for entry in os.environ.get("ODB_CHAIN", "").split(",") if entry]
        return [(number, backup_id) for number, _, backup_id in entries]

    def wanted(self) -> str:
        if not self.chain():
            raise Failure(NOT_FOUND, "the image has no such increment")
        return self.chain()[-1][1]

    def sums(self, folder: Path) -> dict[str, str]:
        try:
            text = (folder / "sums").read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise Failure(CORRUPT, f"{folder}: sums: {error}") from error
        return {name: digest for digest, _, name in (line.partition(" ") for line in text.splitlines())}

    def proved(self, path: Path) -> bytes:
        """The content of a stored file, if it is what was stored."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise Failure(CORRUPT, f"{path}: {error.strerror}") from error
        if hashlib.sha256(content).hexdigest() != self.sums(path.parent).get(path.name):
            raise Failure(CORRUPT, f"{path}: the checksum does not match")
        return content

    def facts(self, folder: Path) -> dict:
        if not folder.is_dir():
            raise Failure(NOT_FOUND, f"there is no backup {folder.name}")
        return json.loads(self.proved(folder / "facts"))

    def disks(self) -> list[str]:
        """The DISK elements of the backup that is meant."""
        facts = self.facts(self.folder(self.wanted()))
        found = []
        for disk_id, file, _, size in facts["disks"]:
            if option("DISK_ID") in {"", disk_id}:
                url = f"plain://{os.environ['ODB_DS_ID']}/-/{self.disk_chain(disk_id)}/{os.environ['ODB_VM_ID']}/disk.{disk_id}"
                found.append(
                    f"<DISK><DISK_ID>{disk_id}</DISK_ID><URL>{url}</URL>"
                    f"<SIZE_BYTES>{size}</SIZE_BYTES><FILE>{file}</FILE></DISK>"
                )
        if not found:
            raise Failure(NOT_FOUND, f"the backup has no disk {option('DISK_ID')}")
        return found

    def disk_chain(self, wanted: str) -> str:
        links = []
        for _, backup_id in reversed(self.chain()):
            facts = self.facts(self.folder(backup_id))
            links.append(f"{facts['increment']}:{backup_id}")
            if any(disk_id == wanted and kind == "FULL" for disk_id, _, kind, _ in facts["disks"]):
                break
        return ",".join(reversed(links))

    def ls(self) -> None:
        self.open_store()
        print(f"LISTING=<LISTING>{''.join(self.disks())}</LISTING>")

    def stat(self) -> None:
        self.open_store()
        sizes = [re.search(r"<SIZE_BYTES>(\d+)", disk)[1] for disk in self.disks()]
        print(f"SIZE_MB={sum(-(-int(size) >> 20) for size in sizes)}")

    def restore(self) -> None:
        self.open_store()
        disks = self.disks()
        folder = self.folder(self.wanted())
        files = "".join(
            f"<FILE><NAME>{name}</NAME><CONTENT>{base64.b64encode(content).decode()}</CONTENT></FILE>"
            for name, content in self.small_files(folder)
        )
        number = self.facts(folder)["increment"]
        print(
            f"PLAN=<PLAN><BACKUP_ID>{folder.name}</BACKUP_ID><INCREMENT_ID>{number}</INCREMENT_ID>"
            f"{''.join(disks)}{files}</PLAN>"
        )

    def small_files(self, folder: Path) -> list[tuple[str, bytes]]:
        names = sorted(path.name for path in folder.iterdir())
        own = {"facts", "sums"}
        return [(n, self.proved(folder / n)) for n in names if n not in own and not n.startswith("disk.")]

    def download(self) -> None:
        self.open_store()
        match = URL.fullmatch(option("URL"))
        if not match:
            raise Failure(2, f"{option('URL')!r} is no URL of this driver")
        layers = [self.layer(entry.partition(":")[2], match[3], match[4]) for entry in match[2].split(",")]
        target = Path(option("TARGET") or "out")
        if option("TARGET").startswith("nbd+unix:"):
            self.convert(layers, option("TARGET"), "-n")
            return
        self.convert(layers, target)
        if not option("TARGET"):
            with target.open("rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer)
                sys.stdout.buffer.flush()

    def layer(self, backup_id: str, vm: str, disk_id: str) -> Path:
        folder = self.folder(backup_id, vm)
        names = [disk[1] for disk in self.facts(folder)["disks"] if disk[0] == disk_id]
        if not names:
            raise Failure(NOT_FOUND, f"backup {backup_id} has no disk {disk_id}")
        self.proved(folder / names[0])
        return folder / names[0]

    def convert(self, layers: list[Path], target: Path | str, *how: str) -> None:
        image: dict | None = None
        for layer in layers:
            file = {"driver": "file", "filename": str(layer)}
            image = {"driver": "qcow2", "file": file, **({"backing": image} if image else {})}
        image_format = option("FORMAT") or "raw"
        self.qemu_img("convert", *how, "-O", image_format, f"json:{json.dumps(image)}", str(target))

    def verify(self) -> None:
        self.open_store()
        reports = []
        for backup_id in self.meant():
            failures = "".join(
                f"<FAILURE><FILE>{escape(name)}</FILE><TEXT>{escape(text)}</TEXT></FAILURE>"
                for name, text in self.failures(self.folder(backup_id))
            )
            read = self.read_bytes(self.folder(backup_id))
            reports.append(f"<BACKUP><ID>{backup_id}</ID><READ_BYTES>{read}</READ_BYTES>{failures}</BACKUP>")
        print(f"REPORT=<REPORT>{''.join(reports)}</REPORT>")

    def read_bytes(self, folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0

    def failures(self, folder: Path) -> list[tuple[str, str]]:
        found = []
        try:
            for name in sorted({*self.sums(folder), *(p.name for p in folder.iterdir())} - {"sums"}):
                try:
                    self.proved(folder / name)
                except Failure as failure:
                    found.append((name, str(failure)))
        except Failure as failure:
            found.append(("sums", str(failure)))
        return found

    def monitor(self) -> None:
        if not self.base.is_dir():
            raise Failure(UNAVAILABLE, f"{self.base} is not there")
        found = os.statvfs(self.base)
        self.capacity(found.f_blocks * found.f_frsize, found.f_bfree * found.f_frsize)

    def capacity(self, total: int, free: int) -> None:
        print(f"TOTAL_MB={total >> 20}\nUSED_MB={(total - free) >> 20}\nFREE_MB={free >> 20}")
