"""Judge one driver, clause by clause."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path

from oned_backup.errors import InvalidInput, OnedBackupError
from oned_backup.runner.drivers import load_driver
from oned_backup.runner.kit import faults, general, hypervisors, merging, safety, storing
from oned_backup.runner.kit.bench import Bench
from oned_backup.runner.kit.clause import CLAUSES, Clause, ClauseResult, NotApplicable, Report, Status, Unmet
from oned_backup.runner.kit.settings import Settings, load_settings

#: imported so that their clauses are in the table
MODULES = (general, storing, safety, faults, merging, hypervisors)


def check_driver(
    folder: Path,
    *,
    parameters: Mapping[str, str] | None = None,
    store_file: Path | None = None,
    ssh_config: Path | None = None,
    only: Collection[str] | None = None,
    on_result: Callable[[ClauseResult], None] | None = None,
) -> Report:
    """Judge the driver in `folder` by all clauses for its kind, or by `only` those with these ids.

    `parameters`: of the datastore to use, secrets among them; without BASE_PATH a
    directory of the kit's own is used. Damage is done on purpose only there, and to a store
    that `store_file` (see `settings`) gives to the kit. `ssh_config`: what OpenSSH is to read.
    What was run is kept, and named in the report, if a clause failed.
    """
    unknown = sorted(set(only or ()) - set(CLAUSES))
    if unknown:
        known = ", ".join(sorted(CLAUSES))
        raise InvalidInput(f"there is no clause {unknown[0]}", hint=f"There are {known}.")
    root = Path(tempfile.mkdtemp(prefix="odb-kit-"))
    results: list[ClauseResult] = []
    try:
        settings = partial(
            load_settings, folder, parameters=parameters, store_file=store_file, ssh_config=ssh_config
        )
        for result in _results(folder, root, settings, only):
            results.append(result)
            if on_result is not None:
                on_result(result)
    except BaseException:
        shutil.rmtree(root, ignore_errors=True)
        raise
    if not (root / "calls").exists() or not any(result.status is Status.FAILED for result in results):
        shutil.rmtree(root)
        return Report(folder, tuple(results))
    for name in ("exports", "out", "work"):
        shutil.rmtree(root / name, ignore_errors=True)
    return Report(folder, tuple(results), root / "calls")


def _results(
    folder: Path, root: Path, settings: Callable[[], Settings], only: Collection[str] | None
) -> Iterator[ClauseResult]:
    try:
        bench = Bench(load_driver(folder), root, settings())
    except InvalidInput:
        raise  # what the check was told, and not the driver, is wrong
    except OnedBackupError as error:
        first = CLAUSES["ALL-01"]
        yield ClauseResult(first.clause_id, first.title, Status.FAILED, f"ALL-01: {_text(error)}")
        return
    try:
        for _, clause in sorted(CLAUSES.items()):
            if bench.driver.manifest.kind in clause.kinds and (only is None or clause.clause_id in only):
                yield _judge(clause, bench)
    finally:
        bench.clean_up()


def _judge(clause: Clause, bench: Bench) -> ClauseResult:
    try:
        clause.check(bench)
    except NotApplicable as reason:
        return ClauseResult(clause.clause_id, clause.title, Status.SKIPPED, str(reason))
    except (Unmet, OnedBackupError) as error:
        text = _text(error) if isinstance(error, OnedBackupError) else str(error)
        return ClauseResult(clause.clause_id, clause.title, Status.FAILED, f"{clause.clause_id}: {text}")
    return ClauseResult(clause.clause_id, clause.title, Status.PASSED)


def _text(error: OnedBackupError) -> str:
    return f"{error.message}. {error.hint}" if error.hint else error.message
