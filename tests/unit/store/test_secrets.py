import pytest
from hypothesis import given
from hypothesis import strategies as st

from oned_backup.errors import Misconfigured, PermissionDenied
from oned_backup.model.datastore import SEALED_PREFIX
from oned_backup.store import SecretBox

CONTEXT = "datastore/100/PASSWORD"
BOX = SecretBox(b"k" * 32)


@given(st.text())
def test_a_sealed_secret_opens_again_and_never_looks_the_same(secret):
    first, second = BOX.seal(secret, CONTEXT), BOX.seal(secret, CONTEXT)

    assert first != second
    assert first.startswith(SEALED_PREFIX)
    assert first.isascii()
    assert BOX.unseal(first, CONTEXT) == secret


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-8] + ("AAAAAAA=" if text[-8:] != "AAAAAAA=" else "BBBBBBB="),
        lambda text: text[: len(SEALED_PREFIX)],
        lambda _: SEALED_PREFIX + "AAAA",
        lambda _: SEALED_PREFIX + "not base64!",
        lambda _: "clear text",
    ],
)
def test_a_damaged_secret_does_not_open(damage):
    sealed = BOX.seal("hunter2", CONTEXT)

    with pytest.raises(Misconfigured, match="cannot be decrypted") as caught:
        BOX.unseal(damage(sealed), CONTEXT)
    assert "oned-backup datastore update" in (caught.value.hint or "")


def test_a_secret_opens_only_where_it_belongs_and_with_its_key():
    sealed = BOX.seal("hunter2", CONTEXT)

    for box, context in ((BOX, "datastore/101/PASSWORD"), (SecretBox(b"l" * 32), CONTEXT)):
        with pytest.raises(Misconfigured, match="cannot be decrypted"):
            box.unseal(sealed, context)


def test_the_key_is_made_once_and_only_its_owner_reads_it(tmp_path):
    path = tmp_path / "state" / "secret.key"
    sealed = SecretBox.open(path).seal("x", CONTEXT)

    assert SecretBox.open(path).unseal(sealed, CONTEXT) == "x"
    assert (path.stat().st_mode & 0o777, path.stat().st_size) == (0o600, 32)
    assert [file.name for file in path.parent.iterdir()] == ["secret.key"]
    assert "k" * 4 not in repr(BOX)


def test_a_key_file_that_is_open_or_no_key_or_a_link_is_refused(tmp_path):
    path = tmp_path / "key"
    path.write_bytes(b"k" * 32)
    path.chmod(0o640)
    with pytest.raises(Misconfigured, match="open to other users"):
        SecretBox.open(path)
    path.chmod(0o600)
    path.write_bytes(b"k" * 31)
    with pytest.raises(Misconfigured, match="31 bytes, a key has 32"):
        SecretBox.open(path)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(PermissionDenied, match="symbolic links"):
        SecretBox.open(tmp_path / "link")
