"""The whole conformance kit for all our datastore drivers, on every kind of place they can store to.

    make kit            about an hour; prints a table of clauses and places
    make kit WHERE="rsync restic"

It takes root. A clause that needs the files of a store (to damage, hide or fill them) is skipped where
the kit cannot see or make these.
"""

from __future__ import annotations

import argparse
import getpass
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from netlab import Netlab
from s3 import S3
from sshd import ALIAS, Sshd

CLI = Path(sys.executable).parent / "oned-backup"
ROOT = Path(__file__).parents[2]
DRIVERS = ROOT / "drivers/datastore"
PASSWORD = "the kit's own"  # noqa: S105
_MARKS = {"passed": "yes", "failed": "**no**", "skipped": "–"}

#: what runs in a lab's backup server: a store is a file system of its own
_MAKE = "set -e; mkdir -p {0}; mount -t tmpfs -o size=256m,mode=0700 kit {0}"
_REMOVE = "umount {0} && rmdir {0}"
_MOVE = "mkdir {1} && mount --bind {0} {1} && umount {0} && rmdir {0}"
_FILL = 'free=$(df -B1 --output=avail {0} | tail -1); fallocate -l "$((free - (12 << 20)))" {0}/.fill'
_UNFILL = "rm {0}/.fill"

#: the words of a check, and what they are run by
Case = tuple[list[str], Callable[[list[str]], list[str]]]


@contextmanager
def fs(_directory: Path) -> Iterator[Case]:
    """A directory."""
    yield [str(DRIVERS / "fs")], list


@contextmanager
def fs_compressed(_directory: Path) -> Iterator[Case]:
    """A directory in which images get compressed."""
    yield [str(DRIVERS / "fs"), "COMPRESSION=zstd"], list


@contextmanager
def rsync(directory: Path) -> Iterator[Case]:
    """An sshd on a loopback port; the kit sees the files."""
    with Sshd(directory / "sshd") as sshd:
        words = [f"RSYNC_HOST={ALIAS}", f"RSYNC_USER={getpass.getuser()}"]
        yield [str(DRIVERS / "rsync"), *words, "--ssh-config", str(sshd.config)], list


@contextmanager
def restic(directory: Path) -> Iterator[Case]:
    """An sshd on a loopback port; the kit sees the files."""
    with Sshd(directory / "sshd") as sshd:
        words = [f"RESTIC_SFTP_SERVER={ALIAS}", f"RESTIC_SFTP_USER={getpass.getuser()}"]
        words.append(f"RESTIC_PASSWORD=@{_secret(directory, PASSWORD)}")
        yield [str(DRIVERS / "restic"), *words, "--ssh-config", str(sshd.config)], list


@contextmanager
def restic_s3(directory: Path) -> Iterator[Case]:
    """A bucket a store."""
    with S3(directory / "s3") as s3:
        service = [sys.executable, str(ROOT / "share/lab/s3.py"), str(s3.directory)]
        parameters = {
            "RESTIC_BACKEND": "S3",
            "RESTIC_S3_BUCKET": "{store}",
            "RESTIC_S3_ENDPOINT": s3.endpoint,
            "RESTIC_S3_FORCE_PATH_STYLE": "yes",
            "RESTIC_S3_CACERT": str(s3.ca_file),
        }
        secrets = {
            "RESTIC_PASSWORD": PASSWORD,
            "RESTIC_S3_ACCESS_KEY_ID": s3.key_id,
            "RESTIC_S3_SECRET_ACCESS_KEY": s3.key,
        }
        file = _store_file(
            directory,
            parameters=parameters,
            secrets={name: str(_secret(directory, value, name)) for name, value in secrets.items()},
            unreachable={"RESTIC_S3_ENDPOINT": "https://127.0.0.1:9"},
            commands={"create": [*service, "make-bucket", "{store}"]},
        )
        yield [str(DRIVERS / "restic"), "--store", str(file)], list


@contextmanager
def rsync_elsewhere(_directory: Path) -> Iterator[Case]:
    """Another machine; the kit is told commands, and does not see the files."""
    with _elsewhere("RSYNC_HOST", "RSYNC_USER") as (words, run_by):
        yield [str(DRIVERS / "rsync"), *words], run_by


@contextmanager
def restic_elsewhere(_directory: Path) -> Iterator[Case]:
    """Another machine; the kit is told commands, and does not see the files."""
    with _elsewhere("RESTIC_SFTP_SERVER", "RESTIC_SFTP_USER", "RESTIC_PASSWORD") as (words, run_by):
        yield [str(DRIVERS / "restic"), *words], run_by


@contextmanager
def _elsewhere(host: str, user: str, password: str = "") -> Iterator[Case]:
    with Netlab(["daemon", "backup"]) as lab:
        daemon = lab["daemon"]
        base = "/srv/{store}"

        def there(command: str) -> list[str]:
            return ["ssh", "-F", str(lab.ssh_config), "backup", command.format(base, f"{base}.away")]

        file = _store_file(
            daemon.own,
            ssh_config=str(lab.ssh_config),
            parameters={host: "backup", user: "root", "BASE_PATH": base},
            secrets={password: str(_secret(daemon.own, PASSWORD))} if password else {},
            unreachable={host: "192.0.2.99"},
            commands={
                "create": there(_MAKE),
                "remove": there(_REMOVE),
                "block": there(_MOVE),
                "unblock": there(_MOVE.replace("{0}", "{2}").replace("{1}", "{0}").replace("{2}", "{1}")),
                "fill": there(_FILL),
                "unfill": there(_UNFILL),
            },
        )
        yield ["--store", str(file)], daemon.argv


PLACES: dict[str, Callable[[Path], AbstractContextManager[Case]]] = {
    "fs": fs,
    "fs-compressed": fs_compressed,
    "rsync": rsync,
    "restic": restic,
    "restic-s3": restic_s3,
    "rsync-elsewhere": rsync_elsewhere,
    "restic-elsewhere": restic_elsewhere,
}


def main() -> int:
    """Print the table as Markdown, and what failed; 1 if anything did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("places", nargs="*", help=f"of {', '.join(PLACES)}; all by default")
    parser.add_argument("--only", action="append", default=[], help="this clause; may be repeated")
    arguments = parser.parse_args()
    only = [word for clause in arguments.only for word in ("--only", clause)]
    found: dict[str, dict[str, str]] = {}
    failures, times = [], []
    for name in arguments.places or PLACES:
        began = time.monotonic()
        with (
            tempfile.TemporaryDirectory(prefix="kit-", dir="/tmp") as directory,
            PLACES[name](Path(directory)) as (words, run_by),
            subprocess.Popen(
                run_by([str(CLI), "driver", "check", *words, *only]), stdout=subprocess.PIPE, text=True
            ) as check,
        ):
            assert check.stdout is not None
            for line in check.stdout:
                print(f"{name}: {line}", end="", file=sys.stderr, flush=True)
                status, clause_id, *title = line.split(maxsplit=2)
                if status in _MARKS:
                    found.setdefault(clause_id, {})[name] = status
                if status == "failed":
                    failures.append(f"{name} {clause_id}: {' '.join(title).strip()}")
        times.append(f"{name} {time.monotonic() - began:.0f} s")
    names = list(arguments.places or PLACES)
    print(f"| clause | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for clause_id, row in sorted(found.items()):
        print(f"| {clause_id} | {' | '.join(_MARKS[row[name]] if name in row else '' for name in names)} |")
    print(f"\n{', '.join(times)}")
    for failure in failures:
        print(failure)
    return 1 if failures or not found else 0


def _secret(directory: Path, value: str, name: str = "password") -> Path:
    path = directory / name
    path.write_text(value)
    path.chmod(0o600)
    return path


def _store_file(directory: Path, *, ssh_config: str = "", **tables: dict[str, object]) -> Path:
    """A file for `driver check --store`; JSON's texts and lists are TOML's too."""
    lines = [f"ssh_config = {json.dumps(ssh_config)}"] if ssh_config else []
    for table, values in tables.items():
        lines += [f"[{table}]", *(f"{name} = {json.dumps(value)}" for name, value in values.items())]
    file = directory / "store.toml"
    file.write_text("\n".join(lines) + "\n")
    return file


if __name__ == "__main__":
    sys.exit(main())
