"""`make fuzz SECONDS=300 [TARGET=image]`: atheris (libFuzzer) on the targets, guided by what they reach.

What was found interesting is kept in build/fuzz/<target>/corpus and is where the next run
goes on; an input that is a fault is build/fuzz/<target>/crash-…, and is repeated by
`python -m tests.security.fuzz image build/fuzz/image/crash-…`.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path("build/fuzz")
#: an input may make us take so much, and so long
MEMORY_MB = 2048
ONE_INPUT_S = 20


def main() -> int:
    """Fuzz all targets, or one; or run one input."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("target", nargs="?", default="")
    parser.add_argument("input", nargs="?", type=Path)
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        return fuzz_here(given.target, given.seconds)
    from tests.security.targets import TARGETS  # noqa: PLC0415 - the fuzzer instruments what it imports

    if given.input:
        TARGETS[given.target].run(given.input.read_bytes())
        return 0
    failed = []
    for name in [given.target] if given.target else TARGETS:
        corpus = FOLDER / name / "corpus"
        corpus.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(TARGETS[name].seeds()):
            (corpus / f"seed-{number}").write_bytes(seed)
        print(f"== {name}", flush=True)
        argv = [sys.executable, "-m", "tests.security.fuzz", name, "--inside", f"--seconds={given.seconds}"]
        with tempfile.TemporaryDirectory() as directory:  # libFuzzer ends without cleaning up
            if subprocess.run(argv, check=False, env={**os.environ, "TMPDIR": directory}).returncode:
                failed.append(name)
    print(f"faults in: {', '.join(failed)}" if failed else "no faults")
    return 1 if failed else 0


def fuzz_here(name: str, seconds: int) -> int:
    """Fuzz one target in this process, which libFuzzer ends."""
    import atheris  # noqa: PLC0415 - one process for each target

    with atheris.instrument_imports(include=["oned_backup"]):
        from tests.security.targets import TARGETS  # noqa: PLC0415

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    folder = FOLDER / name
    options = [
        f"-max_total_time={seconds}",
        f"-rss_limit_mb={MEMORY_MB}",
        f"-timeout={ONE_INPUT_S}",
        f"-artifact_prefix={folder}/",
        "-max_len=400000",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *options, str(folder / "corpus")], TARGETS[name].run)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
