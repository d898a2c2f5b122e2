"""SIGKILL for the daemon, a driver or both, at every journal write and around every driver's action.

Each row: arm the failpoint, ask for the operation, let it die there, start a new daemon, and
look whether everything holds that must hold: all operations over within 30 s, the
guest thawed, nothing left behind, every restore point as it was, and the next backup an increment.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from lab import wait_for

from oned_backup.operations.kinds import KINDS
from tests.faults.simulation import Simulation

#: how each kind of operation is asked for; the answer is the operation's id
ASK: Mapping[str, Callable[[Simulation], str]] = {
    "backup": lambda site: site.submit("vms/0/backup"),
    "restore": lambda site: site.submit(
        f"images/{site.newest_image()}/restore",
        {"to": str(site.directory / "restored"), "define_host_id": 0, "name": "copy"},
    ),
    "verify": lambda site: site.submit(f"images/{site.newest_image()}/verify"),
    "delete": lambda site: site.submit(f"images/{site.images()[0]['id']}", method="delete"),
    "download": lambda site: site.submit(
        "downloads", {"url": site.url(), "target": str(site.directory / "downloaded")}
    ),
}

#: the drivers' actions that a kind of operation takes
ACTIONS = {
    "backup": ("dummy.dump_xml", "dummy.pre_backup_live", "fs.backup", "dummy.post_backup_live"),
    "restore": (
        "fs.restore",
        "dummy.pre_restore",
        "fs.download",
        "dummy.restore",
        "dummy.define",
        "dummy.post_restore",
    ),
    "verify": ("fs.verify",),
    "delete": ("fs.rm",),
    "download": ("fs.download",),
}
#: further places within an action
WITHIN = {
    "fs.backup": ("rename.begun", "rename.acted"),
    "fs.rm": ("rename.begun", "rename.acted"),
}
#: undos run when the step before them failed: a driver that dies is the cause
UNDOS = {
    "backup": (("fs.backup.acted", "undo-STORE"), ("fs.backup.begun", "undo-PREPARE")),
    "restore": (
        ("fs.download.acted", "undo-PREPARE"),
        ("dummy.restore.acted", "undo-PREPARE"),
        ("dummy.define.acted", "undo-DEFINE"),
    ),
    "download": (("fs.download.acted", "undo-DOWNLOAD"),),
}


def daemon_points(kind: str) -> list[str]:
    """All failpoints of the daemon in an operation that goes well."""
    names = [
        f"{kind}.{step.name}.{moment}"
        for step in KINDS[kind].steps
        for moment in ("intend", "begun", "acted", "ended")
    ]
    return [*names, f"{kind}.END.acted", f"{kind}.END.ended"]


def driver_points(kind: str) -> list[str]:
    """All failpoints of the drivers."""
    return [
        f"{action}.{point}"
        for action in ACTIONS[kind]
        for point in ("begun", *WITHIN.get(action, ()), "acted")
    ]


def rows() -> Iterator[tuple[str, str]]:
    """(kind of operation, what is armed) for the whole matrix."""
    for kind in ASK:
        yield from ((kind, f"{point}=kill") for point in daemon_points(kind))
        for how in ("kill", "kill-parent", "kill-both"):
            yield from ((kind, f"{point}={how}") for point in driver_points(kind))
        for cause, undo in UNDOS.get(kind, ()):
            for moment in ("begun", "acted", "ended"):
                yield kind, f"{cause}=kill,{kind}.{undo}.{moment}=kill"


@pytest.fixture(scope="module")
def site() -> Iterator[Simulation]:
    """One simulation for all rows: each leaves it sound."""
    directory = Path(tempfile.mkdtemp(prefix="odb-", dir="/tmp"))
    site = Simulation(directory)
    try:
        site.set_up()
        yield site
    finally:
        site.tear_down()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.parametrize(("kind", "armed"), list(rows()))
def test_killed(site: Simulation, kind: str, armed: str) -> None:
    prepare(site, kind)
    before = {point["backup_id"] for point in site.points()}
    site.arm(armed)
    operation = ASK[kind](site)
    content = site.content()
    wait_for("end of it, or of the daemon", lambda: is_over(site, operation), 60)
    site.arm()
    if not site.product.is_running:
        site.start()
    site.wait_recovered()
    site.learn(content)
    after = {point["backup_id"] for point in site.points()}
    if kind != "delete":
        assert before <= after, "a restore point is lost"
    finish_deletion(site)
    site.assert_sound()
    clear(site)
    assert site.backup() == "INCREMENT"


def prepare(site: Simulation, kind: str) -> None:
    """What the operation needs: for a deletion a chain that is not the active one."""
    if kind == "delete":
        if len(site.images()) == 1:
            assert site.backup(reset=True) == "FULL"
    elif len(site.points()) > 12:
        assert site.backup(reset=True) == "FULL"
        for image in site.images()[:-1]:
            site.done(site.submit(f"images/{image['id']}", method="delete"))


def finish_deletion(site: Simulation) -> None:
    """A deletion whose driver died is asked for again: until then its image is kept, in state DELETE."""
    for image in site.images():
        if image["state"] == "DELETE":
            site.done(site.submit(f"images/{image['id']}", method="delete"))


def clear(site: Simulation) -> None:
    """Remove what the operation was to make, if it made it."""
    for name in ("restored", "downloaded"):
        path = site.directory / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for domain in site.hypervisor.domains():
        if domain.name != "web":
            (site.hypervisor.root / f"{domain.uuid}.json").unlink()


def is_over(site: Simulation, operation: str) -> bool:
    """Whether the daemon is dead or has ended the operation."""
    return not site.product.is_running or site.state(operation) in {"DONE", "FAILED", "CANCELLED"}
