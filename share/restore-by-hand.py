#!/usr/bin/env python3
"""Restore a disk with nothing but the files of a store and qemu-img, as restore-by-hand.md tells it.

    restore-by-hand.py BASE_PATH/7                                             what there is
    restore-by-hand.py BASE_PATH/7 20261121-030000-4c5b6a 0 restored.qcow2     disk 0 of that backup

Copy it wherever it is needed: it takes Python 3 and nothing of oned-backup. It changes nothing
in the store, replaces no file, and checks no checksums.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def backups(folder: Path) -> dict[str, Any]:
    """What each backup of a VM says of itself, by its id and by those that it stands for."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("[!.]*/manifest.json")):
        try:
            backup = json.loads(path.read_text())["backup"]
        except (OSError, ValueError, KeyError) as error:
            sys.stderr.write(f"{path} cannot be used: {error}\n")
            continue
        for name in backup.get("stands_for", []):
            found.setdefault(name, backup)
        found[backup["id"]] = backup
    return found


def layers(folder: Path, backup_id: str, disk_id: int) -> list[Path]:
    """The files of a disk, newest first."""
    known = backups(folder)
    files: list[Path] = []
    while backup_id:
        backup = known.get(backup_id) or sys.exit(f"{folder} has no backup {backup_id}")
        disk = next((one for one in backup["disks"] if one["disk_id"] == disk_id), None)
        if disk is None:
            sys.exit(f"backup {backup['id']} has no disk {disk_id}")
        file = (folder / backup["id"] / disk["file"]).absolute()
        if not file.is_file() or file in files:
            sys.exit(f"{file} is absent, or continues itself")
        files.append(file)
        backup_id = disk["parent_id"] if disk["type"] == "INCREMENT" else ""
    return files


def restore(files: list[Path], target: Path) -> None:
    """Write what the layers hold to a new qcow2 image."""
    if target.exists():
        sys.exit(f"{target} exists already")
    chain: dict[str, Any] | None = None  # below the oldest there is nothing, whatever it says itself
    for file in reversed(files):
        chain = {"driver": "qcow2", "file": {"driver": "file", "filename": str(file)}, "backing": chain}
    image = f"json:{json.dumps(chain)}"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", image, str(target)], check=True)


def told(name: str, backup: Any) -> str:
    """A line about a backup."""
    disks = ", ".join(f"{disk['disk_id']} {disk['target']} {disk['type']}" for disk in backup["disks"])
    merged = "" if name == backup["id"] else f" (merged into {backup['id']})"
    return f"{name}  {backup['vm']['name']}  disks: {disks}{merged}\n"


def main(words: list[str]) -> None:
    """List, or restore."""
    if len(words) == 1:
        sys.stdout.writelines(told(*found) for found in backups(Path(words[0])).items())
    elif len(words) == 4 and words[2].isdecimal():
        restore(layers(Path(words[0]), words[1], int(words[2])), Path(words[3]))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
