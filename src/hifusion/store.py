"""The patch store: the sections of a study with one uint8 region patch per spot, on disk, built once.

A store is a folder::

    store.json               settings, and for each section its patient, spots and the size and SHA-256 of its files
    sections/<name>.h5ad     the section (hifusion.section), measured sections without an image included
    regions/<name>.npy       uint8 (N, R, R, 3): region patches, memory-mapped on use
    regions/<name>.inside.npy  int32 (N, 4): left, top, right, bottom of the part inside the image
"""

import io
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData

from hifusion import files
from hifusion.errors import InputError
from hifusion.section import LABEL, read_section, write_section
from hifusion.slide import Slide

MANIFEST = "store.json"
FORMAT = 1
Progress = Callable[[str, int, int], None]  # (section, spots done, spots in all)


def region_shrink(section: AnnData, mpp: float | None) -> float:
    """Slide pixels per region pixel: 1 where ``mpp`` is None (native), else the ratio of the two scales."""
    return 1.0 if mpp is None else mpp / float(section.uns["hifusion"]["mpp"])


def prepare(
    sections: Iterable[AnnData],
    out: Path,
    *,
    region_px: int = 448,
    mpp: float | None = None,
    progress: Progress | None = None,
) -> "Store":
    """Build a store, or finish one that was interrupted; what is already there and unchanged is not done again.

    Parameters
    ----------
    sections
        What a reader yields. Sections without an image are stored counts-only.
    out
        Folder of the store.
    region_px
        Side of a region patch in stored pixels.
    mpp
        um per stored pixel; None keeps the slide's native pixels, as the paper does.

    Raises
    ------
    InputError
        The folder holds a store of other settings, an image is gone or cannot be read, a spot lies outside its image,
        or the disk is full (sections that were complete are kept).
    """
    if region_px < 2 or region_px % 2:
        raise InputError(f"region_px={region_px} is not possible; use an even number of pixels")
    if mpp is not None and not 0 < mpp < math.inf:
        raise InputError(f"mpp={mpp} is not possible; give um per pixel above 0, or leave it out for native pixels")
    out = Path(out)
    settings = {"format": FORMAT, "region_px": region_px, "mpp": mpp}
    manifest = _open_manifest(out, settings)
    for section in sections:
        name = section.uns["hifusion"]["section"]
        source = _source_digest(section)
        entry = manifest["sections"].get(name)
        if not (entry and entry["source"] == source and _sizes_hold(out, entry)):
            paths = _write_section_files(out, section, source, region_px, mpp, progress)
            manifest["sections"][name] = {
                "patient": section.uns["hifusion"]["patient"],
                "spots": section.n_obs,
                "source": source,
                "image": _image_digest(section),
                "files": {path.relative_to(out).as_posix(): _fingerprint(path) for path in paths},
            }
            files.write_json(out / MANIFEST, manifest)
        if progress:
            progress(name, section.n_obs, section.n_obs)
    return Store.open(out, verify=False)


def _open_manifest(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if not (out / MANIFEST).exists():
        if out.exists() and (
            not out.is_dir() or {path.name for path in out.iterdir()} - {"cache", "checks", "regions", "sections"}
        ):
            raise InputError(f"{out}: is not empty and holds no store; give a new folder")
        return {**settings, "sections": {}}
    manifest = _read_manifest(out)
    for key, wanted in settings.items():
        if manifest.get(key) != wanted:
            raise InputError(f"{out}: was built with {key}={manifest.get(key)}, not {wanted}; give another folder")
    return manifest


def _read_manifest(root: Path) -> dict[str, Any]:
    if not (root / MANIFEST).is_file():
        raise InputError(f"{root}: holds no patch store ({MANIFEST} is missing); make one with `hifusion prepare`")
    manifest = files.read_json(root / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("sections"), dict):
        raise InputError(f"{root / MANIFEST}: does not describe a patch store; build it anew with `hifusion prepare`")
    if manifest.get("format") != FORMAT:
        raise InputError(
            f"{root}: store format {manifest.get('format')} is not {FORMAT}; build it anew with `hifusion prepare`"
        )
    return manifest


def _source_digest(section: AnnData) -> str:
    """Digest of everything the stored files are made from, so that a change of the input is noticed."""
    counts = section.layers.get("counts")
    arrays = (
        [section.obsm["spatial"]]
        if counts is None
        else [counts.data, counts.indices, counts.indptr, section.obsm["spatial"]]
    )
    facts = {key: section.uns["hifusion"][key] for key in ("section", "patient", "mpp", "pitch_um", "spot_diameter_um")}
    labels = [section.obs[LABEL].astype(str).tolist()] if LABEL in section.obs else []
    return files.digest(
        json.dumps([facts, list(section.obs_names), list(section.var_names), *labels]).encode(),
        *(np.ascontiguousarray(array).data for array in arrays),
        _image_digest(section).encode(),
    )


def _image_digest(section: AnnData) -> str:
    image = section.uns["hifusion"]["image"]
    if image and not Path(image).is_file():
        name = section.uns["hifusion"]["section"]
        raise InputError(f"{image}: the image of section {name} is not there; put it back, or read the section anew")
    return files.digest_file(Path(image)) if image else ""


def _write_section_files(
    out: Path, section: AnnData, source: str, region_px: int, mpp: float | None, progress: Progress | None
) -> list[Path]:
    name = section.uns["hifusion"]["section"]
    section_file = out / "sections" / f"{name}.h5ad"
    written = [section_file]
    if section.uns["hifusion"]["image"]:
        slide = Slide(Path(section.uns["hifusion"]["image"]))
        refuse_outside(section, slide)
        written += _write_regions(out / "regions" / f"{name}.npy", section, slide, source, region_px, mpp, progress)
    write_section(section, section_file)
    return written


def refuse_outside(section: AnnData, slide: Slide) -> None:
    """Refuse a section whose spot centres do not all lie on its slide."""
    centres, (width, height) = section.obsm["spatial"], slide.size_px
    outside = (centres < 0).any(axis=1) | (centres[:, 0] >= width) | (centres[:, 1] >= height)
    if outside.any():
        first = int(np.flatnonzero(outside)[0])
        x, y = centres[first]
        raise InputError(
            f"{slide.path}: {int(outside.sum())} of {section.n_obs} spots lie outside the {width} x {height} px image "
            f"(first {section.obs_names[first]} at x={x:.0f}, y={y:.0f}); give positions in full-resolution pixels of "
            "this image"
        )


def _write_regions(
    path: Path,
    section: AnnData,
    slide: Slide,
    source: str,
    region_px: int,
    mpp: float | None,
    progress: Progress | None,
) -> list[Path]:
    """Cut the regions with plain writes: on a full disk a memory-mapped write would kill the process."""
    header = io.BytesIO()
    shape = (section.n_obs, region_px, region_px, 3)
    np.lib.format.write_array_header_2_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    row_bytes = region_px * region_px * 3
    # The part's name carries the source, so that an interrupted cut goes on only over the very same input.
    part = path.with_name(f".{path.name}.{source[:12]}-{region_px}-{mpp}.part")
    size = part.stat().st_size if part.exists() else 0
    done = max(0, size - header.tell()) // row_bytes
    shrink = region_shrink(section, mpp)
    inside = np.empty((section.n_obs, 4), dtype=np.int32)
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("r+b" if size else "wb") as file:
            file.write(header.getvalue())
            file.truncate(header.tell() + done * row_bytes)
            file.seek(0, io.SEEK_END)
            for row, (x, y) in enumerate(section.obsm["spatial"]):
                patch, inside[row] = slide.read_patch(x, y, region_px, shrink)
                if row >= done:
                    file.write(np.ascontiguousarray(patch).data)
                if progress:
                    progress(section.uns["hifusion"]["section"], row + 1, section.n_obs)
    except OSError as error:
        files.raise_if_full(error, path)
        raise
    part.replace(path)
    for stale in path.parent.glob(".*.part"):  # cut from an input that has changed since
        if stale.name.startswith(f".{path.name}."):
            stale.unlink()
    boxes = path.with_suffix(".inside.npy")
    buffer = io.BytesIO()
    np.save(buffer, inside, allow_pickle=False)
    files.write_bytes(boxes, buffer.getvalue())
    return [path, boxes]


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": files.digest_file(path)}


def _sizes_hold(root: Path, entry: dict[str, Any]) -> bool:
    kept = {root / name: fingerprint["bytes"] for name, fingerprint in entry["files"].items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in kept.items())


@dataclass(frozen=True)
class Store:
    """An opened patch store.

    Attributes
    ----------
    root
        Its folder.
    manifest
        What ``store.json`` holds.
    """

    root: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, root: Path, verify: bool = True) -> "Store":
        """Open a store and check that every file has the size and digest it was written with.

        Raises
        ------
        InputError
            No store, one of another format, or a file that is missing or was changed.
        """
        root = Path(root)
        manifest = _read_manifest(root)
        again = "run `hifusion prepare` again to mend it"
        for name, entry in manifest["sections"].items():
            if not _sizes_hold(root, entry):
                raise InputError(f"{root}: a file of section {name} is missing or cut short; {again}")
            for file, kept in entry["files"].items() if verify else ():
                if files.digest_file(root / file) != kept["sha256"]:
                    raise InputError(f"{root / file}: was changed after it was written; delete it and {again}")
        return cls(root, manifest)

    @property
    def region_px(self) -> int:
        """Side of a region patch in stored pixels."""
        return int(self.manifest["region_px"])

    @property
    def mpp(self) -> float | None:
        """um per stored pixel; None means the slide's native pixels."""
        mpp = self.manifest["mpp"]
        return None if mpp is None else float(mpp)

    def section(self, name: str) -> AnnData:
        """Read one section."""
        return read_section(self.root / "sections" / f"{name}.h5ad")

    def regions(self, name: str) -> np.ndarray | None:
        """Region patches of one section, memory-mapped uint8 ``(N, R, R, 3)``; None for a counts-only section."""
        path = self._path(f"regions/{name}.npy", name)
        return np.load(path, mmap_mode="r", allow_pickle=False) if path else None

    def inside(self, name: str) -> np.ndarray | None:
        """Boxes of the regions' parts inside the image, int32 ``(N, 4)``; None for a counts-only section."""
        path = self._path(f"regions/{name}.inside.npy", name)
        return np.load(path, allow_pickle=False) if path else None

    def _path(self, file: str, name: str) -> Path | None:
        """Where a file of a section lies; None where the manifest lists none, whatever an earlier build left there."""
        return self.root / file if file in self.manifest["sections"].get(name, {"files": ()})["files"] else None
