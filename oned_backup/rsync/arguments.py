"""The parameters of a datastore of rsync's, and what they become on command lines.

RSYNC_ARGS is a text that administrators of OpenNebula know (`-aS`, `-az`). It is
taken apart here, and only options that are known to be harmless reach rsync:
some change how data travel, others ask for what is done anyway. Everything else
is refused, with the reason for those that people are likely to try.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from oned_backup.errors import InvalidInput, Misconfigured
from oned_backup.sdk.limits import Confined, confined
from oned_backup.ssh.command import checked_target

_FLAG = ""
_NUMBER = r"\d{1,9}"
_RATE = r"\d{1,9}(?:\.\d{1,3})?[KMGkmg]?"
_WORDS = r"[A-Za-z0-9]{1,16}(?:[ ,][A-Za-z0-9]{1,16}){0,7}"

#: options that reach rsync, and what their values look like
PASSED: Mapping[str, str] = {
    "--compress": _FLAG,
    "--compress-choice": _WORDS,
    "--compress-level": _NUMBER,
    "--checksum-choice": _WORDS,
    "--bwlimit": _RATE,
    "--timeout": r"[1-9]\d{0,8}",
    "--no-compress": _FLAG,
    "--ipv4": _FLAG,
    "--ipv6": _FLAG,
}
_SHORT = {"z": "--compress", "4": "--ipv4", "6": "--ipv6"}
#: options that change nothing for the plain files of a backup, which have no holes, owners or links to keep
IMPLIED = frozenset(
    {
        "--archive", "--recursive", "--links", "--perms", "--times", "--group", "--owner", "--devices",
        "--specials", "--sparse", "--hard-links", "--acls", "--xattrs", "--one-file-system", "--partial",
        "--inplace", "--append-verify", "--numeric-ids", "--human-readable", "--verbose", "--quiet",
        "--stats", "--protect-args", "--secluded-args", "--no-motd", "--fsync",
    }
)  # fmt: skip
_IMPLIED_SHORT = frozenset("arlptgoDSHAXxhvqsP")
_OTHER_PROGRAM = "it would have another program run"
_OTHER_FILES = "which files are sent is not for it to say"
_NO_RESUME = "a transfer that was cut off could not go on"
#: why not, for what people are likely to try
REFUSED: Mapping[str, str] = {
    "--rsh": _OTHER_PROGRAM,
    "-e": _OTHER_PROGRAM,
    "--rsync-path": _OTHER_PROGRAM,
    "--daemon": "it is for servers",
    "--config": "it is for servers",
    "--password-file": "it is for rsync's own daemon; the server is reached by SSH",
    "--files-from": _OTHER_FILES,
    "--exclude": _OTHER_FILES,
    "--exclude-from": _OTHER_FILES,
    "--include": _OTHER_FILES,
    "--include-from": _OTHER_FILES,
    "--filter": _OTHER_FILES,
    "--remove-source-files": _OTHER_FILES,
    "--log-file": "it would write a file of its choice",
    "--write-batch": "it would write a file of its choice",
    "--only-write-batch": "it would write a file of its choice",
    "--read-batch": _OTHER_FILES,
    "--temp-dir": "a file is written where it is going to stay",
    "-T": "a file is written where it is going to stay",
    "--backup": "nothing is replaced",
    "-b": "nothing is replaced",
    "--whole-file": _NO_RESUME,
    "-W": _NO_RESUME,
    "--append": "what is there already would not be proved",
    "--size-only": "what is there already would not be proved",
    "--ignore-times": "each file can be read only once",
    "-I": "each file can be read only once",
    "--checksum": "each file can be read only once",
    "-c": "each file can be read only once",
    "--dry-run": "nothing would be stored",
    "-n": "nothing would be stored",
    "--chmod": "a backup is readable for its owner alone",
    "--chown": "a backup belongs to the server's account",
}


@dataclass(frozen=True)
class Settings:
    """A datastore's parameters, checked. `options`: for rsync; `confined`: how it is to run."""

    user: str
    host: str
    base: str
    options: tuple[str, ...] = ()
    confined: Confined = field(default_factory=Confined)

    @property
    def target(self) -> str:
        """For ssh."""
        return f"{self.user}@{self.host}"

    def remote(self, path: str = "") -> str:
        """A path below BASE_PATH, for rsync and sshfs."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.user}@{host}:{self.base}/{path}"


def settings_from(parameters: Mapping[str, str], base_path: Path) -> Settings:
    """The settings in a driver's parameters; `Misconfigured` names the first that is wrong."""
    user, host = parameters.get("RSYNC_USER", ""), parameters.get("RSYNC_HOST", "")
    if not user or not host or "@" in host or "@" in user:
        raise Misconfigured(f"RSYNC_USER '{user}' and RSYNC_HOST '{host}' do not name an account on a server")
    base = str(base_path)
    if ".." in base_path.parts or any(ord(character) < 32 for character in base):
        raise Misconfigured(f"BASE_PATH {base!r} cannot be a directory on the server")
    try:
        checked_target(f"{user}@{host}")
        options = parse_rsync_args(parameters.get("RSYNC_ARGS", ""))
    except InvalidInput as error:
        raise Misconfigured(error.message, hint=error.hint) from error
    if limit := parameters.get("RSYNC_BWLIMIT", ""):
        options = [option for option in options if not option.startswith("--bwlimit=")]
        options.append(f"--bwlimit={limit}")
    return Settings(user, host, base, tuple(options), confined(parameters, "RSYNC"))


def parse_rsync_args(text: str) -> list[str]:
    """What of RSYNC_ARGS is for rsync; `InvalidInput` names what is refused, and why."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InvalidInput(f"RSYNC_ARGS: {str(error).lower()}") from error
    passed: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name in IMPLIED and not equals:
            continue
        if name in PASSED:
            if not equals and PASSED[name] != _FLAG:
                value = next(rest, "")
            passed.append(_checked(name, value, given=bool(equals)))
        elif re.fullmatch(r"-[A-Za-z0-9]+", word):
            passed += _short(word)
        else:
            raise _refusal(name)
    return passed


def _checked(name: str, value: str, *, given: bool) -> str:
    pattern = PASSED[name]
    if pattern == _FLAG:
        if given:
            raise InvalidInput(f"RSYNC_ARGS: {name} takes no value")
        return name
    if not re.fullmatch(pattern, value):
        raise InvalidInput(f"RSYNC_ARGS: {name}='{value[:40]}' is not a value for it")
    return f"{name}={value}"


def _short(word: str) -> list[str]:
    passed = []
    for letter in word[1:]:
        if letter in _SHORT:
            passed.append(_SHORT[letter])
        elif letter not in _IMPLIED_SHORT:
            raise _refusal(f"-{letter}")
    return passed


def _refusal(name: str) -> InvalidInput:
    shown = name[:60]
    if name.startswith("--del"):
        why = "nothing that is stored is deleted by a transfer"
    else:
        why = REFUSED.get(name, "it is not among the options that are known to be harmless")
    return InvalidInput(
        f"RSYNC_ARGS: '{shown}' is refused: {why}", hint=f"Let through are {', '.join(sorted(PASSED))}."
    )
