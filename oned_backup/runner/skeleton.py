"""Write the folder of a new driver, with everything but what only its author knows.

Each action is there, says in a comment what it must do and print, and fails with
Unsupported (64) until its TODO is replaced. `oned-backup driver check` tells what
is still missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent, wrap

from oned_backup.contract.actions import Action, Kind, actions_of
from oned_backup.errors import Conflict, InvalidInput

_NAME = re.compile(r"[a-z][a-z0-9]{0,31}")
#: what an author begins with; optional actions can be added later
_FIRST = {
    "verify",
    *("pre_backup_live", "post_backup_live", "pre_restore", "restore", "post_restore"),
    *("define", "thaw", "abort_backup"),
}

#: what each action must do: a sentence, and what else there is to know
_DUTIES = {
    (Kind.DATASTORE, "backup"): (
        "Store every file of the backup, and publish it under its id.",
        (
            "It gets its finished name only when all of it is durable. A finished one of that id is "
            "answered again; what a killed call left is removed first. 73 if the store is full, and then "
            "nothing stays."
        ),
    ),
    (Kind.DATASTORE, "backup_cancel"): (
        "Remove what an unfinished backup of that id left.",
        "Succeed if there is nothing. A finished one stays.",
    ),
    (Kind.DATASTORE, "ls"): (
        "The disks of the backup that IMAGE and the option INCREMENT_ID mean.",
        "Only that of DISK_ID if it is given. 66 if the backup is absent, 69 if nobody can tell.",
    ),
    (Kind.DATASTORE, "stat"): ("The size of those disks once they are restored, each rounded up to MB.", ""),
    (Kind.DATASTORE, "restore"): (
        "A plan: the disks as ls has them, and the small files (vm.xml, …) as they were stored.",
        "Their checksums are compared: 65 if one differs.",
    ),
    (Kind.DATASTORE, "download"): (
        "Write the disk that the option URL names to TARGET, or to standard output without one.",
        (
            "TARGET is a file or a block device, FORMAT raw or qcow2. Checksums are compared on the way: "
            "65 if one differs."
        ),
    ),
    (Kind.DATASTORE, "verify"): (
        "Read backups again (those of BACKUP_IDS, else all of IMAGE) and compare checksums.",
        (
            "What is wrong goes into the report: finding it is no failure. To do without this action, "
            "remove its executable, and the feature in driver.toml."
        ),
    ),
    (Kind.DATASTORE, "rm"): (
        "Remove the backups of BACKUP_IDS, else all of IMAGE.",
        "First the name, then the data. Succeed for what is absent.",
    ),
    (Kind.DATASTORE, "monitor"): ("How large the store is, what is used and what is free, in MB.", ""),
    (Kind.TM, "pre_backup"): ("Prepare the exports of a VM that is off.", "75 if it is running."),
    (Kind.TM, "pre_backup_live"): (
        "Begin the backup of a running VM, with its checkpoint, at one instant for all disks.",
        "Freeze before as FS_FREEZE says, thaw after it. 75 if the VM is off.",
    ),
    (Kind.TM, "post_backup"): (
        "End what pre_backup began, whatever became of it.",
        "Only the checkpoint that the option KEEP_CHECKPOINT names stays.",
    ),
    (Kind.TM, "post_backup_live"): ("As post_backup; the VM was running when the backup began.", ""),
    (Kind.TM, "pre_restore"): (
        "Make room for DISKS in DIRECTORY, and tell where each is to be downloaded.",
        "4 if one of the names is taken, 73 if ROOM_BYTES are not free; nothing has its final name yet.",
    ),
    (Kind.TM, "restore"): (
        "Give the files in the option NAMES their names in DIRECTORY.",
        "All or none, durably, and without replacing what is there.",
    ),
    (Kind.TM, "post_restore"): (
        "End what pre_restore began, whatever became of it.",
        "Unless OUTCOME is SUCCESS, what restore has placed goes, too.",
    ),
    (Kind.VMM, "monitor"): ("The state of all domains of the host.", ""),
    (Kind.VMM, "dump_xml"): (
        "The inactive XML, the state and the disks' sizes of the domain in the option DOMAIN.",
        "",
    ),
    (Kind.VMM, "dump_domains"): ("The same of all domains whose UUIDs are in the option DOMAINS.", ""),
    (Kind.VMM, "define"): (
        "Define the domain whose XML is in the option DOMAIN.",
        "The daemon has rebuilt it.",
    ),
    (Kind.VMM, "thaw"): ("Thaw the domain's file systems.", "Succeed if they are not frozen."),
    (Kind.VMM, "abort_backup"): ("End a backup job of ours.", "Succeed if there is none."),
}


def new_driver(directory: Path, name: str, kind: Kind, *, shell: bool = False) -> Path:
    """The new folder `directory`/`name`: in Python with the SDK, or in POSIX shell.

    `InvalidInput` for a name that cannot be the scheme of a URL; `Conflict` if the folder exists.
    """
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"'{name[:64]}' cannot be a driver's name", hint="Use a-z and 0-9, beginning with a letter."
        )
    folder = directory / name
    try:
        folder.mkdir(parents=True, mode=0o755)
    except FileExistsError as error:
        raise Conflict(f"{folder} exists already") from error
    except OSError as error:
        raise InvalidInput(
            f"{folder} cannot be made: {error.strerror}", hint="Choose another --directory."
        ) from error
    actions = [action for action in actions_of(kind) if action.mandatory or action.name in _FIRST]
    (folder / "driver.toml").write_text(_manifest(name, kind, shell=shell))
    if shell:
        _write_program(folder / "driver.sh", _shell_code(name, kind, actions))
        for action in actions:
            (folder / action.name).symlink_to("driver.sh")
    else:
        (folder / "driver.py").write_text(_python_code(name, kind, actions))
        for action in actions:
            _write_program(folder / action.name, _PYTHON_ACTION)
    return folder


def _write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def _manifest(name: str, kind: Kind, *, shell: bool) -> str:
    features = ["verify"] if shell else ["stream", "verify"]
    listed = ", ".join(f'"{feature}"' for feature in features) if kind is Kind.DATASTORE else ""
    text = f"""\
        spec = 1
        kind = "{kind}"
        name = "{name}"
        summary = "TODO: what it is, in a few words"
        features = [{listed}]
        """
    if kind is Kind.DATASTORE:
        text += """
        # Later: "flatten" with the action increment_flatten, by which retention merges increments, and
        # "catalogue" with catalogue, by which a store is imported. Each is an executable more.
        # "nbd" promises that download writes into NBD exports, too; what the SDK's write_disk does.

        # What a datastore needs to be told. The daemon checks it; passwords and keys are `secret = true`
        # and come as files in $ODB_SECRETS_DIR.
        [parameters.BASE_PATH]
        required = true
        pattern = "/.*[^/]"
        help = "absolute path of an existing directory that holds the backups"
        """
    return dedent(text)


_PYTHON_ACTION = """\
#!/usr/bin/env python3
from driver import DRIVER
from oned_backup.sdk import main

main(DRIVER)
"""

_PYTHON_HEAD = '''\
"""TODO: what the store is, and how the backups lie in it.

The contract is share/doc/driver-spec.md; drivers/datastore/fs is a complete driver.
Raise the errors of oned_backup.errors: they become exit codes.
"""

from __future__ import annotations

from oned_backup.errors import Unsupported
from oned_backup.sdk import Answer, Call, Driver


class {class_name}(Driver):
    """A method for each action."""
'''

_PYTHON_TAIL = """

def _todo(call: Call) -> Unsupported:
    return Unsupported(f"{name}: {{call.action}} is not written yet: replace its TODO in driver.py")


DRIVER = {class_name}()
"""

_HINTS = {
    "backup": (
        "with call.files() as files:  # small files, disks, .blocks, manifest.json last",
        "    call.require_space(call.base_path, files.total_bytes)",
        "    for file in files: store(file.name, file.size_bytes, file.chunks())",
    ),
    "ls": ("restore_points.stored_disks(call, SCHEME, load_manifest, restore_points.wanted_backup(call))",),
    "download": ("write_disk(call, url, layers)  # sdk.download; a Layer is one stored file of the disk",),
    "rm": ("for backup_id in restore_points.meant_backups(call): …",),
}


def _python_code(name: str, kind: Kind, actions: list[Action]) -> str:
    class_name = f"{name.capitalize()}{ {'tm': 'Transfer', 'vmm': 'Hypervisor'}.get(kind, 'Datastore') }"
    lines = [_PYTHON_HEAD.format(class_name=class_name)]
    for action in actions:
        summary, *rest = _duty(action)
        lines.append(f"\n    def {action.name}(self, call: Call) -> Answer:\n")
        lines.append(f'        """{summary}"""\n')
        lines += [f"        # {line}\n" for line in rest]
        if kind is Kind.DATASTORE:
            lines += [f"        #     {hint}\n" for hint in _HINTS.get(action.name, ())]
        lines.append("        raise _todo(call)  # TODO\n")
    return "".join(lines) + _PYTHON_TAIL.format(name=name, class_name=class_name)


_SHELL_HEAD = """\
#!/bin/sh
# TODO: what the store is, and how the backups lie in it.
#
# The contract is share/doc/driver-spec.md, with a complete driver in shell at its end.
# Every action is a link to this file. The variables ODB_… say everything that the request
# on standard input does; standard output takes nothing but the answer, as KEY=VALUE lines.
set -eu

# fail CODE TEXT: end with an exit code of the contract; the text is shown to people.
fail() {
    code=$1
    shift
    printf '%s\\n' "$*" >&2
    exit "$code"
}

# checked ID: an id that may be a file name and an argument.
checked() {
    case $1 in
    '' | .* | -* | *[!A-Za-z0-9._-]*) fail 2 "'$1' is not a valid id" ;;
    esac
}

todo() {
    fail 64 "@NAME@: $1 is not written yet: replace its TODO in driver.sh"
}
"""

_SHELL_TAIL = """
action=${0##*/}
case $action in
@ACTIONS@) "action_$action" ;;
*) fail 64 "@NAME@ has no action $action" ;;
esac
"""


def _shell_code(name: str, kind: Kind, actions: list[Action]) -> str:
    text = _SHELL_HEAD
    for action in actions:
        text += "\n" + "".join(f"# {line}\n" for line in _duty(action))
        if (kind, action.name) == (Kind.DATASTORE, "backup"):
            text += "# The files are in $ODB_SOURCE_DIR, ODB_DISKS lists the disks among them.\n"
        text += f"action_{action.name}() {{\n    todo {action.name} # TODO\n}}\n"
    text += _SHELL_TAIL.replace("@ACTIONS@", " | ".join(action.name for action in actions))
    return text.replace("@NAME@", name)


def _duty(action: Action) -> Iterator[str]:
    """What an action must do and print: a sentence, then lines."""
    summary, more = _DUTIES[action.kind, action.name]
    printed = "BYTES if there is a TARGET" if action.streams else ", ".join(action.required) or "nothing"
    yield summary
    yield from wrap(f"{more} Prints {printed}.".strip(), 96)
