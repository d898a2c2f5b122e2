"""Backups, merges, deletions and restores for as long as is wanted; then the daemon must be as it was.

    python -m tests.faults.soak --cycles 1000 --seed 7

A cycle is a backup, something that changes the chains, and the restore of any point, through the
real daemon with real drivers and a simulated guest. A model knows which restore points there are
and what each holds; after each cycle the catalogue must say the same, and every so often
all points are restored and compared. The daemon's descriptors, threads and memory are looked at
on the way, and must not have grown in the end. The seed makes a finding repeatable, which leaves
the directory as it is.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median

from tests.faults.simulation import Simulation

Key = tuple[int, int]

#: all points are restored so often
_ALL_EVERY = 25
_LONGEST_CHAIN = 6
_MOST_IMAGES = 3
#: what a sample may have grown by from the first quarter after the warm-up to the last one;
#: a further connection to the catalogue, which the pool keeps, has three descriptors
_MAY_GROW: Mapping[str, float] = {"descriptors": 3, "threads": 1, "children": 0, "files": 0, "rss_mib": 8}


@dataclass(frozen=True)
class Sample:
    """The daemon at rest; `files`: in its directories, those of the catalogue and its sockets."""

    descriptors: int
    threads: int
    children: int
    files: int
    rss_mib: float


class Soak:
    """A simulation and the model of its restore points: their contents are the simulation's `truth`."""

    def __init__(self, site: Simulation, chance: random.Random) -> None:
        self.site = site
        self.samples: list[Sample] = []
        self._chance = chance
        self._changes: dict[str, tuple[int, Callable[[], None]]] = {
            "nothing": (2, lambda: None),
            "merge": (4, self._merge),
            "cut": (1, self._cut),
            "delete": (1, self._delete),
            "retain": (2, self._retain),
            "verify": (1, self._verify),
        }

    def cycle(self, number: int) -> str:
        """One cycle; what it did."""
        site, chance = self.site, self._chance
        backup = site.backup(reset=chance.random() < 0.15 or len(self._chain()) >= 2 * _LONGEST_CHAIN)
        weights = [weight for weight, _ in self._changes.values()]
        change = chance.choices(list(self._changes), weights)[0]
        if len(self._chain()) > _LONGEST_CHAIN:
            change = "merge"
        if len({image for image, _ in site.truth}) > _MOST_IMAGES:
            change = "delete"
        self._changes[change][1]()
        site.settle()
        self._compare(chance.choice(sorted(site.truth)))
        if number % _ALL_EVERY == 0:
            for key in sorted(site.truth):
                self._compare(key)
        site.assert_tidy()
        found = {(point["image_id"], point["increment_id"]) for point in site.points()}
        if found != site.truth.keys():
            raise AssertionError(f"after {change}: {sorted(found)} are there, not {sorted(site.truth)}")
        self.samples.append(look(site))
        return f"{backup.lower()}, {change}"

    def _compare(self, key: Key) -> None:
        if self.site.restore(*key) != self.site.truth[key]:
            raise AssertionError(f"restore point {key} is another one")
        for path in self.site.directory.glob("restored-*"):
            shutil.rmtree(path)

    # --- what changes the chains

    def _chain(self) -> list[Key]:
        """The newest image's points."""
        newest = max((image for image, _ in self.site.truth), default=-1)
        return sorted(key for key in self.site.truth if key[0] == newest)

    def _merge(self) -> None:
        older = self._chain()[:-1]
        if older:
            key = self._chance.choice(older)
            self.site.done(self._delete_increment(key))
            del self.site.truth[key]

    def _cut(self) -> None:
        *older, newest = self._chain()
        if older:
            self.site.done(self._delete_increment(newest))
            del self.site.truth[newest]

    def _delete_increment(self, key: Key) -> str:
        return self.site.submit(f"images/{key[0]}?increment_id={key[1]}", method="delete")

    def _delete(self) -> None:
        oldest, newest = min(self.site.truth)[0], max(self.site.truth)[0]
        if oldest != newest:
            self.site.done(self.site.submit(f"images/{oldest}", method="delete"))
            self._forget({key for key in self.site.truth if key[0] == oldest})

    def _retain(self) -> None:
        keep = self._chance.randint(2, 5)
        self.site.set(KEEP_LAST=str(keep))
        self.site.done(self.site.submit("vms/0/retention"))
        self.site.settle()
        self.site.set(KEEP_LAST="0")
        self._forget(set(sorted(self.site.truth)[:-keep]))

    def _verify(self) -> None:
        image = self._chance.choice(sorted(self.site.truth))[0]
        self.site.done(self.site.submit(f"images/{image}/verify"))

    def _forget(self, keys: set[Key]) -> None:
        for key in keys:
            del self.site.truth[key]


def look(site: Simulation) -> Sample:
    """The daemon as it is now."""
    process = Path(f"/proc/{site.product.pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    tasks = [task.name for task in (process / "task").iterdir()]
    children = (process / "task" / tasks[0] / "children").read_text().split()
    places = (site.product.state_dir, site.product.run_dir)
    return Sample(
        descriptors=len(list((process / "fd").iterdir())),
        threads=len(tasks),
        children=len(children),
        files=sum(path.is_file() or path.is_socket() for place in places for path in place.rglob("*")),
        rss_mib=int(status["VmRSS"].split()[0]) / 1024,
    )


def growth(samples: Sequence[Sample]) -> dict[str, float]:
    """What has grown by more than it may, and by how much: medians of the last quarter and of an early one.

    The first fifth is the warm-up: pools fill, modules are loaded.
    """
    warm = samples[len(samples) // 5 :]
    quarter = max(len(warm) // 4, 1)
    found = {}
    for field in fields(Sample):
        early, late = (
            median(getattr(one, field.name) for one in part) for part in (warm[:quarter], warm[-quarter:])
        )
        if late - early > _MAY_GROW[field.name]:
            found[field.name] = late - early
    return found


def main() -> int:
    """Soak for the cycles that were asked for; 1 if something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    wanted = parser.parse_args()
    print(f"seed {wanted.seed}, {wanted.cycles} cycles", flush=True)
    directory = Path(tempfile.mkdtemp(prefix="odb-", dir="/tmp"))
    site = Simulation(directory, seed=wanted.seed)
    soak = Soak(site, random.Random(wanted.seed))
    number = 0
    began = time.monotonic()
    try:
        site.set_up()
        for number in range(1, wanted.cycles + 1):
            done = soak.cycle(number)
            print(f"{number:5} {done:20} {len(site.truth)} points, {soak.samples[-1]}", flush=True)
        grown = growth(soak.samples)
        if grown:
            raise AssertionError(f"the daemon has grown: {grown}")
    except Exception as error:  # noqa: BLE001 - a finding is told, whatever it is
        print(f"FOUND in cycle {number} of seed {wanted.seed}: {type(error).__name__}: {error}")
        traceback.print_exc(file=sys.stdout)
        print(f"everything is left in {directory}; the daemon's log is daemon.log")
        return 1
    finally:
        site.tear_down()
    shutil.rmtree(directory)
    print(f"{wanted.cycles} cycles in {time.monotonic() - began:.0f} s, nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
