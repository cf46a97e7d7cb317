"""Public data sets, downloaded into the layout that a reader knows.

What is published about a data set stands here as data. Sizes and digests are not among it: neither record states them
in public text, so they are asked of the record itself (Zenodo gives MD5, Mendeley Data SHA-256), each time.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hifusion import files
from hifusion.archives import extract, require_unpackers
from hifusion.errors import InputError
from hifusion.transfer import RemoteFile, fetch, fetch_json

CONTAINERS = (".zip", ".7z")  # names an archive may end with
RECEIPT = "dataset.json"  # what was downloaded from where, its licence and citation
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Archive:
    """An encrypted archive of a record.

    Attributes
    ----------
    password
        As the authors publish it.
    member
        What the name of a member must match to be taken out; its folders do not count. Group 1 is the section.
    place
        Where that member goes; ``{0}`` is the section, ``{0[0]}`` its patient.
    """

    password: str
    member: str
    place: str

    def path_of(self, name: str) -> str | None:
        """Where a member goes, None if nowhere."""
        match = re.fullmatch(self.member, name.rsplit("/", 1)[-1])
        return self.place.format(match[1]) if match else None


@dataclass(frozen=True)
class Dataset:
    """What is known of a public data set.

    Attributes
    ----------
    host, listing
        Where its files are listed, with sizes and digests.
    read_listing
        From the listing's JSON to the files.
    n_files
        How many files the listing must have, at least.
    archives
        By file name, less what it ends with (:data:`CONTAINERS`); empty where the files are taken as they are.
    reader
        The layout it is read as (``hifusion.readers``).
    """

    title: str
    doi: str
    licence: str
    citation: str
    reader: str
    size: str
    host: str
    listing: str
    read_listing: Callable[[Any], list[RemoteFile]]
    n_files: int
    archives: dict[str, Archive] = field(default_factory=dict)


def _zenodo_files(record: Any) -> list[RemoteFile]:
    return [RemoteFile(file["key"], file["links"]["self"], file["size"], file["checksum"]) for file in record["files"]]


def _mendeley_files(listing: Any) -> list[RemoteFile]:
    return [
        RemoteFile(file["filename"], known["download_url"], known["size"], f"sha256:{known['sha256_hash']}")
        for file in listing
        for known in [file["content_details"]]
    ]


# The passwords stand in the README of github.com/almaan/her2st (commit 85df7411, "Data access"). It says 7z; public
# code opens zips encrypted with AES (WinZip's method 99). Either is taken.
_DATA, _META = "zNLXkYk3Q9znUseS", "yUx44SzG6NdB32gY"

DATASETS: dict[str, Dataset] = {
    "her2st": Dataset(
        title="HER2-positive breast cancer, 8 patients, 36 sections (Spatial Transcriptomics)",
        doi="10.5281/zenodo.4751624",
        licence="CC BY 4.0",
        citation="Andersson et al., Spatial deconvolution of HER2-positive breast cancer delineates tumor-associated "
        "cell type interactions. Nature Communications 12:6012 (2021), doi 10.1038/s41467-021-26271-2",
        reader="her2st",
        size="0.63 GB",
        host="https://zenodo.org",
        listing="/api/records/4751624",
        read_listing=_zenodo_files,
        n_files=4,
        archives={
            "count-matrices": Archive(_DATA, r"([A-H][1-6])\.tsv\.gz", "data/ST-cnts/{0}.tsv.gz"),
            "spot-selections": Archive(
                _META, r"([A-H][1-6])_selection\.tsv\.gz", "data/ST-spotfiles/{0}_selection.tsv"
            ),
            "meta": Archive(
                _META, r"([A-H][1-6])_labeled_coordinates\.tsv", "data/ST-pat/lbl/{0}_labeled_coordinates.tsv"
            ),
            "images": Archive(_DATA, r"([A-H][1-6])\.jpg", "data/ST-imgs/{0[0]}/{0}/{0}.jpg"),
        },
    ),
    "stdata": Dataset(
        title="Breast cancer, 23 patients, 68 sections (Spatial Transcriptomics), the data of ST-Net",
        doi="10.17632/29ntw7sh4r.5",
        licence="CC BY 4.0",
        citation="Stenbeck et al., Human breast cancer in situ capturing transcriptomics. Mendeley Data V5 (2021), doi "
        "10.17632/29ntw7sh4r.5; He et al., Nature Biomedical Engineering 4:827 (2020), doi 10.1038/s41551-020-0578-x",
        reader="stnet",
        size="0.76 GB",
        host="https://data.mendeley.com",
        listing="/public-api/datasets/29ntw7sh4r/files?folder_id=root&version=5&%24start=0&%24limit=1000",
        read_listing=_mendeley_files,
        n_files=273,  # metadata.csv, and four files for each of 68 sections
    ),
}


def download(name: str, out: Path, *, host: str | None = None, progress: Progress | None = None) -> Path:
    """Download a public data set into ``out``, checked file by file; gives ``out``.

    Run again after a cut, it goes on where it stopped; what is complete is not asked for again. ``out/dataset.json``
    then says what came from where, under which licence, and what to cite.

    Parameters
    ----------
    name
        A name of :data:`DATASETS`.
    host
        Another host than the data set's own that answers like it: a mirror, or a test.
    progress
        Called with the file, and how many of all MB are there.

    Raises
    ------
    InputError
        Unknown name, an extra that is not installed, a host that cannot be reached or has something else, a full disk.
    """
    if name not in DATASETS:
        raise InputError(f"data set {name!r} is unknown; use one of {', '.join(DATASETS)}")
    dataset, out = DATASETS[name], Path(out)
    done = _read_receipt(out, dataset)
    if done.get("complete") and done["files"] and all(_is_there(out, entry) for entry in done["files"].values()):
        return out
    if dataset.archives:
        require_unpackers()  # before the long wait
    source = (host or dataset.host) + dataset.listing
    listed = _listed(dataset, source)
    total = sum(file.size for file in listed)
    before = 0
    for file in listed:
        entry = done["files"].get(file.name, {})
        if entry.get("digest") != file.digest or not _is_there(out, entry):
            report = _in_megabytes(progress, file.name, before, total)
            done["files"][file.name] = {"digest": file.digest, "contents": _get(dataset, file, out, report)}
            files.write_json(out / RECEIPT, done)
        before += file.size
    files.write_json(out / RECEIPT, done | {"complete": True})
    return out


def _get(dataset: Dataset, file: RemoteFile, out: Path, report: Callable[[int], None]) -> dict[str, int]:
    """Download one file, take it apart where it is an archive; gives the size of each file it became."""
    archive = dataset.archives.get(_stem(file))
    if archive is None:
        return {file.name: fetch(file, out, report).stat().st_size}
    folder = out / ".archives"
    packed = fetch(file, folder, report)
    contents = extract(packed, out, archive.path_of, archive.password)
    packed.unlink()  # unpacked, it would only take room: the receipt knows that it came
    if not any(folder.iterdir()):
        folder.rmdir()
    return contents


def _listed(dataset: Dataset, source: str) -> list[RemoteFile]:
    """The files to get, the small ones first: what is wrong with the rest shows before the long wait."""
    answer = fetch_json(source)
    try:
        listed = sorted((file.checked(source) for file in dataset.read_listing(answer)), key=lambda file: file.size)
    except (LookupError, TypeError) as error:
        raise InputError(
            f"{source}: does not list files as it used to; download by hand from doi.org/{dataset.doi}"
        ) from error
    wanted: dict[str, RemoteFile] = {}
    for file in listed:
        stem = _stem(file)
        if stem in dataset.archives or not dataset.archives:
            wanted.setdefault(stem, file)
    if len(wanted) < dataset.n_files:
        lacks = ", ".join(stem for stem in dataset.archives if stem not in wanted)
        there = ", ".join(file.name for file in listed)[:200] or "nothing"
        which = f" (no {lacks}, as {' or '.join(CONTAINERS)}; it lists {there})" if lacks else ""
        raise InputError(
            f"{source}: lists {len(wanted)} of the {dataset.n_files} files that are needed{which}; download by hand "
            f"from doi.org/{dataset.doi}"
        )
    return list(wanted.values())


def _stem(file: RemoteFile) -> str:
    """Its name, less what says how it is packed."""
    for container in CONTAINERS:
        if file.name.endswith(container):
            return file.name.removesuffix(container)
    return file.name


def _read_receipt(out: Path, dataset: Dataset) -> dict[str, Any]:
    """What an earlier run left done; an ``out`` that holds another data set is refused."""
    fresh: dict[str, Any] = {
        "title": dataset.title,
        "doi": dataset.doi,
        "licence": dataset.licence,
        "citation": dataset.citation,
        "files": {},
    }
    if not (out / RECEIPT).exists():
        return fresh
    found = files.read_json(out / RECEIPT)
    if not isinstance(found, dict) or found.get("doi") != dataset.doi or not isinstance(found.get("files"), dict):
        raise InputError(f"{out / RECEIPT}: is not of this data set ({dataset.doi}); give a folder of its own")
    entries = {name: entry for name, entry in found["files"].items() if isinstance(entry, dict)}
    return fresh | {"files": entries, "complete": bool(found.get("complete"))}


def _is_there(out: Path, entry: dict[str, Any]) -> bool:
    """Whether all that a file became still lies in ``out``, at its size."""
    contents = entry.get("contents", {})
    places = {out / path: size for path, size in contents.items()}
    return bool(places) and all(path.is_file() and path.stat().st_size == size for path, size in places.items())


def _in_megabytes(progress: Progress | None, name: str, before: int, total: int) -> Callable[[int], None]:
    def report(have: int) -> None:
        if progress:
            progress(f"{name} (MB)", (before + have) // 1_000_000, -(-total // 1_000_000))

    return report
