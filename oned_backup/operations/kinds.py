"""All kinds of operations, by name."""

from __future__ import annotations

from oned_backup.operations.backup import BACKUP
from oned_backup.operations.delete import CUT, DELETE, REMOVE
from oned_backup.operations.download import DOWNLOAD
from oned_backup.operations.engine import OperationKind
from oned_backup.operations.flatten import FLATTEN
from oned_backup.operations.import_store import IMPORT
from oned_backup.operations.prune import PRUNE
from oned_backup.operations.restore import RESTORE
from oned_backup.operations.retention import RETENTION
from oned_backup.operations.scrub import SCRUB
from oned_backup.operations.untrack import UNTRACK
from oned_backup.operations.verify import VERIFY

_ALL = (
    BACKUP, UNTRACK, RESTORE, VERIFY, DOWNLOAD, IMPORT, RETENTION, FLATTEN, CUT, DELETE, REMOVE, PRUNE, SCRUB,
)  # fmt: skip
KINDS: dict[str, OperationKind] = {kind.name: kind for kind in _ALL}
