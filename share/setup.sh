#!/usr/bin/env bash
# Install what oned-backup needs to run, and with further words what its tests
# and its benchmark need:   share/setup.sh [lab] [bench]
#
# Debian packages are installed when this runs as root; otherwise the missing
# ones are named and nothing is changed. Python packages go into .venv/ in the
# project's root, a virtual environment of the system's Python. Of the system's
# packages it sees libvirt's and libnbd's bindings alone: what else is there, and
# runs whenever Python starts, would be paid for at each start of a driver.
set -euo pipefail
cd "$(dirname "$0")/.."

runtime=(fuse3 libvirt-clients openssh-client python3 python3-libnbd python3-libvirt python3-venv qemu-utils
         restic rsync sshfs)
lab=(busybox-static cpio dosfstools e2fsprogs git iproute2 jq libnbd-bin
     libvirt-daemon-driver-qemu libvirt-daemon-system mtools nbdkit
     netcat-openbsd nftables openssh-server ovmf procps qemu-guest-agent qemu-system-x86 shellcheck
     swtpm swtpm-tools syslinux syslinux-common)
bench=(virtnbdbackup)

packages=("${runtime[@]}")
extra=""
for word in "$@"; do
  case $word in
    lab) packages+=("${lab[@]}"); extra="[dev]" ;;
    bench) packages+=("${bench[@]}") ;;
    *) echo "usage: share/setup.sh [lab] [bench]" >&2; exit 2 ;;
  esac
done

missing=()
for package in "${packages[@]}"; do
  status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
  [ "$status" = installed ] || missing+=("$package")
done
if [ "${#missing[@]}" -gt 0 ]; then
  if [ "$(id -u)" -ne 0 ]; then
    echo "missing Debian packages: ${missing[*]}" >&2
    echo "install them with: sudo apt-get install ${missing[*]}" >&2
    exit 1
  fi
  echo "installing Debian packages: ${missing[*]}"
  log=$(mktemp)
  if ! { apt-get update -q &&
         DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
           -o DPkg::Lock::Timeout=300 "${missing[@]}"; } >"$log" 2>&1; then
    cat "$log" >&2
    exit 1
  fi
  rm -f "$log"
fi

stamp=$(cat pyproject.toml share/setup.sh | sha256sum | cut -d ' ' -f 1)$extra
if [ "$(cat .venv/.stamp 2>/dev/null || true)" != "$stamp" ]; then
  echo "setting up .venv"
  /usr/bin/python3 -m venv --clear .venv
  for binding in /usr/lib/python3/dist-packages/{libvirt*.py,libvirtmod*,libvirt_python-*,nbd.py,libnbdmod*}; do
    ln -s "$binding" .venv/lib/python3.*/site-packages/
  done
  .venv/bin/python -m pip install -qq --disable-pip-version-check --editable ".$extra"
  echo "$stamp" >.venv/.stamp
fi
# once, and not at every start: PYTHONDONTWRITEBYTECODE may be set
.venv/bin/python -m compileall -q oned_backup drivers share/lab
