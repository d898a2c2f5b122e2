"""What this machine needs for backups, looked at one by one, each with its remedy."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from oned_backup.cli.check import Check
from oned_backup.cli.doctor_datastores import check_datastores
from oned_backup.cli.doctor_hosts import check_hosts
from oned_backup.client import Client
from oned_backup.config import Loaded, Settings, load_settings
from oned_backup.contract.actions import Kind
from oned_backup.contract.request import Request
from oned_backup.errors import OnedBackupError
from oned_backup.model.host import DEFAULT_URI, new_host
from oned_backup.runner.drivers import find_driver, find_drivers
from oned_backup.runner.run import Invocation, Limits, run_action
from oned_backup.ssh.command import CONFIG_VARIABLE

#: incremental backups of running VMs through libvirt's public interface
LIBVIRT_MINIMUM = (7, 6, 0)
QEMU_MINIMUM = (6, 1, 0)

_PROGRAMS = (("qemu-img", "qemu-utils"), ("qemu-nbd", "qemu-utils"))
_MODULES = (("nbd", "python3-libnbd"), ("libvirt", "python3-libvirt"))
_FREE_BYTES = 1024**3
_APPARMOR = Path("/sys/module/apparmor/parameters/enabled")
_APPARMOR_RULES = Path("/etc/apparmor.d/local/abstractions/libvirt-qemu")


def examine(settings_file: Path | None, uri: str | None) -> Iterator[Check]:
    """All checks, one after the other, as they are made.

    Libvirt is looked at on the hosts that the daemon knows, and at `uri`; at the default one without either.
    """
    try:
        loaded = load_settings(settings_file)
    except OnedBackupError as error:
        yield Check("settings", "fail", error.message, error.hint or "")
        return
    yield _settings(loaded)
    yield _python()
    for program, package in _PROGRAMS:
        yield check_program(program, package)
    for module, package in _MODULES:
        yield check_module(module, package)
    yield _drivers(loaded.settings)
    yield check_apparmor(loaded.settings.nbd_dir, _APPARMOR, _APPARMOR_RULES)
    yield from _directories(loaded.settings)
    daemon = check_daemon(loaded.settings.socket)
    yield daemon
    hosts = []
    if daemon.status == "ok":
        client = Client(loaded.settings.socket)
        names = [datastore["driver"] for datastore in client.get("datastores")]
        yield from check_datastores(loaded.settings.all_driver_dirs, names)
        libvirts = _libvirt_drivers(loaded.settings)
        hosts = [host for host in client.get("hosts") if host["vmm"] in libvirts]
    for host in hosts:
        reached = list(check_hosts(loaded.settings.ssh_config, [host]))
        yield from reached
        if all(check.status != "fail" for check in reached):
            yield check_libvirt(loaded.settings, host["uri"], f"host {host['name']}")
    if uri or not hosts:
        yield check_libvirt(loaded.settings, uri or DEFAULT_URI, "hypervisor")


def _settings(loaded: Loaded) -> Check:
    where = str(loaded.file) if loaded.file_exists else f"{loaded.file} is not there, all defaults"
    return Check("settings", "ok", where)


def _python() -> Check:
    return Check("python", "ok", ".".join(map(str, sys.version_info[:3])))


def check_program(program: str, package: str) -> Check:
    """Whether a tool of QEMU is there and new enough."""
    remedy = f"Run: apt-get install {package}"
    path = shutil.which(program)
    if path is None:
        return Check(program, "fail", "not found", remedy)
    version = _version(_output([path, "--version"]))
    if version is None:
        return Check(program, "warn", f"{path}: prints no version", remedy)
    if version < QEMU_MINIMUM:
        return Check(program, "fail", f"{_dotted(version)}, {_dotted(QEMU_MINIMUM)} is needed", remedy)
    return Check(program, "ok", _dotted(version))


def check_module(module: str, package: str) -> Check:
    """Whether drivers can import a binding; tried in a process of its own, as drivers do."""
    name = f"python module {module}"
    remedy = (
        f"Run: apt-get install {package}; the virtual environment must see system packages"
        " (python3 -m venv --system-site-packages)."
    )
    code = f"import {module}; print(getattr({module}, 'getVersion', lambda: '')())"
    found = _run([sys.executable, "-c", code])
    if found is None or found.returncode:
        return Check(name, "fail", "cannot be imported", remedy)
    number = found.stdout.strip()
    if module == "libvirt" and number.isdecimal():
        version = (int(number) // 1000000, int(number) // 1000 % 1000, int(number) % 1000)
        if version < LIBVIRT_MINIMUM:
            return Check(
                name, "fail", f"libvirt {_dotted(version)}, {_dotted(LIBVIRT_MINIMUM)} is needed", remedy
            )
        return Check(name, "ok", f"libvirt {_dotted(version)}")
    return Check(name, "ok", "can be imported")


def _libvirt_drivers(settings: Settings) -> set[str]:
    """The hypervisor drivers whose hosts can be looked at here."""
    manifests = [driver.manifest for driver in find_drivers(settings.all_driver_dirs)]
    return {one.name for one in manifests if one.kind is Kind.VMM and "libvirt" in one.features}


def _drivers(settings: Settings) -> Check:
    refused: list[str] = []
    found = find_drivers(
        settings.all_driver_dirs, on_refused=lambda path, error: refused.append(f"{path}: {error.message}")
    )
    kinds = {driver.manifest.kind for driver in found}
    missing = [kind.value for kind in Kind if kind not in kinds]
    names = ", ".join(str(driver) for driver in found) or "none"
    if missing:
        where = ", ".join(str(path) for path in settings.all_driver_dirs)
        return Check("drivers", "fail", f"no driver of kind {', '.join(missing)}", f"Looked in {where}.")
    if refused:
        return Check("drivers", "warn", f"{names}; refused: {'; '.join(refused)}", "Correct or remove them.")
    return Check("drivers", "ok", names)


def check_libvirt(settings: Settings, uri: str, name: str) -> Check:
    """Whether the hypervisor driver reaches libvirt; `name`: of the check."""
    request = Request(
        kind=Kind.VMM,
        operation_id="doctor",
        operation_kind="doctor",
        host=new_host(0, name="doctor", uri=uri).element,
    )
    try:
        driver = find_driver(settings.all_driver_dirs, Kind.VMM, "kvm")
        with tempfile.TemporaryDirectory(prefix="oned-backup-") as work:
            limits = Limits(deadline_s=20)
            environment = {CONFIG_VARIABLE: str(settings.ssh_config)}
            invocation = Invocation(Path(work), environment=environment)
            answer = run_action(driver, "monitor", request, invocation, limits=limits)
    except OnedBackupError as error:
        remedy = "Run there: apt-get install libvirt-daemon-system, and start libvirtd."
        return Check(name, "warn", error.message, error.hint or remedy)
    count = answer["DOMAINS"].count("<DOMAIN>")
    return Check(name, "ok", f"libvirt at {uri}: reached, {count} domain{'' if count == 1 else 's'}")


def check_apparmor(nbd_dir: Path, enabled: Path, rules: Path) -> Check:
    """Whether AppArmor lets QEMU make our sockets; by default it does not."""
    try:
        active = enabled.read_text().strip() == "Y"
    except OSError:
        active = False
    if not active:
        return Check("apparmor", "ok", "not active")
    try:
        allowed = str(nbd_dir) in rules.read_text()
    except OSError:
        allowed = False
    if allowed:
        return Check("apparmor", "ok", f"{rules} allows {nbd_dir}")
    return Check(
        "apparmor",
        "warn",
        f"active, and {rules} says nothing of {nbd_dir}",
        f"Add the line `{nbd_dir}/** rw,` to {rules}, then restart the guests' domains.",
    )


def _directories(settings: Settings) -> Iterator[Check]:
    yield check_directory("state_dir", settings.state_dir, private=True)
    yield check_directory("run_dir", settings.run_dir, private=False)
    if settings.scratch_dir is not None:
        yield check_directory("scratch_dir", settings.scratch_dir, private=False)
    for path in filter(None, {settings.state_dir, settings.scratch_dir}):
        yield check_space(path)


def check_directory(name: str, path: Path, *, private: bool) -> Check:
    """Whether a directory can be used, or made."""
    label = f"{name} {path}"
    if not path.exists():
        parent = next(parent for parent in path.parents if parent.exists())
        if os.access(parent, os.W_OK):
            return Check(label, "ok", "will be made by the daemon")
        return Check(label, "fail", f"is not there, and {parent} is not writable", f"Set {name}, or be root.")
    status = path.stat()
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        return Check(label, "fail", "is no directory that can be written", f"Set {name}, or be root.")
    if status.st_uid not in {0, os.geteuid()}:
        return Check(label, "fail", f"belongs to uid {status.st_uid}", f"Run: chown {os.geteuid()} {path}")
    if private and stat.S_IMODE(status.st_mode) & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        return Check(label, "warn", f"is open to others (mode {mode:04o})", f"Run: chmod 700 {path}")
    return Check(label, "ok", f"mode {stat.S_IMODE(status.st_mode):04o}")


def check_space(path: Path) -> Check:
    """Whether there is a little room where we write."""
    existing = next(entry for entry in (path, *path.parents) if entry.exists())
    free = shutil.disk_usage(existing).free
    text = f"{free / 1024**3:.1f} GiB free"
    if free < _FREE_BYTES:
        return Check(f"space at {path}", "warn", text, "Make room: at least 1 GiB.")
    return Check(f"space at {path}", "ok", text)


def check_daemon(socket: Path) -> Check:
    """Whether the daemon answers."""
    try:
        status = Client(socket).get("status")
    except OnedBackupError as error:
        return Check("daemon", "warn", error.message, error.hint or "")
    return Check(
        "daemon", "ok", f"version {status['version']}, {status['running']} running, {status['queued']} queued"
    )


def _run(argv: list[str]) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None


def _output(argv: list[str]) -> str:
    found = _run(argv)
    return "" if found is None else found.stdout


def _version(text: str) -> tuple[int, ...] | None:
    match = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return None if match is None else tuple(int(part or 0) for part in match.groups())


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
