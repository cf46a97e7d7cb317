"""Gene panels and named normalisations: what a model is asked to predict, in which unit."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from anndata import AnnData

from hifusion import files
from hifusion.errors import InputError
from hifusion.metrics import lattice_weights, morans_i

# Highly variable and Moran's I panels choose among this many genes of highest mean: rarer ones have too few counts
# for either statistic to mean anything, and the cost stays bounded.
CANDIDATES = 2000


@dataclass(frozen=True)
class GenePanel:
    """The genes a model predicts, in order, with the rule and the sections they were chosen from.

    Attributes
    ----------
    genes
        Gene symbols, unique, in the order of every ``(.., G)`` array.
    rule
        One of :data:`PANEL_RULES`, ``"paper"`` (top mean over ALL sections, test sections included) or ``"file"``.
    sections
        Names of the sections that were looked at.
    """

    genes: tuple[str, ...]
    rule: str
    sections: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.genes:
            raise InputError(f"the gene panel is empty (rule {self.rule!r}); give at least one gene")
        if len(set(self.genes)) != len(self.genes):
            twice = sorted({gene for gene in self.genes if self.genes.count(gene) > 1})
            raise InputError(f"the gene panel names {', '.join(twice[:3])} more than once; list each gene once")

    def __repr__(self) -> str:
        first = ", ".join(self.genes[:4]) + (", ..." if len(self.genes) > 4 else "")
        return f"GenePanel of {len(self.genes)} genes ({self.rule}): {first}"

    @property
    def digest(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the ordered gene names."""
        return files.digest("\n".join(self.genes).encode())[:16]

    def save(self, path: Path) -> None:
        """Write the panel as readable JSON."""
        files.write_json(path, {**asdict(self), "digest": self.digest})

    @classmethod
    def load(cls, path: Path) -> "GenePanel":
        """Read what :meth:`save` wrote; a file whose genes no longer match their digest is refused."""
        stored = files.read_json(path)
        try:
            panel = cls(tuple(stored["genes"]), stored["rule"], tuple(stored["sections"]))
            intact = stored["digest"] == panel.digest
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{path}: not a gene panel written by hifusion; give its file or a list of genes"
            ) from error
        if not intact:
            raise InputError(f"{path}: the genes do not match their digest; the panel was edited after it was written")
        return panel


def read_panel(path: Path) -> GenePanel:
    """Read a panel from a text file with one gene symbol a line (``#`` starts a comment) or from a saved panel."""
    path = Path(path)
    if path.suffix == ".json":
        return GenePanel.load(path)
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a gene list ({error})") from error
    genes = tuple(gene for line in lines if (gene := line.split("#")[0].strip()))
    if not genes:
        raise InputError(f"{path}: the gene panel is empty; give one gene symbol a line")
    return GenePanel(genes, "file")


PACKAGED_PANELS = ("her2st_paper",)
"""Panels that come with the package, by name: the paper's rule over all 36 sections of her2st."""


def packaged_panel(name: str) -> GenePanel:
    """Read one of :data:`PACKAGED_PANELS`."""
    with resources.as_file(resources.files("hifusion") / "panels" / f"{name}.json") as path:
        return GenePanel.load(path)


def common_genes(sections: Mapping[str, AnnData]) -> list[str]:
    """Genes measured in every section, in the order of the first section."""
    everywhere = set.intersection(*(set(section.var_names) for section in sections.values()))
    return [gene for gene in next(iter(sections.values())).var_names if gene in everywhere]


def choose_panel(
    sections: Mapping[str, AnnData], rule: str = "top_mean", size: int = 250, named_in: Iterable[AnnData] = ()
) -> GenePanel:
    """Choose the ``size`` genes that score highest by ``rule``, among genes common to all ``sections``.

    Every rule scores genes section by section and averages the scores, so that a large section counts no more than a
    small one. Ties go by gene name.

    Parameters
    ----------
    sections
        Measured sections by name: the training sections, unless the paper's own all-section habit is wanted.
    rule
        ``"top_mean"`` (the paper: mean raw count), ``"highly_variable"`` (log-variance of the counts above a quadratic
        in their log-mean), ``"moran"`` (Moran's I of ``log1p_cpm`` on the lattice), or ``"paper"``, which is
        ``top_mean`` under the name that tells that test sections were among ``sections``.
    named_in
        Sections to be predicted, which must name the genes too; nothing but the names of their genes is looked at.

    Raises
    ------
    InputError
        Unknown rule, no section, or fewer than ``size`` common genes.
    """
    allowed = (*PANEL_RULES, "paper")
    if rule not in allowed:
        known = ", ".join((*allowed, *PACKAGED_PANELS))
        raise InputError(f"panel={rule!r} is not a rule; use one of {known} or the path of a gene list")
    if not sections:
        raise InputError("a gene panel needs at least one section to choose from; none was given")
    named = [set(section.var_names) for section in named_in]
    genes = [gene for gene in common_genes(sections) if all(gene in names for names in named)]
    if size < 1 or size > len(genes):
        raise InputError(f"panel_size={size} is not possible: {len(genes)} genes are common to all sections")
    score = PANEL_RULES["top_mean" if rule == "paper" else rule]
    per_section = [score(section[:, genes]) for section in sections.values()]
    order = np.lexsort((np.array(genes), -np.mean(per_section, axis=0)))[:size]
    return GenePanel(tuple(genes[i] for i in order), rule, tuple(sections))


def _mean_count(section: AnnData) -> np.ndarray:
    return np.asarray(section.layers["counts"].mean(axis=0), dtype=np.float64).ravel()


def _excess_variance(section: AnnData) -> np.ndarray:
    counts = section.layers["counts"].astype(np.float64)
    mean = _mean_count(section)
    variance = np.asarray(counts.multiply(counts).mean(axis=0)).ravel() - mean**2
    candidates = _candidates(mean) & (variance > 0)
    log_mean, log_variance = np.log(mean[candidates]), np.log(variance[candidates])
    scores = np.full(mean.size, -np.inf)
    if np.unique(log_mean).size > 2:  # fewer points do not fix a quadratic
        scores[candidates] = log_variance - np.polyval(np.polyfit(log_mean, log_variance, deg=2), log_mean)
    return _floored(scores)


def _spatial_autocorrelation(section: AnnData) -> np.ndarray:
    candidates = _candidates(_mean_count(section))
    facts = section.uns["hifusion"]
    weights = lattice_weights(section.obsm["spatial"], facts["pitch_um"] / facts["mpp"])
    scores = np.full(section.n_vars, -np.inf)
    scores[candidates] = np.nan_to_num(morans_i(np.asarray(section.X[:, candidates].todense()), weights), nan=-1.0)
    return _floored(scores)


def _candidates(mean: np.ndarray) -> np.ndarray:
    chosen = np.zeros(mean.size, dtype=bool)
    chosen[np.argsort(-mean, kind="stable")[:CANDIDATES]] = True
    return chosen & (mean > 0)


def _floored(scores: np.ndarray) -> np.ndarray:
    """Put genes that are no candidates just below the worst candidate, so that averages over sections stay finite."""
    finite = np.isfinite(scores)
    scores[~finite] = scores[finite].min() - 1.0 if finite.any() else 0.0
    return scores


PANEL_RULES: dict[str, Callable[[AnnData], np.ndarray]] = {
    "top_mean": _mean_count,
    "highly_variable": _excess_variance,
    "moran": _spatial_autocorrelation,
}


class Normalisation(NamedTuple):
    """A map from raw counts to expression, with one line that says what its unit means."""

    of: Callable[[np.ndarray, np.ndarray], np.ndarray]
    meaning: str


def log_share(counts: np.ndarray, total_counts: np.ndarray) -> np.ndarray:
    """Log share of the panel: ``ln((count + 1) / sum over the panel of (count + 1))``, float32 ``(N, G)``.

    Source: HiFusion (arXiv 2511.12969), target of all its experiments. It depends on the panel as a whole.
    """
    shifted = np.asarray(counts, dtype=np.float64) + 1.0
    return np.log(shifted / shifted.sum(axis=1, keepdims=True)).astype(np.float32)


def log1p_cpm(counts: np.ndarray, total_counts: np.ndarray) -> np.ndarray:
    """Log counts per million of all genes: ``ln(1 + 1e6 count / total)``, float32 ``(N, G)``; an empty spot gives 0."""
    total = np.maximum(np.asarray(total_counts, dtype=np.float64), 1.0)[:, None]
    return np.log1p(1e6 * np.asarray(counts, dtype=np.float64) / total).astype(np.float32)


NORMALISATIONS: dict[str, Normalisation] = {
    "log_share": Normalisation(log_share, "ln of the gene's share of the panel's counts, one added to each count"),
    "log1p_cpm": Normalisation(log1p_cpm, "ln(1 + counts per million counts of all genes)"),
}


def normalisation(name: str) -> Normalisation:
    """Look a normalisation up by name."""
    if name not in NORMALISATIONS:
        raise InputError(f"normalisation={name!r} is unknown; use one of {', '.join(NORMALISATIONS)}")
    return NORMALISATIONS[name]


def panel_counts(section: AnnData, genes: Sequence[str]) -> np.ndarray:
    """Raw counts of the panel in one measured section, int32 ``(N, G)``.

    Raises
    ------
    InputError
        The section has no counts, or lacks genes of the panel.
    """
    name = section.uns["hifusion"]["section"]
    if "counts" not in section.layers:
        raise InputError(f"section {name} has no layer 'counts'; only a measured section can be used here")
    missing = [gene for gene in genes if gene not in section.var_names]
    if missing:
        raise InputError(
            f"section {name} lacks {len(missing)} of the panel's {len(genes)} genes ({', '.join(missing[:3])}...); "
            "choose the panel on sections that share their genes"
        )
    return np.asarray(section[:, list(genes)].layers["counts"].todense(), dtype=np.int32)


def total_counts(section: AnnData) -> np.ndarray:
    """Total counts over all genes of each spot, float64 ``(N,)``."""
    return np.asarray(section.layers["counts"].sum(axis=1), dtype=np.float64).ravel()


def sparse_log1p_cpm(counts: sp.csr_matrix) -> sp.csr_matrix:
    """:func:`log1p_cpm` of a whole sparse section: zeros stay zeros, so 15,000 genes cost no memory."""
    total = np.maximum(np.asarray(counts.sum(axis=1), dtype=np.float64).ravel(), 1.0)
    scaled = sp.csr_matrix(sp.diags(1e6 / total) @ counts.astype(np.float64))
    scaled.data = np.log1p(scaled.data)
    return scaled.astype(np.float32)
