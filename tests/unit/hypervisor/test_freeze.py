"""Freezing a guest whose agent misbehaves in ways that a real one cannot be made to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import libvirt
import pytest

from oned_backup.errors import Unavailable
from oned_backup.hypervisor.domain import Domain
from oned_backup.hypervisor.freeze import Mode, Window, frozen, resume_if_noted
from oned_backup.hypervisor.host import LocalHost


class Handle:
    """A libvirt domain whose freeze and thaw fail as told."""

    def __init__(self, *, freeze_fails: bool = False, failing_thaws: int = 0) -> None:
        self.freeze_fails = freeze_fails
        self.failing_thaws = failing_thaws
        self.calls: list[str] = []
        self.thawed = threading.Event()

    def name(self) -> str:
        return "web"

    def UUIDString(self) -> str:  # noqa: N802
        return "u"

    def state(self) -> tuple[int, int]:
        return libvirt.VIR_DOMAIN_RUNNING, 0

    def isActive(self) -> int:  # noqa: N802
        return 1

    def XMLDesc(self, _flags: int) -> str:  # noqa: N802
        target = "<target name='org.qemu.guest_agent.0' state='connected'/>"
        return f"<domain><devices><channel>{target}</channel></devices></domain>"

    def agentSetResponseTimeout(self, seconds: int, _flags: int) -> None:  # noqa: N802
        self.calls.append(f"timeout {seconds}")

    def fsFreeze(self) -> int:  # noqa: N802
        self.calls.append("freeze")
        if self.freeze_fails:
            raise libvirt.libvirtError("no answer")
        return 1

    def fsThaw(self) -> int:  # noqa: N802
        self.calls.append("thaw")
        if self.failing_thaws:
            self.failing_thaws -= 1
            raise libvirt.libvirtError("no answer")
        self.thawed.set()
        return 1

    @property
    def commands(self) -> list[str]:
        return [call for call in self.calls if not call.startswith("timeout")]


@pytest.fixture(autouse=True)
def _operation_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The notes lie where the test runs."""
    monkeypatch.chdir(tmp_path)


def by_agent(handle: Handle, *, timeout_s: float) -> AbstractContextManager[Window]:
    """The guest frozen by its agent; that the guardian is left alone with it is a call too."""

    @contextmanager
    def guarded(*, limit_s: float, note: Path | None = None) -> Iterator[Callable[[], None]]:
        assert limit_s > timeout_s
        assert note is None
        told = threading.Event()
        try:
            yield told.set
        finally:
            if not told.is_set():
                handle.calls.append("guardian")

    here = Path.cwd()
    return frozen(
        LocalHost(), Domain(handle), Mode.AGENT, timeout_s=timeout_s, directory=here, guarded=guarded
    )


def test_thaw_is_sent_also_when_the_freeze_was_not_answered() -> None:
    handle = Handle(freeze_fails=True)
    with by_agent(handle, timeout_s=5) as window:
        assert handle.commands == ["freeze"]
    assert handle.commands == ["freeze", "thaw"]
    assert window.method is Mode.NONE
    assert "no freeze" in window.warning


@pytest.mark.fault("guest", "thaw not answered")
def test_thaw_that_nobody_answers_is_repeated_by_somebody_else() -> None:
    handle = Handle(freeze_fails=True, failing_thaws=100)
    with by_agent(handle, timeout_s=5) as window:
        pass
    assert handle.commands == ["freeze", "thaw", "guardian"]
    assert "repeated until the agent answers" in window.warning


@pytest.mark.fault("guest", "thaw not answered")
def test_thaw_is_repeated_until_it_is_answered() -> None:
    handle = Handle(failing_thaws=2)
    with by_agent(handle, timeout_s=5) as window:
        pass
    assert handle.commands == ["freeze", "thaw", "thaw", "thaw"]
    assert (window.method, window.warning) == (Mode.AGENT, "")


@pytest.mark.fault("guest", "thaw not answered")
def test_guest_that_may_still_be_frozen_is_an_error() -> None:
    handle = Handle(failing_thaws=100)
    with (
        pytest.raises(Unavailable, match="may still be frozen"),
        by_agent(handle, timeout_s=5),
    ):
        pass
    assert handle.commands[-1] == "guardian"


def test_block_that_takes_too_long_is_thawed_in_the_middle() -> None:
    handle = Handle()
    with by_agent(handle, timeout_s=0.05) as window:
        assert handle.thawed.wait(10)
    assert window.method is Mode.NONE
    assert "thawed after 0.05 s" in window.warning


def test_error_inside_the_block_comes_out_after_the_thaw() -> None:
    handle = Handle()
    with (
        pytest.raises(RuntimeError, match="job"),
        by_agent(handle, timeout_s=5),
    ):
        raise RuntimeError("job")
    assert handle.commands == ["freeze", "thaw"]
    # others wait for the agent as long as before
    assert handle.calls[-1] == f"timeout {libvirt.VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK}"


def test_note_of_another_operation_that_ends_meanwhile(tmp_path: Path) -> None:
    note = tmp_path / "op" / "suspended"
    note.parent.mkdir()
    note.write_text("other")

    class JustRemoved(LocalHost):
        def read_file(self, path: str, *, max_bytes: int) -> bytes | None:
            Path(path).unlink()
            return super().read_file(path, max_bytes=max_bytes)

    handle = Handle()
    resume_if_noted(JustRemoved(), Domain(handle), tmp_path)
    assert not note.exists()
    assert handle.calls == []
