"""Which of RSYNC_ARGS reach rsync, and what the other parameters become."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oned_backup.errors import InvalidInput, Misconfigured
from oned_backup.rsync.arguments import PASSED, REFUSED, parse_rsync_args, settings_from
from oned_backup.sdk.limits import Confined

ACCOUNT = {"RSYNC_HOST": "backup", "RSYNC_USER": "oneadmin"}
BASE = Path("/backups/100")


@pytest.mark.parametrize(
    ("text", "passed"),
    [
        ("", []),
        ("-aS", []),
        ("-az", ["--compress"]),
        ("-a -z -4", ["--compress", "--ipv4"]),
        ("--archive --sparse --compress-level=3", ["--compress-level=3"]),
        ("--bwlimit 20M --timeout=90", ["--bwlimit=20M", "--timeout=90"]),
        ("--compress-choice='zstd lz4'", ["--compress-choice=zstd lz4"]),
    ],
)
def test_what_reaches_rsync(text: str, passed: list[str]) -> None:
    assert parse_rsync_args(text) == passed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("-e ssh", "'-e' is refused: it would have another program run"),
        ("-aSe 'sh -c id'", "'-e' is refused"),
        ("--rsh=sh", "'--rsh' is refused: it would have another program run"),
        ("--rsync-path='rm -rf /;rsync'", "'--rsync-path' is refused: it would have another program run"),
        ("--rsync-pat=x", "'--rsync-pat' is refused"),
        ("--daemon", "it is for servers"),
        ("--delete", "nothing that is stored is deleted by a transfer"),
        ("--delete-after", "nothing that is stored is deleted"),
        ("--del", "nothing that is stored is deleted"),
        ("--files-from=/etc/shadow", "which files are sent"),
        ("--log-file=/etc/cron.d/x", "it would write a file of its choice"),
        ("--write-batch=/tmp/x", "it would write a file of its choice"),
        ("--whole-file", "a transfer that was cut off could not go on"),
        ("-aW", "'-W' is refused: a transfer that was cut off could not go on"),
        ("--append", "would not be proved"),
        ("-an", "nothing would be stored"),
        ("--timeout=0", "--timeout='0' is not a value for it"),
        ("--timeout", "--timeout='' is not a value for it"),
        ("--compress=9", "--compress takes no value"),
        ("--bwlimit='1;id'", "is not a value for it"),
        ("--archive=yes", "'--archive' is refused"),
        ("root@other:/etc", "'root@other:/etc' is refused"),
        ("--", "'--' is refused"),
        ("-", "'-' is refused"),
        ("'open", "no closing quotation"),
    ],
)
def test_what_is_refused_and_why(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message.replace("(", r"\(")) as caught:
        parse_rsync_args(text)
    assert str(caught.value).startswith("RSYNC_ARGS: ")


@given(st.lists(st.text(alphabet="-abezWS=/;'\" $rshpat", max_size=12), max_size=4).map(" ".join))
def test_nothing_else_ever_comes_out(text: str) -> None:
    try:
        passed = parse_rsync_args(text)
    except InvalidInput:
        return
    assert {word.partition("=")[0] for word in passed} <= set(PASSED)


def test_no_option_is_let_through_and_refused() -> None:
    assert not set(PASSED) & set(REFUSED)


def test_a_server_and_its_options() -> None:
    settings = settings_from({**ACCOUNT, "RSYNC_ARGS": "-az --bwlimit=5M", "RSYNC_BWLIMIT": "300"}, BASE)
    assert settings.target == "oneadmin@backup"
    assert settings.remote("7/.partial-x/") == "oneadmin@backup:/backups/100/7/.partial-x/"
    assert settings.options == ("--compress", "--bwlimit=300")
    assert settings.confined == Confined()


def test_an_address_of_ipv6_is_put_into_brackets() -> None:
    settings = settings_from({**ACCOUNT, "RSYNC_HOST": "2001:db8::7"}, BASE)
    assert settings.remote() == "oneadmin@[2001:db8::7]:/backups/100/"


@pytest.mark.parametrize(
    "wrong",
    [
        {"RSYNC_HOST": ""},
        {"RSYNC_USER": ""},
        {"RSYNC_HOST": "-oProxyCommand=id"},
        {"RSYNC_HOST": "a b"},
        {"RSYNC_HOST": "root@other"},
        {"RSYNC_USER": "-l"},
        {"RSYNC_USER": "a;id"},
        {"RSYNC_ARGS": "-e id"},
    ],
)
def test_what_can_be_no_server_is_misconfigured(wrong: dict[str, str]) -> None:
    with pytest.raises(Misconfigured):
        settings_from({**ACCOUNT, **wrong}, BASE)


@pytest.mark.parametrize("path", ["/a/../b", "/a\nb"])
def test_what_can_be_no_directory_is_misconfigured(path: str) -> None:
    with pytest.raises(Misconfigured, match="BASE_PATH"):
        settings_from(ACCOUNT, Path(path))


def test_priorities_are_given_by_the_programs_before_rsync() -> None:
    settings = settings_from({**ACCOUNT, "RSYNC_NICE": "10", "RSYNC_IONICE": "7"}, BASE)
    assert settings.confined.prefix == ("nice", "-n", "10", "ionice", "-c", "2", "-n", "7")


@pytest.mark.parametrize("systemd", [True, False])
def test_limits_are_enforced_or_said_not_to_be(systemd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_dir", lambda _: systemd)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    settings = settings_from({**ACCOUNT, "RSYNC_CPU_QUOTA": "50%", "RSYNC_MEMORY_MAX_MB": "400"}, BASE)
    if systemd:
        scope = ("systemd-run", "--scope", "--quiet", "--collect")
        assert settings.confined.prefix == (
            *scope,
            "--property=CPUQuota=50%",
            "--property=MemoryMax=400M",
            "--",
        )
        assert settings.confined.warnings == ()
    else:
        assert settings.confined.prefix == ()
        assert settings.confined.warnings == (
            "RSYNC_CPU_QUOTA and RSYNC_MEMORY_MAX_MB cannot be enforced: this machine has no systemd",
        )


def test_what_has_no_effect_says_so() -> None:
    settings = settings_from({**ACCOUNT, "RSYNC_MAX_RIOPS": "100", "RSYNC_MAX_WIOPS": "100"}, BASE)
    assert [warning.partition(" ")[0] for warning in settings.confined.warnings] == [
        "RSYNC_MAX_RIOPS",
        "RSYNC_MAX_WIOPS",
    ]
