"""SIGKILL for the daemon, a driver or both, at every journal write and around every driver's action.

Continuous integration runs the rows that matter most: death when the effect is there and the
outcome is not written yet. With `--whole-matrix` death comes at every failpoint in every way;
`make torture` kills at random times.

Each row: arm the failpoint, ask for the operation, let it die there, start a new daemon, and
look whether everything holds that must hold: all operations over within 30 s, the
guest thawed, nothing left behind, every restore point as it was, and the next backup an increment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

import pytest
from lab import wait_for

from oned_backup.errors import DaemonUnreachable
from oned_backup.operations.kinds import KINDS
from tests.faults.attempts import ASK, clear, finish, keys, prepare, survivors
from tests.faults.simulation import Simulation, simulation

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
        "dummy.post_restore",
    ),
    "verify": ("fs.verify",),
    "delete": ("fs.rm",),
    "download": ("fs.download",),
    "retention": ("fs.increment_flatten", "fs.rm"),
}
#: further places within an action
WITHIN = {
    "fs.backup": ("disk.chunk", "rename.begun", "rename.acted"),
    "fs.rm": ("rename.begun", "rename.acted"),
    "fs.increment_flatten": ("disk.chunk", "rename.begun", "rename.acted"),
}
#: undos run when the step before them failed: a driver that dies is the cause
UNDOS = {
    "backup": (("fs.backup.acted", "backup.undo-STORE"), ("fs.backup.begun", "backup.undo-PREPARE")),
    "restore": (
        ("fs.download.acted", "restore.undo-PREPARE"),
        ("dummy.restore.acted", "restore.undo-PREPARE"),
    ),
    "download": (("fs.download.acted", "download.undo-DOWNLOAD"),),
    "retention": (("fs.increment_flatten.acted", "flatten.undo-MERGE"),),
}
#: what is proved of the daemon by the rows of each kind of operation; see table.py
DAEMON_KILLED = {
    "backup": pytest.mark.fault("daemon", "daemon killed at a step of a backup"),
    "restore": pytest.mark.fault("daemon", "daemon killed at a step of a restore"),
    "verify": pytest.mark.fault("daemon", "daemon killed at a step of a verification or download"),
    "download": pytest.mark.fault("daemon", "daemon killed at a step of a verification or download"),
    "delete": pytest.mark.fault("daemon", "daemon killed at a step of a removal"),
    "retention": pytest.mark.fault("daemon", "daemon killed at a step of a merge (flatten)"),
}
BOTH_KILLED = pytest.mark.fault("daemon", "daemon and driver killed together")
DRIVER_KILLED = pytest.mark.fault("daemon", "driver killed at a step of an operation")
KILLED_IN_UNDO = pytest.mark.fault("daemon", "killed in an undo")
#: actions that may be taken beside these operations, and change nothing
ASIDE = ("fs.monitor", "fs.ls", "dummy.monitor")
#: of these every second row is run by default
READING = ("verify", "download", "restore")
ALL_MOMENTS = ("intend", "begun", "acted", "ended")


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
        moments = ALL_MOMENTS if whole else ("acted",)
        yield from ((kind, f"{point}=kill") for point in daemon_points(kind, moments))
        for how in ("kill", "kill-parent", "kill-both") if whole else ("kill-both",):
            yield from (
                (kind, f"{point}={how}") for point in driver_points(kind) if whole or point.endswith(".acted")
            )
        for cause, undo in UNDOS.get(kind, ()):
            for moment in ("begun", "acted", "ended") if whole else ("begun",):
                yield kind, f"{cause}=kill,{undo}.{moment}=kill"


def fault(kind: str, armed: str) -> pytest.MarkDecorator:
    """What a row proves."""
    if "," in armed:
        return KILLED_IN_UNDO
    if armed.endswith("=kill-both"):
        return BOTH_KILLED
    if armed.startswith(ACTIONS[kind]) and armed.endswith("=kill"):
        return DRIVER_KILLED
    return DAEMON_KILLED[kind]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The rows of the matrix, as many as were asked for."""
    if "armed" in metafunc.fixturenames:
        whole = bool(metafunc.config.getoption("--whole-matrix"))
        chosen = list(rows(whole=whole))
        if not whole:
            chosen = [row for number, row in enumerate(chosen) if row[0] not in READING or number % 2]
        every = [pytest.param(*row, marks=fault(*row)) for row in chosen]
        metafunc.parametrize(("kind", "armed"), every)


@pytest.fixture(scope="module")
def site() -> Iterator[Simulation]:
    """One simulation for all rows: each leaves it sound."""
    with simulation() as site:
        yield site


def once(site: Simulation, armed: str) -> Iterator[str]:
    """What is armed, killing one time each: what is tried again goes on."""
    for number, entry in enumerate(armed.split(",")):
        (site.directory / f"once.{number}").touch()
        yield f"{entry}:{site.directory}/once.{number}" if "=kill" in entry else entry


def test_killed(site: Simulation, kind: str, armed: str) -> None:
    prepare(site, kind)
    stay = survivors(site, kind)
    log = site.directory / "reached"
    log.unlink(missing_ok=True)
    site.arm(",".join([f"*=record:{log}", *once(site, armed)]))
    with suppress(DaemonUnreachable):  # it may die before it has answered
        ASK[kind](site)
    content = site.content()
    wait_for("end of it, or of the daemon", lambda: site.is_idle() or not site.product.is_running, 60)
    site.arm()
    assert {entry.partition("=")[0] for entry in armed.split(",")} <= set(log.read_text().split())
    if not site.product.is_running:
        site.start()
    site.wait_recovered()
    site.learn(content)
    assert stay <= keys(site), "a restore point is lost"
    finish(site, kind)
    site.assert_sound()
    clear(site)
    assert site.backup() == "INCREMENT"


def test_every_failpoint_is_in_the_matrix() -> None:
    with simulation() as site:
        reached = set(recorded(site))
    known = {point for kind in ASK for point in daemon_points(kind, ALL_MOMENTS)}
    known |= {point for kind in ASK for point in driver_points(kind)}
    assert reached - known <= {f"{action}.{point}" for action in ASIDE for point in ("begun", "acted")}
    assert known - reached == set()


def recorded(site: Simulation) -> list[str]:
    """All failpoints that are reached when each kind of operation goes well, once."""
    log = site.directory / "reached"
    for kind in ASK:
        prepare(site, kind)
        site.arm(f"*=record:{log}")
        ASK[kind](site)
        site.settle()
        wait_for("the last one", lambda last=f"{kind}.END.ended": last in log.read_text().split(), 10)
        site.arm()
        finish(site, kind)
        clear(site)
    return log.read_text().split()
