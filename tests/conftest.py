"""Where the tests find data, and settings that make them quick and repeatable."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

REPO = Path(__file__).resolve().parents[1]

# Set before anything imports torch: small arrays on many threads are slower than on a few. Subprocesses inherit it.
# Beside other workers of pytest-xdist each has one core; idle threads sleep, since spinning would take the others'.
os.environ.setdefault(
    "OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else str(min(4, os.cpu_count() or 1))
)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MPLBACKEND", "Agg")  # plots are written to files; a test machine has no display

# Time depends on the machine, not on the code: a slow example is not a failure.
settings.register_profile("hifusion", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("hifusion")


def _root(variable: str, default: Path) -> Path:
    """The folder that the environment variable names, or the default; the test skips where there is none."""
    root = Path(os.environ.get(variable) or default)
    if not root.is_dir():
        pytest.skip(f"{root} is not a folder; set {variable} to where it lies")
    return root


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of public data sets, one folder each."""
    return _root("HIFUSION_DATA", REPO.parent / "shared" / "data")


@pytest.fixture(scope="session")
def her2st_root(data_root: Path) -> Path:
    """The raw her2st layout: counts of 36 sections, images of five."""
    root = data_root / "her2st"
    if not root.is_dir():
        pytest.skip(f"{root} is not a folder; HIFUSION_DATA names the folder that holds her2st")
    return root


@pytest.fixture(scope="session")
def golden_root() -> Path:
    """The folder of golden figures: what the published networks compute from fabricated weights."""
    return _root("HIFUSION_GOLDEN", REPO.parent / "shared" / "golden")
