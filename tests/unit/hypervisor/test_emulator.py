"""Whether a QEMU outlives its readers is tried with the program that runs, and told from not knowing."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from oned_backup.errors import Unavailable, Unsupported
from oned_backup.hypervisor import emulator
from oned_backup.hypervisor.host import LocalHost

EMPTY = ["-M", "none", "-nodefaults", "-display", "none"]


@pytest.fixture
def domain() -> Iterator[Any]:
    """What stands for a domain: a QEMU with a UUID."""
    name = str(uuid.uuid4())
    process = subprocess.Popen(["qemu-system-x86_64", *EMPTY, "-uuid", name])
    yield SimpleNamespace(name="web", uuid=name)
    process.kill()
    process.wait()


def test_a_qemu_whose_disks_have_no_iothread_outlives_them(
    domain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = emulator._TRY.replace(', "iothread": "one"', "")
    assert without != emulator._TRY
    monkeypatch.setattr(emulator, "_TRY", without)
    emulator.require_outlives_readers(LocalHost(), domain)


def test_one_that_ends_is_refused_with_its_last_words(domain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ending = emulator._TRY.replace('echo \'{"execute": "quit"}\'', "kill -ABRT $(cat $dir/pid)")
    ending = ending.replace("-qmp stdio", "-qmp stdio -pidfile $dir/pid").replace(', "iothread": "one"', "")
    monkeypatch.setattr(emulator, "_TRY", ending)
    with pytest.raises(Unsupported, match="domain web would end"):
        emulator.require_outlives_readers(LocalHost(), domain)


def test_one_that_is_not_seen_is_not_known() -> None:
    absent: Any = SimpleNamespace(name="web", uuid=str(uuid.uuid4()))
    with pytest.raises(Unavailable, match="could not be tried: its process is not to be seen"):
        emulator.require_outlives_readers(LocalHost(), absent)
