"""What protects a guest on another machine while the link to it is dead: a small shell over there.

It is started before the guest is frozen and ends when the operation's directory is
gone. It acts by `virsh`, on the host itself, where nothing of ours is installed, and
only on what the operation has made:

    frozen     there for as long as the guest is frozen by us; too long: it is thawed
    suspended  the same of a guest that is suspended by us, which is resumed
    alive      touched by our watchman (see `guard`); too old: nobody is left who would end the job,
               so the job and the servers are ended, the operation's directory and scratch files removed
    scratch    half of the room is gone that our watchman keeps free: the job is aborted

A host without virsh is backed up all the same, with a warning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from oned_backup.hypervisor.domain import Domain
from oned_backup.hypervisor.host import Host
from oned_backup.ssh.libvirt_uri import parse_uri
from oned_backup.transfer import guard
from oned_backup.transfer.task import Task

#: over the limit of the freeze: ours is the one that is met
_LATER_S = 5

_COMMON = """\
exec </dev/null >/dev/null 2>&1
is_lost() { [ -z "$(find "$dir/alive" -newermt "-$lost seconds")" ]; }
end_servers() {
  for file in "$dir"/*.pid; do
    pid=$(cat "$file") && grep -aqF -- "$dir/" "/proc/$pid/cmdline" && kill "$pid"
  done
}
"""

_OF_BACKUP = """\
dir=$1 uuid=$2 uri=$3 prefix=$4 freeze=$5 lost=$6 room=$7; shift 7
ask() { timeout 20 virsh -q -c "$uri" "$@"; }
go_on() {
  if [ -e "$dir/frozen" ]; then rm -f "$dir/frozen"; ask domfsthaw "$uuid"; fi
  if [ -e "$dir/suspended" ] && ask resume "$uuid"; then rm -f "$dir/suspended"; fi
}
abort() {
  if ask backup-dumpxml "$uuid" | grep -qF "$dir/"; then ask domjobabort "$uuid"; fi
  case $(ask domstate --reason "$uuid") in *"I/O error"*) ask resume "$uuid" ;; esac
}
full() {
  for folder; do
    # shellcheck disable=SC2046 # two numbers
    set -- $(stat -f -c '%a %S' -- "$folder")
    if [ $(($1 * $2)) -lt "$room" ]; then return 0; fi
  done
  return 1
}
n=0
while [ -d "$dir" ]; do
  if [ -e "$dir/frozen" ] || [ -e "$dir/suspended" ]; then n=$((n + 1)); else n=0; fi
  if [ "$n" -gt "$freeze" ]; then go_on; fi
  if full "$@"; then abort; fi
  if is_lost; then
    if [ ! -d "$dir" ]; then exit; fi
    go_on; abort; end_servers
    for folder; do rm -f -- "$folder/$prefix"*; done
    rm -rf -- "$dir"
  fi
  sleep 1
done
"""

_OF_RESTORE = """\
dir=$1 work=$2 lost=$3
while [ -d "$dir" ]; do
  if is_lost; then
    if [ ! -d "$dir" ]; then exit; fi
    end_servers
    [ -e "$work/.placing" ] || rm -rf -- "$work"
    rm -rf -- "$dir"
  fi
  sleep 1
done
"""


def arguments(
    directory: Path,
    uuid: str,
    uri: str,
    prefix: str,
    folders: Iterable[Path],
    *,
    freeze_s: float,
    lost_s: float = guard.LOST_S,
) -> list[str]:
    """The command line of the shell; `uri` is libvirt's on that machine, `prefix` that of scratch files."""
    limits = [math.ceil(freeze_s) + _LATER_S, math.ceil(lost_s), guard.MIN_FREE_BYTES // 2]
    places = [str(directory), uuid, uri, prefix, *map(str, limits), *map(str, folders)]
    return ["setsid", "-f", "sh", "-c", _COMMON + _OF_BACKUP, "sh", *places]


def start(task: Task, domain: Domain, folders: Iterable[Path]) -> str:
    """Start it for an operation on another machine; what to tell people if it cannot protect the guest."""
    if not task.host.machine:
        return ""
    if task.host.run(["sh", "-c", "command -v virsh"], check=False).returncode != 0:
        return f"{task.host.machine} has no virsh: nobody can help the guest if the link breaks"
    task.host.write_file(task.operation_dir / guard.ALIVE, b"")
    task.host.run(
        arguments(
            task.operation_dir,
            domain.uuid,
            parse_uri(task.uri).local,
            task.scratch_prefix,
            folders,
            freeze_s=task.freeze_timeout_s,
        )
    )
    return ""


def start_for_servers(host: Host, directory: Path, work: Path, *, lost_s: float = guard.LOST_S) -> None:
    """Start one for a restore: it ends the servers in `directory` when nobody is left who writes to them.

    Their images, in `work`, go too, unless some of them have been given their names.
    """
    host.write_file(directory / guard.ALIVE, b"")
    places = [str(directory), str(work), str(math.ceil(lost_s))]
    host.run(["setsid", "-f", "sh", "-c", _COMMON + _OF_RESTORE, "sh", *places])
