"""(c) Sections to store: reading, checking the geometry, cutting patches, writing and digests."""

import shutil
import time
from pathlib import Path

from benchmarks.clock import Row
from benchmarks.sections import prepare
from hifusion.store import Store


def run(work: Path) -> list[Row]:
    """One build from raw data into a new folder, pages of the files as warm as they happen to be."""
    out = work / "prepared"
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    prepare(work, out)
    seconds = time.perf_counter() - started
    entries = Store.open(out, verify=False).manifest["sections"].values()
    spots = sum(entry["spots"] for entry in entries)
    size = sum(kept["bytes"] for entry in entries for kept in entry["files"].values())
    shutil.rmtree(out)
    note = f"{len(entries)} sections, {size / seconds / 2**20:.0f} MiB/s written"
    return [Row("preparation", "raw data to store", round(spots / seconds, 1), "spots/s", note)]
