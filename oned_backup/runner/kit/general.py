"""Clauses for drivers of every kind."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

from oned_backup import xmldoc
from oned_backup.contract.actions import Kind, actions_of
from oned_backup.contract.request import Backup, Outcome, Request
from oned_backup.errors import DriverBug
from oned_backup.runner.kit.bench import Bench
from oned_backup.runner.kit.called import Called
from oned_backup.runner.kit.clause import NotApplicable, Unmet, clause
from oned_backup.runner.kit.guest import VM_XML

_FEATURE_ACTIONS = {"verify": "verify", "flatten": "increment_flatten", "catalogue": "catalogue"}


@clause("ALL-01", "driver.toml is valid and the folder cannot be changed by others")
def manifest_is_valid(bench: Bench) -> None:
    """Loading the driver has shown most of it; a summary is for people."""
    manifest = bench.driver.manifest
    if not manifest.summary.strip() or manifest.summary.startswith("TODO"):
        raise Unmet(f"{bench.driver.folder}/driver.toml: summary is still to be written")
    if manifest.name != bench.driver.folder.name:
        raise Unmet(f"{bench.driver.folder}/driver.toml: name is {manifest.name!r}, unlike the folder's")
    for parameter in manifest.parameters.values():
        if not parameter.help.strip():
            raise Unmet(f"{bench.driver.folder}/driver.toml: [parameters.{parameter.name}] has no help")


@clause("ALL-02", "every mandatory action, and every one that a feature promises, is an executable")
def actions_are_there(bench: Bench) -> None:
    """Names in the folder that are executable but no action are a spelling mistake."""
    driver = bench.driver
    known = {action.name for action in actions_of(driver.manifest.kind)}
    wanted = {action.name for action in actions_of(driver.manifest.kind) if action.mandatory}
    wanted |= {action for feature, action in _FEATURE_ACTIONS.items() if feature in driver.manifest.features}
    missing = sorted(action for action in wanted if not driver.supports(action))
    if missing:
        raise Unmet(f"{driver.folder}: absent or not executable: {', '.join(missing)}")
    for path in sorted(driver.folder.iterdir()):
        if path.is_file() and path.stat().st_mode & 0o100 and path.name not in known and not path.suffix:
            raise Unmet(f"{path} is executable, but there is no {driver.manifest.kind} action of that name")


@clause("ALL-03", "a failure says why in its last line on stderr, and is none of the driver itself")
def failures_are_explained(bench: Bench) -> None:
    """Every action is asked for something that cannot be had."""
    for action, request in _hopeless(bench):
        called = bench.call(action, request)
        if called.exit_code == 0:
            continue
        if called.exit_code == DriverBug.exit_code or b"Traceback" in called.stderr:
            raise called.unmet("failed by a mistake of its own")
        if not called.stderr.strip().split(b"\n")[-1].strip():
            raise called.unmet(f"ended with {called.ended_with} without a message on stderr")


@clause("ALL-04", "10 MB on stdin do no harm, read or not")
def large_request(bench: Bench) -> None:
    """The request has many options that nobody knows."""
    junk = {f"JUNK_{number}": "x" * 500_000 for number in range(20)}
    for action, request in _cheap(bench):
        plain = bench.call(action, request)
        large = bench.call(action, Request(**{**vars(request), "options": {**request.options, **junk}}))
        if plain.exit_code != large.exit_code:
            raise large.unmet(
                f"ended with {large.ended_with} on a request of 10 MB, with {plain.ended_with} otherwise"
            )


@clause("ALL-05", "unknown variables, sections and options are ignored")
def unknown_is_ignored(bench: Bench) -> None:
    """What a later version of the contract adds must not break a driver."""
    for action, request in _cheap(bench):
        plain = bench.call(action, request)
        document = request.to_xml()
        document.append(xmldoc.build("NEW_SECTION", {"A": {"B": "<&>"}}))
        xmldoc.put(document, "TEMPLATE", {**request.options, "NEW_OPTION": "a b"})
        odd = bench.call(
            action,
            request,
            stdin=xmldoc.serialize(document).encode(),
            environment={"ODB_NEW_VARIABLE": "a 'b' $(c)", "ODB_": "", "ODB_DS_": "x"},
        )
        if plain.exit_code != odd.exit_code:
            raise odd.unmet(f"ended with {odd.ended_with} in place of {plain.ended_with}")


@clause("ALL-06", "what is printed on success has every key that the action's page names")
def keys_are_printed(bench: Bench) -> None:
    """Whatever succeeds here must answer completely."""
    judged = False
    for action, request in (*_cheap(bench), *_hopeless(bench)):
        called = bench.call(action, request)
        if called.exit_code == 0 and bench.driver.executable(action)[0].required:
            _complete(called, bench.driver.manifest.kind)
            judged = True
    if not judged:
        raise NotApplicable("no action of this kind can succeed without a hypervisor")


def _complete(called: Called, kind: Kind) -> None:
    for key, value in called.answer(kind).items():
        if not value.strip():
            raise called.unmet(f"{key} is empty")


def _cheap(bench: Bench) -> Iterator[tuple[str, Request]]:
    """Calls that can be repeated: two reading actions of a datastore, all of another kind."""
    if bench.driver.manifest.kind is Kind.DATASTORE:
        chain = bench.good_chain
        yield "monitor", bench.request_for(chain.store, "monitor")
        yield "ls", bench.request_for(chain.store, "ls", chain=chain)
    else:
        yield from _hopeless(bench)


def _hopeless(bench: Bench) -> Iterator[tuple[str, Request]]:
    """Calls that ask for what is not there, with nothing that a careless driver could destroy."""
    kind = bench.driver.manifest.kind
    if kind is Kind.DATASTORE:
        chain = bench.good_chain
        absent = bench.plan(bench.new_chain(chain.store), bench.guests.tiny)
        for action in ("ls", "stat", "restore", "download"):
            if bench.driver.supports(action):
                options = {
                    "URL": f"{bench.driver.manifest.name}://103/-/0:{absent.backup.id}/{absent.chain.vm_id}/disk.0",
                    "TARGET": str(bench.new_path()),
                }
                yield action, bench.request_for(chain.store, action, chain=absent.supposed, options=options)
        return
    nowhere = bench.root / "nowhere"
    options = {
        name: str(nowhere / name.lower())
        for name in ("SOCKET_DIR", "SCRATCH_DIR", "PATH", "TARGET", "TPM_TAR")
    }
    for known in actions_of(kind):
        if bench.driver.supports(known.name):
            backup_id = f"20000101-000000-{secrets.token_hex(3)}"
            yield (
                known.name,
                Request(
                    kind,
                    f"op-{secrets.token_hex(6)}",
                    "kit",
                    outcome=Outcome.FAILURE if known.name.startswith("post_") else None,
                    backup=Backup(backup_id, backup_id, 0, 946684800),
                    host=xmldoc.build(
                        "HOST", {"ID": 1, "NAME": "nowhere", "TEMPLATE": {"URI": "kit-nowhere:///"}}
                    ),
                    vm=xmldoc.parse(VM_XML),
                    options={**options, "DOMAIN": "kit-nowhere", "INSTALLATION": "00000000"},
                ),
            )
