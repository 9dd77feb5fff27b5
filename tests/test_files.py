import hashlib

import pytest

from companion.files import sha256, write_atomically


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 1000).hexdigest()


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "new folder" / "a"
    write_atomically(path, lambda p: p.write_text("old"))

    def fails(partial):
        partial.write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_atomically(path, fails)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
