"""Archives taken apart safely, whichever container they are: what is wrong with one is told in one line."""

import functools
import gzip
import stat
import struct
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fabricate import contents, full_disk, refused
from hifusion import InputError, archives
from hifusion.archives import extract
from packing import PASSWORD, locked_7z, sevenzipped, zipped

CONTAINERS = {"zip": zipped, "7z": sevenzipped, "locked_7z": locked_7z}
IN_THE_CLEAR = pytest.mark.parametrize("pack", ["zip", "7z"], indirect=True)
IN_7Z = pytest.mark.parametrize("pack", ["7z"], indirect=True)
NOISE = np.random.default_rng(0).bytes(5000)


def text_only(name: str) -> str | None:
    """Place of a member: text files go flat into `texts`."""
    base = name.rsplit("/", 1)[-1]
    return f"texts/{base.removesuffix('.gz')}" if ".txt" in base else None


@pytest.fixture(autouse=True, scope="module")
def keys_once():
    """A key of a 7z takes a while to derive, on purpose; here it is always the same one."""
    compressor = pytest.importorskip("py7zr.compressor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compressor, "calculate_key", functools.cache(compressor.calculate_key))
        yield


@pytest.fixture(params=CONTAINERS)
def pack(request, tmp_path):
    """Write an archive of each container; its name says nothing of which."""

    def write(*made_of: object, change: Callable[[bytes], bytes] = bytes, **how: object) -> Path:
        (tmp_path / "packed").write_bytes(change(CONTAINERS[request.param](*made_of, **how)))
        return tmp_path / "packed"

    return write


@IN_THE_CLEAR
@pytest.mark.parametrize("password", [PASSWORD, None], ids=["encrypted", "plain"])
def test_wanted_members_are_taken_out_and_gzip_unpacked(password, pack, tmp_path):
    members = {"deep/er/a.txt": b"A", "b.txt.gz": gzip.compress(b"BB"), "c.jpg": b"no", "empty.txt": b""}
    sizes = extract(pack(members, password), tmp_path / "out", text_only, PASSWORD)
    assert sizes == {"texts/a.txt": 1, "texts/b.txt": 2, "texts/empty.txt": 0}
    assert contents(tmp_path / "out") == {"texts/a.txt": b"A", "texts/b.txt": b"BB", "texts/empty.txt": b""}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "packed"]


def test_the_names_in_a_locked_header_are_read(tmp_path):
    data = locked_7z({"deep/er/a.txt": NOISE, "c.jpg": b"no"})
    assert "a.txt".encode("utf-16le") not in data and "a.txt".encode("utf-16le") in sevenzipped({"a.txt": NOISE})
    (tmp_path / "packed").write_bytes(data)
    extract(tmp_path / "packed", tmp_path / "out", text_only, PASSWORD)
    assert contents(tmp_path / "out") == {"texts/a.txt": NOISE}


def test_a_wrong_password_is_one_line(pack, tmp_path):
    with refused("packed", "locked with another password"):
        extract(pack({"a.txt": NOISE}), tmp_path / "out", text_only, "wrong")
    assert contents(tmp_path) == {"packed": (tmp_path / "packed").read_bytes()}


@pytest.mark.parametrize("start", [b"", b"<html></html>", b"7z\xbc\xaf'", b"\x1f\x8b\x08"])
def test_what_is_no_archive_is_told(start, tmp_path):
    pytest.importorskip("pyzipper")
    (tmp_path / "a.zip").write_bytes(start)
    with refused("a.zip", "neither a zip nor a 7z archive", repr(start[:6])):
        extract(tmp_path / "a.zip", tmp_path / "out", text_only, PASSWORD)


@pytest.mark.parametrize("end", [6, 40, 2500, -30, -1])
def test_a_truncated_archive_is_told(end, pack, tmp_path):
    archive = pack({"a.txt": NOISE}, change=lambda data: data[:end])
    with refused("packed", "cannot be unpacked", "get it anew"):
        extract(archive, tmp_path / "out", text_only, PASSWORD)
    assert contents(tmp_path) == {"packed": archive.read_bytes()}


def test_a_flipped_bit_is_found_out(pack, tmp_path):
    archive = pack({"a.txt": NOISE}, change=lambda data: data[:2000] + bytes([data[2000] ^ 1]) + data[2001:])
    with refused("packed", "cannot be unpacked"):
        extract(archive, tmp_path / "out", text_only, PASSWORD)
    assert not (tmp_path / "out" / "texts" / "a.txt").exists()


@pytest.mark.parametrize("pack", ["zip"], indirect=True)
def test_a_name_that_is_no_text_is_told(pack, tmp_path):
    archive = pack({"\u00e9.txt": b"A"}, change=lambda data: data.replace("\u00e9".encode(), b"\xff\xff"))
    with refused("packed", "cannot be unpacked"):
        extract(archive, tmp_path / "out", text_only, PASSWORD)


def test_a_member_that_is_no_gzip_is_told(pack, tmp_path):
    with refused("packed", "cannot be unpacked"):
        extract(pack({"b.txt.gz": b"plain"}), tmp_path / "out", text_only, PASSWORD)


@pytest.mark.parametrize(
    "name",
    [
        *("../evil.txt", "a/../../evil.txt", "..\\evil.txt"),
        *("/etc/evil.txt", "//etc/evil.txt", "C:\\evil.txt", "c:evil.txt"),
    ],
)
@pytest.mark.parametrize("wanted", [True, False], ids=["wanted", "not wanted"])
def test_a_path_that_leads_elsewhere_condemns_the_archive(name, wanted, pack, tmp_path):
    name = name if wanted else name.replace(".txt", ".jpg")
    with refused("packed", "leads out of its folder", "not what was published"):
        extract(pack({"a.txt": b"A", name: b"evil"}), tmp_path / "out", text_only, PASSWORD)
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFBLK])
@pytest.mark.parametrize("name", ["a.txt", "a.jpg"], ids=["wanted", "not wanted"])
def test_a_link_or_device_condemns_the_archive(name, kind, pack, tmp_path):
    with refused("packed", "a link or device"):
        extract(pack({name: b"/etc/passwd"}, kind=kind), tmp_path / "out", text_only, PASSWORD)
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


@IN_7Z
@pytest.mark.parametrize("attributes", [0x400, 0x410], ids=["link", "junction"])
def test_a_link_of_windows_condemns_the_archive(attributes, pack, tmp_path):
    with refused("packed", "a link or device"):
        extract(pack({"a.txt": b"C:\\x"}, attributes=attributes), tmp_path / "out", text_only, PASSWORD)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("names", [("x/a.txt", "y/a.txt"), ("a.txt", "a.txt.gz"), ("a.txt", "a.txt")])
def test_two_members_for_one_file_condemn_the_archive(names, pack, tmp_path):
    with refused("packed", "texts/a.txt more than once"):
        extract(pack([(name, b"A") for name in names]), tmp_path / "out", text_only, PASSWORD)


@pytest.mark.parametrize("members", [{"c.jpg": b"no"}, {}], ids=["others", "none"])
def test_an_archive_without_the_expected_files_is_told(members, pack, tmp_path):
    with refused("packed", "none of the expected files"):
        extract(pack(members), tmp_path / "out", text_only, PASSWORD)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_bomb_is_stopped(name, pack, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MOST_BYTES", 2_000_000)
    bomb = b"\0" * 10_000_000
    with refused("packed", "unpacks to more than"):
        extract(pack({name: gzip.compress(bomb) if name.endswith("gz") else bomb}), tmp_path, text_only, PASSWORD)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["packed"]


def test_many_small_members_are_a_bomb_too(pack, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MOST_BYTES", 100)
    with refused("packed", "unpacks to more than"):
        extract(pack({f"{i}.txt": b"x" * 30 for i in range(4)}), tmp_path, text_only, PASSWORD)


@IN_7Z
def test_a_bomb_before_a_wanted_member_is_stopped(pack, tmp_path, monkeypatch):
    """In a 7z one member is packed after the other: what comes before has to be unpacked too."""
    monkeypatch.setattr(archives, "MOST_BYTES", 2_000_000)
    with refused("packed", "unpacks to more than"):
        extract(pack({"b.jpg": b"\0" * 10_000_000, "a.txt": b"A"}), tmp_path / "out", text_only, PASSWORD)


@IN_7Z
@pytest.mark.parametrize("method", ["ZSTD", "PPMD", "BROTLI", "DEFLATE"])
def test_methods_that_unpack_without_bounds_are_refused(method, pack, tmp_path):
    py7zr = pytest.importorskip("py7zr")
    how = {"id": getattr(py7zr, f"FILTER_{method}"), "level": 1, "order": 6, "mem": 24}
    with refused("packed", "unpack it with 7-Zip"):
        extract(pack({"a.txt": b"A"}, None, filters=[how]), tmp_path / "out", text_only, PASSWORD)


@IN_7Z
@pytest.mark.parametrize("method", ["COPY", "LZMA", "LZMA2", "BZIP2"])
def test_methods_of_7zip_are_read(method, pack, tmp_path):
    py7zr = pytest.importorskip("py7zr")
    how = [{"id": getattr(py7zr, f"FILTER_{method}")}, {"id": py7zr.FILTER_CRYPTO_AES256_SHA256}]
    extract(pack({"a.txt": NOISE, "b.txt": b"B"}, filters=how), tmp_path / "out", text_only, PASSWORD)
    assert contents(tmp_path / "out") == {"texts/a.txt": NOISE, "texts/b.txt": b"B"}


@IN_7Z
def test_what_a_killed_run_left_is_no_harm(pack, tmp_path):
    left = tmp_path / ".packed.members"
    left.mkdir()
    (left / "0").write_bytes(b"half of it")
    extract(pack({"a.txt": b"A"}), tmp_path / "out", text_only, PASSWORD)
    assert contents(tmp_path / "out") == {"texts/a.txt": b"A"} and not left.exists()


def test_a_full_disk_leaves_no_half_member(pack, tmp_path):
    archive = pack({"a.txt": NOISE})
    with full_disk(1000), refused("cannot be written", "file too large"):
        extract(archive, tmp_path / "out", text_only, PASSWORD)
    assert contents(tmp_path) == {"packed": archive.read_bytes()}


@IN_THE_CLEAR
@pytest.mark.parametrize("module", ["pyzipper", "py7zr"])
def test_a_missing_extra_is_named(module, pack, tmp_path, monkeypatch):
    archive = pack({"a.txt": b"A"})
    monkeypatch.setitem(sys.modules, module, None)
    with refused("pip install 'hifusion[download]'"):
        extract(archive, tmp_path, text_only, PASSWORD)


@functools.cache
def sound(container: str) -> bytes:
    return CONTAINERS[container]({"a.txt": b"A" * 50, "b.txt.gz": gzip.compress(b"BB")})


def checksummed(data: bytes) -> bytes:
    """A 7z whose header is said to be as it is, damaged or not."""
    start, size = struct.unpack("<QQ", data[12:28])
    signed = data[12:28] + struct.pack("<L", zlib.crc32(data[32 + start : 32 + start + size]))
    return data[:8] + struct.pack("<L", zlib.crc32(signed)) + signed + data[32:]


def test_a_sound_archive_is_rightly_checksummed():
    assert checksummed(sound("7z")) == sound("7z")


@pytest.mark.parametrize("container", CONTAINERS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_damage_is_one_line_or_harmless(container, changes, tmp_path):
    data = bytearray(sound(container))
    for place, value in changes:
        data[place % len(data)] = value
    (tmp_path / "a").write_bytes(checksummed(bytes(data)) if container == "7z" else data)
    with suppress(InputError):
        extract(tmp_path / "a", tmp_path / "out", text_only, PASSWORD)
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} <= {tmp_path, tmp_path / "out" / "texts"}
