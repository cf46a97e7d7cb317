"""What the viewer gathers and gives away: files of one section together, exact values, and nothing else."""

import json
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from anndata import AnnData
from fastapi.testclient import TestClient

from fabricate import contents, full_disk, refused
from fabricate_views import (
    ACROSS,
    DOWN,
    GENES,
    HOSTILE_GENE,
    HOSTILE_SECTION,
    measured,
    predicted,
    write_hostile,
    write_pair,
    write_slide,
)
from hifusion import cli, files, metrics
from hifusion.section import read_section, write_section
from hifusion.viewer.content import BLOCK_VALUES, Content
from hifusion.viewer.gathering import Gathered, gather
from hifusion.viewer.pages import Site
from hifusion.viewer.server import make_app
from hifusion.viewer.showing import view

N, TOKEN, PORT = ACROSS * DOWN, "a-token-of-this-test", 8123
HOST = f"http://127.0.0.1:{PORT}"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of a measured section and of its prediction, which knows its errors."""
    return write_pair(tmp_path_factory.mktemp("pair"), knows_errors=True)


@pytest.fixture(scope="module")
def client(pair: list[Path]) -> Iterator[TestClient]:
    """Talks to the application as a browser on this machine does."""
    with TestClient(make_app(Site(pair), TOKEN, PORT), base_url=HOST) as talking:
        yield talking


def column(content: Content, kind: str, gene: str) -> np.ndarray:
    """Values that the page would draw, read from the block they are sent in."""
    its = next(one for one in content.maps if one.kind == kind and (kind == "novelty" or gene in one.genes))
    row = 0 if kind == "novelty" else its.genes.index(gene)
    block = np.frombuffer(its.block(row // its.rows_per_block), dtype="<f4").reshape(-1, N)
    return block[row % its.rows_per_block]


# ---- what comes together


def test_measured_and_predicted_of_a_section_come_together(pair):
    [its] = gather(pair)
    assert its.name == "A1" and its.measured is not None and list(its.predictions) == ["run-1"]


def test_a_section_with_other_spots_is_another_one(pair, tmp_path):
    write_section(read_section(pair[1])[: N - 1].copy(), tmp_path / "fewer.h5ad")
    assert [its.name for its in gather([pair[0], tmp_path / "fewer.h5ad"])] == ["A1", "A1"]


def test_models_of_an_evaluation_stand_in_its_order_without_those_that_see_the_answer(tmp_path):
    for name in ("A2", "A10"):
        section = measured(None, name)
        for label in ("hifusion-seed0", "hifusion-seed1", "own_mean", "ridge"):
            write_section(predicted(section, label), tmp_path / "predictions" / label / f"{name}.h5ad")
    files.write_json(tmp_path / "metrics.json", {"models": {"own_mean": {"oracle": True}}})
    found = gather([tmp_path])
    assert [its.name for its in found] == ["A2", "A10"]
    assert list(found[0].predictions) == ["ridge", "hifusion-seed0"]


def test_folders_of_a_slide_an_archive_and_a_store_are_looked_into(pair, tmp_path):
    section = read_section(pair[1])
    (tmp_path / "store.json").touch()
    for place in ("slide/section.h5ad", "archive/one/section.h5ad", "sections/A1.h5ad"):
        (tmp_path / place).parent.mkdir(parents=True)
        write_section(section, tmp_path / place)
    for folder in (tmp_path / "slide", tmp_path / "archive", tmp_path):
        assert [its.name for its in gather([folder])] == ["A1"]


@pytest.mark.parametrize(
    "wrong, words",
    [
        ("nowhere", ["no such file or folder"]),
        ("empty", ["holds no section", "hifusion predict"]),
        ("text.h5ad", ["cannot be read as .h5ad"]),
    ],
)
def test_what_holds_no_section_is_refused_in_one_line(wrong, words, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.h5ad").write_text("no section")
    with refused(wrong, *words):
        gather([tmp_path / wrong])


def test_the_same_model_twice_is_refused(pair):
    with refused("the same section and model run-1"):
        gather([pair[1], pair[1]])


def test_a_wrong_path_ends_the_command_with_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hifusion", "view", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_without_the_extra_the_command_names_it(pair, monkeypatch):
    monkeypatch.delattr("hifusion.viewer.server")
    monkeypatch.setitem(sys.modules, "hifusion.viewer.server", None)
    with refused("pip install 'hifusion[viewer]'"):
        view(pair)


# ---- values


def test_blocks_hold_the_values_of_the_files(pair):
    [content] = Site(pair).contents
    section = read_section(pair[1])
    for gene in ("ERBB2", "GENE35"):
        np.testing.assert_array_equal(column(content, "predicted", gene), section[:, gene].X.ravel())
        np.testing.assert_allclose(column(content, "uncertainty", gene), 0.4, rtol=1e-5)
    np.testing.assert_array_equal(column(content, "novelty", ""), section.obs["novelty"].astype(np.float32))


def test_what_was_measured_is_shown_in_the_unit_of_the_model(pair):
    """ln((count + 1) / sum over the panel of (count + 1)), computed here from the counts."""
    [content] = Site(pair).contents
    panel = read_section(pair[0])[:, list(GENES[:40])].layers["counts"].toarray() + 1
    np.testing.assert_allclose(column(content, "measured", "ERBB2"), np.log(panel[:, 0] / panel.sum(axis=1)), rtol=1e-5)


def test_genes_outside_the_panel_are_shown_as_the_section_has_them(pair):
    [content] = Site(pair).contents
    wanted = read_section(pair[0])[:, "GENE50"].X.toarray().ravel()
    np.testing.assert_array_equal(column(content, "measured", "GENE50"), wanted)


def test_a_block_holds_whole_genes_and_no_more_than_it_may():
    section = measured(None)
    its = Content(gather_one(section)).maps[0]
    assert its.rows_per_block == BLOCK_VALUES // N
    wide = its.__class__(**{**vars(its), "table": np.zeros((BLOCK_VALUES + 1, 3), dtype=np.float32)})
    assert (wide.rows_per_block, wide.blocks) == (1, 3)


def gather_one(section: AnnData) -> Gathered:
    """A section that is in no file, as gathered."""
    return Gathered("A1", measured=section)


def test_skill_is_what_was_measured_where_it_was(pair):
    [skill] = Site(pair).contents[0].facts()["skill"]
    [content] = Site(pair).contents
    both = (column(content, kind, "CD74")[:, None] for kind in ("predicted", "measured"))
    assert skill["measured"]
    assert skill["pcc_per_gene"][GENES.index("CD74")] == pytest.approx(metrics.pcc_per_gene(*both)[0], rel=1e-5)
    assert skill["pcc_per_gene"][GENES.index("GENE50")] is None


def test_skill_is_what_the_run_expects_where_nothing_was_measured(pair):
    [skill] = Site(pair[1:]).contents[0].facts()["skill"]
    assert not skill["measured"]
    assert skill["pcc_per_gene"][0] == pytest.approx(0.6)
    assert skill["trust"][:3] == ["green", "amber", "red"]


def test_what_a_file_does_not_hold_is_not_offered():
    section = measured(None)
    plain = predicted(section)
    del plain.obs["novelty"]
    its = gather_one(section)
    its.predictions["plain"] = plain
    content = Content(its)
    assert {one.kind for one in content.maps} == {"measured", "predicted"}
    assert content.facts()["skill"][0]["trust"] is None


def test_only_the_genes_asked_for_are_given(pair):
    [content] = Site(pair, ["KRT19", "GENE50"]).contents
    assert sorted(content.genes) == ["GENE50", "KRT19"]
    with refused("gene 'KRT91'", "KRT19"):
        Site(pair, ["KRT91"])


def test_qupath_gets_the_values_of_the_map_and_the_gene_that_is_shown(pair):
    [content] = Site(pair).contents
    number = next(n for n, its in enumerate(content.maps) if its.kind == "measured" and "GENE50" not in its.genes)
    features = json.loads(content.geojson(number, content.genes.index("ERBB2")))["features"]
    assert len(features) == N
    shown = [feature["properties"]["measurements"]["ERBB2"] for feature in features]
    np.testing.assert_allclose(shown, column(content, "measured", "ERBB2"), rtol=1e-5)


# ---- who is answered


def test_the_page_and_its_files_are_served_with_a_strict_policy(client):
    page = client.get(f"/{TOKEN}/")
    assert page.status_code == 200 and "<title>HiFusion viewer</title>" in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for name in ("main.js", "viewer.css", "openseadragon.LICENSE.txt", "data/sections.json", "data/0/tiles/0/0_0.jpeg"):
        assert client.get(f"/{TOKEN}/{name}").status_code == 200, name


@pytest.mark.parametrize("token", ["", "wrong", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "ü"])
@pytest.mark.parametrize("file", ["", "main.js", "data/sections.json", "data/0/tiles/0/0_0.jpeg"])
def test_a_wrong_token_is_refused(client, token, file):
    answer = client.get(f"/{token}/{file}")
    assert answer.status_code == 403 and "A1" not in answer.text


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        f"evil.example:{PORT}",
        "127.0.0.1",
        f"127.0.0.1:{PORT + 1}",
        "",
        f"127.0.0.1:{PORT}.evil.example",
    ],
)
def test_another_host_header_is_refused(client, host):
    assert client.get(f"/{TOKEN}/", headers={"host": host}).status_code == 403


def test_localhost_is_this_machine_too(client):
    assert client.get(f"/{TOKEN}/", headers={"host": f"localhost:{PORT}"}).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "data/0/tiles/0/../../../../../../etc/passwd",
        "data/0/tiles/0/..%2f..%2f..%2fetc%2fpasswd",
        "data/0/tiles/0/%2e%2e/%2e%2e/section.json",
        "data/0/tiles/..%5c..%5c/0_0.jpeg",
        "..%2fserver.py",
        "%2e%2e/server.py",
        "data/0/tiles/0/0_0.jpeg%00.png",
        "data/-1/section.json",
        "data/7/section.json",
        "data/0/99/0.bin",
        "data/0/0/99.bin",
        "data/0/tiles/99/0_0.jpeg",
        "data/0/tiles/0/5_5.jpeg",
        "data/0/0.geojson?gene=99999",
        "docs",
        "openapi.json",
    ],
)
def test_what_is_no_file_of_the_page_is_not_found(client, path):
    answer = client.get(f"/{TOKEN}/{path}")
    assert answer.status_code in (403, 404), path  # 403 where the client itself resolved ".." before the token
    assert "root:" not in answer.text


def test_a_damaged_slide_is_told_in_one_line(tmp_path):
    slide = write_slide(tmp_path / "slide.png")
    write_section(measured(slide), tmp_path / "A1.h5ad")
    site = Site([tmp_path / "A1.h5ad"])
    slide.write_bytes(slide.read_bytes()[:2000])
    with TestClient(make_app(site, TOKEN, PORT), base_url=HOST, raise_server_exceptions=False) as talking:
        answer = talking.get(f"/{TOKEN}/data/0/tiles/5/0_0.jpeg")
    assert answer.status_code == 500 and "slide.png" in answer.text and answer.text.count("\n") == 1


def test_a_port_that_is_taken_is_refused(pair):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with refused("--port", "cannot be used"):
            view(pair, port=taken.getsockname()[1])


# ---- a copy


def test_a_copy_holds_what_the_server_answers(pair, client, tmp_path):
    view(pair, export=tmp_path / "copy")
    copied = contents(tmp_path / "copy")
    assert copied.pop("index.html") == client.get(f"/{TOKEN}/").content
    for address, content in copied.items():
        assert client.get(f"/{TOKEN}/{address}").content == content, address
    assert len(copied) + 1 == Site(pair).count()


def test_a_copy_replaces_an_earlier_copy_and_nothing_else(pair, tmp_path):
    view(pair, export=tmp_path / "copy", genes=["CD74"])
    view(pair, export=tmp_path / "copy", genes=["KRT19"])
    assert json.loads((tmp_path / "copy/data/0/section.json").read_text())["genes"] == ["KRT19"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    (tmp_path / "copy/CNAME").touch()
    for theirs in ("mine", "copy"):
        with refused(theirs, "holds something else"):
            view(pair, export=tmp_path / theirs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "mine"]


def test_a_full_disk_leaves_no_half_copy(pair, tmp_path):
    with full_disk(1000), refused("copy", "cannot be written"):
        view(pair, export=tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_hostile_names_write_nowhere_else(tmp_path):
    source = write_hostile(tmp_path / "in" / "hostile.h5ad")
    view([source], export=tmp_path / "deep" / "deeper" / "copy")
    outside = [path for path in contents(tmp_path) if not path.startswith(("deep/deeper/copy/", "in/"))]
    assert outside == []
    facts = json.loads((tmp_path / "deep/deeper/copy/data/0/section.json").read_text())
    assert (facts["name"], facts["genes"][0]) == (HOSTILE_SECTION, HOSTILE_GENE)
    assert "nowhere" not in facts["slide_note"]


def test_centres_are_pairs_of_float32(pair):
    given = Site(pair).contents[0].centres()
    assert struct.unpack("<4f", given[:16]) == (36.0, 36.0, 108.0, 36.0)
