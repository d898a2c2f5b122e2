"""Tables for people: aligned, folded where they are too wide, safe to print."""

from __future__ import annotations

from oned_backup.cli.table import table_lines


def test_columns_are_aligned() -> None:
    rows = [(1, "web", None), (22222, "Datenbank ü", "RUNNING"), (3, "日本", "OFF")]
    assert list(table_lines(("ID>", "NAME", "STATE"), rows, 80)) == [
        "   ID   NAME          STATE",
        "─" * 29,
        "    1   web",
        "22222   Datenbank ü   RUNNING",
        "    3   日本          OFF",
    ]


def test_the_widest_column_is_folded() -> None:
    rows = [(7, "a name of several words", "x" * 9), (8, "b", "y")]
    assert list(table_lines(("ID>", "NAME", "KEY"), rows, 28)) == [
        "ID   NAME          KEY",
        "─" * 28,
        " 7   a name of     xxxxxxxxx",
        "     several",
        "     words",
        " 8   b             y",
    ]


def test_what_cannot_be_folded_enough_is_shown_whole() -> None:
    assert list(table_lines(("A", "B"), [("abcdefgh", "ijklmnop")], 5)) == [
        "A        B",
        "─" * 15,
        "abcdef   ijklmn",
        "gh       op",
    ]


def test_a_name_cannot_talk_to_the_terminal() -> None:
    assert list(table_lines(("NAME",), [("\x1b[2Jweb\r\n",)], 80))[2] == "?[2Jweb??"
