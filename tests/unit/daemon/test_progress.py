"""How far an operation is: the last warning stays until bytes move again."""

from __future__ import annotations

from oned_backup.daemon.progress import ProgressBoard, RunningStep


def current(board: ProgressBoard) -> RunningStep:
    found = board.get("op")
    assert found is not None
    return found


def test_a_warning_stays_until_bytes_move() -> None:
    board = ProgressBoard()
    board.report("op", "STORE", 10, 100)
    board.log("op", "started rsync")
    assert current(board).message == ""
    board.log("op", "connection lost; the next attempt is in 4 s", warning=True)
    board.report("op", "STORE", 10, 100)
    assert current(board).message == "connection lost; the next attempt is in 4 s"
    assert current(board).lines == ("started rsync", "connection lost; the next attempt is in 4 s")
    board.report("op", "STORE", 11, 100)
    assert current(board).message == ""


def test_a_further_step_begins_without_a_message() -> None:
    board = ProgressBoard()
    board.report("op", "STORE", 0, 0)
    board.log("op", "slow", warning=True)
    board.report("op", "RECORD", 0, 0)
    assert current(board).message == ""
    board.changed("op", ended=True)
    assert board.get("op") is None
