"""The driver in plain/, or one of those that are like it but for one mistake, as a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from oned_backup.runner.kit import Report, Status

HERE = Path(__file__).parent
ACTIONS = (
    "backup", "backup_cancel", "ls", "stat", "restore", "download", "verify", "increment_flatten", "rm",
    "monitor",
)  # fmt: skip
ACTION = "#!/usr/bin/env python3\nfrom driver import DRIVER\n\nDRIVER.main()\n"


def build_plain(directory: Path, broken: str = "") -> Path:
    """A driver folder in `directory`; `broken` is a folder's name below broken/.

    Files there take the place of the plain driver's; an empty file `absent.NAME` removes one.
    """
    folder = directory / "plain"
    shutil.copytree(HERE / "plain", folder, ignore=shutil.ignore_patterns("__pycache__"))
    for action in ACTIONS:
        (folder / action).write_text(ACTION)
        (folder / action).chmod(0o755)
    if broken:
        for path in (HERE / "broken" / broken).glob("*.*"):
            if path.name.startswith("absent."):
                (folder / path.suffix[1:]).unlink()
            else:
                shutil.copyfile(path, folder / path.name)
    return folder


def failures(report: Report) -> str:
    return "\n".join(f"{clause.title}\n  {clause.detail}" for clause in report.having(Status.FAILED))
