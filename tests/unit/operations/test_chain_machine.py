"""Backups, retention, deletions and failures in any order, against a store in memory that forgives nothing.

The store keeps for each backup which clusters it has, goes by the chain that it is told, refuses
to remove what is continued, and hands out what a restore would read. After every step each restore point
of the catalogue must read as the guest was when it was made.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from oned_backup.contract.request import Request
from oned_backup.errors import Conflict, NoSpace, NotFound
from oned_backup.model.image import Image
from oned_backup.model.manifest import Manifest, dump_manifest, parse_manifest
from oned_backup.model.pruning import pinned, to_remove, with_pin
from oned_backup.operations.inventory import configure_vm
from oned_backup.operations.recovery import recover
from oned_backup.sdk.restore_points import disk_chain, refuse_parents
from oned_backup.store import BackupState, Operation, OperationState

from .conftest import World, new_world
from .test_recovery import killed_in

CLUSTERS = 6
Content = dict[int, int]


@dataclass
class MemoryStore:
    """What a datastore keeps, by backup id."""

    world: World
    guest: Content = field(default_factory=dict)
    dirty: set[int] = field(default_factory=set)
    kept: dict[str, tuple[Manifest, Content]] = field(default_factory=dict)

    def load(self, backup_id: str) -> Manifest:
        if backup_id not in self.kept:
            raise NotFound(backup_id)
        return self.kept[backup_id][0]

    def read(self, backup_id: str, known: list[str]) -> Content:
        """What a restore gives of the backup, in the chain `known`."""
        content: Content = {}
        for link in disk_chain(self.load, backup_id, 0, known):
            content |= self.kept[link.id][1]
        return content

    def backup(self, request: Request) -> dict[str, str]:
        answer = self.world.drivers._backup(request)
        manifest = parse_manifest(answer["MANIFEST"])
        whole = manifest.disks[0].type == "FULL"
        changed = dict(self.guest) if whole else {number: self.guest[number] for number in self.dirty}
        self.kept[manifest.id] = manifest, changed
        self.dirty.clear()
        return answer

    def increment_flatten(self, request: Request) -> dict[str, str]:
        assert request.backup is not None
        assert request.image is not None
        ids = request.options["MERGE_IDS"].split(",")
        chain = [entry.source for entry in Image(request.image).increments]
        assert chain[chain.index(ids[0]) :][: len(ids)] == ids
        merged = [self.load(backup_id) for backup_id in ids]
        content: Content = {}
        for backup_id in ids:
            content |= self.kept[backup_id][1]
        raw: dict[str, Any] = {
            **merged[-1].raw,
            "id": request.backup.id,
            "parent_id": merged[0].parent_id,
            "type": merged[0].type,
            "replaces": [name for manifest in merged for name in (*manifest.replaces, manifest.id)],
            "stands_for": [*merged[-1].stands_for, merged[-1].id],
        }
        first = merged[0].disks[0]
        raw["disks"] = [{**raw["disks"][0], "type": first.type, "parent_id": first.parent_id}]
        text = json.dumps(json.loads(dump_manifest(raw)))
        self.kept[request.backup.id] = parse_manifest(text), content
        told = f"{request.backup.increment_id}:{request.backup.id}"
        return {"BACKUP_ID": request.backup.id, "SIZE_MB": "1", "CHAIN": told, "MANIFEST": text}

    def rm(self, request: Request) -> dict[str, str]:
        ids = request.options["BACKUP_IDS"].split(",")
        refuse_parents([manifest for manifest, _ in self.kept.values()], ids)
        for backup_id in ids:
            self.kept.pop(backup_id, None)
        return {}


class Chains(RuleBasedStateMachine):
    """Whatever is asked for, every restore point stays what it was."""

    database: Path

    def __init__(self) -> None:
        super().__init__()
        self._exits = ExitStack()
        directory = Path(tempfile.mkdtemp(prefix="odb-"))
        self._exits.callback(shutil.rmtree, directory)
        self.world = self._exits.enter_context(new_world(directory, self.database))
        self.now = 1_772_452_800.0
        self.world.services = replace(self.world.services, clock=lambda: self.now)
        self.store = MemoryStore(self.world, guest=dict.fromkeys(range(CLUSTERS), 0))
        answers = {name: getattr(self.store, name) for name in ("backup", "increment_flatten", "rm")}
        self.world.drivers.answers.update(answers)
        self.truth: dict[tuple[int, int], Content] = {}
        self.written = 0

    def teardown(self) -> None:
        self._exits.close()

    # --- what is asked for

    @rule(clusters=st.sets(st.integers(0, CLUSTERS - 1), max_size=3), days=st.sampled_from([0.2, 1, 8, 40]))
    def backup(self, clusters: set[int], days: float) -> None:
        self._write(clusters)
        self.now += days * 86_400
        self._know(self.world.run("backup", vm_id=0))

    @rule(reset=st.booleans())
    def backup_that_fails(self, reset: bool) -> None:
        self.world.drivers.script["backup"] = [NoSpace("full")]
        assert self.world.run("backup", vm_id=0, reset=reset).state is OperationState.FAILED

    @rule()
    def new_chain(self) -> None:
        self.now += 3600
        self._know(self.world.run("backup", vm_id=0, reset=True))

    @rule(
        name=st.sampled_from(["KEEP_LAST", "KEEP_DAILY", "KEEP_MONTHLY", "CHAIN_LENGTH"]),
        value=st.integers(0, 3),
    )
    def configure(self, name: str, value: int) -> None:
        configure_vm(self.world.services, 0, {name: str(value)})

    @rule()
    def retention(self) -> None:
        done = self.world.run("retention", vm_id=0)
        assert done.state is OperationState.DONE, done.error

    @rule()
    def run_queued(self) -> None:
        self.world.run_queued()

    @rule(clusters=st.sets(st.integers(0, CLUSTERS - 1), max_size=3))
    def backup_during_the_next_merge(self, clusters: set[int]) -> None:
        def beside(_request: Request) -> None:
            self._write(clusters)
            self._know(self.world.run("backup", vm_id=0))

        self.world.drivers.script["increment_flatten"] = [beside]

    @rule()
    def the_next_merge_fails(self) -> None:
        self.world.drivers.script["increment_flatten"] = [NoSpace("full")]

    @rule()
    def the_next_removal_fails(self) -> None:
        self.world.drivers.script["rm"] = [Conflict("not now")]

    @precondition(lambda self: self._runs())
    @rule(data=st.data())
    def merge(self, data: st.DataObject) -> None:
        image_id, run = data.draw(st.sampled_from(self._runs()))
        self.world.run("flatten", vm_id=0, image_id=image_id, increment_ids=run)

    @precondition(lambda self: self._runs())
    @rule(data=st.data())
    def the_daemon_dies_in_a_merge(self, data: st.DataObject) -> None:
        image_id, run = data.draw(st.sampled_from(self._runs()))
        if set(pinned(self.world.services.image(image_id))) & set(run[:-1]):
            return
        arguments: dict[str, Any] = {"vm_id": 0, "image_id": image_id, "increment_ids": run}
        killed_in(self.world, "increment_flatten", "flatten", **arguments)
        recover(self.world.services)

    @precondition(lambda self: self._runs())
    @rule(data=st.data())
    def cut(self, data: st.DataObject) -> None:
        image_id, run = data.draw(st.sampled_from(self._runs()))
        self.world.run("cut", vm_id=0, image_id=image_id, increment_ids=run)

    @precondition(lambda self: self._images())
    @rule(data=st.data(), pin=st.booleans())
    def pin(self, data: st.DataObject, pin: bool) -> None:
        image = data.draw(st.sampled_from(self._images()))
        number = data.draw(st.sampled_from([entry.id for entry in image.increments]))
        self.world.services.store.change(
            "image", image.id, lambda element: with_pin(Image(element), number, pin=pin).element
        )

    @precondition(lambda self: self._images())
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        image = data.draw(st.sampled_from(self._images()))
        self.world.run("delete", vm_id=0, image_id=image.id)

    # --- what must hold

    @invariant()
    def every_restore_point_is_what_it_was(self) -> None:
        for image in self._images():
            chain = [entry.source for entry in image.increments]
            for place, entry in enumerate(image.increments):
                read = self.store.read(entry.source, chain[: place + 1])
                assert read == self.truth[image.id, entry.id], (image.id, entry)
            assert [entry.parent_id for entry in image.increments] == [
                -1,
                *(entry.id for entry in image.increments[:-1]),
            ]

    @invariant()
    def catalogue_and_documents_agree(self) -> None:
        rows = {
            (row.image_id, row.increment_id): row.backup_id
            for row in self.world.services.store.backups(vm_id=0)
            if row.state is not BackupState.REMOVING
        }
        assert rows == {
            (image.id, entry.id): entry.source for image in self._images() for entry in image.increments
        }
        vm = self.world.services.vm(0)
        assert not vm.config.active_flatten
        assert set(vm.backup_ids) == {image.id for image in self._images()}

    @invariant()
    def what_is_stored_is_known(self) -> None:
        known = {row.backup_id for row in self.world.services.store.backups(vm_id=0)}
        for entry in self.world.services.store.find("image"):
            known.update(to_remove(Image(entry.element)))
        assert set(self.store.kept) <= known

    # --- helpers

    def _write(self, clusters: set[int]) -> None:
        for number in clusters:
            self.written += 1
            self.store.guest[number] = self.written
        self.store.dirty |= clusters

    def _know(self, done: Operation) -> None:
        assert done.state is OperationState.DONE, done.error
        result: Mapping[str, Any] = done.result
        self.truth[result["image_id"], result["increment_id"]] = dict(self.store.guest)

    def _images(self) -> list[Image]:
        found = [Image(entry.element) for entry in self.world.services.store.find("image")]
        return [image for image in found if image.is_ready]

    def _runs(self) -> list[tuple[int, list[int]]]:
        return [
            (image.id, [entry.id for entry in image.increments[start : start + 2]])
            for image in self._images()
            for start in range(len(image.increments) - 1)
        ]


def test_restore_points_survive_everything(empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chains, "database", empty_database, raising=False)
    run_state_machine_as_test(
        Chains,
        settings=settings(
            max_examples=12,
            stateful_step_count=20,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
