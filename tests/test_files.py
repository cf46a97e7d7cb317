"""Outputs are whole or not there; what cannot be written or read is told in one line."""

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabricate import full_disk, refused
from hifusion import files

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=15)
@given(value=JSON_VALUES)
def test_json_comes_back_as_it_was_written(value, tmp_path_factory):
    path = tmp_path_factory.mktemp("json") / "deep" / "value.json"
    files.write_json(path, value)
    assert files.read_json(path) == value


@settings(max_examples=8)  # each file is synced to disk
@given(pieces=st.lists(st.binary(max_size=40), max_size=4))
def test_written_pieces_stand_one_after_the_other_and_have_one_digest(pieces, tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes") / "file"
    files.write_bytes(path, *pieces)
    assert path.read_bytes() == b"".join(pieces)
    expected = hashlib.sha256(b"".join(pieces)).hexdigest()
    assert files.digest(*pieces) == files.digest_file(path) == expected


def test_digest_file_reads_files_longer_than_its_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK", 3)
    (tmp_path / "file").write_bytes(b"0123456789")
    assert files.digest_file(tmp_path / "file") == hashlib.sha256(b"0123456789").hexdigest()


def test_output_appears_only_when_the_block_ends_well(tmp_path):
    path = tmp_path / "out.txt"
    with files.replacing(path) as part:
        part.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["out.txt"]


def test_interrupted_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old")

    def write_half() -> None:
        with files.replacing(path) as part:
            part.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["out.txt"]


def test_nan_is_no_json_and_leaves_the_old_file(tmp_path):
    files.write_json(tmp_path / "scores.json", {"mse": 1.0})
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "scores.json", {"mse": float("nan")})
    assert files.read_json(tmp_path / "scores.json") == {"mse": 1.0}


def test_full_disk_is_one_line_leaves_the_old_file_and_a_second_try_completes(tmp_path):
    path, long = tmp_path / "scores.json", list(range(5000))
    files.write_json(path, "old")
    with full_disk(4096), refused(str(path), "cannot be written", "free some space"):
        files.write_json(path, long)
    assert json.loads(path.read_text()) == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["scores.json"]
    files.write_json(path, long)
    assert files.read_json(path) == long


@pytest.mark.parametrize("below", ["out.json", "deep/out.json"])
def test_a_file_where_a_folder_is_needed_is_one_line(tmp_path, below):
    (tmp_path / "taken").write_text("a file")
    with refused(str(tmp_path / "taken" / below), "cannot be written"):
        files.write_json(tmp_path / "taken" / below, 1)
    assert (tmp_path / "taken").read_text() == "a file"


def test_what_is_no_json_file_is_one_line(tmp_path):
    (tmp_path / "words.json").write_text("{'single': quotes}")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    for name, why in [
        ("none.json", "no such file"),
        ("words.json", "not a JSON file"),
        ("bytes.json", "not a JSON file"),
    ]:
        with refused(str(tmp_path / name), why):
            files.read_json(tmp_path / name)
    with refused(str(tmp_path), "cannot be read"):
        files.read_json(tmp_path)


def _stopped_after(path, key, data, row_bytes, batch_rows):
    """Write rows and be interrupted; gives how many rows were there before."""
    try:
        with files.growing(path, key, row_bytes, batch_rows) as (file, done):
            file.write(data)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        return done


def test_growing_rows_are_gone_on_with_in_whole_batches_and_then_deleted(tmp_path):
    """Rows of 4 bytes in batches of 2, stopped within the fourth row: the first batch is kept."""
    assert _stopped_after(tmp_path / "out", "key", b"aaaabbbbccccd", row_bytes=4, batch_rows=2) == 0
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.")
    with files.growing(tmp_path / "out", "key", 4, 2) as (file, done):
        assert done == 2
        file.write(b"CCCCDDDD")
        file.seek(0)
        assert file.read() == b"aaaabbbbCCCCDDDD"
    assert list(tmp_path.iterdir()) == []


def test_rows_of_another_key_are_not_gone_on_with_and_other_files_stay(tmp_path):
    (tmp_path / ".other.key.rows").write_bytes(b"of another output")
    _stopped_after(tmp_path / "out", "one", b"1", row_bytes=1, batch_rows=1)
    with files.growing(tmp_path / "out", "two", 1, 1) as (_, done):
        assert done == 0
    assert [path.name for path in tmp_path.iterdir()] == [".other.key.rows"]


def test_growing_on_a_full_disk_is_one_line_and_keeps_what_was_written(tmp_path):
    with refused("free some space"), full_disk(10), files.growing(tmp_path / "out", "key", 5, 1) as (file, _):
        for _ in range(3):
            file.write(b"12345")
            file.flush()
    with files.growing(tmp_path / "out", "key", 5, 1) as (_, done):
        assert done == 2
