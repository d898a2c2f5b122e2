"""The network lab is what it says: machines that are apart, cables, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lab import LabError, wait_for
from netlab import Machine, Netlab
from product import Product


def ssh(source: Machine, target: str, *words: str) -> subprocess.CompletedProcess[bytes]:
    """A command by ssh from one machine in another."""
    return source.run(["ssh", target, *words], check=False, timeout_s=30)


def test_machines_are_apart(netlab: Netlab) -> None:
    daemon, backup = netlab["daemon"], netlab["backup"]
    assert ssh(daemon, "backup", "hostname; echo $PATH").stdout.split() == [
        b"backup", b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    ]  # fmt: skip
    ssh(daemon, "backup", "echo stored >/srv/file")
    assert (backup.root / "srv/file").read_text() == "stored\n"
    assert daemon.run(["ls", "/srv"]).stdout == b""
    (backup.own / "secret").touch()
    assert daemon.run(["ls", backup.own], check=False).returncode != 0
    assert set(backup.processes("sshd")) & set(daemon.processes()) == set()
    assert not Path("/srv/file").exists()


def test_signals_reach_the_program(netlab: Netlab) -> None:
    process = netlab["hv1"].popen(["sleep", "1000"])
    pid = process.program_pid
    assert pid in netlab["hv1"].processes("sleep", "1000")
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM
    assert not Path(f"/proc/{pid}").exists()


def test_cables_and_silence(netlab: Netlab) -> None:
    daemon, hv1, backup = netlab["daemon"], netlab["hv1"], netlab["backup"]
    backup.link(up=False)
    hv1.drop(daemon)
    assert b"timed out" in ssh(daemon, "hv1", "true").stderr
    assert ssh(daemon, "backup", "true").returncode == 255
    netlab.calm()
    assert ssh(daemon, "hv1", "true").returncode == 0
    assert ssh(daemon, "backup", "true").returncode == 0
    backup.stop_sshd()
    assert b"refused" in ssh(daemon, "backup", "true").stderr


def test_a_limited_rate(netlab: Netlab) -> None:
    backup = netlab["backup"]
    backup.rate("8mbit")
    assert b"rate 8Mbit" in backup.run(["tc", "qdisc", "show", "dev", "eth0"]).stdout
    sender = netlab["daemon"].popen(["ssh", "backup", "cat >/srv/slow"], stdin=subprocess.PIPE)
    assert sender.stdin
    sender.stdin.write(bytes(1 << 20))
    sender.stdin.close()
    assert sender.wait(60) == 0
    assert (backup.root / "srv/slow").stat().st_size == 1 << 20
    backup.rate("")
    assert b"rate" not in backup.run(["tc", "qdisc", "show", "dev", "eth0"]).stdout


def test_a_libvirt_that_others_reach_by_ssh(netlab: Netlab) -> None:
    here = netlab["hv1"].libvirtd.connection.getHostname()
    there = netlab["daemon"].run(["virsh", "-c", "qemu+ssh://root@hv1/system", "hostname"]).stdout
    assert here == there.decode().strip() == "hv1"


def test_the_product_in_a_machine(remote_product: Product, netlab: Netlab) -> None:
    assert remote_product.ask("vm", "list") == []
    assert netlab["daemon"].processes("oned-backup", "serve")
    remote_product.stop()
    assert not netlab["daemon"].processes("oned-backup", "serve")


def test_nothing_is_left_of_a_killed_lab() -> None:
    code = (
        "import time; from netlab import Netlab\n"
        "with Netlab(['one']) as lab:\n"
        "    sleeper = lab['one'].popen(['sleep', '1000'])\n"
        "    print(lab.directory, lab['one'].pid, sleeper.program_pid, flush=True); time.sleep(1000)"
    )
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "share/lab")}
    maker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=path)
    assert maker.stdout
    directory, *pids = maker.stdout.readline().decode().split()
    maker.kill()
    maker.communicate()
    for pid in pids:
        wait_for(f"end of {pid}", lambda pid=pid: not Path(f"/proc/{pid}").exists(), 20)
    with Netlab(["one"]):
        assert not Path(directory).exists()


def test_a_command_that_fails_is_an_error(netlab: Netlab) -> None:
    with pytest.raises(LabError, match=r"hv2: cat /none: exit 1: .*No such file"):
        netlab["hv2"].run(["cat", "/none"])
