"""A VM whose stored firmware variables or TPM are damaged: it is named, and the VM not restored by half."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt
import pytest
from lab import Guest, Libvirtd, data_disk
from product import Product

from oned_backup.errors import DataCorrupt, Salvaged

pytestmark = [pytest.mark.guest, pytest.mark.whole_matrix]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "flipped": flip,
    "missing": Path.unlink,
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
}


@pytest.fixture
def guest(libvirtd: Libvirtd, make_guest: Callable[..., Guest], tmp_path: Path) -> Iterator[Guest]:
    """A guest that has run, so that its firmware and its TPM have something to remember."""
    guest = make_guest([data_disk(tmp_path, 16)], start=False, boot="disk", agent=False, uefi=True, tpm=True)
    guest.start()
    guest.end()
    state = Path("/var/lib/libvirt/swtpm", guest.uuid)  # where the daemon looks for it
    state.parent.mkdir(parents=True, exist_ok=True)
    state.symlink_to(libvirtd.swtpm_dir / guest.uuid)
    yield guest
    state.unlink()


@pytest.mark.fault("data", "flipped bit in domain, VM or firmware documents")
def test_damage_of_nvram_and_tpm(libvirtd: Libvirtd, guest: Guest, product: Product, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    product.run("host", "add", "local", "--uri", guest.uri)
    product.run("vm", "import", "local", guest.name)
    product.run("datastore", "create", "nightly", "--driver", "fs", f"BASE_PATH={store}")
    for _ in range(2):
        product.run("vm", "backup", "0")
    newest = max((store / "0").iterdir())

    def states() -> list[str]:
        return [point["state"] for point in product.ask("image", "show", "0")["increments"]]

    def restore(target: Path, *words: str, error: type[DataCorrupt | Salvaged]) -> str:
        place = ("--define", "local", "--name", "again", "--to", str(target))
        done = product.call("image", "restore", "0", *place, *words)
        assert done.returncode == error.exit_code, done.stderr.decode()
        return done.stderr.decode()

    cases = [(name, damage) for name in ("nvram.fd", "tpm.tar") for damage in DAMAGE]
    for number, (name, damage) in enumerate(cases):
        path = newest / name
        sound = path.read_bytes()
        DAMAGE[damage](path)
        done = product.call("image", "verify", "0")
        assert done.returncode == DataCorrupt.exit_code
        assert name in (done.stdout + done.stderr).decode()
        assert states() == ["GOOD", "BROKEN"]
        refused = tmp_path / f"refused-{number}"
        assert name in restore(refused, error=DataCorrupt)
        assert not refused.exists()
        with pytest.raises(libvirt.libvirtError, match="not found"):
            libvirtd.connection.lookupByName("again")
        path.write_bytes(sound)
        product.run("image", "verify", "0")
        assert states() == ["GOOD", "GOOD"]

    flip(newest / "tpm.tar")
    target = tmp_path / "salvaged"
    assert "tpm.tar is damaged and left out" in restore(target, "--salvage", error=Salvaged)
    assert guest.nvram is not None
    assert (target / "nvram.fd").read_bytes() == guest.nvram.read_bytes()
    salvaged = Guest.adopt(libvirtd, "again")
    salvaged.start()  # with a TPM that has forgotten everything
    salvaged.destroy()
