"""Downloads against a host of our own: resumed, checked, unpacked, and one line for whatever goes wrong."""

import dataclasses
import gzip
import hashlib
import json
import shutil
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from fabricate import contents, full_disk, refused, write_her2st
from hifusion import transfer
from hifusion.downloading import DATASETS, RECEIPT, download
from hifusion.readers import her2st
from hifusion.transfer import CHUNK, RemoteFile, fetch, fetch_json
from packing import Members, locked_7z, sevenzipped, zipped


@dataclass
class Served:
    """How one path is answered, and the ranges it was asked for."""

    body: bytes
    kind: str = "application/octet-stream"
    status: int = 200
    ranges: bool = True
    cut_after: int | None = None  # bytes of an answer, after which the connection is closed
    say_length: bool = True
    asked: list[str | None] = field(default_factory=list)


class Host:
    """An HTTP host on this machine that serves ``paths``."""

    def __init__(self) -> None:
        self.paths: dict[str, Served] = {}
        paths = self.paths

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                served = paths.get(self.path.split("?")[0])
                if served is None:
                    self.send_error(404)
                    return
                wanted = self.headers.get("Range")
                served.asked.append(wanted)
                body, status = served.body, served.status
                start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and served.ranges else 0
                if start >= len(body) > 0:
                    self.send_error(416)
                    return
                if start:
                    status = 206
                self.send_response(status)
                self.send_header("Content-Type", served.kind)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
                if served.say_length:
                    self.send_header("Content-Length", str(len(body) - start))
                self.end_headers()
                self.wfile.write(body[start:][: served.cut_after])
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def serve(self, path: str, body: bytes, **how: object) -> Served:
        self.paths[path] = Served(body, **how)  # type: ignore[arg-type]
        return self.paths[path]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)


@pytest.fixture
def host(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    host = Host()
    yield host
    host.close()


BODY = np.random.default_rng(0).bytes(6 * CHUNK - 1000)
TOTAL = f"{len(BODY):,}"


def remote(host: Host, body: bytes = BODY, name: str = "a.bin", digest: str | None = None) -> RemoteFile:
    return RemoteFile(name, f"{host.address}/a.bin", len(body), digest or f"md5:{hashlib.md5(body).hexdigest()}")


# One file


def test_a_file_comes_whole(host, tmp_path):
    host.serve("/a.bin", BODY)
    assert fetch(remote(host), tmp_path).read_bytes() == BODY
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_sha256_is_checked_too(host, tmp_path):
    host.serve("/a.bin", BODY)
    fetch(remote(host, digest=f"sha256:{hashlib.sha256(BODY).hexdigest()}"), tmp_path)
    with refused("another digest"):
        fetch(remote(host, name="b.bin", digest=f"sha256:{'0' * 64}"), tmp_path)


def test_a_file_that_is_there_is_not_asked_for_again(host, tmp_path):
    served = host.serve("/a.bin", BODY)
    fetch(remote(host), tmp_path)
    fetch(remote(host), tmp_path)
    assert len(served.asked) == 1


def test_a_file_that_was_changed_here_is_fetched_anew(host, tmp_path):
    host.serve("/a.bin", BODY)
    (tmp_path / "a.bin").write_bytes(b"mine")
    assert fetch(remote(host), tmp_path).read_bytes() == BODY


def test_a_cut_connection_is_resumed_in_the_same_run(host, tmp_path):
    served = host.serve("/a.bin", BODY, cut_after=4 * CHUNK)
    assert fetch(remote(host), tmp_path).read_bytes() == BODY
    assert served.asked == [None, f"bytes={4 * CHUNK}-"]


def test_a_connection_that_keeps_breaking_is_told_and_resumed_by_the_next_run(host, tmp_path):
    served = host.serve("/a.bin", BODY, cut_after=CHUNK)
    with refused("a.bin", f"{3 * CHUNK:,} of {TOTAL} bytes are here", "run the same command again"):
        fetch(remote(host), tmp_path)
    assert not (tmp_path / "a.bin").exists()
    served.cut_after = None
    assert fetch(remote(host), tmp_path).read_bytes() == BODY
    assert served.asked == [None, *(f"bytes={n * CHUNK}-" for n in (1, 2, 3))]


def test_a_host_that_ignores_ranges_sends_all_again(host, tmp_path):
    served = host.serve("/a.bin", BODY, ranges=False)
    (tmp_path / ".a.bin.part").write_bytes(BODY[:70_000])
    assert fetch(remote(host), tmp_path).read_bytes() == BODY
    assert served.asked == ["bytes=70000-"]


def test_a_beginning_that_is_longer_than_the_file_is_thrown_away(host, tmp_path):
    host.serve("/a.bin", BODY)
    (tmp_path / ".a.bin.part").write_bytes(BODY + b"more")
    assert fetch(remote(host), tmp_path).read_bytes() == BODY


def test_a_beginning_of_something_else_is_found_out_and_thrown_away(host, tmp_path):
    host.serve("/a.bin", BODY)
    (tmp_path / ".a.bin.part").write_bytes(b"\0" * 1000)
    with refused("another digest", "thrown away"):
        fetch(remote(host), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert fetch(remote(host), tmp_path).read_bytes() == BODY


def test_a_range_that_the_host_no_longer_has_starts_anew(host, tmp_path):
    served = host.serve("/a.bin", BODY[:100])  # the host's file has shrunk
    (tmp_path / ".a.bin.part").write_bytes(BODY[:1000])
    with refused("the host sends 100 bytes", f"0 of {TOTAL}"):
        fetch(remote(host), tmp_path)
    assert served.asked[:2] == ["bytes=1000-", None]


def test_an_answer_without_a_length_that_stops_early_is_no_file(host, tmp_path):
    host.serve("/a.bin", BODY[:100_000], say_length=False, ranges=False)
    with refused("a.bin", f"100,000 of {TOTAL} bytes"):
        fetch(remote(host), tmp_path)
    assert not (tmp_path / "a.bin").exists()


@pytest.mark.parametrize("say_length", [True, False])
def test_an_answer_that_is_longer_than_published_is_no_file(say_length, host, tmp_path):
    host.serve("/a.bin", BODY + b"more", say_length=say_length)
    with refused("a.bin", "the host sends"):
        fetch(remote(host), tmp_path)
    assert not (tmp_path / "a.bin").exists()


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/json"])
def test_a_page_instead_of_the_file_is_told_and_what_came_before_is_kept(kind, host, tmp_path):
    host.serve("/a.bin", b"<html>log in</html>", kind=kind, ranges=False)
    (tmp_path / ".a.bin.part").write_bytes(BODY[:1000])
    with refused("a.bin", "a page instead of the file", f"1,000 of {TOTAL}"):
        fetch(remote(host), tmp_path)
    assert not (tmp_path / "a.bin").exists()
    host.serve("/a.bin", BODY)
    assert fetch(remote(host), tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("status", [403, 404, 500, 503])
def test_a_host_that_says_no_is_quoted(status, host, tmp_path):
    host.serve("/a.bin", b"no", status=status)
    with refused("a.bin", f"the host says {status}"):
        fetch(remote(host), tmp_path)
    assert list(tmp_path.iterdir()) == []


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_a_host_that_is_not_there_is_told(host, tmp_path):
    nowhere = f"http://127.0.0.1:{free_port()}"
    with refused(nowhere, "ConnectionError", f"0 of {TOTAL}"):
        fetch(remote(host)._replace(url=f"{nowhere}/a.bin"), tmp_path)
    with refused(nowhere, "cannot be reached", "run the same command again"):
        fetch_json(f"{nowhere}/list")


def test_a_full_disk_is_told_and_the_next_run_goes_on(host, tmp_path):
    served = host.serve("/a.bin", BODY)
    with full_disk(100_000), refused("a.bin", "cannot be written"):
        fetch(remote(host), tmp_path)
    assert not (tmp_path / "a.bin").exists()
    assert fetch(remote(host), tmp_path).read_bytes() == BODY
    assert served.asked[0] is None and served.asked[1] in {f"bytes={CHUNK}-", "bytes=100000-"}


def test_progress_counts_the_bytes_that_are_there(host, tmp_path):
    host.serve("/a.bin", BODY)
    (tmp_path / ".a.bin.part").write_bytes(BODY[:100_000])
    seen = []
    fetch(remote(host), tmp_path, seen.append)
    assert seen[0] > 100_000 and seen == sorted(seen) and seen[-1] == len(BODY)


@pytest.mark.parametrize("body, words", [(b"<html>", "does not answer with JSON"), (b"\xff\xfe", "JSON")])
def test_a_list_that_is_none_is_told(body, words, host):
    host.serve("/list", body)
    with refused("/list", words):
        fetch_json(f"{host.address}/list")


def test_a_list_without_end_is_refused(host, monkeypatch):
    host.serve("/list", b"[" + b"1," * 1000)
    monkeypatch.setattr(transfer, "MOST_LISTING_BYTES", 1000)
    with refused("/list", "answers with more than"):
        fetch_json(f"{host.address}/list")


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "../../evil"},
        {"name": "/etc/passwd"},
        {"name": ".bashrc"},
        {"name": "a\nb"},
        {"digest": "crc32:12"},
        {"digest": ""},
        {"size": 0},
        {"size": "12"},
    ],
)
def test_a_listed_file_that_cannot_be_used_is_refused(wrong):
    with refused("source", "no usable file"):
        RemoteFile("a.bin", "http://x", 3, "md5:" + "0" * 32)._replace(**wrong).checked("source")


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with refused("pip install 'hifusion[download]'"):
        fetch_json("http://127.0.0.1/")


# Data sets


def her2st_archives(
    root: Path, pack: Callable[[Members, str], bytes] = zipped, suffix: str = ".zip"
) -> dict[str, bytes]:
    """The four archives of the record, made of a small her2st folder; gives them by name."""
    data, packed = root / "data", {}
    read = {
        section: (data / "ST-spotfiles" / f"{section}_selection.tsv").read_bytes() for section in ("A1", "A2", "B1")
    }
    counts = {f"count-matrices/{s}.tsv.gz": (data / "ST-cnts" / f"{s}.tsv.gz").read_bytes() for s in read}
    images = {f"images/HE/{s}.jpg": (data / "ST-imgs" / s[0] / s / f"{s}_HE.jpg").read_bytes() for s in read}
    known = DATASETS["her2st"].archives
    packed["count-matrices"] = counts
    packed["spot-selections"] = {f"{s}_selection.tsv.gz": gzip.compress(table) for s, table in read.items()}
    packed["meta"] = {"A1_labeled_coordinates.tsv": b"\tx\ty\n"}
    packed["images"] = images | {"images/annotation/A1.jpg.txt": b"?", "__MACOSX/._A1.jpg": b"?"}
    return {name + suffix: pack(members, known[name].password) for name, members in packed.items()}


def serve_zenodo(host: Host, packed: dict[str, bytes]) -> None:
    """Serve archives as the record's API lists them."""
    listed = []
    for name, data in packed.items():
        path = f"/api/records/4751624/files/{name}/content"
        host.serve(path, data)
        checksum = f"md5:{hashlib.md5(data).hexdigest()}"
        listed.append(
            {"key": name, "size": len(data), "checksum": checksum, "links": {"self": f"{host.address}{path}"}}
        )
    record = {"id": 4751624, "files": [*listed, listed[0] | {"key": "readme.pdf"}]}
    host.serve("/api/records/4751624", json.dumps(record).encode(), kind="application/json")


@pytest.fixture
def zenodo(host, tmp_path, request):
    write_her2st(tmp_path / "made")
    packed = her2st_archives(tmp_path / "made", *getattr(request, "param", ()))
    shutil.rmtree(tmp_path / "made")
    serve_zenodo(host, packed)
    return host


@pytest.mark.parametrize(
    "zenodo", [(zipped, ".zip"), (sevenzipped, ".7z"), (locked_7z, ".7z"), (sevenzipped, ".zip")], indirect=True
)
def test_her2st_lands_in_the_layout_of_its_reader(zenodo, tmp_path):
    out = download("her2st", tmp_path / "h", host=zenodo.address)
    assert her2st.lacks(out) == "" and her2st.names(out) == ["A1", "A2", "B1"]
    section = next(her2st.read(out, ["B1"]))
    assert section.uns["hifusion"]["image"].endswith("data/ST-imgs/B/B1/B1.jpg") and section.n_obs == 26
    assert sorted(path.name for path in out.iterdir()) == ["data", RECEIPT], "no archive is left"
    assert sorted(contents(out / "data" / "ST-pat")) == ["lbl/A1_labeled_coordinates.tsv"]


def test_the_receipt_says_licence_citation_and_digests(zenodo, tmp_path):
    said = json.loads((download("her2st", tmp_path, host=zenodo.address) / RECEIPT).read_text())
    assert said["licence"] == "CC BY 4.0" and "Andersson" in said["citation"] and said["doi"].endswith("4751624")
    served = zenodo.paths["/api/records/4751624/files/meta.zip/content"].body
    assert said["files"]["meta.zip"]["digest"] == f"md5:{hashlib.md5(served).hexdigest()}"


@pytest.mark.parametrize("module", ["pyzipper", "py7zr"])
def test_a_missing_extra_is_named_before_anything_is_asked_for(module, zenodo, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with refused("pip install 'hifusion[download]'"):
        download("her2st", tmp_path / "h", host=zenodo.address)
    assert not any(served.asked for served in zenodo.paths.values())


def test_a_complete_data_set_asks_the_network_for_nothing(zenodo, tmp_path):
    out = download("her2st", tmp_path / "h", host=zenodo.address)
    before = contents(out)
    zenodo.paths.clear()
    assert download("her2st", out, host=zenodo.address) == out and contents(out) == before


def test_an_interrupted_data_set_goes_on_with_what_is_missing(zenodo, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "CHUNK", 1000)
    images = zenodo.paths["/api/records/4751624/files/images.zip/content"]
    images.cut_after = 8000
    with refused("images.zip", "run the same command again"):
        download("her2st", tmp_path / "h", host=zenodo.address)
    assert not (tmp_path / "h" / "data" / "ST-imgs").exists()
    images.cut_after = None
    download("her2st", tmp_path / "h", host=zenodo.address)
    others = [served for path, served in zenodo.paths.items() if path.endswith(("meta.zip/content", "ces.zip/content"))]
    assert len(others) == 2 and all(len(served.asked) == 1 for served in others)
    assert images.asked[-1] == "bytes=24000-"


def test_of_an_archive_in_two_containers_the_smaller_is_asked_for(host, tmp_path):
    root = write_her2st(tmp_path / "made")
    both = her2st_archives(root) | her2st_archives(root, suffix=".7z")
    serve_zenodo(host, both | {"images.7z": both["images.7z"] + bytes(1000)})
    download("her2st", tmp_path / "h", host=host.address)
    asked = {path.split("/")[-2]: bool(served.asked) for path, served in host.paths.items() if "/files/" in path}
    assert asked["images.zip"] and not asked["images.7z"] and sum(asked.values()) == 4


def test_a_file_that_was_lost_is_fetched_again(zenodo, tmp_path):
    out = download("her2st", tmp_path / "h", host=zenodo.address)
    lost = out / "data" / "ST-cnts" / "A2.tsv.gz"
    lost.unlink()
    download("her2st", out, host=zenodo.address)
    assert lost.is_file()
    assert len(zenodo.paths["/api/records/4751624/files/images.zip/content"].asked) == 1


def test_a_wrong_digest_leaves_nothing_unpacked(zenodo, tmp_path):
    served = zenodo.paths["/api/records/4751624/files/count-matrices.zip/content"]
    served.body = bytes(len(served.body))
    with refused("count-matrices.zip", "another digest"):
        download("her2st", tmp_path / "h", host=zenodo.address)
    assert not (tmp_path / "h" / "data" / "ST-cnts").exists()


def test_another_password_than_the_published_is_one_line(zenodo, tmp_path):
    members = {"A1.tsv.gz": b"", "A1.jpg": b""}
    serve_zenodo(zenodo, {f"{name}.zip": zipped(members, "other") for name in DATASETS["her2st"].archives})
    with refused("another password", "Bad password"):
        download("her2st", tmp_path / "h", host=zenodo.address)


@pytest.mark.parametrize(
    "answer, words",
    [
        ({"files": []}, "lists 0 of the 4 files that are needed (no count-matrices, spot-selections, meta, images, as"),
        ({"message": "gone"}, "does not list files as it used to"),
        ([1, 2], "does not list files as it used to"),
        ({"files": [{"key": "images.zip", "size": 5, "checksum": "md5:00", "links": {"self": "x"}}]}, "1 of the 4"),
        (
            {"files": [{"key": "images.rar", "size": 5, "checksum": "md5:00", "links": {"self": "x"}}]},
            "images, as .zip or .7z; it lists images.rar)",
        ),
        ({"files": [{"key": "../x", "size": 5, "checksum": "md5:00", "links": {"self": "x"}}]}, "no usable file"),
    ],
)
def test_a_record_that_has_changed_is_told_with_where_to_look(answer, words, host, tmp_path):
    host.serve("/api/records/4751624", json.dumps(answer).encode())
    with refused(host.address, words):
        download("her2st", tmp_path / "h", host=host.address)
    assert not (tmp_path / "h").exists() or contents(tmp_path / "h") == {}


def serve_mendeley(host: Host, members: dict[str, bytes]) -> None:
    """Serve files as Mendeley's public API lists them."""
    listed = []
    for n, (name, data) in enumerate(members.items()):
        host.serve(f"/public-files/{n}/file_downloaded", data)
        details = {
            "sha256_hash": hashlib.sha256(data).hexdigest(),
            "size": len(data),
            "download_url": f"{host.address}/public-files/{n}/file_downloaded",
        }
        listed.append({"filename": name, "id": str(n), "content_details": details})
    host.serve("/public-api/datasets/29ntw7sh4r/files", json.dumps(listed).encode(), kind="application/json")


STDATA = {"metadata.csv": b"patient,replicate\n", "HE_BT1_C1.jpg": b"jpg", "BC1_C1_stdata.tsv.gz": b"gz"}


def test_stdata_lands_flat_as_it_is_published(host, tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "stdata", dataclasses.replace(DATASETS["stdata"], n_files=len(STDATA)))
    serve_mendeley(host, STDATA)
    out = download("stdata", tmp_path / "s", host=host.address)
    assert {name: data for name, data in contents(out).items() if name != RECEIPT} == STDATA
    assert "29ntw7sh4r" in json.loads((out / RECEIPT).read_text())["doi"]


def test_stdata_of_which_the_list_lacks_a_file_is_told(host, tmp_path):
    serve_mendeley(host, STDATA)
    with refused("lists 3 of the 273 files", "doi.org/10.17632/29ntw7sh4r.5"):
        download("stdata", tmp_path / "s", host=host.address)


def test_progress_counts_megabytes_of_the_whole(zenodo, tmp_path):
    seen = []
    download("her2st", tmp_path, host=zenodo.address, progress=lambda *now: seen.append(now))
    assert {name for name, _, _ in seen} == {f"{name}.zip (MB)" for name in DATASETS["her2st"].archives}
    done = [done for _, done, _ in seen]
    assert done == sorted(done) and {total for _, _, total in seen} == {1}


def test_an_unknown_data_set_is_told_with_those_there_are(tmp_path):
    with refused("data set 'her3st' is unknown", "her2st, stdata"):
        download("her3st", tmp_path)


def test_a_folder_of_another_data_set_is_refused(zenodo, tmp_path):
    out = download("her2st", tmp_path / "h", host=zenodo.address)
    with refused(RECEIPT, "is not of this data set (10.17632/29ntw7sh4r.5)", "a folder of its own"):
        download("stdata", out, host=zenodo.address)


@pytest.mark.parametrize("text", ["[]", "{}", '{"doi": "10.5281/zenodo.4751624", "files": 3}'])
def test_a_receipt_of_something_else_is_refused(text, tmp_path):
    (tmp_path / RECEIPT).write_text(text)
    with refused(RECEIPT, "is not of this data set"):
        download("her2st", tmp_path)


@pytest.mark.parametrize("name", DATASETS)
def test_each_data_set_says_whose_it_is(name):
    dataset = DATASETS[name]
    assert dataset.host.startswith("https://") and dataset.doi.startswith("10.")
    assert all((dataset.licence, dataset.citation, dataset.title, dataset.size))


@pytest.mark.parametrize(
    "archive, member, path",
    [
        ("count-matrices", "count-matrices/C3.tsv.gz", "data/ST-cnts/C3.tsv.gz"),
        ("spot-selections", "C3_selection.tsv.gz", "data/ST-spotfiles/C3_selection.tsv"),
        ("meta", "G2_labeled_coordinates.tsv", "data/ST-pat/lbl/G2_labeled_coordinates.tsv"),
        ("images", "images/HE/C3.jpg", "data/ST-imgs/C/C3/C3.jpg"),
        ("images", "images/HE/._C3.jpg", None),
        ("images", "images/annotation/C3_annotated.jpg", None),
    ],
)
def test_members_of_the_her2st_archives_go_where_the_reader_looks(archive, member, path):
    assert DATASETS["her2st"].archives[archive].path_of(member) == path
