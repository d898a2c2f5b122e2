"""What a driver's program may take of this machine, by the parameters that several drivers share.

<DRIVER>_NICE, _IONICE                 its priorities, by the programs of these names
<DRIVER>_CPU_QUOTA, _MEMORY_MAX_MB     a scope of systemd's; without systemd they cannot be enforced
<DRIVER>_MAX_RIOPS, _MAX_WIOPS         OpenNebula's, which have no effect here
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Confined:
    """How a program is to run. `prefix`: under which programs; `warnings`: what cannot be had here."""

    prefix: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def confined(parameters: Mapping[str, str], driver: str) -> Confined:
    """What `parameters` ask for; `driver` is what their names begin with: RSYNC, RESTIC."""
    prefix: list[str] = []
    warnings: list[str] = []
    properties = {}
    if quota := parameters.get(f"{driver}_CPU_QUOTA"):
        properties[f"{driver}_CPU_QUOTA"] = f"--property=CPUQuota={quota.removesuffix('%')}%"
    if memory_mb := parameters.get(f"{driver}_MEMORY_MAX_MB"):
        properties[f"{driver}_MEMORY_MAX_MB"] = f"--property=MemoryMax={memory_mb}M"
    if properties and Path("/run/systemd/system").is_dir() and shutil.which("systemd-run"):
        prefix += ["systemd-run", "--scope", "--quiet", "--collect", *properties.values(), "--"]
    elif properties:
        warnings.append(f"{' and '.join(properties)} cannot be enforced: this machine has no systemd")
    warnings += [
        f"{driver}_{name} has no effect: QEMU reads the disks, and the server writes them"
        for name in ("MAX_RIOPS", "MAX_WIOPS")
        if parameters.get(f"{driver}_{name}")
    ]
    if nice := parameters.get(f"{driver}_NICE"):
        prefix += ["nice", "-n", nice]
    if ionice := parameters.get(f"{driver}_IONICE"):
        prefix += ["ionice", "-c", "2", "-n", ionice]
    return Confined(tuple(prefix), tuple(warnings))
