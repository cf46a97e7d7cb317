"""Commands that bring data in and say what is there. Imports stay inside commands: --help is instant."""

from pathlib import Path
from typing import Annotated

import typer

from hifusion.console import Json, Recipe, Sections, listed, progress_bar, show

app = typer.Typer()


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="New folder.")],
    patients: int = 4,
    sections_per_patient: int = 2,
    seed: int = 0,
) -> None:
    """Draw a synthetic cohort with planted signal, in the her2st layout.

    Example: `hifusion synth demo/raw`
    """
    from hifusion import api

    with progress_bar() as report:
        names = api.synthesise(
            out,
            patients=patients,
            sections_per_patient=sections_per_patient,
            seed=seed,
            progress=lambda done, total: report("draw", done, total),
        )
    typer.echo(f"{out}: {len(names)} sections ({', '.join(names)})")


@app.command()
def prepare(
    data: Annotated[Path, typer.Argument(help="Raw data folder.")],
    out: Annotated[Path, typer.Argument(help="Folder of the patch store.")],
    recipe: Recipe = "her2st_2d",
    sections: Sections = None,
    region_px: Annotated[int | None, typer.Option(help="Side of a region patch, instead of the recipe's.")] = None,
    mpp: Annotated[float | None, typer.Option(help="um per patch pixel, instead of the recipe's.")] = None,
    as_json: Json = False,
) -> None:
    """Build the patch store of a study, once; interrupted, it goes on where it stopped.

    Example: `hifusion prepare her2st store --recipe quick --sections C2,C3`
    """
    from hifusion import api

    with progress_bar() as report:
        api.prepare(data, out, recipe=recipe, sections=listed(sections), region_px=region_px, mpp=mpp, progress=report)
    show(api.info(out), as_json)


@app.command()
def info(
    path: Annotated[Path, typer.Argument(help="Store, run, evaluation, raw data folder, section or slide.")],
    as_json: Json = False,
) -> None:
    """Say what a file or folder is and what it holds.

    Example: `hifusion info store`
    """
    from hifusion import api

    show(api.info(path), as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine offers: versions, device, precision, memory, disk.

    Example: `hifusion doctor`
    """
    from hifusion import api

    show(api.doctor(), as_json)
