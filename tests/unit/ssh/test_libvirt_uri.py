"""What a libvirt URI says of where libvirt is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from oned_backup.errors import InvalidInput, Misconfigured
from oned_backup.ssh.command import quoted, ssh_argv
from oned_backup.ssh.config_file import config_text, write_config
from oned_backup.ssh.libvirt_uri import parse_uri

SSH = Path("/var/lib/odb/ssh/ssh")


@pytest.mark.parametrize(
    ("uri", "target", "machine", "local", "over"),
    [
        ("qemu:///system", "", "", "qemu:///system", "qemu:///system"),
        ("qemu:///system?socket=/x/s", "", "", "qemu:///system?socket=/x/s", "qemu:///system?socket=/x/s"),
        (
            "qemu+ssh://root@hv1/system",
            "root@hv1",
            "hv1",
            "qemu:///system",
            f"qemu+ssh://root@hv1/system?command={SSH}",
        ),
        (
            "qemu+ssh://hv1:2222/system?socket=/x/s&netcat=nc6",
            "ssh://hv1:2222",
            "hv1",
            "qemu:///system?socket=/x/s",
            f"qemu+ssh://hv1:2222/system?socket=/x/s&netcat=nc6&command={SSH}",
        ),
        (
            "qemu+ssh://odb@[fe80::1]:22/session",
            "ssh://odb@[fe80::1]:22",
            "fe80::1",
            "qemu:///session",
            f"qemu+ssh://odb@[fe80::1]:22/session?command={SSH}",
        ),
    ],
)
def test_where_it_leads(uri: str, target: str, machine: str, local: str, over: str) -> None:
    place = parse_uri(uri)
    assert (place.target, place.machine, place.local, place.over(SSH)) == (target, machine, local, over)
    assert place.is_remote is bool(target)


@pytest.mark.parametrize(
    ("uri", "kind"),
    [
        ("qemu+tls://hv1/system", Misconfigured),
        ("qemu+tcp://hv1/system", Misconfigured),
        ("qemu://hv1/system", Misconfigured),
        ("qemu+ssh:///system", Misconfigured),
        ("qemu+ssh://root@hv1/system?no_verify=1", Misconfigured),
        ("qemu+ssh://root@hv1/system?command=/tmp/x", Misconfigured),
        ("qemu+ssh://root@hv1/system?keyfile=/tmp/x", Misconfigured),
        ("qemu+ssh://-oProxyCommand=x/system", InvalidInput),
        ("qemu+ssh://root@hv1:many/system", InvalidInput),
        ("hv1", InvalidInput),
    ],
)
def test_what_is_refused(uri: str, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        parse_uri(uri)


def test_the_configuration_keeps_accepted_keys_and_lets_the_administrator_win(tmp_path: Path) -> None:
    directory = tmp_path / "ssh"
    text = config_text(directory, identity_file=tmp_path / "a b", include=tmp_path / "hosts")
    config = write_config(directory, text)
    (directory / "known_hosts").write_text("hv1 ssh-ed25519 AAAA\n")
    assert write_config(directory, text) == config
    assert (directory / "known_hosts").read_text() == "hv1 ssh-ed25519 AAAA\n"
    lines = config.read_text().splitlines()
    assert lines[1] == f'Include "{tmp_path}/hosts"'
    assert f'    IdentityFile "{tmp_path}/a b"' in lines
    assert "    StrictHostKeyChecking yes" in lines
    assert [path.stat().st_mode & 0o777 for path in (directory, config, directory / "ssh")] == [
        0o700,
        0o600,
        0o700,
    ]


def test_a_path_that_cannot_stand_in_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured):
        config_text(tmp_path, identity_file=Path('/x"\nProxyCommand id'))


def test_ssh_understands_it_and_prefers_a_cipher_that_the_processor_knows(tmp_path: Path) -> None:
    config = write_config(tmp_path, config_text(tmp_path))
    done = subprocess.run(["ssh", "-G", "-F", config, "hv1"], capture_output=True, text=True, check=True)
    ciphers = next(line for line in done.stdout.splitlines() if line.startswith("ciphers "))
    assert ciphers.startswith("ciphers aes128-gcm@openssh.com,")
    assert "chacha20-poly1305@openssh.com" in ciphers


def test_words_stay_words() -> None:
    assert quoted(["a b", "$(x)", "'"]) == """'a b' '$(x)' ''"'"''"""
    with pytest.raises(InvalidInput):
        quoted(["a\0b"])
    argv = ssh_argv("root@hv1", ["ls", "a b"], options=["-N"], config=Path("/c"))
    assert argv == ["ssh", "-F", "/c", "-T", "-N", "--", "root@hv1", "ls 'a b'"]
