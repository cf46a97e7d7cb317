"""The documentation builds without a warning, its links lead somewhere on GitHub too, and its first page is true."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hifusion

REPO = Path(__file__).resolve().parents[1]
DOCS = REPO / "docs"
PAGES = sorted(DOCS.glob("*.md"))
READ = [*PAGES, *(REPO / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
BUILD_S, START_S = 300, 1500


def _blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block of a page, in its order."""
    return re.findall(r"^```(\S*)\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def _prose(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def _anchors(page: Path) -> set[str]:
    """Anchors as GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", _prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower().strip()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", READ, ids=lambda page: page.name)
def test_every_link_within_the_repository_leads_to_a_file_and_a_heading(page):
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        if not other.exists() or (anchor and anchor not in _anchors(other)):
            lost.append(target)
    assert lost == []


def test_every_page_is_reachable_from_the_first():
    listed = {name for language, text in _blocks(DOCS / "index.md") if language == "{toctree}" for name in text.split()}
    assert {page.stem for page in PAGES} - {"index"} <= listed


def test_the_reference_has_every_verb():
    told = set(re.findall(r"^\.\. auto\w+:: (\w+)$", (DOCS / "api.md").read_text(), flags=re.MULTILINE))
    assert set(hifusion.__all__) - {"__version__"} <= told


@pytest.mark.slow
def test_it_builds_without_a_warning_and_has_every_command(tmp_path):
    pytest.importorskip("sphinx", reason="no sphinx here; it is in the extra docs")
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=BUILD_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "cli.html").read_text()
    assert all(f"hifusion {command} [OPTIONS]" in page for command in ("prepare", "train", "evaluate", "report"))


@pytest.mark.slow
def test_every_block_of_the_first_page_runs_as_it_stands(tmp_path):
    """One after the other in an empty folder, with `hifusion` as the command of this Python."""
    command = tmp_path / "bin" / "hifusion"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m hifusion "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "MPLBACKEND": "Agg"}
    run = {"bash": ["bash", "-e", "-c"], "python": [sys.executable, "-c"]}
    blocks = _blocks(DOCS / "start.md")
    assert len(blocks) > 4 and {language for language, _ in blocks} == set(run)
    for language, text in blocks:
        done = subprocess.run(
            [*run[language], text],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
    made = ("C1.h5ad", "C1.png", "gene.png", "report.html", "slide/section.h5ad", "spots.geojson")
    assert [name for name in made if not (tmp_path / "demo" / name).is_file()] == []
