"""What somebody sees and does in the viewer: a real Chromium on the real command."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from browsing import Visit, chromium, served, viewed
from fabricate_views import (
    GENES,
    HOSTILE_GENE,
    HOSTILE_SECTION,
    LEFT,
    is_left,
    predicted,
    write_hostile,
    write_pair,
    write_positions,
)
from hifusion import metrics
from hifusion.importing import import_sections
from hifusion.section import build_section, predicted_section, read_section, write_section
from hifusion.viewer import view

AXE = Path(__file__).with_name("axe.min.js")
GRAVE = ("serious", "critical")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as one:
        yield one


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Measured and predicted of one section, a section whose names are hostile, and one of positions alone."""
    root = tmp_path_factory.mktemp("views")
    pair = write_pair(root, knows_errors=True)
    return [*pair, write_hostile(root / "hostile.h5ad"), write_positions(root / "bare.h5ad")]


@pytest.fixture(scope="module")
def address(files: list[Path]) -> Iterator[str]:
    with viewed(*files) as one:
        yield one


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Visit]:
    """The page on the fabricated section; nothing may be complained of, nor asked of another machine."""
    its = Visit(browser, address, "#section=1&gene=ERBB2")
    yield its
    its.close()
    assert its.complaints == []
    assert its.foreign == []


def test_the_first_view_is_measured_beside_predicted_over_the_slide(visit):
    chosen = visit.page.locator(".view select").evaluate_all("all => all.map((one) => one.selectedOptions[0].text)")
    assert chosen == ["Measured", "Predicted · run-1"]
    assert all(visit.pixels(n)[1] > 20 for n in (0, 1))
    assert visit.pixels(0)[0] == pytest.approx(visit.pixels(1)[0], rel=0.02)
    assert visit.page.locator(".scale h3").all_text_contents() == ["log_share"]
    assert any("/tiles/" in url for url in visit.asked)


def test_spots_lie_where_the_slide_has_them_at_every_zoom(visit):
    """The slide has a black disc of a spot's size at each centre."""
    surface = visit.page.locator(".openseadragon-canvas").first
    for keys in ("", "++", "ArrowRight ArrowDown", "++++"):
        for key in keys.split() if " " in keys else keys:
            surface.press(key)
        visit.page.wait_for_timeout(450)
        assert min(visit.on_discs()) > 0.9, keys  # half a pixel off and the blur of JPEG take the rest


def test_a_gene_is_found_by_typing_and_shown(visit, files):
    visit.page.keyboard.press("/")
    visit.page.keyboard.type("krt")
    assert visit.page.locator("#gene-list li").all_text_contents() == ["KRT19"]
    visit.page.keyboard.press("Enter")
    section, truth = (read_section(path) for path in reversed(files[:2]))
    panel = truth[:, list(section.var_names)].layers["counts"].toarray() + 1.0
    share = np.log(panel / panel.sum(axis=1, keepdims=True))[:, [1]]
    pcc = metrics.pcc_per_gene(section[:, "KRT19"].X, share)[0]
    visit.until(f"document.querySelectorAll('.score')[1].textContent === 'pcc_per_gene {pcc:.3}'")
    assert visit.page.locator("#genes tr.chosen th").text_content() == "KRT19"


def test_a_gene_outside_the_panel_is_measured_only(visit):
    visit.page.fill("#gene", "GENE50")
    visit.page.keyboard.press("Enter")
    visit.until("document.querySelectorAll('.score')[1].textContent === 'not in this view'")
    assert visit.page.locator(".scale h3").all_text_contents() == ["log1p_cpm"]


def test_views_zoom_and_move_together_and_spots_with_them(visit):
    box = visit.page.locator(".stage").first.bounding_box()
    visit.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    before = visit.pixels()
    visit.page.mouse.wheel(0, -600)
    visit.page.wait_for_timeout(450)
    zoomed = visit.pixels()
    visit.drag((0.5, 0.5), (0.1, 0.2))
    visit.page.wait_for_timeout(450)
    assert len({before[0], zoomed[0], visit.pixels()[0]}) == 3
    # The same spots are in both views; what covers part of a pixel is not counted.
    assert visit.pixels(0)[0] == pytest.approx(visit.pixels(1)[0], rel=0.02)


def test_compare_shows_every_kind_of_view(visit):
    visit.page.click("#compare")
    visit.until("document.querySelectorAll('.view').length === 5")
    visit.page.wait_for_timeout(300)
    scales = visit.page.locator(".scale h3").all_text_contents()
    assert scales == ["log_share", "difference, log_share", "± log_share", "novelty"]
    first = visit.pixels()[0]
    assert first > 100 and all(visit.pixels(n)[0] == pytest.approx(first, rel=0.02) for n in range(1, 5))
    # Novelty runs evenly from 0.2 to 1.4 over 108 spots: 36 of them lie above 1.
    assert visit.page.locator(".score").nth(4).text_content() == "33.3 % of spots above 1"
    visit.page.click("[aria-label='Remove view 5']")
    visit.until("document.querySelectorAll('.view').length === 4")


def test_a_lasso_ranks_the_genes_of_a_region(visit, files):
    visit.page.click("#lasso")
    visit.drag((0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.0, 1.0))
    visit.page.wait_for_selector("#ranking tbody tr")
    assert visit.page.locator("#ranking tbody th").first.text_content() == LEFT
    rows = list(csv.DictReader(visit.download("#ranking-csv").open()))
    assert (int(rows[0]["spots_region"]), int(rows[0]["spots_rest"])) == (54, 54)
    truth = read_section(files[0])
    panel = truth[:, list(GENES[:40])].layers["counts"].toarray() + 1.0
    share = np.log(panel / panel.sum(axis=1, keepdims=True))
    inside, outside = share[is_left()], share[~is_left()]
    difference = inside.mean(axis=0) - outside.mean(axis=0)
    effect = difference / np.sqrt((inside.var(axis=0, ddof=1) + outside.var(axis=0, ddof=1)) / 2)
    wanted = {gene: (difference[n], effect[n]) for n, gene in enumerate(GENES[:40])}
    for row in rows:
        assert (float(row["difference"]), float(row["effect_sd"])) == pytest.approx(
            wanted[row["gene"]], rel=1e-3, abs=1e-5
        )
    spots = list(csv.DictReader(visit.download("#spots-csv").open()))
    assert len(spots) == 54 and {row["label"] for row in spots} == {"left"}
    visit.page.keyboard.press("Escape")
    assert visit.page.locator("#clear").is_disabled()


def test_regions_need_no_pointer(visit):
    visit.page.select_option("#by-label", "right")
    visit.page.wait_for_selector("#ranking tbody tr")
    assert visit.page.locator("#ranking tbody th").last.text_content() == LEFT
    visit.page.keyboard.press("Escape")
    visit.page.locator(".openseadragon-canvas").first.focus()
    for _ in range(4):
        visit.page.keyboard.press("+")
    visit.page.wait_for_timeout(600)
    visit.page.click("#in-view")
    visit.page.wait_for_selector("#ranking tbody tr")


def test_the_limits_of_the_colours_are_moved_by_keys_and_by_dragging(visit):
    handle = visit.page.locator("[role=slider]").first
    before, drawn = float(handle.get_attribute("aria-valuenow")), visit.pixels()
    handle.focus()
    for _ in range(30):
        visit.page.keyboard.press("ArrowRight")
    assert float(handle.get_attribute("aria-valuenow")) > before
    assert visit.pixels() != drawn
    box = handle.bounding_box()
    visit.page.mouse.move(box["x"] + 8, box["y"] + 60)
    visit.page.mouse.down()
    visit.page.mouse.move(box["x"] + 48, box["y"] + 60, steps=3)
    visit.page.mouse.up()
    moved = float(handle.get_attribute("aria-valuenow"))
    assert moved > before + 0.1
    visit.page.click(".ends button")
    assert float(handle.get_attribute("aria-valuenow")) == pytest.approx(before)


def test_a_spot_under_the_pointer_tells_what_is_known_of_it(visit):
    box = visit.page.locator(".stage").first.bounding_box()
    for step in range(40):  # somewhere on the way there is a spot
        visit.page.mouse.move(box["x"] + box["width"] / 2 + 2 * step, box["y"] + box["height"] / 2 + step)
        if visit.page.locator(".details").is_visible():
            break
    told = visit.page.locator(".details dt").all_text_contents()
    assert told == ["Measured", "Predicted · run-1", "row", "column", "label", "UMI counts"]


def test_what_is_seen_is_saved_as_a_picture_and_for_qupath(visit):
    picture = visit.download("#png")
    assert picture.name == "A1-ERBB2.png"
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 1000
    tiles = visit.download("#geojson")
    assert tiles.name == "A1-measured.geojson"
    features = json.loads(tiles.read_text())["features"]
    assert len(features) == 108 and "ERBB2" in features[0]["properties"]["measurements"]


def test_trust_is_told_by_a_word_and_not_by_colour_alone(visit):
    visit.page.locator("#genes thead button", has_text="Trust").click()
    words = visit.page.locator("#genes .trust").all_text_contents()
    assert words == sorted(words, key=("green", "amber", "red").index) and len(set(words)) == 3


def test_keys_do_what_the_list_says(visit):
    visit.page.keyboard.press("a")
    visit.until("document.querySelectorAll('.view').length === 3")
    visit.page.keyboard.press("c")
    visit.until("document.querySelectorAll('.view').length === 5")
    visit.page.keyboard.press("t")
    visit.until("document.documentElement.dataset.theme === 'dark'")
    visit.page.keyboard.press("j")
    visit.until(
        "document.querySelector('#genes tr.chosen') !== null && document.querySelector('#gene').value !== 'ERBB2'"
    )
    visit.page.keyboard.press("n")
    visit.page.keyboard.press("n")
    assert visit.page.text_content(".details strong") == "1x0"
    visit.page.keyboard.press("p")
    visit.page.keyboard.press("p")
    assert visit.page.text_content(".details strong") == "11x8"
    visit.page.keyboard.press("?")
    visit.page.wait_for_selector("dialog[open]")


def test_hostile_names_are_text(browser, address):
    visit = Visit(browser, address)
    assert visit.page.locator("#section option").first.text_content() == f"{HOSTILE_SECTION} · patient A · 108 spots"
    visit.page.fill("#gene", "<img")
    assert visit.page.locator("#gene-list li").all_text_contents() == [HOSTILE_GENE]
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_timeout(200)
    assert visit.page.input_value("#gene") == HOSTILE_GENE
    assert visit.page.locator("img, .view b").count() == 0
    name = visit.download("#png").name
    assert name == "x-img_src_x_onerror_alert_1_.png"
    visit.close()
    assert visit.complaints == [] and visit.foreign == []


def test_positions_alone_are_shown_as_spots(browser, address):
    visit = Visit(browser, address, "#section=2")
    assert visit.page.locator(".view select option").all_text_contents() == ["Spots"]
    assert visit.pixels()[0] > 100
    assert visit.page.text_content("#slide-note") == "The section names no slide: spots alone."
    visit.page.keyboard.press("[")
    visit.until("document.querySelectorAll('.view').length === 2")
    visit.page.wait_for_timeout(300)
    visit.close()
    assert visit.complaints == [] and visit.foreign == []


@pytest.mark.parametrize("width, height, scheme", [(1440, 900, "light"), (390, 844, "dark")])
def test_axe_finds_nothing_grave_and_nothing_runs_over_the_edge(browser, address, width, height, scheme):
    if not AXE.is_file():
        pytest.skip(f"{AXE.name} is not here; the repository has it (axe-core 4.14.1 from npm)")
    visit = Visit(browser, address, "#section=1", color_scheme=scheme)
    page = visit.page
    page.set_viewport_size({"width": width, "height": height})
    page.select_option("#by-label", "left")
    page.wait_for_selector("#ranking tbody tr")
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
    visit.close()
    assert [(one["id"], [node["target"] for node in one["nodes"]]) for one in found if one["impact"] in GRAVE] == []


def test_a_copy_is_the_same_page_behind_any_web_server(browser, files, tmp_path):
    view(files, export=tmp_path / "copy")
    with served(tmp_path / "copy") as address:
        visit = Visit(browser, address)
        visit.page.select_option("#section", label="A1 · patient A · 108 spots")
        visit.until("document.title.startsWith('A1')")
        visit.page.fill("#gene", "GENE30")
        visit.page.keyboard.press("Enter")
        visit.page.select_option("#by-label", "left")
        visit.page.wait_for_selector("#ranking tbody tr")
        assert visit.page.locator("#ranking tbody th").first.text_content() == LEFT
        assert len(json.loads(visit.download("#geojson").read_text())["features"]) == 108
        visit.close()
    assert visit.complaints == [] and visit.foreign == []


def finest_level(visit: Visit) -> int:
    """The finest level of which more was asked than the one tile that makes the server decode the slide."""
    return max(int(url.split("/")[-2]) for url in visit.asked if "/tiles/" in url and not url.endswith("14/0_0.jpeg"))


@pytest.mark.slow  # reading the raw section takes longest
@pytest.mark.real
def test_a_real_section_opens_in_two_seconds(browser, her2st_root, tmp_path):
    [path] = import_sections(her2st_root, tmp_path, sections=["C3"])
    section = read_section(path)
    write_section(predicted(section, genes=40), tmp_path / "predicted.h5ad")
    with viewed(path, tmp_path / "predicted.h5ad") as address:
        visit = Visit(browser, address)
        assert visit.page.locator(".view").count() == 2 and visit.pixels()[1] > 20
        print(f"first view after {visit.first_view_ms():.0f} ms")
        assert visit.first_view_ms() < 2000
        coarse = finest_level(visit)
        box = visit.page.locator(".stage").first.bounding_box()
        visit.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        for _ in range(16):
            visit.page.mouse.wheel(0, -500)
            visit.page.wait_for_timeout(100)
        for _ in range(200):  # the first of the finer tiles wait until the whole JPEG is decoded
            if finest_level(visit) == 14:
                break
            visit.page.wait_for_timeout(100)
        assert coarse < finest_level(visit) == 14  # the slide's own pixels: 9,936 are at most 2 ** 14
        visit.page.locator(".openseadragon-canvas").first.press("0")
        visit.page.wait_for_timeout(600)
        visit.page.fill("#gene", "ERBB2")
        visit.page.keyboard.press("Enter")
        visit.page.click("#lasso")
        visit.drag((0.2, 0.2), (0.6, 0.2), (0.6, 0.8), (0.2, 0.8))
        visit.page.wait_for_selector("#ranking tbody tr")
        visit.close()
    assert visit.complaints == [] and visit.foreign == []


@pytest.mark.slow
@pytest.mark.parametrize("many, least", [(20_000, 30), (100_000, 15)])
def test_many_spots_move_smoothly(browser, many, least, tmp_path):
    """Frames that the browser gives while two views are dragged and zoomed, and how often spots are drawn meanwhile."""
    side = round(many**0.5)
    row, column = np.divmod(np.arange(many), side)
    section = build_section(
        None,
        spots=[f"s{n}" for n in range(many)],
        centres_px=(np.stack([column, row], axis=1) + 0.5) * 110,
        name="many",
        patient="A",
        mpp=0.5,
        spot_diameter_um=45,
        pitch_um=55,
        array_row=row,
        array_col=column,
        thumbnail=np.full((1000, 1000, 3), 220, dtype=np.uint8),
        full_size_px=(110 * side, 110 * side),
    )
    values = np.stack([np.sin(row / 9 + n) for n in range(8)], axis=1).astype(np.float32)
    made = predicted_section(
        section, values, genes=list(GENES[:8]), normalisation="log_share", panel_digest="d", run="r"
    )
    made.layers["measured"] = values + np.float32(0.1)
    write_section(made, tmp_path / "many.h5ad")
    with viewed(tmp_path / "many.h5ad") as address:
        visit = Visit(browser, address)
        visit.page.evaluate("""() => {
            window.frames_ = []; window.drawn_ = 0;
            const put = CanvasRenderingContext2D.prototype.putImageData;
            CanvasRenderingContext2D.prototype.putImageData = function (...all) {
                window.drawn_++;
                put.apply(this, all);
            };
            const frame = (t) => { window.frames_.push(t); requestAnimationFrame(frame); };
            requestAnimationFrame(frame);
        }""")
        for n in range(6):
            visit.page.mouse.wheel(0, -300 if n < 3 else 300)
            visit.drag((0.5, 0.5), (0.3, 0.7), (0.7, 0.4), (0.5, 0.5))
        times, drawn = visit.page.evaluate("[window.frames_, window.drawn_]")
        visit.close()
    seconds = (times[-1] - times[0]) / 1000
    print(f"{many} spots: {len(times) / seconds:.1f} frames/s, spots drawn {drawn / 2 / seconds:.1f} times a second")
    assert len(times) / seconds > least
    assert drawn / 2 / seconds > least / 2  # dragging pauses between events, when there is nothing to draw
