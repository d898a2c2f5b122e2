"""What a driver's author imports.

    from oned_backup.sdk import Answer, Call, Driver

    class Shelf(Driver):
        def monitor(self, call: Call) -> Answer: …

    DRIVER = Shelf()

and an executable per action that says `main(DRIVER)`. The contract is
`share/doc/driver-spec.md`; errors to raise are those of `oned_backup.errors`.
"""

from typing import TYPE_CHECKING, Any

from oned_backup.sdk.call import Answer, Call
from oned_backup.sdk.entry import Driver, main
from oned_backup.sdk.log import Level, Secret

if TYPE_CHECKING:
    from oned_backup.sdk.process import Completed, run

__all__ = ["Answer", "Call", "Completed", "Driver", "Level", "Secret", "main", "run"]


def __getattr__(name: str) -> Any:
    """`run` and its result, loaded when they are asked for: most actions start no program."""
    if name in {"Completed", "run"}:
        from oned_backup.sdk import process  # noqa: PLC0415 - see above

        return getattr(process, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
