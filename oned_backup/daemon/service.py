"""The daemon: recovers what its predecessor left, then runs queued operations on a bounded pool.

Every thread is a worker with a name, belongs to the `Service`, and ends when
`stop` is called: a worker claims the oldest operation that may run (no other one
holds its lock, its host has room), runs it to its end, and claims again.
One daemon per state directory: the store locks its file.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from oned_backup.config import Settings
from oned_backup.daemon.directories import make_directories, write_ssh_config
from oned_backup.daemon.metrics import Metrics
from oned_backup.daemon.progress import ProgressBoard
from oned_backup.daemon.telling import named, outcome
from oned_backup.errors import Conflict, DriverFailed, NotFound, OnedBackupError
from oned_backup.operations import delete, prune, scrub
from oned_backup.operations.caller import QUERY_PREFIX
from oned_backup.operations.context import Context, describe
from oned_backup.operations.datastores import unreadable_secrets
from oned_backup.operations.engine import run_operation
from oned_backup.operations.exclusion import BACKGROUND, must_wait_for
from oned_backup.operations.kinds import KINDS
from oned_backup.operations.locks import held
from oned_backup.operations.recovery import queue_again, recover
from oned_backup.operations.services import Services
from oned_backup.runner.run import Cancellation
from oned_backup.store import Operation, OperationState, SecretBox, Store

logger = logging.getLogger(__name__)

#: a worker looks at the queue at least so often
_LOOK_S = 5.0
#: how often it is looked whether a store is to be pruned or scrubbed, and the journal is shortened
_UPKEEP_S = 600.0
#: what the scrubber runs, and what the workers do
_SCRUBS = frozenset({scrub.SCRUB.name})
_OTHERS = frozenset(KINDS) - _SCRUBS
_OPERATION_ID_LENGTH = len("op-") + 12
#: how long the journal keeps operations that have ended
_KEEP_JOURNAL_S = 90 * 86_400


class Service:
    """Make it with `open`, then `start` it; `stop` ends it."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.board = ProgressBoard()
        self.metrics = Metrics()
        self.started_at = time.time()
        self.recovered = threading.Event()
        self._work = threading.Condition()
        self._stopping = False
        self._threads: list[threading.Thread] = []
        self._running: dict[str, Cancellation] = {}
        #: the operations that run, by id
        self._claimed: dict[str, Operation] = {}
        self._hosts: Counter[int] = Counter()
        #: how often something changed that lets operations run, and at which count none could, by kinds
        self._changes = 0
        self._nothing_at: dict[frozenset[str], int] = {}
        #: errors of operations whose end could not be written, by id
        self._unended: dict[str, str] = {}

    @classmethod
    def open(cls, settings: Settings) -> Service:
        """The service over the settings' directories; `Conflict` if another daemon has them."""
        make_directories(settings)
        write_ssh_config(settings)
        store = Store.open(settings.database)
        try:
            for leftover in settings.work_dir.glob(f"{QUERY_PREFIX}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            box = SecretBox.open(settings.state_dir / "secret.key")
            return cls(Services(store, settings, box))
        except BaseException:
            store.close()
            raise

    @property
    def settings(self) -> Settings:
        """The effective settings."""
        return self.services.settings

    def start(self) -> None:
        """Begin to recover and to work; returns at once."""
        for number in range(self.settings.workers):
            thread = threading.Thread(target=self._worker, name=f"worker-{number}", daemon=True)
            self._threads.append(thread)
        # What nobody waits for must keep no worker from what somebody does.
        scrubber = threading.Thread(target=self._worker, args=(_SCRUBS,), name="scrubber", daemon=True)
        self._threads.append(scrubber)
        recovery = threading.Thread(target=self._recover, name="recovery", daemon=True)
        self._threads.append(recovery)
        self._threads.append(threading.Thread(target=self._upkeep, name="upkeep", daemon=True))
        for thread in self._threads:
            thread.start()

    def stop(self) -> bool:
        """Claim nothing more, cancel what runs after half of `stop_s`; whether all ended in time.

        What did not end is taken up by the next start's recovery.
        """
        half = self.settings.stop_s / 2
        with self._work:
            self._stopping = True
            self._work.notify_all()
        self._join(half)
        with self._work:
            for cancellation in self._running.values():
                cancellation.cancel()
        ended = self._join(half)
        if ended:
            self.services.store.close()
        return ended

    def submit(
        self,
        kind: str,
        lock: str,
        arguments: Mapping[str, Any],
        *,
        vm_id: int | None = None,
        image_id: int | None = None,
        datastore_id: int | None = None,
    ) -> Operation:
        """Queue an operation."""
        operation = self.services.store.journal.enqueue(
            kind, lock, arguments, vm_id=vm_id, image_id=image_id, datastore_id=datastore_id
        )
        self.look()
        return operation

    def look(self) -> None:
        """Have the workers look at the queue: something may run that could not before."""
        with self._work:
            self._changes += 1
            self._work.notify_all()

    def cancel(self, operation_id: str) -> Operation:
        """Ask for the end of an operation; it ends soon, when what it began is undone."""
        operation = self.services.store.journal.request_cancel(operation_id)
        with self._work:
            cancellation = self._running.get(operation_id)
        if cancellation is not None:
            cancellation.cancel()
        self.board.changed(operation_id)
        return operation

    def wait_for(self, operation_id: str, seen: int, timeout_s: float) -> tuple[Operation, int]:
        """The operation once the board is not at version `seen`, or it has ended, or after `timeout_s`."""
        version = seen
        operation = self.services.store.journal.get(operation_id)
        if not operation.state.is_final:
            version = self.board.wait(seen, timeout_s)
            operation = self.services.store.journal.get(operation_id)
        return operation, version

    def _recover(self) -> None:
        try:
            for operation in recover(self.services):
                logger.warning("recovered %s: %s", named(self.services.store, operation), outcome(operation))
                self.metrics.observe(operation)
                self.board.changed(operation.id, ended=True)
            self._sweep()
            for text in unreadable_secrets(self.services):
                logger.warning("%s", text)
        except Exception:
            logger.exception("recovery")
        self.recovered.set()
        self.look()

    def _sweep(self) -> None:
        """Remove the lock files and private directories that a killed daemon left of ended operations."""
        for path in (*self.settings.run_dir.glob("op-*.lock"), *self.settings.work_dir.glob("op-*")):
            operation_id = path.name[:_OPERATION_ID_LENGTH]
            try:
                if not self.services.store.journal.get(operation_id).state.is_final:
                    continue
            except NotFound:
                pass
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _upkeep(self) -> None:
        """Queue what is due by itself, and forget what ended long ago, until the daemon stops."""
        self.recovered.wait()
        while True:
            with self._work:
                if self._stopping:
                    return
            for work in (self._queue_prunes, self._queue_scrubs, self._queue_removals, self._shorten_journal):
                try:
                    work()
                except Exception:
                    logger.exception("upkeep")
            self._pause(_UPKEEP_S)

    def _queue_prunes(self) -> None:
        for datastore_id in prune.due(self.services):
            prune.queue(self.services, datastore_id)
            self.look()

    def _queue_scrubs(self) -> None:
        for datastore_id in scrub.due(self.services):
            scrub.queue(self.services, datastore_id)
            self.look()

    def _queue_removals(self) -> None:
        if delete.queue_overdue(self.services):
            self.look()

    def _shorten_journal(self) -> None:
        self.services.store.journal.prune(time.time() - _KEEP_JOURNAL_S)

    def _pause(self, seconds: float) -> None:
        """Wait so long, or until the daemon stops."""
        until = time.monotonic() + seconds
        with self._work:
            while not self._stopping and (left := until - time.monotonic()) > 0:
                self._work.wait(left)

    def _worker(self, kinds: frozenset[str] = _OTHERS) -> None:
        """Run operations of these kinds, one after another, until the daemon stops."""
        self.recovered.wait()
        while True:
            operation = self._claim(kinds)
            if operation is None:
                return
            try:
                self._run(operation)
            finally:
                with self._work:
                    self._running.pop(operation.id, None)
                    self._claimed.pop(operation.id, None)
                    self._hosts[self._host_of(operation)] -= 1
                self.board.changed(operation.id, ended=True)
                self.look()

    def _claim(self, kinds: frozenset[str]) -> Operation | None:
        """The next operation to run, waited for; None when the daemon stops."""
        journal = self.services.store.journal
        with self._work:
            told = True
            while not self._stopping:
                operation = None
                # Of many workers that are woken, one need look through a long queue in vain.
                if not told or self._nothing_at.get(kinds) != self._changes:
                    try:
                        self._end_given_up()
                        operation = journal.claim(self._may_run, kinds=kinds)
                    except Exception:
                        logger.exception("the queue cannot be read")
                if operation is not None:
                    self._hosts[self._host_of(operation)] += 1
                    self._running[operation.id] = Cancellation()
                    self._claimed[operation.id] = operation
                    return operation
                self._nothing_at[kinds] = self._changes
                told = self._work.wait(_LOOK_S)
        return None

    def _may_run(self, operation: Operation) -> bool:
        if must_wait_for(operation, self._claimed.values()) is not None:
            return False
        behind = sum(other.kind in BACKGROUND for other in self._claimed.values())
        if operation.kind in BACKGROUND and behind >= max(self.settings.workers // 2, 1):
            return False
        host_id = self._host_of(operation)
        return host_id < 0 or self._hosts[host_id] < self.settings.workers_per_host

    def _host_of(self, operation: Operation) -> int:
        """The host whose limit counts for the operation, -1 for none."""
        return int(operation.arguments.get("host_id", -1))

    def _run(self, operation: Operation) -> None:
        """Run one operation to its end: the top of a worker, where everything is caught."""
        cancellation = self._running[operation.id]
        name = named(self.services.store, operation)
        context = Context(
            self.services,
            operation,
            cancellation=cancellation,
            report=lambda step, done, total: self.board.report(operation.id, step, done, total),
            log=lambda level, line: self._log(operation.id, name, level, line),
        )
        logger.info("%s: begins", name)
        try:
            if self.services.store.journal.get(operation.id).cancel_requested:
                cancellation.cancel()
            with held(self.settings.run_dir, operation.id) as context.lock_fd:
                state = run_operation(KINDS[operation.kind], context)
            self._tell(self.services.store.journal.get(operation.id), name)
            if state is OperationState.QUEUED:
                self._look_again_at(self.services.store.journal.get(operation.id).not_before)
            elif state is OperationState.CANCELLED and self._stopping:  # perhaps it was not the user
                queue_again(self.services, self.services.store.journal.get(operation.id))
        except Exception as error:
            logger.exception("%s", name)
            context.remove_work_dir()
            self._give_up(operation, error)

    def _tell(self, operation: Operation, name: str) -> None:
        """Enter how an operation stands after it ran into log and metrics."""
        told = logging.WARNING if operation.state is OperationState.FAILED else logging.INFO
        logger.log(told, "%s: %s", name, outcome(operation))
        self.metrics.observe(operation)

    def _give_up(self, operation: Operation, error: Exception) -> None:
        """The engine itself failed: at least the journal must say so, later if it cannot be written now."""
        known = error if isinstance(error, OnedBackupError) else DriverFailed(f"internal error: {error}")
        with self._work:
            self._unended[operation.id] = describe(known)
            self._end_given_up()

    def _end_given_up(self) -> None:
        """Write the end of what ended while the journal could not be written; it holds its lock till then."""
        for operation_id, error in list(self._unended.items()):
            try:
                self.services.store.journal.finish(operation_id, OperationState.FAILED, error=error)
            except (Conflict, NotFound):
                pass  # it has its end already
            except Exception:
                logger.exception("%s cannot be ended in the journal", operation_id)
                continue
            del self._unended[operation_id]

    def _log(self, operation_id: str, name: str, level: int, line: str) -> None:
        logger.log(_LEVELS.get(level, logging.DEBUG), "%s: %s", name, line)
        self.board.log(operation_id, line, warning=level <= _WARNING)

    def _look_again_at(self, when: float | None) -> None:
        """Have a worker look at the queue when an operation's wait is over."""
        timer = threading.Timer(max((when or 0) - time.time(), 0), self.look)
        timer.daemon = True
        timer.start()

    def _join(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
        return not any(thread.is_alive() for thread in self._threads)


#: syslog's
_WARNING = 4
_LEVELS = {
    0: logging.CRITICAL,
    1: logging.CRITICAL,
    2: logging.CRITICAL,
    3: logging.ERROR,
    4: logging.WARNING,
    5: logging.INFO,
    6: logging.INFO,
}


def log_to_stderr(level: int) -> None:
    """Send the daemon's log to stderr, from `level` on."""
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s", force=True)
