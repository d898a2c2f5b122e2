"""What doctor says of hosts that are reached by SSH, against a real sshd."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sshd import Sshd

from oned_backup.cli.doctor_hosts import check_host, check_hosts
from oned_backup.ssh.libvirt_uri import parse_uri


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with Sshd(tmp_path_factory.mktemp("ssh") / "d") as server:
        yield server


def test_a_host_that_has_everything(sshd: Sshd) -> None:
    hosts = [
        {"name": "here", "uri": "qemu:///system"},
        {"name": "hv1", "uri": f"qemu+ssh://{sshd.target}/system"},
    ]
    (check,) = check_hosts(sshd.config, hosts)
    assert (check.name, check.status) == ("host hv1", "ok")


def test_a_host_without_virsh_is_a_warning(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oned_backup.cli.doctor_hosts._MISSING", "echo virsh")
    check = check_host(sshd.config, "hv1", parse_uri(f"qemu+ssh://{sshd.target}/system"))
    assert check.status == "warn"
    assert "libvirt-clients" in check.remedy


def test_a_host_that_nobody_has_accepted(sshd: Sshd, tmp_path: Path) -> None:
    sshd.forget()
    try:
        check = check_host(sshd.config, "hv1", parse_uri(f"qemu+ssh://{sshd.target}/system"))
    finally:
        sshd.accept()
    assert check.status == "fail"
    assert sshd.fingerprint in check.remedy


def test_a_uri_that_leads_nowhere(sshd: Sshd) -> None:
    (check,) = check_hosts(sshd.config, [{"name": "old", "uri": "qemu+tls://hv/system"}])
    assert (check.status, check.name) == ("fail", "host old")
