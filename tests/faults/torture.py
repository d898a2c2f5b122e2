"""SIGKILL for the daemon, its drivers or both at random moments, for as long as is wanted.

    python -m tests.faults.torture --minutes 10 --seed 7

After each death everything must hold that the kill matrix asks for; every tenth time all restore
points are restored and compared. The seed decides what is done, when who is killed, and what the guest
writes; each round is a line of the log. A finding leaves the directory as it is.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

from lab import wait_for

from tests.faults.attempts import ASK, clear, finish, keys, prepare, survivors
from tests.faults.simulation import Simulation

#: an operation takes up to about a second; backups are what matters most
_LONGEST_S = 1.2
_WEIGHTS = {"backup": 4, "retention": 3}
_VICTIMS = ("daemon", "driver", "both")


def main() -> int:
    """Torture for the time that was asked for; 1 if something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    wanted = parser.parse_args()
    print(f"seed {wanted.seed}, {wanted.minutes:g} minutes", flush=True)
    directory = Path(tempfile.mkdtemp(prefix="odb-", dir="/tmp"))
    site = Simulation(directory, seed=wanted.seed)
    chance = random.Random(wanted.seed)
    until = time.monotonic() + wanted.minutes * 60
    number = 0
    try:
        site.set_up()
        while time.monotonic() < until:
            number += 1
            torture(site, chance, number)
    except Exception as error:  # noqa: BLE001 - a finding is told, whatever it is
        print(f"FOUND in round {number} of seed {wanted.seed}: {type(error).__name__}: {error}")
        traceback.print_exc(file=sys.stdout)
        print(f"everything is left in {directory}; the daemon's log is daemon.log")
        return 1
    finally:
        site.tear_down()
    shutil.rmtree(directory)
    print(f"{number} rounds, nothing found")
    return 0


def torture(site: Simulation, chance: random.Random, number: int) -> None:
    """One round: ask for something, kill somebody, and see that everything holds."""
    kind = chance.choices(list(ASK), [_WEIGHTS.get(kind, 1) for kind in ASK])[0]
    delay_s = chance.uniform(0, _LONGEST_S)
    victim = chance.choice(_VICTIMS)
    print(f"{number:5} {kind:10} {victim:7} after {delay_s:.3f} s", end="", flush=True)
    prepare(site, kind)
    stay = survivors(site, kind)
    ASK[kind](site)
    content = site.content()
    time.sleep(delay_s)
    drivers = site.drivers() if victim != "daemon" else []
    if victim != "driver":
        site.product.kill()
    for process in drivers:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    print(f", {len(drivers)} drivers", flush=True)
    wait_for("end of it", lambda: site.is_idle() or not site.product.is_running, 60)
    if not site.product.is_running:
        site.start()
    site.wait_recovered()
    site.learn(content)
    if not stay <= keys(site):
        raise AssertionError(f"restore points are lost: {sorted(stay - keys(site))}")
    finish(site, kind)
    site.assert_sound(restore_all=number % 10 == 0)
    clear(site)
    found = site.backup()
    if found != "INCREMENT":
        raise AssertionError(f"the next backup is {found}")


if __name__ == "__main__":
    sys.exit(main())
