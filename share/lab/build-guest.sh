#!/usr/bin/env bash
# build-guest.sh [DIRECTORY]: a tiny guest made from this machine's Debian packages.
#
#   DIRECTORY/vmlinuz, initrd.img   for a direct kernel boot (fast)
#   DIRECTORY/guest.qcow2           512 MiB: FAT with syslinux, then an ext4 root; boots by itself, too
#
# Inside: Debian's cloud kernel, busybox, and the real qemu-guest-agent with a
# freeze hook. It prints "LAB-GUEST READY" on its serial console once it is up.
# Does nothing if DIRECTORY (default: build/lab/guest of the repository) is up to date.
#
# Needs busybox-static qemu-guest-agent qemu-utils cpio dosfstools mtools syslinux e2fsprogs python3.
set -euo pipefail
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:-$here/../../build/lab/guest}
disk_mib=512
boot_mib=40
modules=( # in the order of loading
  virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk virtio_console
)

mkdir -p "$out"
out=$(cd "$out" && pwd)
exec 9>"$out/.lock"
flock 9
rm -rf "$out"/.making.* # of a build that was killed

inputs=$(cat "$here/build-guest.sh" "$here"/guest/* /bin/busybox /usr/sbin/qemu-ga | sha256sum)
[ "$(cat "$out/.stamp" 2>/dev/null)" = "$inputs" ] && exit 0

work=$(mktemp -d "$out/.making.XXXXXX")
trap 'rm -rf "$work"' EXIT

fetch_kernel() { # downloads and unpacks the kernel's package; nothing is installed
  local kernel patterns=("${modules[@]/%/.ko}")
  patterns=("${patterns[@]/#/\*/}")
  kernel=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | awk '/Depends:/ {print $2; exit}')
  if [ -z "$kernel" ]; then
    echo "build-guest: the package linux-image-cloud-amd64 is not known: run apt-get update" >&2
    exit 69
  fi
  (cd "$work" && apt-get -o APT::Sandbox::User=root download -q "$kernel" >&2)
  dpkg-deb --fsys-tarfile "$(echo "$work/${kernel}"_*.deb)" |
    tar -x -C "$work" --wildcards './boot/vmlinuz-*' "${patterns[@]}"
  cp "$work"/boot/vmlinuz-* "$work/vmlinuz"
}

make_initrd() {
  local tree=$work/initrd module
  mkdir -p "$tree"/{bin,dev,proc,sys,lib,newroot}
  cp /bin/busybox "$tree/bin/busybox"
  for module in "${modules[@]}"; do
    find "$work/lib/modules" -name "$module.ko" -exec cp {} "$tree/lib/" \;
  done
  echo "${modules[@]}" >"$tree/modules"
  install -m 755 "$here/guest/init" "$tree/init"
  (cd "$tree" && find . -print0 | sort -z | cpio --null -o -H newc --reproducible --quiet | gzip -9n) \
    >"$work/initrd.img"
}

make_root() {
  local tree=$work/root applet library
  mkdir -p "$tree"/{bin,sbin,usr/bin,usr/sbin,etc/qemu/fsfreeze-hook.d} \
    "$tree"/{dev,proc,sys,run,tmp,root,data,var/log,var/run,lib/x86_64-linux-gnu,lib64}
  cp /bin/busybox "$tree/bin/busybox"
  for applet in $(/bin/busybox --list-full); do
    [ -e "$tree/$applet" ] && continue
    mkdir -p "$tree/$(dirname "$applet")"
    ln -s /bin/busybox "$tree/$applet"
  done
  cp /usr/sbin/qemu-ga "$tree/usr/sbin/"
  ldd /usr/sbin/qemu-ga | awk '/=> \// {print $3} $1 ~ /^\/lib64/ {print $1}' |
    while read -r library; do cp -L "$library" "$tree/lib/x86_64-linux-gnu/"; done
  ln -s ../lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 "$tree/lib64/ld-linux-x86-64.so.2"
  echo 'root::0:0:root:/root:/bin/sh' >"$tree/etc/passwd"
  echo 'root:x:0:' >"$tree/etc/group"
  echo labguest >"$tree/etc/hostname"
  printf 'ID=lab\nPRETTY_NAME="Lab guest (Debian kernel, busybox)"\n' >"$tree/etc/os-release"
  install -m 644 "$here/guest/inittab" "$tree/etc/inittab"
  install -m 755 "$here/guest/rcS" "$tree/etc/rcS"
  install -m 755 "$here/guest/fsfreeze-hook" "$tree/etc/qemu/fsfreeze-hook"
  install -m 755 "$here/guest/shutdown" "$tree/sbin/shutdown"
  truncate -s $((disk_mib - boot_mib))M "$work/root.ext4"
  mkfs.ext4 -q -F -L labroot -m 0 -E root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0 \
    -d "$tree" "$work/root.ext4"
}

make_disk() { # a partition table, the FAT that syslinux starts from at 1 MiB, the root after it
  local disk=$work/guest.raw
  truncate -s $((boot_mib - 1))M "$work/boot.fat"
  mkfs.vfat -F16 -n LABBOOT -h 2048 "$work/boot.fat" >/dev/null
  mcopy -i "$work/boot.fat" "$work/vmlinuz" "$work/initrd.img" "$here/guest/syslinux.cfg" ::
  syslinux --install "$work/boot.fat"
  truncate -s ${disk_mib}M "$disk"
  dd if=/usr/lib/syslinux/mbr/mbr.bin of="$disk" conv=notrunc status=none
  python3 - "$disk" $boot_mib $disk_mib <<'PYTHON'
import struct, sys
path, boot_end, end = sys.argv[1], int(sys.argv[2]) * 2048, int(sys.argv[3]) * 2048
def entry(active, kind, start, stop):
    return struct.pack("<B3sB3sII", active, b"\xfe\xff\xff", kind, b"\xfe\xff\xff", start, stop - start)
with open(path, "r+b") as disk:
    disk.seek(446)
    disk.write(entry(0x80, 0x0E, 2048, boot_end) + entry(0, 0x83, boot_end, end) + bytes(32) + b"\x55\xaa")
PYTHON
  dd if="$work/boot.fat" of="$disk" bs=1M seek=1 conv=notrunc,sparse status=none
  dd if="$work/root.ext4" of="$disk" bs=1M seek=$boot_mib conv=notrunc,sparse status=none
  qemu-img convert -f raw -O qcow2 "$disk" "$work/guest.qcow2"
}

fetch_kernel
make_initrd
make_root
make_disk
rm -f "$out/.stamp"
mv -f "$work/vmlinuz" "$work/initrd.img" "$work/guest.qcow2" "$out/"
chmod 644 "$out"/{vmlinuz,initrd.img,guest.qcow2}
echo "$inputs" >"$out/.stamp"
