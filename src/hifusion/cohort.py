"""The sections of a study, from a raw folder or a store, seen through one gene panel and normalisation."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from anndata import AnnData

from hifusion import expression, files
from hifusion.errors import InputError
from hifusion.expression import GenePanel
from hifusion.protocols import SectionInfo
from hifusion.readers import find_reader
from hifusion.store import MANIFEST, Store, region_shrink


@dataclass(frozen=True, eq=False)
class SectionView:
    """One measured section as the models of a fold see it.

    Attributes
    ----------
    genes
        The panel, ``G`` names.
    expression
        float32 ``(N, G)`` in the fold's normalisation.
    total_counts
        float64 ``(N,)``, over all genes.
    centres_px
        float64 ``(N, 2)``, (x, y) of the spot centres in full-resolution pixels, ``pitch_px`` apart.
    mpp
        um per full-resolution pixel.
    spot_diameter_um
        Of a spot.
    regions
        uint8 ``(N, R, R, 3)`` memory-mapped region patches, or None for a counts-only section.
    inside
        int32 ``(N, 4)``: left, top, right, bottom of each region's part inside the image; None likewise.
    counts
        float32 ``(N, G)``, raw counts of the panel; None where only expression is known.
    array
        int64 ``(N, 2)``, (column, row) of the spots on the array; None where only positions are known.
    image, image_digest
        The slide the regions were cut from, and its SHA-256; None and "" for a counts-only section.
    shrink
        Full-resolution pixels per region pixel.
    cache
        Folder of the store where what takes long to compute of this section may be kept; None without a store.
    """

    name: str
    patient: str
    genes: tuple[str, ...]
    expression: np.ndarray
    total_counts: np.ndarray
    centres_px: np.ndarray
    pitch_px: float
    mpp: float
    spot_diameter_um: float
    regions: np.ndarray | None = field(default=None, repr=False)
    inside: np.ndarray | None = field(default=None, repr=False)
    counts: np.ndarray | None = field(default=None, repr=False)
    array: np.ndarray | None = field(default=None, repr=False)
    image: Path | None = None
    image_digest: str = ""
    shrink: float = 1.0
    cache: Path | None = None


@dataclass(frozen=True)
class Cohort:
    """The sections of a study.

    Attributes
    ----------
    root
        The folder they came from.
    sections
        Measured sections by name.
    store
        The patch store, or None for a raw folder (counts-only work).
    """

    root: Path
    sections: dict[str, AnnData]
    store: Store | None

    @classmethod
    def open(cls, root: Path, sections: Sequence[str] | None = None, verify: bool = True) -> "Cohort":
        """Open a store, or read a raw data folder.

        Parameters
        ----------
        sections
            Names to open; all where None.

        Raises
        ------
        InputError
            Neither a store nor a known layout, or an unknown section.
        """
        root = Path(root)
        store = Store.open(root, verify) if (root / MANIFEST).exists() else None
        reader = None if store else find_reader(root)
        known = list(store.manifest["sections"]) if store else reader.names(root)  # type: ignore[union-attr]
        wanted = list(known if sections is None else sections)
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise InputError(f"{root}: has no section {', '.join(unknown)}; it has {', '.join(known)}")
        if not wanted:
            raise InputError(f"{root}: holds no section")
        found = (store.section(name) for name in wanted) if store else reader.read(root, wanted)  # type: ignore[union-attr]
        return cls(root, {section.uns["hifusion"]["section"]: section for section in found}, store)

    def __repr__(self) -> str:
        patients = ", ".join(dict.fromkeys(info.patient for info in self.infos))
        return (
            f"Cohort({str(self.root)!r}): {len(self.sections)} sections (patients {patients}), "
            f"{len(self.image_digests)} with region patches: {', '.join(self.sections)}"
        )

    @property
    def infos(self) -> list[SectionInfo]:
        """Name and patient of every section."""
        return [SectionInfo(name, section.uns["hifusion"]["patient"]) for name, section in self.sections.items()]

    @property
    def image_digests(self) -> dict[str, str]:
        """SHA-256 of the image of each section that has one in the store."""
        stored = self.store.manifest["sections"] if self.store else {}
        return {name: stored[name]["image"] for name in self.sections if name in stored and stored[name]["image"]}

    @property
    def digests(self) -> dict[str, dict[str, str]]:
        """What two sections can share, section by section: digests of their images and of their counts."""
        counts = {name: _counts_digest(section) for name, section in self.sections.items()}
        return {"image": self.image_digests, "counts": counts}

    def has_regions(self, name: str) -> bool:
        """Whether the store holds region patches of this section."""
        return name in self.image_digests

    def panel(self, rule: str, size: int, names: Sequence[str], tested: Sequence[str] = ()) -> GenePanel:
        """A panel chosen on sections (all of the cohort for ``rule="paper"``), or read from a file or the package.

        Parameters
        ----------
        tested
            Sections that must name the panel's genes, see :func:`hifusion.expression.choose_panel`.
        """
        if rule in expression.PACKAGED_PANELS:
            return expression.packaged_panel(rule)
        known = rule in (*expression.PANEL_RULES, "paper")
        if not known and (Path(rule).suffix or Path(rule).exists()):
            return expression.read_panel(Path(rule))
        chosen = self.sections if rule == "paper" else {name: self.sections[name] for name in names}
        return expression.choose_panel(chosen, rule, size, [self.sections[name] for name in tested])

    def view(self, name: str, panel: GenePanel, normalisation: str) -> SectionView:
        """One section through a panel and a normalisation."""
        section = self.sections[name]
        facts = section.uns["hifusion"]
        total = expression.total_counts(section)
        counts = expression.panel_counts(section, panel.genes)
        digest = self.image_digests.get(name, "")
        return SectionView(
            name=name,
            patient=facts["patient"],
            genes=panel.genes,
            expression=expression.normalisation(normalisation).of(counts, total),
            total_counts=total,
            centres_px=section.obsm["spatial"],
            pitch_px=facts["pitch_um"] / facts["mpp"],
            mpp=facts["mpp"],
            spot_diameter_um=facts["spot_diameter_um"],
            regions=self.store.regions(name) if self.store else None,
            inside=self.store.inside(name) if self.store else None,
            counts=counts.astype(np.float32),
            array=section.obs[["array_col", "array_row"]].to_numpy(dtype=np.int64),
            image=Path(facts["image"]) if digest else None,
            image_digest=digest,
            shrink=region_shrink(section, self.store.mpp) if self.store else 1.0,
            cache=self.store.root / "cache" if self.store else None,
        )

    def views(self, names: Sequence[str], panel: GenePanel, normalisation: str) -> list[SectionView]:
        """Several sections through one panel and normalisation."""
        return [self.view(name, panel, normalisation) for name in names]


def _counts_digest(section: AnnData) -> str:
    """Of the counts by themselves, whatever spots and genes are called; spots in another order give another digest."""
    counts = section.layers["counts"]
    return files.digest(*(np.ascontiguousarray(its).data for its in (counts.data, counts.indices, counts.indptr)))


def mean_profile(views: Sequence[SectionView]) -> np.ndarray:
    """Mean expression over all spots of some sections, float64 ``(G,)``."""
    return np.asarray(np.concatenate([view.expression for view in views]).mean(axis=0, dtype=np.float64))
