"""Odd, broken and hostile files: a verdict in one line each, soon, within bounded memory, and never a crash.

One other process goes through all of them under a memory limit; each test then looks at the verdict on one file.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fabricate import refused
from hifusion.slide import Slide
from odd_files import refused_files, taken_files

SOURCE = Path(__file__).resolve().parents[1] / "src"
MEMORY_BYTES = 4 << 30  # addresses, not pages: the imaging libraries take one of these GB before any file
MOST_S = 10
MOST_GROWTH_KB = 400_000

# hifusion is imported before the limit is set and the memory taken: what counts is what the files cost.
RUN = f"""
import json, resource, sys, time
sys.path.insert(0, {str(SOURCE)!r})
from hifusion.slide import Slide
from hifusion.errors import InputError
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_BYTES}, {MEMORY_BYTES}))
memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = memory()
for path in sys.argv[1:]:
    begin = time.perf_counter()
    try:
        verdict = Slide(path).facts()
    except InputError as error:
        verdict = str(error)
    print(json.dumps([path, verdict, time.perf_counter() - begin, memory() - before]), flush=True)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The folder of all files, and by folder what is expected of each."""
    root = tmp_path_factory.mktemp("odd")
    expected = {"refused": refused_files(root), "taken": taken_files(root)}
    for folder, entries in expected.items():
        (root / folder).mkdir()
        for name, (data, *_) in entries.items():
            (root / folder / name).write_bytes(data)
    return root, expected


@pytest.fixture(scope="module")
def verdicts(files):
    """Path -> facts, or the line that refuses it; seconds; growth of memory so far in kB."""
    root, expected = files
    paths = [str(root / folder / name) for folder, entries in expected.items() for name in entries]
    done = subprocess.run([sys.executable, "-c", RUN, *paths], capture_output=True, text=True, check=False)
    found = {path: rest for path, *rest in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0, f"ended with {done.returncode} at {paths[len(found)]}: {done.stderr}"
    assert list(found) == paths
    assert done.stderr == "", "libraries told the user things beside our one line"
    return found


def test_every_odd_file_is_refused_in_one_line_that_says_what_it_is(files, verdicts):
    root, expected = files
    wrong = []
    for name, (_, words) in expected["refused"].items():
        path = str(root / "refused" / name)
        line = verdicts[path][0]
        if not (isinstance(line, str) and line.startswith(f"{path}: ") and words in line and "\n" not in line):
            wrong.append((name, words, line))
    assert len(expected["refused"]) > 80
    assert wrong == []


def test_every_readable_file_tells_its_scale_or_why_it_has_none(files, verdicts):
    root, expected = files
    wrong = []
    for name, (_, mpp, words) in expected["taken"].items():
        facts = verdicts[str(root / "taken" / name)][0]
        if not (isinstance(facts, dict) and facts["mpp"] == mpp and words in facts["mpp_source"]):
            wrong.append((name, mpp, words, facts))
    assert wrong == []


def test_every_verdict_comes_soon_and_costs_little_memory(verdicts):
    slow = {path: seconds for path, (_, seconds, _) in verdicts.items() if seconds > MOST_S}
    assert slow == {}
    assert max(growth for _, _, growth in verdicts.values()) < MOST_GROWTH_KB


WSI = {
    "CMU-1-Small-Region.svs": ("openslide", "aperio", [(2220, 2967)], 0.499, "openslide.mpp"),
    "RationAI-CMU-1-small.tiff": (
        *("tifffile", "BigTIFF", [(718, 514), (359, 257), (179, 128)], 3.195),
        "TIFF resolution tags",
    ),
    "kidney-48-5.tif": ("tifffile", "TIFF", [(1493, 901)], None, "not in the file"),
    "large_image-yb10kx5k.zstd.tiff": (
        *("tifffile", "BigTIFF", [(10000, 5000), (5000, 2500), (2500, 1250), (1250, 625), (625, 312)], None),
        "352.9 um, the 72 dpi",
    ),
    "openslide-boxes.tiff": ("tifffile", "TIFF", [(300, 250), (150, 125), (75, 62), (37, 31)], None, "the 72 dpi"),
    "openslide-small.svs": ("openslide", "aperio", [(16, 16)], 0.499, "openslide.mpp"),
    "qupath-cells.ome.tif": ("tifffile", "OME-TIFF", [(93, 131)], 0.25, "OME-XML"),
    "small_HE_levels.tiff": ("tifffile", "TIFF", [(300, 250), (150, 125), (75, 62), (37, 31)], None, "the 72 dpi"),
    "openslide-unopenable.tiff": "compressed by number 52479",
    "openslide-unreadable.svs": "not a readable image",
}


@pytest.mark.real
@pytest.mark.parametrize("name", WSI)
def test_public_slide_files_are_what_they_are(name, data_root):
    path = data_root / "wsi" / name
    if not path.is_file():
        pytest.skip(f"{path} is not there; HIFUSION_DATA names the folder that holds wsi")
    if isinstance(WSI[name], str):
        with refused(name, WSI[name]):
            Slide(path).facts()
        return
    reader, kind, sizes, mpp, source = WSI[name]
    facts = Slide(path).facts()
    assert (facts["reader"], facts["format"]) == (reader, kind)
    assert [tuple(level["size_px"]) for level in facts["levels"]] == sizes
    assert facts["mpp"] == (mpp and pytest.approx(mpp, abs=0.001))
    assert source in facts["mpp_source"]


@pytest.mark.real
def test_every_public_slide_file_is_in_the_table(data_root):
    files = {path.name for path in (data_root / "wsi").glob("*.*") if path.suffix != ".md"}
    assert files <= set(WSI), "a file has no expected verdict"


@pytest.mark.real
@pytest.mark.parametrize("folder", ["her2st/data/ST-imgs", "mob_stutility"])
def test_public_section_photographs_open_without_a_scale(folder, data_root):
    photographs = sorted((data_root / folder).rglob("*.jpg"))
    if not photographs:
        pytest.skip(f"{data_root / folder} holds no photograph; HIFUSION_DATA names the folder above it")
    for path in photographs:
        slide = Slide(path)
        assert slide.image.format == "JPEG" and slide.mpp is None
        assert min(slide.size_px) > 1000
