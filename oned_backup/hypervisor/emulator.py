"""Whether a guest's QEMU outlives those who read its disks.

With the fix of CVE-2024-7409 in a QEMU whose NBD server is older than 9.0 (7.2.14 and later of that line,
Debian 12's among them, and what distributions have patched), QEMU ends, and with it the guest, when a
reader leaves an export that an iothread serves:

    blockdev-nbd.c: nbd_blockdev_client_closed: Assertion `qemu_in_main_thread() && nbd_server' failed.

Numbers of versions do not tell who has taken over what, and what runs may be older than what is
installed. So it is tried: with another process of the very program that runs the guest, and an empty disk.
"""

from __future__ import annotations

from oned_backup.errors import Unavailable, Unsupported
from oned_backup.hypervisor.domain import Domain
from oned_backup.hypervisor.host import Host

_TIMEOUT_S = 30.0

#: ends with 0 if that QEMU outlived three readers, with 1 if it did not, otherwise if it could not be tried;
#: with a limit of 1 no core is dumped, also where cores go to a program
_TRY = """\
uuid=$1
for file in $(grep -lsF -- "$uuid" /proc/[0-9]*/cmdline); do
  if cat "$file" 2>&1 | tr '\\0' ' ' | grep -qF -- " -uuid $uuid "; then program=${file%cmdline}exe; fi
done
[ -n "$program" ] || { echo "its process is not to be seen" >&2; exit 2; }
dir=$(mktemp -d) || exit 2
trap 'rm -rf "$dir"' EXIT
answers() { grep -cE '"(return|error)"' "$dir/out"; }
{
  cat <<COMMANDS
{"execute": "qmp_capabilities"}
{"execute": "nbd-server-start", "arguments": {"addr": {"type": "unix", "data": {"path": "$dir/nbd"}}}}
{"execute": "block-export-add",
 "arguments": {"type": "nbd", "id": "disk", "name": "disk", "node-name": "disk", "iothread": "one"}}
COMMANDS
  while [ "$(answers)" -lt 3 ] && [ ! -e "$dir/ended" ]; do sleep 0.05; done
  for reader in 1 2 3; do
    qemu-img info "nbd+unix:///disk?socket=$dir/nbd" && echo "$reader" >"$dir/read"
  done
  echo '{"execute": "quit"}'
} 2>/dev/null | {
  prlimit --core=1 -- timeout 20 "$program" -M none -nodefaults -display none -qmp stdio \
    -object iothread,id=one -blockdev null-co,node-name=disk,size=1048576 >"$dir/out" 2>"$dir/said"
  echo $? >"$dir/ended"
}
head -n 1 "$dir/said" >&2
[ "$(cat "$dir/ended")" -lt 128 ] || exit 1
[ "$(cat "$dir/read" "$dir/ended" 2>&1 | tr '\\n' ' ')" = "3 0 " ] || exit 2
"""


def require_outlives_readers(host: Host, domain: Domain) -> None:
    """Raise `Unsupported` if QEMU would not survive it that somebody reads a disk with an iothread.

    `Unavailable` if it could not be tried.
    """
    tried = host.run(["sh", "-c", _TRY, "sh", domain.uuid], timeout_s=_TIMEOUT_S, check=False)
    if tried.returncode == 1:
        raise Unsupported(
            f"the QEMU of domain {domain.name} would end when a backup of a disk with an iothread "
            f"has been read: {tried.last_words}",
            hint="Run the guest with QEMU 9.0 or later, or without iothreads, or back it up while it is off.",
        )
    if tried.returncode != 0:
        raise Unavailable(
            f"whether the QEMU of domain {domain.name}, which has iothreads, outlives a backup "
            f"could not be tried: {tried.last_words}"
        )
