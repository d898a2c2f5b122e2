"""SSH as drivers use it, against a real sshd."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from lab import wait_for
from sshd import Sshd

from oned_backup.errors import DriverFailed, InvalidInput, Misconfigured, PermissionDenied, Unavailable
from oned_backup.sdk.ssh import remote_run, ssh_argv, wrapper_path
from oned_backup.ssh.command import shared_config_path
from oned_backup.ssh.config_file import write_shared
from oned_backup.ssh.host_keys import accept_host_key, seen_fingerprint

EVIL = "$(id) `id` 'x' \"y\" ; & | > < * ? ~ \\ ! # % é\n-n"


@pytest.fixture
def sockets():
    with tempfile.TemporaryDirectory(prefix="odb-", dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture(params=["alone", "shared"])
def sshd(request, tmp_path, sockets, monkeypatch):
    """With a connection for each command, and with one for all."""
    with Sshd(tmp_path / "sshd") as server:
        monkeypatch.setenv("ODB_SSH_CONFIG", str(server.config))
        if request.param == "shared":
            write_shared(server.config.parent, sockets)
        yield server
        end_master(server, sockets)


def end_master(sshd, sockets):
    for socket in sockets.iterdir():
        subprocess.run(["ssh", "-F", sshd.config, "-S", socket, "-O", "exit", sshd.target], check=False)


only_shared = pytest.mark.parametrize("sshd", ["shared"], indirect=True)


def is_alive(pid_file):
    return Path(f"/proc/{pid_file.read_text().strip()}").exists()


def test_arguments_arrive_as_they_are(sshd):
    assert remote_run(sshd.target, ["printf", "%s", EVIL]).stdout.decode() == EVIL


def test_input_output_and_exit_code(sshd):
    data = os.urandom(1 << 20)
    assert remote_run(sshd.target, ["cat"], stdin=data).stdout == data
    assert remote_run(sshd.target, ["cat"]).stdout == b""
    assert remote_run(sshd.target, ["false"], check=False).returncode == 1
    with pytest.raises(DriverFailed, match=r"ls on .*cannot access .* \(exit code 2\)$"):
        remote_run(sshd.target, ["ls", "/no/such/file"])
    with pytest.raises(Misconfigured, match="no-such-program is not installed on"):
        remote_run(sshd.target, ["no-such-program"])


@only_shared
def test_commands_share_a_connection_and_do_without_it(sshd, sockets):
    """One that was killed, or is broken, is replaced; the command that it had fails."""
    remote_run(sshd.target, ["true"])
    (socket,) = sockets.iterdir()
    ports = [remote_run(sshd.target, ["sh", "-c", "echo $SSH_CLIENT"]).stdout for _ in range(3)]
    assert len(set(ports)) == 1
    argv = ["ssh", "-F", sshd.config, "-S", socket, "-O", "check", sshd.target]
    said = subprocess.run(argv, check=True, capture_output=True, text=True).stderr
    master = int(re.search(r"pid=(\d+)", said)[1])

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(remote_run, sshd.target, ["sleep", "600", str(sshd.port)])
        wait_for("start of the command", lambda: sleeping(sshd), 20)
        os.kill(master, signal.SIGKILL)
        with pytest.raises(Unavailable):
            running.result(30)
    wait_for("end of the remote command", lambda: not sleeping(sshd), 20)
    assert socket.exists()  # of no use any more
    assert remote_run(sshd.target, ["sh", "-c", "echo $SSH_CLIENT"]).stdout not in ports


def sleeping(sshd):
    """The remote command, which has our marker in its command line."""
    listed = subprocess.run(["ps", "-ewwo", "args"], check=True, capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if line == f"sleep 600 {sshd.port}"]


@only_shared
def test_a_path_that_is_too_long_is_done_without(sshd, tmp_path):
    write_shared(sshd.config.parent, tmp_path / ("long" * 20))
    assert remote_run(sshd.target, ["echo", "in"]).stdout == b"in\n"
    assert shared_config_path() == sshd.config


def test_it_takes_no_longer_than_allowed(sshd, tmp_path):
    pid = tmp_path / "pid"
    with pytest.raises(Unavailable, match="no end after 4 s"):
        remote_run(sshd.target, ["sh", "-c", f"echo $$ >{pid}; exec sleep 600"], timeout_s=4)
    wait_for("end of the remote command", lambda: not is_alive(pid), 20)


def test_a_killed_driver_leaves_no_remote_command(sshd, tmp_path):
    pid = tmp_path / "pid"
    code = "import sys; from oned_backup.sdk.ssh import remote_run; remote_run(sys.argv[1], sys.argv[2:])"
    command = ["sh", "-c", f"echo $$ >{pid}; exec sleep 600"]
    driver = subprocess.Popen([sys.executable, "-c", code, sshd.target, *command])
    wait_for("start of the remote command", lambda: pid.exists() and pid.read_text(), 20)
    driver.send_signal(signal.SIGKILL)
    driver.wait(10)
    wait_for("end of the remote command", lambda: not is_alive(pid), 20)


def test_an_unknown_host_key_is_named_and_can_be_accepted(sshd):
    sshd.forget()
    with pytest.raises(Misconfigured, match="is not known; it shows SHA256:") as caught:
        remote_run(sshd.target, ["true"])
    assert f"--accept-host-key {sshd.fingerprint}" in caught.value.hint
    assert seen_fingerprint(sshd.config, sshd.target) == sshd.fingerprint
    with pytest.raises(Misconfigured, match="it shows SHA256"):
        accept_host_key(sshd.config, sshd.target, "SHA256:" + "A" * 43)
    assert sshd.known_hosts.read_text() == ""
    accept_host_key(sshd.config, sshd.target, sshd.fingerprint)
    assert remote_run(sshd.target, ["echo", "in"]).stdout == b"in\n"


@pytest.mark.fault("store", "host key changed")
def test_a_changed_host_key_is_refused_until_it_is_accepted(sshd):
    before = sshd.fingerprint
    sshd.stop()
    sshd.new_host_key()
    sshd.start()
    with pytest.raises(Misconfigured, match="has changed") as caught:
        remote_run(sshd.target, ["true"])
    assert sshd.fingerprint in caught.value.message
    accept_host_key(sshd.config, sshd.target, sshd.fingerprint)
    assert remote_run(sshd.target, ["true"]).returncode == 0
    assert before != sshd.fingerprint
    assert len(sshd.known_hosts.read_text().splitlines()) == 1


def test_a_refused_login_and_a_host_that_is_away(sshd, tmp_path):
    (sshd.directory / "id.pub").write_text("")
    with pytest.raises(PermissionDenied, match="Permission denied"):
        remote_run(sshd.target, ["true"])
    sshd.stop()
    with pytest.raises(Unavailable, match="Connection refused"):
        remote_run(sshd.target, ["true"])


def test_a_target_is_no_option(sshd):
    for target in ("-oProxyCommand=id", "root@-x", "a b", "root@host;id", ""):
        with pytest.raises(InvalidInput):
            ssh_argv(target, ["true"])


def test_the_wrapper_is_ssh_with_our_configuration(sshd):
    argv = [str(wrapper_path()), sshd.target, "echo", "in"]
    assert subprocess.run(argv, check=True, capture_output=True).stdout == b"in\n"
