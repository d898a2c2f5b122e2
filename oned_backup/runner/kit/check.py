"""Judge one driver, clause by clause."""

from __future__ import annotations

import shutil
import tempfile
import tomllib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from oned_backup.errors import InvalidInput, OnedBackupError
from oned_backup.runner.drivers import load_driver
from oned_backup.runner.kit import faults, general, safety, storing
from oned_backup.runner.kit.bench import Bench, Settings
from oned_backup.runner.kit.clause import CLAUSES, Clause, ClauseResult, NotApplicable, Report, Status, Unmet

#: imported so that their clauses are in the table
MODULES = (general, storing, safety, faults)


def check_driver(
    folder: Path,
    *,
    parameters: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
    on_result: Callable[[ClauseResult], None] | None = None,
) -> Report:
    """Judge the driver in `folder` by all clauses for its kind, or by `only` those with these ids.

    `parameters`: of the datastore to use, secrets among them; without BASE_PATH a
    directory of the kit's own is used, and only then is damage done to the store on
    purpose. What was run is kept, and named in the report, if a clause failed.
    """
    unknown = sorted(set(only or ()) - set(CLAUSES))
    if unknown:
        raise InvalidInput(f"there is no clause {unknown[0]}", hint=f"There are {', '.join(CLAUSES)}.")
    root = Path(tempfile.mkdtemp(prefix="odb-kit-"))
    results: list[ClauseResult] = []

    def add(result: ClauseResult) -> None:
        results.append(result)
        if on_result is not None:
            on_result(result)

    try:
        bench = Bench(load_driver(folder), root, _settings(folder, parameters or {}))
    except OnedBackupError as error:
        first = CLAUSES["ALL-01"]
        add(ClauseResult(first.clause_id, first.title, Status.FAILED, _text(error)))
    else:
        for _, clause in sorted(CLAUSES.items()):
            if bench.driver.manifest.kind in clause.kinds and (only is None or clause.clause_id in only):
                add(_judge(clause, bench))
        bench.clean_up()
    failed = any(result.status is Status.FAILED for result in results)
    for path in root.iterdir():
        if not failed or path.name not in {"calls", "stores"}:
            shutil.rmtree(path)
    if not failed:
        root.rmdir()
    return Report(folder, tuple(results), root / "calls" if failed else None)


def _judge(clause: Clause, bench: Bench) -> ClauseResult:
    try:
        clause.check(bench)
    except NotApplicable as reason:
        return ClauseResult(clause.clause_id, clause.title, Status.SKIPPED, str(reason))
    except (Unmet, OnedBackupError) as error:
        text = _text(error) if isinstance(error, OnedBackupError) else str(error)
        return ClauseResult(clause.clause_id, clause.title, Status.FAILED, f"{clause.clause_id}: {text}")
    return ClauseResult(clause.clause_id, clause.title, Status.PASSED)


def _settings(folder: Path, parameters: Mapping[str, str]) -> Settings:
    with (folder / "driver.toml").open("rb") as file:
        table = tomllib.load(file).get("kit", {})
    given = {**table.get("parameters", {}), **parameters}
    unreachable = table.get("unreachable", {})
    return Settings(given, unreachable, float(table.get("timeout_s", Settings.timeout_s)))


def _text(error: OnedBackupError) -> str:
    return f"{error.message}. {error.hint}" if error.hint else error.message
