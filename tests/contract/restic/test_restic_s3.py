"""The restic driver against a real S3 service behind TLS: what SFTP does not show."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from s3 import S3
from stores import Disk, Store, export, exports_of, make_chain, make_disk, make_store

from oned_backup.errors import Misconfigured, OnedBackupError, PermissionDenied
from oned_backup.runner.kit import Report
from oned_backup.runner.kit.clause import Status

DRIVER = Path(__file__).parents[3] / "drivers/datastore/restic"
SERVICE = Path(__file__).parents[3] / "share/lab/s3.py"
PASSWORD = "correct horse"  # noqa: S105
ID = "20260101-000000-aaaaaa"
CLAUSES = {"DS-20", "DS-35", "DS-36"}


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with S3(tmp_path_factory.mktemp("s3") / "service") as service:
        service.make_bucket("backups")
        yield service


@pytest.fixture
def store(s3: S3, tmp_path: Path) -> Store:
    """A store in the bucket `backups`."""
    return replace(
        make_store(tmp_path, DRIVER),
        parameters={
            "RESTIC_BACKEND": "S3",
            "RESTIC_S3_BUCKET": "backups",
            "RESTIC_S3_ENDPOINT": s3.endpoint,
            "RESTIC_S3_FORCE_PATH_STYLE": "yes",
            "RESTIC_S3_CACERT": str(s3.ca_file),
        },
        secrets={
            "RESTIC_PASSWORD": PASSWORD,
            "RESTIC_S3_ACCESS_KEY_ID": s3.key_id,
            "RESTIC_S3_SECRET_ACCESS_KEY": s3.key,
        },
    )


def backup(store: Store, disk: Disk) -> None:
    with disk.served() as socket:
        store.backup(ID, exports_of(export(disk, socket)))


def test_a_chain_in_a_bucket(store: Store, s3: S3) -> None:
    made = make_chain(store)
    assert [store.download(store.url(number)) for number in range(3)] == made.expected
    assert store.failures() == {name: {} for name in store.chain}
    assert len(store.catalogue().manifests) == 3
    full = store.call("monitor")
    assert int(full["TOTAL_MB"]) - int(full["USED_MB"]) == int(full["FREE_MB"])
    packs = [name for name in s3.objects("backups") if name.startswith("7/data/")]
    assert packs
    newest = store.chain[-1]
    store.call("rm", {"BACKUP_IDS": newest})
    assert [json.loads(text)["backup"]["id"] for text in store.catalogue().manifests] == store.chain[:-1]
    store.call("rm")
    store.call("prune")
    assert not [name for name in s3.objects("backups") if name.startswith("7/data/")]


@pytest.mark.parametrize("name", ["RESTIC_S3_ACCESS_KEY_ID", "RESTIC_S3_SECRET_ACCESS_KEY"])
def test_a_wrong_key_is_denied_and_named(store: Store, name: str, tmp_path: Path) -> None:
    wrong = replace(store, secrets={**store.secrets, name: "none-that-it-knows"})
    refused(wrong, make_disk(tmp_path), PermissionDenied, "RESTIC_S3_ACCESS_KEY_ID")
    logged = "\n".join(wrong.logged)
    assert not [secret for secret in wrong.secrets.values() if secret in logged]


def test_a_bucket_that_is_not_there_is_misconfigured_and_not_made(
    store: Store, s3: S3, tmp_path: Path
) -> None:
    store.parameters = {**store.parameters, "RESTIC_S3_BUCKET": "nowhere"}
    refused(store, make_disk(tmp_path), Misconfigured, "bucket nowhere at .*: there is no such bucket")
    s3.make_bucket("nowhere")  # it would be refused if there were one


def test_a_service_that_proves_another_identity_is_misconfigured(store: Store, tmp_path: Path) -> None:
    store.parameters = {**store.parameters, "RESTIC_S3_CACERT": ""}
    refused(store, make_disk(tmp_path), Misconfigured, "RESTIC_S3_CACERT")


def refused(store: Store, disk: Disk, kind: type[OnedBackupError], text: str) -> None:
    """Assert that every kind of action ends so."""
    store.chain.append(ID)  # as if the catalogue had it
    for action in ("monitor", "ls"):
        with pytest.raises(kind, match=text):
            store.call(action)
    with pytest.raises(kind, match=text):
        backup(store, disk)


@pytest.mark.timeout(600)
def test_the_contract_in_buckets(judge: Callable[..., Report], s3: S3, store: Store, tmp_path: Path) -> None:
    store_file = tmp_path / "buckets.toml"
    create = json.dumps([sys.executable, str(SERVICE), str(s3.directory), "make-bucket", "{store}"])
    store_file.write_text(
        'unreachable = { RESTIC_S3_ENDPOINT = "https://127.0.0.1:9" }\n'
        f'[parameters]\nRESTIC_S3_BUCKET = "{{store}}"\n[commands]\ncreate = {create}\n'
    )
    rest = {name: value for name, value in store.parameters.items() if name != "RESTIC_S3_BUCKET"}
    report = judge(DRIVER, parameters={**rest, **store.secrets}, store_file=store_file, only=CLAUSES)
    assert [f"{clause.clause_id}: {clause.detail}" for clause in report.having(Status.FAILED)] == []
    assert {clause.clause_id for clause in report.having(Status.PASSED)} == CLAUSES
