"""Operations that are killed in the middle: how to ask for them, what they need, what must outlive them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping

from tests.faults.simulation import Simulation

#: how each kind of operation is asked for; the answer is the operation's id
ASK: Mapping[str, Callable[[Simulation], str]] = {
    "backup": lambda site: site.submit("vms/0/backup"),
    "restore": lambda site: site.submit(
        f"images/{site.newest_image()}/restore",
        {"to": str(site.directory / "restored")},
    ),
    "verify": lambda site: site.submit(f"images/{site.newest_image()}/verify"),
    "delete": lambda site: site.submit(f"images/{site.images()[0]['id']}", method="delete"),
    "download": lambda site: site.submit(
        "downloads", {"url": site.url(), "target": str(site.directory / "downloaded")}
    ),
    "retention": lambda site: site.submit("vms/0/retention"),
}


def keys(site: Simulation) -> set[tuple[int, int]]:
    """All restore points, by image and increment."""
    return {(point["image_id"], point["increment_id"]) for point in site.points()}


def survivors(site: Simulation, kind: str) -> set[tuple[int, int]]:
    """The restore points that the operation does not take away."""
    newest = site.newest_image()
    if kind == "delete":
        return {key for key in keys(site) if key[0] == newest}
    if kind == "retention":
        return {(newest, increment) for increment in site.chain()[-2:]}
    return keys(site)


def prepare(site: Simulation, kind: str) -> None:
    """What the operation needs: a chain that is not the active one, or one that is long enough."""
    if not site.product.is_running:  # an earlier attempt was found wanting
        site.start()
    if len(site.chain()) > 6 or (kind == "delete" and len(site.images()) == 1):
        assert site.backup(reset=True) == "FULL"
    if kind != "delete":
        for image in site.images()[:-1]:
            site.done(site.submit(f"images/{image['id']}", method="delete"))
    if kind == "retention":
        while len(site.chain()) < 4:
            site.backup()
        site.set(KEEP_LAST="2")


def finish(site: Simulation, kind: str) -> None:
    """What failed with its driver is asked for again, and then comes to its end."""
    if kind == "delete":
        for image in site.images():
            if image["state"] == "DELETE":
                site.done(site.submit(f"images/{image['id']}", method="delete"))
    if kind == "retention":
        site.done(site.submit("vms/0/retention"))
        site.settle()
        assert len(site.chain()) == 2
        site.set(KEEP_LAST="0")


def clear(site: Simulation) -> None:
    """Remove what the operation was to make, if it made it."""
    for name in ("restored", "downloaded"):
        path = site.directory / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for domain in site.hypervisor.domains():
        if domain.name != "web":
            (site.hypervisor.root / f"{domain.uuid}.json").unlink()
