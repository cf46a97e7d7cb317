"""Gene maps: what is shown, in which order, on which scale; what is refused; that nothing is half written."""

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from anndata import AnnData
from matplotlib.collections import EllipseCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image

from fabricate import MPP, PITCH_PX, contents, full_disk, lattice_section, refused
from hifusion import files
from hifusion.baselines import BASELINES
from hifusion.evaluated import ORDER
from hifusion.plots import CMAP, gene_figure, map_gene, plot_genes
from hifusion.section import predicted_section, write_section

GENES = ("KRT8", "ERBB2", "CD74", "TMSB10")
N, COLUMNS = 24, 6
ORACLES = {"own_mean": {"oracle": True}, "ridge": {"oracle": False}}


def measured_values(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(N, len(GENES))).astype(np.float32)


def predicted(
    values: np.ndarray,
    *,
    name: str = "A1",
    run: str = "ridge",
    genes: tuple[str, ...] = GENES,
    measured: np.ndarray | None = None,
    unit: str = "log_share",
) -> AnnData:
    """A predicted section, over a picture that is red all over."""
    section = lattice_section({gene: np.ones(N, dtype=int) for gene in genes}, name, COLUMNS)
    picture = np.zeros((100, 120, 3), dtype=np.uint8)
    picture[..., 0] = 200
    section.uns["spatial"][name]["images"] = {"hires": picture}
    section.uns["spatial"][name]["scalefactors"]["tissue_hires_scalef"] = 0.25
    made = predicted_section(section, values, genes=genes, normalisation=unit, panel_digest="d", run=run)
    if measured is not None:
        made.layers["measured"] = measured
    return made


def write_evaluation(root: Path, models: Mapping[str, np.ndarray], sections: tuple[str, ...] = ("A1",)) -> Path:
    """What `hifusion evaluate` leaves, as far as the maps read it."""
    for label, values in models.items():
        for name in sections:
            made = predicted(values, name=name, run=label, measured=measured_values())
            write_section(made, root / "predictions" / label / f"{name}.h5ad")
    files.write_json(root / "metrics.json", {"models": ORACLES})
    return root


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sections; measured itself as the network's prediction, a flat map, noise, and an oracle."""
    flat, noise = np.full((N, len(GENES)), -3.3, dtype=np.float32), measured_values(1)
    models = {"hifusion-seed0": measured_values(), "hifusion-seed1": noise, "own_mean": flat, "train_mean": flat}
    return write_evaluation(
        tmp_path_factory.mktemp("evaluation"), {**models, "shuffled-seed0": noise}, ("A1", "A2", "A10")
    )


def titles(figure: Figure) -> list[str]:
    return [ax.get_title() for ax in figure.axes]


def spots(figure: Figure, panel: int) -> EllipseCollection:
    (found,) = [part for part in figure.axes[panel].collections if isinstance(part, EllipseCollection)]
    return found


def test_a_perfect_map_scores_1_and_a_constant_map_has_no_correlation(evaluation):
    shown = titles(gene_figure(evaluation, genes=["CD74"], sections=["A1"], models=["train_mean", "hifusion-seed0"]))
    truth = measured_values()[:, GENES.index("CD74")]
    assert shown[0] == f"measured\nmean {truth.mean():.2f}  sd {truth.std():.2f}"
    assert shown[1] == f"train_mean\nMAE {np.abs(truth + 3.3).mean():.2f}  pcc_per_gene n/a"
    assert shown[2] == "hifusion-seed0\nMAE 0.00  pcc_per_gene 1.00"


def test_a_constant_gene_and_values_that_are_not_finite_are_shown_without_a_score(tmp_path):
    truth, values = measured_values(), measured_values()
    truth[:, 0], values[3, 1] = 2.0, np.nan
    write_section(predicted(values, measured=truth), tmp_path / "p.h5ad")
    shown = titles(gene_figure(tmp_path / "p.h5ad", genes=GENES[:2]))
    assert shown[1].endswith("pcc_per_gene n/a")
    assert shown[3] == "ridge\nMAE n/a  pcc_per_gene n/a"
    plot_genes(tmp_path / "p.h5ad", tmp_path / "p.png", genes=GENES[:2], dpi=40)


def test_default_models_are_no_oracles_one_seed_each_floor_first(evaluation):
    """And the default sections are the first two by number, the default genes the paper's markers."""
    figure = gene_figure(evaluation)
    row = ["measured", "train_mean", "shuffled-seed0", "hifusion-seed0"]
    assert [title.split("\n")[0] for title in titles(figure)] == row * 3 * 2
    assert [ax.get_ylabel() for ax in figure.axes[:: len(row)]] == ["ERBB2", "CD74", "TMSB10"] * 2
    assert [text.get_text().split("  ·")[0] for text in figure.texts[:2]] == ["Section A1", "Section A2"]


def test_a_model_name_means_all_its_seeds_and_an_oracle_can_be_asked_for(evaluation):
    shown = titles(gene_figure(evaluation, genes=["CD74"], sections=["A10"], models=["hifusion", "own_mean"]))
    assert [title.split("\n")[0] for title in shown] == ["measured", "own_mean", "hifusion-seed0", "hifusion-seed1"]


def test_order_names_every_baseline():
    assert set(BASELINES) <= set(ORDER)


def test_without_markers_the_first_three_genes_are_drawn(tmp_path):
    genes = ("G1", "G2", "G3", "G4")
    write_section(predicted(measured_values(), genes=genes), tmp_path / "p.h5ad")
    assert [ax.get_ylabel() for ax in gene_figure(tmp_path / "p.h5ad").axes] == ["G1", "G2", "G3"]


def test_more_than_seven_maps_of_a_gene_go_into_lines_of_even_length(tmp_path):
    folder = write_evaluation(tmp_path, {f"m{i}": measured_values() for i in range(8)})
    figure = gene_figure(folder, genes=["CD74", "KRT8"])
    lefts, bottoms = zip(*(ax.get_position().p0.round(4) for ax in figure.axes), strict=True)
    assert [sorted(set(lefts)).index(left) for left in lefts] == [0, 1, 2, 3, 4, 0, 1, 2, 3] * 2
    assert len(set(bottoms)) == 4 and min(bottoms) > 0
    assert [bool(ax.child_axes) for ax in figure.axes] == ([False] * 4 + [True] + [False] * 4) * 2, "colour bars"


def test_a_row_has_the_scale_of_what_was_measured(evaluation):
    figure = gene_figure(evaluation, genes=["CD74"], sections=["A1"])
    low, high = np.percentile(measured_values()[:, GENES.index("CD74")], [1, 99])
    assert all(np.allclose(spots(figure, panel).get_clim(), (low, high)) for panel in range(4))


def test_a_prediction_without_measurement_is_drawn_alone_on_its_own_scale(tmp_path):
    values = measured_values()
    write_section(predicted(values, run="0123456789ab"), tmp_path / "p.h5ad")
    figure = gene_figure([tmp_path / "p.h5ad"], genes=["ERBB2"])
    assert titles(figure) == ["0123456789ab\nnot measured"]
    assert np.allclose(spots(figure, 0).get_clim(), np.percentile(values[:, 1], [1, 99]))


@pytest.mark.parametrize("over_image, diameter_um", [(True, 100.0), (False, 200.0)])
def test_spots_are_circles_of_true_size_at_their_centres_y_down(tmp_path, over_image, diameter_um):
    section = predicted(measured_values())
    figure = Figure()
    ax = map_gene(section, "CD74", ax=figure.subplots(), over_image=over_image)
    drawn = spots(figure, 0)
    assert np.allclose(drawn.get_widths(), diameter_um / MPP)
    assert np.allclose(drawn.get_heights(), diameter_um / MPP)
    assert np.array_equal(drawn.get_offsets(), section.obsm["spatial"])
    bottom, top = ax.get_ylim()
    assert bottom > top and ax.get_aspect() == 1 and len(ax.get_xticks()) == 0
    assert len(ax.images) == over_image


def test_the_picture_lies_where_the_slide_does_and_is_paler_than_it():
    ax = map_gene(predicted(measured_values()), "CD74", ax=Figure().subplots())
    assert tuple(ax.images[0].get_extent()) == (0, 120 / 0.25, 100 / 0.25, 0)
    assert ax.images[0].get_array().min() > 120  # the red picture holds 0


def test_the_scale_bar_is_as_long_as_it_says():
    ax = map_gene(predicted(measured_values()), "CD74", ax=Figure().subplots())
    (bar,), (text,) = ax.lines, [text.get_text().strip() for text in ax.texts]
    assert text == "200 µm"  # of 6 spots, 200 um apart, and a pitch on each side: 30 % of 1400 um is 420 -> 200
    assert np.isclose(np.ptp(bar.get_xdata()) * MPP, 200)


def test_a_spot_has_the_colour_of_its_value_on_the_page(tmp_path):
    """The pixel at the middle of the spot of lowest, and of highest, value has that end of the colour map."""
    values = np.zeros((N, len(GENES)), dtype=np.float32)
    values[7], values[15] = -5, 5
    figure = Figure(figsize=(4, 4), dpi=100)
    ax = map_gene(predicted(values), "CD74", ax=figure.subplots(), vmin=-5, vmax=5, over_image=False)
    figure.savefig(tmp_path / "map.png")
    page = np.asarray(Image.open(tmp_path / "map.png").convert("RGB")).astype(int)
    for spot, end in ((7, 0.0), (15, 1.0)):
        x, y = ax.transData.transform([PITCH_PX * (spot % COLUMNS), PITCH_PX * (spot // COLUMNS)])
        wanted = 255 * np.array(to_rgba(spots(figure, 0).get_cmap()(end))[:3])
        assert np.abs(page[page.shape[0] - 1 - int(y), int(x)] - wanted).max() <= 2
    assert spots(figure, 0).get_cmap().name == CMAP


def test_map_gene_takes_a_layer_and_its_own_axes_come_with_a_colour_bar():
    from matplotlib import pyplot as plt

    section = predicted(measured_values(), measured=measured_values(2))
    ax = map_gene(section, "CD74", layer="measured", title="seen", vmin=-1)
    try:
        drawn = spots(ax.figure, 0)
        assert np.allclose(drawn.get_array(), measured_values(2)[:, 2])
        assert drawn.get_clim()[0] == -1 and ax.get_title() == "seen"
        assert [other.get_ylabel() for other in ax.figure.axes[1:]] == ["log_share"]
    finally:
        plt.close(ax.figure)


def test_map_gene_draws_a_column_of_the_spots_in_the_colours_asked_for():
    section = predicted(measured_values())
    section.obs["novelty"] = np.linspace(0, 2, N)
    ax = map_gene(section, "novelty", cmap="viridis", ax=Figure().subplots())
    drawn = spots(ax.figure, 0)
    assert np.allclose(drawn.get_array(), np.linspace(0, 2, N)) and drawn.get_cmap().name == "viridis"


def test_map_gene_draws_a_measured_section_too():
    section = lattice_section({"A": np.arange(N), "B": np.full(N, 50)}, columns=COLUMNS)
    ax = map_gene(section, "A", ax=Figure().subplots())
    assert np.allclose(spots(ax.figure, 0).get_array(), section.X[:, 0].toarray().ravel())


@pytest.mark.parametrize(
    "suffix, start", [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")]
)
def test_the_suffix_says_the_format_and_the_same_input_gives_the_same_bytes(evaluation, tmp_path, suffix, start):
    first, second = (
        plot_genes(evaluation, tmp_path / f"{name}{suffix}", genes=["CD74"], sections=["A1"], dpi=50) for name in "ab"
    )
    assert first.read_bytes().startswith(start)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("gene", ["<img src=x onerror=alert(1)>", "$x$", "$\\frac{", "../../x", "a\nb", "--><b>"])
def test_hostile_names_are_text_and_no_path(tmp_path, gene):
    folder = tmp_path / "in"
    write_section(predicted(measured_values(), genes=(gene, *GENES[1:]), run=gene), folder / "p.h5ad")
    before = contents(tmp_path)
    figure = gene_figure(folder / "p.h5ad", genes=[gene])
    assert figure.axes[0].get_title().split("\n")[0] == gene.replace("\n", "?")
    out = plot_genes(folder / "p.h5ad", tmp_path / "maps.svg", genes=[gene])
    tags = {element.tag.split("}")[-1] for element in ET.parse(out).iter()}
    assert not tags & {"img", "b", "script"}
    assert contents(tmp_path).keys() == before.keys() | {"maps.svg"}


@pytest.mark.parametrize(
    "choice, words",
    [
        ({"genes": ["erb2"]}, ("gene 'erb2'", "nearest of 4: ERBB2")),
        ({"genes": ["CD74", "../../x"]}, ("gene '../../x'", "panel of section A1")),
        ({"sections": ["A3"]}, ("section 'A3'", "A1")),
        ({"models": ["hifuson"]}, ("model 'hifuson'", "hifusion")),
        ({"cmap": "magmma"}, ("cmap='magmma'", "magma")),
    ],
)
def test_what_is_not_there_is_refused_with_the_nearest_names(evaluation, tmp_path, choice, words):
    with refused(*words):
        plot_genes(evaluation, tmp_path / "out" / "maps.png", **choice)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, dpi, words",
    [("maps.gif", 150, (".png, .svg, .pdf",)), ("maps", 150, (".png",)), ("maps.png", 0, ("dpi=0",))],
)
def test_a_picture_that_cannot_be_is_refused(evaluation, tmp_path, name, dpi, words):
    with refused(*words):
        plot_genes(evaluation, tmp_path / name, dpi=dpi)
    assert not (tmp_path / name).exists()


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_drawn(tmp_path):
    genes = tuple(f"G{i}" for i in range(20))
    values = np.zeros((N, len(genes)), dtype=np.float32)
    write_section(predicted(values, genes=genes), tmp_path / "p.h5ad")
    with refused("px", "fewer genes"):
        plot_genes(tmp_path / "p.h5ad", tmp_path / "maps.png", genes=genes, dpi=1200)
    assert not (tmp_path / "maps.png").exists()


def test_sources_that_hold_nothing_to_draw_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "empty", tmp_path / "missing", tmp_path / "missing.h5ad", []):
        with refused("nothing to draw"):
            plot_genes(source, tmp_path / "maps.png")
    (tmp_path / "broken.h5ad").write_bytes(b"no HDF5")
    with refused("broken.h5ad", "cannot be read"):
        plot_genes(tmp_path / "broken.h5ad", tmp_path / "maps.png")
    write_section(lattice_section({"A": np.ones(4, dtype=int)}), tmp_path / "measured.h5ad")
    with refused("measured section, not a prediction"):
        plot_genes(tmp_path / "measured.h5ad", tmp_path / "maps.png")
    assert not (tmp_path / "maps.png").exists()


def test_an_evaluation_that_did_not_end_is_refused(tmp_path):
    folder = write_evaluation(tmp_path / "evaluation", {"ridge": measured_values()})
    (folder / "metrics.json").unlink()
    with refused("metrics.json", "no such file"):
        plot_genes(folder, tmp_path / "maps.png")


def test_files_that_cannot_stand_in_one_row_are_refused(tmp_path):
    for name, its in {
        "a": predicted(measured_values(), run="one"),
        "b": predicted(measured_values(), run="two", unit="log1p_cpm"),
        "c": predicted(measured_values(), run="one"),
        "d": predicted(measured_values(), run="three", genes=("W", "X", "Y", "Z")),
    }.items():
        write_section(its, tmp_path / f"{name}.h5ad")
    paths = {name: tmp_path / f"{name}.h5ad" for name in "abcd"}
    for pair, words in {
        "ab": ("log1p_cpm, log_share",),
        "ac": ("same section and run",),
        "ad": ("share no gene",),
    }.items():
        with refused(*words):
            plot_genes([paths[name] for name in pair], tmp_path / "maps.png")


def test_a_full_disk_leaves_the_old_picture_and_nothing_half_written(evaluation, tmp_path):
    out = plot_genes(evaluation, tmp_path / "out" / "maps.png", genes=["CD74"], sections=["A1"], dpi=30)
    before = contents(out.parent)
    with full_disk(free_bytes=1000), refused("maps.png", "free some space"):
        plot_genes(evaluation, out, genes=["ERBB2"], sections=["A1"], dpi=60)
    assert contents(out.parent) == before


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"color": "CD75"}, "gene 'CD75' is not in section"),
        ({"color": "section"}, "gene 'section' is not in section"),  # a column of words has no colour scale
        ({"color": "CD74", "layer": "mesured"}, "layer 'mesured' is not in section"),
    ],
)
def test_what_a_section_lacks_cannot_be_coloured_by(asked, message):
    with refused(message):
        map_gene(predicted(measured_values(), measured=measured_values(2)), ax=Figure().subplots(), **asked)
