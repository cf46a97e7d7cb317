"""Run the benchmarks, print a table and keep it as JSON: `python -m benchmarks --parts network,data`.

Each part runs in a process of its own, so that its peak memory is its own. Nothing else should run meanwhile.
"""

import argparse
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.clock import Row
from hifusion import __version__
from hifusion.costs import peak_memory_mib
from hifusion.models.fused import fast_dtype

PARTS = {
    "network": "(a) forward and training step of the network",
    "data": "(b) store to device, against a PNG a spot",
    "preparation": "(c) sections to store",
    "epochs": "(e) training end to end",
    "slide": "(d) slide to file",
    "int8": "what 8 bits cost on a real section",
    "recommended": "the recommended recipe: a slide seen, a training",
    "scaling": "(g) cost against spots, slide area and genes",
}
"""Name -> what it measures, in the order they run: `slide` and `int8` predict with the run that `epochs` trains."""

MACHINES = Path(__file__).parent / "machines"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, epilog="example: python -m benchmarks --parts network"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="folder for stores and runs")
    parser.add_argument("--out", type=Path, help="JSON to write (default: one named after this machine)")
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)  # a part, in its own process
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.one:
        started = time.perf_counter()
        rows = importlib.import_module(f"benchmarks.{given.one}").run(given.work)
        rows.append(Row(given.one, "peak memory (f)", round(peak_memory_mib()), "MiB", _minutes(started)))
        (given.work / f"{given.one}.json").write_text(json.dumps(rows))
        return
    wanted = given.parts.split(",")
    if unknown := [name for name in wanted if name not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    found, failed = {}, []
    for name in wanted:
        print(f"{name}: {PARTS[name]}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "benchmarks", "--one", name, "--work", str(given.work)]
        if subprocess.run(command).returncode:
            failed.append(name)
        else:
            found[name] = json.loads((given.work / f"{name}.json").read_text())
    _show(found)
    _keep(found, given.out or MACHINES / f"{machine()['slug']}.json")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _minutes(started: float) -> str:
    return f"the part took {(time.perf_counter() - started) / 60:.1f} min"


def machine() -> dict[str, str | int]:
    """What was measured on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        cpu = found[1] if found else cpu
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    bf16 = fast_dtype(torch.device("cpu")) == torch.bfloat16
    slug = re.sub(r"\W+", "-", f"{name} {os.cpu_count()} cores{' bf16' if bf16 else ''}".lower()).strip("-")
    return {"slug": slug, "name": name, "cores": os.cpu_count() or 1, "bfloat16": bf16}


def _show(found: dict[str, list[list]]) -> None:
    table = Table("part", "what", "value", "unit", "note")
    for rows in found.values():
        for part, what, value, unit, note in rows:
            table.add_row(part, what, f"{value:g}", unit, note)
        table.add_section()
    Console(width=150).print(table)


def _keep(found: dict[str, list[list]], path: Path) -> None:
    """Write the table; parts that were not run now stay as an earlier call left them."""
    parts = json.loads(path.read_text())["parts"] if path.exists() else {}
    versions = {"hifusion": __version__, "torch": torch.__version__, "python": platform.python_version()}
    for name, rows in found.items():
        parts[name] = {"date": date.today().isoformat(), "versions": versions, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "parts": parts}, indent=1) + "\n")
    print(f"kept in {path}")


if __name__ == "__main__":
    main()
