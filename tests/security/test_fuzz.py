"""Every target of `targets.py`, for a moment: real files and documents, changed at random places."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.security.targets import TARGETS

#: how many changed inputs each gets; the slow ones get fewer
_EXAMPLES = {"image": 60, "blocks": 60, "api": 100}

NUMBERS = st.sampled_from([0, 1, 0xFF, 0x7F, 1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 62 | 5])
WORDS = st.sampled_from(
    [
        b"",
        b"..",
        b"../../etc/passwd",
        b"/",
        b"\0",
        b"\n",
        b"&x;",
        b"<a>",
        b"\xff",
        b"9" * 30,
        b"-1",
        b"{",
        b'"',
    ]
)
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("number"), st.floats(0, 1), NUMBERS),
        st.tuples(st.just("word"), st.floats(0, 1), WORDS),
        st.tuples(st.just("cut"), st.floats(0, 1), st.integers(0, 64)),
        st.tuples(st.just("double"), st.floats(0, 1), st.integers(1, 400)),
        st.tuples(st.just("byte"), st.floats(0, 1), st.integers(0, 255)),
    ),
    max_size=6,
)


def changed(seed: bytes, changes: list[tuple[str, float, int | bytes]]) -> bytes:
    data = bytearray(seed)
    for how, where, what in changes:
        # most of what matters is at the beginning
        at = int(where * where * len(data))
        if isinstance(what, bytes):
            data[at : at + len(what)] = what
        elif how == "number":
            at &= ~7
            data[at : at + 8] = what.to_bytes(8, "big")
        elif how == "cut":
            del data[at : at + what]
        elif how == "double":
            data[at:at] = data[at : at + what]
        else:
            data[at : at + 1] = bytes([what])
    return bytes(data)


@pytest.mark.fault("security", "nonsense where documents, URLs, manifests or answers are due")
@pytest.mark.fault("security", "nonsense on the API's socket")
@pytest.mark.fault("security", "images made to harm: tables, sizes, backing and data files")
@pytest.mark.parametrize("name", TARGETS)
def test_nothing_that_is_read_from_outside_is_a_fault(name: str) -> None:
    target = TARGETS[name]
    seeds = target.seeds()
    for seed in (*seeds, b"", b"\0" * 100):
        target.run(seed)

    @settings(
        max_examples=_EXAMPLES.get(name, 200),
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(seed=st.sampled_from(seeds), changes=CHANGES)
    def try_changed(seed: bytes, changes: list[tuple[str, float, int | bytes]]) -> None:
        target.run(changed(seed, changes))

    try_changed()
