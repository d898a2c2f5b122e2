"""SIGKILL for the daemon, a driver or both, at every journal write and around every driver's action.

Continuous integration runs the rows that matter most: death between an intent and its outcome. With
`--whole-matrix` death comes at every failpoint in every way; `make torture` kills at random times.

Each row: arm the failpoint, ask for the operation, let it die there, start a new daemon, and
look whether everything holds that must hold: all operations over within 30 s, the
guest thawed, nothing left behind, every restore point as it was, and the next backup an increment.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    "retention": lambda site: site.submit("vms/0/retention"),
}
#: what is done for each of them, if it is more than one operation
OPERATIONS = {"retention": ("retention", "flatten", "remove")}

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
    "retention": ("fs.increment_flatten", "fs.rm"),
}
#: further places within an action
WITHIN = {
    "fs.backup": ("rename.begun", "rename.acted"),
    "fs.rm": ("rename.begun", "rename.acted"),
    "fs.increment_flatten": ("rename.begun", "rename.acted"),
}
#: undos run when the step before them failed: a driver that dies is the cause
UNDOS = {
    "backup": (("fs.backup.acted", "backup.undo-STORE"), ("fs.backup.begun", "backup.undo-PREPARE")),
    "restore": (
        ("fs.download.acted", "restore.undo-PREPARE"),
        ("dummy.restore.acted", "restore.undo-PREPARE"),
        ("dummy.define.acted", "restore.undo-DEFINE"),
    ),
    "download": (("fs.download.acted", "download.undo-DOWNLOAD"),),
    "retention": (("fs.increment_flatten.acted", "flatten.undo-MERGE"),),
}
#: actions that are taken beside these operations, and change nothing
ASIDE = ("fs.monitor",)
#: these two enclose the effect
ENCLOSING = ("begun", "acted")


def daemon_points(kind: str, moments: Sequence[str]) -> list[str]:
    """The failpoints of the daemon in an operation that goes well."""
    return [
        f"{name}.{step}.{moment}"
        for name in OPERATIONS.get(kind, (kind,))
        for step in (*(step.name for step in KINDS[name].steps), "END")
        for moment in moments
        if step != "END" or moment in {"acted", "ended"}
    ]


def driver_points(kind: str) -> list[str]:
    """The failpoints of the drivers."""
    return [
        f"{action}.{point}"
        for action in ACTIONS[kind]
        for point in ("begun", *WITHIN.get(action, ()), "acted")
    ]


def rows(*, whole: bool) -> Iterator[tuple[str, str]]:
    """(kind of operation, what is armed)."""
    for kind in ASK:
        moments = ("intend", "begun", "acted", "ended") if whole else ENCLOSING
        yield from ((kind, f"{point}=kill") for point in daemon_points(kind, moments))
        for how in ("kill", "kill-parent", "kill-both") if whole else ("kill-both",):
            yield from ((kind, f"{point}={how}") for point in driver_points(kind))
        for cause, undo in UNDOS.get(kind, ()):
            for moment in ("begun", "acted", "ended") if whole else ("begun",):
                yield kind, f"{cause}=kill,{undo}.{moment}=kill"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The rows of the matrix, as many as were asked for."""
    if "armed" in metafunc.fixturenames:
        whole = bool(metafunc.config.getoption("--whole-matrix"))
        metafunc.parametrize(("kind", "armed"), list(rows(whole=whole)))


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


def test_killed(site: Simulation, kind: str, armed: str) -> None:
    prepare(site, kind)
    stay = survivors(site, kind)
    site.arm(armed)
    ASK[kind](site)
    content = site.content()
    wait_for("end of it, or of the daemon", lambda: site.is_idle() or not site.product.is_running, 60)
    site.arm()
    if not site.product.is_running:
        site.start()
    site.wait_recovered()
    site.learn(content)
    assert stay <= keys(site), "a restore point is lost"
    finish(site, kind)
    site.assert_sound()
    clear(site)
    assert site.backup() == "INCREMENT"


def test_every_failpoint_is_in_the_matrix(site: Simulation) -> None:
    log = site.directory / "reached"
    site.arm(f"*=record:{log}")
    for kind in ASK:
        site.arm()
        prepare(site, kind)
        site.arm(f"*=record:{log}")
        ASK[kind](site)
        site.settle()
        site.arm()
        finish(site, kind)
        clear(site)
    known = {point for kind in ASK for point in daemon_points(kind, ("intend", "begun", "acted", "ended"))}
    known |= {point for kind in ASK for point in driver_points(kind)}
    reached = set(log.read_text().split())
    assert reached - known == {f"{action}.{point}" for action in ASIDE for point in ENCLOSING}
    assert known - reached == set()


def keys(site: Simulation) -> set[tuple[int, int]]:
    """All restore points, by image and increment."""
    return {(point["image_id"], point["increment_id"]) for point in site.points()}


def survivors(site: Simulation, kind: str) -> set[tuple[int, int]]:
    """The restore points that the operation does not take away."""
    newest = site.newest_image()
    if kind == "delete":
        return {key for key in keys(site) if key[0] == newest}
    if kind == "retention":
        return {(newest, increment) for increment in site.chain()[-2:]}
    return keys(site)


def prepare(site: Simulation, kind: str) -> None:
    """What the operation needs: a chain that is not the active one, or one that is long enough."""
    if len(site.chain()) > 6 or (kind == "delete" and len(site.images()) == 1):
        assert site.backup(reset=True) == "FULL"
    if kind != "delete":
        for image in site.images()[:-1]:
            site.done(site.submit(f"images/{image['id']}", method="delete"))
    if kind == "retention":
        while len(site.chain()) < 4:
            site.backup()
        site.set(KEEP_LAST="2")


def finish(site: Simulation, kind: str) -> None:
    """What failed with its driver is asked for again, and then comes to its end."""
    if kind == "delete":
        for image in site.images():
            if image["state"] == "DELETE":
                site.done(site.submit(f"images/{image['id']}", method="delete"))
    if kind == "retention":
        site.done(site.submit("vms/0/retention"))
        site.settle()
        assert len(site.chain()) == 2
        site.set(KEEP_LAST="0")


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
