"""One section as the page asks for it: facts as JSON, numbers as blocks of float32, all under plain numbers as names.

The files of a section, relative to the page (``i`` a section, ``m`` a map, ``b`` a block)::

    data/i/section.json        genes, models, maps, skill (:meth:`Content.facts`), and the slide's size
    data/i/spots.json          names and known columns of the spots
    data/i/centres.bin         float32 (N, 2), full-resolution pixels
    data/i/m/b.bin             float32 (genes of the block, N): values of a map
    data/i/m.geojson           values of a measured or predicted map as tiles for QuPath
    data/i/tiles/level/column_row.jpeg
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from hifusion.errors import InputError, refuse_unknown
from hifusion.export_spots import dense, geojson
from hifusion.exporting import FEW, most_variable
from hifusion.expression import NORMALISATIONS, normalisation, panel_counts, total_counts
from hifusion.metrics import pcc_per_gene
from hifusion.section import LABEL, OBS_COLUMNS
from hifusion.viewer.gathering import Gathered

BLOCK_VALUES = (
    2**18
)  # numbers of a block at most, unless one gene has more: 1 MB, read in a blink even from a web server

QUPATH_KINDS = ("measured", "predicted")  # maps whose values are the genes of a section file


@dataclass(frozen=True)
class ValueMap:
    """Values of some genes at all spots: what one map of the page can show.

    Attributes
    ----------
    kind
        "measured", "predicted", "uncertainty" (half the width of the 90 % interval) or "novelty" (of no gene).
    model
        Index of the model, None of what was measured.
    unit
        Name of the normalisation; maps are comparable where ``scale`` is the same too.
    scale
        What a colour scale is shared by: unit and panel, since ``log_share`` depends on its panel.
    genes
        Names, ``(rows,)``; empty for novelty, which has one row.
    table
        ``(N, rows)``, dense or sparse by columns.
    source
        The file of the values: its spots.
    """

    kind: str
    model: int | None
    unit: str
    scale: str
    genes: tuple[str, ...]
    table: np.ndarray | sp.csc_matrix
    source: AnnData

    @property
    def rows(self) -> int:
        """How many values a spot has."""
        return int(self.table.shape[1])

    @property
    def rows_per_block(self) -> int:
        """How many genes one block holds."""
        return max(1, BLOCK_VALUES // int(self.table.shape[0]))

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return -(-self.rows // self.rows_per_block)

    def block(self, number: int) -> bytes:
        """Values of one block, gene by gene."""
        part = self.table[:, number * self.rows_per_block : (number + 1) * self.rows_per_block]
        return np.ascontiguousarray(_array(part).T, dtype="<f4").tobytes()


class Content:
    """All that the page may ask of one section, except tiles.

    Parameters
    ----------
    gathered
        The section's files.
    genes
        The only genes to show, in this order; all where None.
    """

    def __init__(self, gathered: Gathered, genes: Sequence[str] | None = None) -> None:
        self.name, self.spots = gathered.name, gathered.spots
        self.models = list(gathered.predictions)
        self._predictions = list(gathered.predictions.values())
        self.maps = _maps_of(gathered, genes)
        self.genes = list(dict.fromkeys(gene for its in self.maps for gene in its.genes))

    def summary(self) -> dict[str, Any]:
        """What the list of sections shows."""
        return {
            "name": self.name,
            "patient": str(self.spots.uns["hifusion"]["patient"]),
            "spots": self.spots.n_obs,
        }

    def facts(self) -> dict[str, Any]:
        """What ``section.json`` says of spots, genes, models and maps."""
        facts, place = self.spots.uns["hifusion"], {gene: n for n, gene in enumerate(self.genes)}
        return {
            **self.summary(),
            "mpp": float(facts["mpp"]),
            "spot_diameter_px": float(facts["spot_diameter_um"] / facts["mpp"]),
            "genes": self.genes,
            "models": self.models,
            "maps": [
                {
                    "kind": its.kind,
                    "model": its.model,
                    "unit": its.unit,
                    "meaning": NORMALISATIONS[its.unit].meaning if its.unit in NORMALISATIONS else "",
                    "scale": its.scale,
                    "genes": [place[gene] for gene in its.genes],
                    "rows": its.rows,
                    "rows_per_block": its.rows_per_block,
                }
                for its in self.maps
            ],
            "skill": [self._skill(model) for model in range(len(self.models))],
        }

    def spot_facts(self) -> dict[str, Any]:
        """Names of spots, and the columns of ``obs`` that say more: place on the array, label, counts."""
        obs = self.spots.obs
        columns = {"row": _plain_numbers(obs["array_row"]), "column": _plain_numbers(obs["array_col"])}
        if LABEL in obs:
            columns[LABEL] = _words(obs[LABEL])
        if "counts" in self.spots.layers:
            columns["UMI counts"] = _plain_numbers(total_counts(self.spots))
        return {"names": [str(name) for name in self.spots.obs_names], "columns": columns}

    def centres(self) -> bytes:
        """Centres of the spots, full-resolution pixels."""
        return np.ascontiguousarray(self.spots.obsm["spatial"], dtype="<f4").tobytes()

    def geojson(self, number: int, gene: int | None = None) -> bytes:
        """The values of a map for QuPath: its most variable genes, and the gene that is shown."""
        its = self.maps[number]
        # Columns that a reader or other software added are not ours to tell; novelty is of a prediction.
        told = [*OBS_COLUMNS, LABEL, *(["novelty"] if its.kind == "predicted" else [])]
        section = AnnData(
            X=its.table,
            obs=its.source.obs[[name for name in told if name in its.source.obs]],
            var=pd.DataFrame(index=pd.Index(its.genes, dtype=object)),
            obsm={"spatial": its.source.obsm["spatial"]},
            uns={"hifusion": its.source.uns["hifusion"]},
        )
        few = most_variable(section, FEW)
        if gene is not None and self.genes[gene] in its.genes:
            few = list(dict.fromkeys([self.genes[gene], *few]))
        return "".join(geojson(section[:, few])).encode()

    def _skill(self, model: int) -> dict[str, Any]:
        """How good a model is at each gene: measured where that was possible, else what its run expects."""
        predicted = [its for its in self.maps if its.kind == "predicted" and its.model == model]
        measured = [its for its in self.maps if its.kind == "measured" and [_key(its)] == list(map(_key, predicted))]
        var, pcc = self._predictions[model].var.reindex(self.genes), {}
        if measured:
            scores = pcc_per_gene(np.asarray(predicted[0].table), np.asarray(measured[0].table))
            pcc = dict(zip(predicted[0].genes, scores, strict=True))
        elif "expected_pcc_per_gene" in var:
            pcc = dict(var["expected_pcc_per_gene"])
        return {
            "measured": bool(measured),
            "pcc_per_gene": _plain_numbers([pcc.get(gene, np.nan) for gene in self.genes]) if pcc else None,
            "of_ceiling": _plain_numbers(var["expected_of_ceiling"]) if "expected_of_ceiling" in var else None,
            "trust": _words(var["trust"]) if "trust" in var else None,
        }


def _maps_of(gathered: Gathered, genes: Sequence[str] | None) -> list[ValueMap]:
    """Every map there is: what was measured in each model's unit, then all that was measured, then the models'."""
    measured: dict[Any, ValueMap] = {}
    others: list[ValueMap] = []
    for model, section in enumerate(gathered.predictions.values()):
        truth = _measured_for(section, gathered.measured)
        if truth is not None:
            its = _value_map("measured", None, section, truth, genes)
            measured.setdefault(_key(its), its)  # models of one panel share it
        others.append(_value_map("predicted", model, section, dense(section), genes))
        if {"lower_90", "upper_90"} <= set(section.layers):
            half = (_array(section.layers["upper_90"]) - _array(section.layers["lower_90"])) / 2
            others.append(_value_map("uncertainty", model, section, half, genes))
        if "novelty" in section.obs and np.isfinite(section.obs["novelty"]).any():
            column = section.obs[["novelty"]].to_numpy(dtype=np.float32)
            others.append(ValueMap("novelty", model, "novelty", "novelty", (), column, section))
    if gathered.measured is not None:
        measured["all"] = _value_map("measured", None, gathered.measured, gathered.measured.X, genes)
    return [its for its in (*measured.values(), *others) if its.genes or its.kind == "novelty"]


def _value_map(kind: str, model: int | None, section: AnnData, table: Any, genes: Sequence[str] | None) -> ValueMap:
    """Values of the genes asked for, of those that the file has."""
    facts, place = section.uns["hifusion"], {str(name): n for n, name in enumerate(section.var_names)}
    names = tuple(place) if genes is None else tuple(gene for gene in genes if gene in place)
    if genes is not None:
        table = table[:, [place[gene] for gene in names]]
    unit = str(facts["normalisation"])
    if not isinstance(table, np.ndarray):
        table = table.tocsc()  # genes are asked for one by one
    return ValueMap(
        kind,
        model,
        unit,
        f"{unit} {facts['panel_digest']}".strip(),
        names,
        table,
        section,
    )


def _key(its: ValueMap) -> tuple[str, tuple[str, ...]]:
    return its.scale, its.genes


def _measured_for(predicted: AnnData, measured: AnnData | None) -> np.ndarray | None:
    """What was measured in the unit of a prediction, ``(N, G)``: beside it in its file, or made from the counts."""
    if "measured" in predicted.layers:
        return _array(predicted.layers["measured"])
    unit = predicted.uns["hifusion"]["normalisation"]
    if measured is None or "counts" not in measured.layers or unit not in NORMALISATIONS:
        return None
    genes = list(predicted.var_names)
    if not set(genes) <= set(measured.var_names):
        return None
    return normalisation(unit).of(panel_counts(measured, genes), total_counts(measured))


def _array(table: Any) -> np.ndarray:
    return np.asarray(table if isinstance(table, np.ndarray) else table.toarray(), dtype=np.float32)


def _words(values: Iterable[Any]) -> list[Any]:
    """Words as JSON has them, null where there is none."""
    return [word if isinstance(word, str) else None for word in values]


def _plain_numbers(values: Any) -> list[Any]:
    """Numbers as JSON has them: what is not finite becomes null, the rest keeps six digits."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in np.asarray(values, dtype=np.float64)]


def contents_of(gathered: Sequence[Gathered], genes: Sequence[str] | None = None) -> list[Content]:
    """The content of each section; refused where there is nothing to show, or a gene is nowhere."""
    if not gathered:
        raise InputError("no section, so nothing to show; give section files (.h5ad) or folders of predictions")
    files = [file for its in gathered for file in (its.measured, *its.predictions.values()) if file is not None]
    refuse_unknown("gene", genes or (), (gene for file in files for gene in file.var_names), "the sections")
    return [Content(its, genes) for its in gathered]
