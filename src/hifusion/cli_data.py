"""Commands that bring data in and say what is there. Imports stay inside commands: --help is instant."""

from pathlib import Path
from typing import Annotated

import typer

from hifusion.console import Json, Recipe, Sections, listed, named, progress_bar, show

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
def download(
    name: Annotated[str, typer.Argument(help="her2st or stdata.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder.")],
) -> None:
    """Fetch a public study: checked, gone on with when interrupted, its licence and citation printed.

    Example: `hifusion download her2st -o her2st`
    """
    from hifusion import api

    with progress_bar() as report:
        api.download(name, out, progress=report, say=typer.echo)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="Raw data: a folder or file in a known layout.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the sections, one .h5ad each.")],
    layout: Annotated[
        str | None, typer.Option("--format", help="Name of the layout. Default: recognised; a wrong name lists all.")
    ] = None,
    sections: Sections = None,
    image: Annotated[
        list[str] | None, typer.Option(help="Full-resolution slide of a section: NAME=PATH. Repeatable.")
    ] = None,
    patient: Annotated[list[str] | None, typer.Option(help="Patient of a section: NAME=PATIENT. Repeatable.")] = None,
    mpp: Annotated[
        float | None, typer.Option(help="um per full-resolution pixel, instead of what the files say.")
    ] = None,
    bin_um: Annotated[float | None, typer.Option(help="Sum Visium HD bins into squares of so many um.")] = None,
) -> None:
    """Turn raw data (Visium, Visium HD, HEST, ST tables, AnnData, SpatialData...) into sections for `prepare`.

    Example: `hifusion import spaceranger/outs -o sections --image outs=slide.tif`
    """
    from hifusion import api

    with progress_bar() as report:
        written = api.import_sections(
            source,
            out,
            layout=layout,
            sections=listed(sections),
            images={name: Path(path) for name, path in named("--image", image).items()},
            patients=named("--patient", patient),
            mpp=mpp,
            bin_um=bin_um,
            progress=report,
        )
    for path in written:
        typer.echo(str(path))


@app.command()
def prepare(
    data: Annotated[Path, typer.Argument(help="Raw data, or the folder of `hifusion import`.")],
    out: Annotated[Path, typer.Argument(help="Folder of the patch store.")],
    recipe: Recipe = "recommended",
    sections: Sections = None,
    region_px: Annotated[int | None, typer.Option(help="Side of a region patch, instead of the recipe's.")] = None,
    mpp: Annotated[float | None, typer.Option(help="um per patch pixel, instead of the recipe's.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Go on where positions and slide do not seem to belong together.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build the patch store of a study, once; interrupted, it goes on where it stopped.

    Example: `hifusion prepare her2st store --recipe quick --sections C2,C3`
    """
    from hifusion import api

    with progress_bar() as report:
        api.prepare(
            data,
            out,
            recipe=recipe,
            sections=listed(sections),
            region_px=region_px,
            mpp=mpp,
            force=force,
            progress=report,
        )
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
