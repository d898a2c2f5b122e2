#!/usr/bin/env bash
# private-libvirtd.sh start|stop|uri DIRECTORY: a libvirtd of its own, for tests and the demo.
#
# It has its own configuration, state, logs and sockets in DIRECTORY and is reached through
#   qemu:///system?socket=DIRECTORY/run/libvirt-sock
# which `start` and `uri` print. The machine's own libvirt, if there is one, is not touched.
# DIRECTORY must be short: paths of unix sockets end at 107 bytes.
#
# libvirtd's paths are compiled in, so it runs in a mount namespace where DIRECTORY lies over
# /etc/libvirt, /var/lib/libvirt and so on. /dev/kvm is hidden, so that guests run the same
# everywhere; LAB_KVM=1 shows it. QEMU runs as LAB_QEMU_USER (default: root),
# to whom its files are given with LAB_DYNAMIC_OWNERSHIP=1. With
# LAB_MOUNTS_PRIVATE=1 this is run in a mount namespace that can have these mounts itself.
#
# `start` on a running one does nothing; `stop` also ends the guests, even if libvirtd was
# killed. Needs root, libvirt-daemon-system, libvirt-clients.
set -euo pipefail

usage() {
  echo "usage: private-libvirtd.sh start|stop|uri DIRECTORY" >&2
  exit 2
}
[ $# -eq 2 ] || usage
mkdir -p "$2"
dir=$(cd "$2" && pwd)
uri="qemu:///system?socket=$dir/run/libvirt-sock"

runs() { # the process of a pid file, if it is alive and sees this directory as /run/libvirt
  local pid
  pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] && [ -d "/proc/$pid" ] || return 1
  [ "$(stat -L -c %d:%i "/proc/$pid/root/run/libvirt" 2>/dev/null)" = "$(stat -c %d:%i "$dir/run")" ] || return 1
  echo "$pid"
}

end() { # TERM, then KILL after 10 s
  local pid=$1 tries
  kill "$pid" 2>/dev/null || return 0
  for tries in $(seq 200); do
    [ -d "/proc/$pid" ] || return 0
    [ "$tries" -ne 150 ] || kill -KILL "$pid" 2>/dev/null || true
    sleep 0.05
  done
  echo "private-libvirtd: process $pid does not end" >&2
  return 1
}

configure() {
  local user=${LAB_QEMU_USER:-root} port
  port=$((6100 + $(printf %s "$dir" | cksum | cut -d ' ' -f 1) % 400 * 20))
  mkdir -p "$dir"/{etc/qemu/networks,etc/nwfilter,lib/qemu,cache/qemu,log/qemu,run}
  : >"$dir/etc/libvirt.conf"
  cat >"$dir/etc/libvirtd.conf" <<CONF
auth_unix_ro = "none"
auth_unix_rw = "none"
unix_sock_rw_perms = "0700"
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
CONF
  cat >"$dir/etc/qemu.conf" <<CONF
user = "$user"
group = "$(id -gn "$user")"
security_driver = "none"
dynamic_ownership = ${LAB_DYNAMIC_OWNERSHIP:-0}
remember_owner = 0
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
seccomp_sandbox = 0
swtpm_user = "${LAB_SWTPM_USER:-root}"
swtpm_group = "${LAB_SWTPM_USER:-root}"
vnc_listen = "127.0.0.1"
remote_display_port_min = $port
remote_display_port_max = $((port + 19))
CONF
}

start() {
  local tries namespace=(unshare --mount --propagation private)
  [ -z "${LAB_MOUNTS_PRIVATE:-}" ] || namespace=()
  if ! runs "$dir/run/libvirtd.pid" >/dev/null; then
    configure
    rm -f "$dir/run/libvirtd.pid"
    # shellcheck disable=SC2016 # expanded by the inner shell
    "${namespace[@]}" bash -c '
      mkdir -p /etc/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt /run/libvirt
      if [ /run/libvirt -ef "$1/run" ]; then
        exec libvirtd -d -f /etc/libvirt/libvirtd.conf -p /run/libvirt/libvirtd.pid
      fi
      mount --bind "$1/etc" /etc/libvirt
      mount --bind "$1/lib" /var/lib/libvirt
      mount --bind "$1/cache" /var/cache/libvirt
      mount --bind "$1/log" /var/log/libvirt
      mount --bind "$1/run" /run/libvirt
      if [ -z "${LAB_KVM:-}" ] && [ -e /dev/kvm ]; then
        : >"$1/run/no-kvm"
        mount --bind "$1/run/no-kvm" /dev/kvm
        mount -o remount,bind,ro /dev/kvm
      fi
      exec libvirtd -d -f /etc/libvirt/libvirtd.conf -p /run/libvirt/libvirtd.pid
    ' private-libvirtd "$dir" </dev/null >"$dir/log/start.log" 2>&1 || {
      cat "$dir/log/start.log" >&2
      return 1
    }
  fi
  for tries in $(seq 150); do
    if virsh -q -c "$uri" uri >/dev/null 2>&1; then
      echo "$uri"
      return
    fi
    [ "$tries" -ne 150 ] || break
    sleep 0.1
  done
  echo "private-libvirtd: libvirtd does not answer" >&2
  cat "$dir/log/start.log" "$dir/log/libvirtd.log" >&2 2>/dev/null
  return 1
}

stop() {
  local file pid
  for file in "$dir"/run/libvirtd.pid "$dir"/run/qemu/*.pid "$dir"/run/qemu/swtpm/*.pid; do
    if pid=$(runs "$file"); then end "$pid"; fi
  done
}

case $1 in
  start) start ;;
  stop) stop ;;
  uri) echo "$uri" ;;
  *) usage ;;
esac
