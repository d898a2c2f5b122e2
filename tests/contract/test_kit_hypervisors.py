"""The kit's clauses about hypervisors: the dummy keeps them, and a driver in shell breaks each in its way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from oned_backup.contract.actions import Kind
from oned_backup.hypervisor.dummy import DummyHost
from oned_backup.runner.kit import Report, Status
from oned_backup.runner.skeleton import new_driver

DRIVERS = Path(__file__).parents[2] / "drivers"
Judge = Callable[..., Report]

#: one domain that never changes, told as the specification wants it
SHELL = """#!/bin/sh
set -eu
uri=$(tr -d '\\n' | sed 's/.*<URI>//; s/<.*//')
[ "$uri" = static://here ] || { echo "$uri does not answer" >&2; exit 69; }
uuid=5d3c1a52-7a0f-4b8e-9f43-52c0a2ab7c11
domain="<domain type='kvm'><name>one</name><uuid>$uuid</uuid><devices><disk type='file' device='disk'>\
<source file='/srv/one.raw'/><target dev='vda'/></disk></devices></domain>"
case ${0##*/} in
monitor)
    line="<DOMAIN><NAME>one</NAME><UUID>$uuid</UUID><STATE>OFF</STATE></DOMAIN>"
    echo "DOMAINS=<DOMAINS>$line</DOMAINS>"
    ;;
*)
    [ "$ODB_OPT_DOMAIN" = one ] || [ "$ODB_OPT_DOMAIN" = $uuid ] || { echo "no such domain" >&2; exit 66; }
    [ "${0##*/}" != dump_xml ] || printf 'DOMAIN=%s\\nSTATE=OFF\\nCAPACITY=vda:1048576\\n' "$domain"
    ;;
esac
"""
UNREACHABLE = 'unreachable = { URI = "static://gone" }\n'


@pytest.mark.whole_matrix  # fifty starts of Python
def test_the_dummy_keeps_all_clauses(judge: Judge, tmp_path: Path) -> None:
    host = DummyHost(f"dummy://{tmp_path}/host")
    host.create("a", {"vda": 1 << 20})
    host.create("b", {"vda": 1 << 20, "vdb": 1 << 20}, state="OFF")
    (tmp_path / "store.toml").write_text(f'unreachable = {{ URI = "dummy://{tmp_path}/absent" }}\n')
    report = judge(
        DRIVERS / "vmm/dummy",
        parameters={"URI": f"dummy://{host.root}"},
        store_file=tmp_path / "store.toml",
        only={f"VMM-0{number}" for number in range(1, 6)},
    )
    assert [clause.status for clause in report.clauses] == [Status.PASSED] * 5, report


@pytest.mark.parametrize(
    ("right", "wrong", "clauses"),
    [
        ("", "", set()),
        ("<STATE>OFF", "<STATE>shut off", {"VMM-01"}),
        ('= one ] || [ "$ODB_OPT_DOMAIN" ', "", {"VMM-02"}),
        ("vda:1048576", "sda:1 MiB", {"VMM-02"}),
        ("exit 66", "exit 69", {"VMM-03"}),
        ("exit 69", "exit 66", {"VMM-05"}),
    ],
)
def test_a_driver_in_shell(judge: Judge, right: str, wrong: str, clauses: set[str], tmp_path: Path) -> None:
    folder = new_driver(tmp_path / "vmm", "static", Kind.VMM, shell=True)  # noqa: S604
    (folder / "driver.sh").write_text(SHELL.replace(right, wrong) if right else SHELL)
    (tmp_path / "store.toml").write_text(UNREACHABLE)
    report = judge(
        folder,
        parameters={"URI": "static://here"},
        store_file=tmp_path / "store.toml",
        only={f"VMM-0{number}" for number in range(1, 6)},
    )
    assert {clause.clause_id for clause in report.having(Status.FAILED)} == clauses, report


def test_without_a_host_nothing_is_judged(judge: Judge) -> None:
    report = judge(DRIVERS / "vmm/dummy", only={"VMM-01"})
    assert report.having(Status.SKIPPED)[0].detail == "no host was given: URI=…"
