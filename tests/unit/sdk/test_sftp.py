"""Files on a server that allows nothing but SFTP, against a real sshd."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest
from sshd import Sshd

from oned_backup.errors import NotFound
from oned_backup.sdk import sftp


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with Sshd(tmp_path_factory.mktemp("sftp") / "d") as server:
        yield server


@pytest.mark.parametrize("name", ["plain", "with space", 'odd "[*?] name', "'quoted'\\"])
def test_names_that_mean_something_to_sftp(
    name: str, sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ODB_SSH_CONFIG", str(sshd.config))
    place = tmp_path / name
    for folder, file in (("data/00", "abc-temp-1"), ("data/01", "abc"), ("data/02", "of two-temp-words")):
        (place / folder).mkdir(parents=True)
        (place / folder / file).touch()
    base = PurePosixPath(place)
    assert sftp.names(sshd.target, base) == ["data"]
    found = sftp.matches(sshd.target, base, "data/*/*-temp-*")
    assert sorted(found) == [base / "data/00/abc-temp-1", base / "data/02/of two-temp-words"]
    sftp.batch(sshd.target, [f"-rm {sftp.path_argument(path)}" for path in found])
    assert sftp.matches(sshd.target, base, "data/*/*-temp-*") == []
    assert (place / "data/01/abc").exists()


def test_what_is_absent(sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODB_SSH_CONFIG", str(sshd.config))
    nowhere = PurePosixPath(tmp_path / "nowhere")
    assert sftp.matches(sshd.target, nowhere, "*") == []
    for ask in (sftp.names, sftp.space_kb):
        with pytest.raises(NotFound):
            ask(sshd.target, nowhere)
