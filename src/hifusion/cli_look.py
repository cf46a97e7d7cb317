"""Commands that draw, and that read what an evaluation left. Imports stay inside commands: --help is instant."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hifusion.console import Json, Sections, listed, progress_bar, show

app = typer.Typer()


class Kind(StrEnum):
    """What a plot shows."""

    maps = "maps"
    scatter = "scatter"
    skill = "skill"
    moran = "moran"
    error = "error"
    figure3 = "figure3"
    within = "2d3d"


@app.command()
def plot(
    source: Annotated[
        list[Path], typer.Argument(help="Evaluation or benchmark folder; for maps also sections (.h5ad).")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Picture: .png, .svg or .pdf.")],
    kind: Annotated[
        Kind,
        typer.Option(
            help="maps: genes on the slide. scatter: predicted against measured. skill: correlations of all genes. "
            "moran: how smooth. error: offset and pattern. figure3: the paper's markers, all models. 2d3d: between "
            "against within patients, two folders in this order."
        ),
    ] = Kind.maps,
    genes: Annotated[
        str | None, typer.Option(help="Default: ERBB2, KRT19, CD74, TMSB10, where they are in the panel.")
    ] = None,
    sections: Sections = None,
    models: Annotated[
        str | None, typer.Option(help="Labels such as ridge,hifusion-seed0. Default: all but oracles.")
    ] = None,
    bare: Annotated[bool, typer.Option("--bare", help="Without the H&E behind the spots.")] = False,
) -> None:
    """Draw what models predict: gene maps beside the measured ones, or how they compare over all genes.

    Example: `hifusion plot evaluation -o maps.png --genes ERBB2,CD74 --sections C3`
    """
    from hifusion import api

    path = api.draw(
        kind.value,
        source,
        out,
        genes=listed(genes),
        sections=listed(sections),
        models=listed(models),
        over_image=not bare,
    )
    typer.echo(str(path))


@app.command()
def report(
    source: Annotated[Path, typer.Argument(help="Folder of `hifusion evaluate`, `benchmark` or `train`.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Page: .html.")],
    model: Annotated[str | None, typer.Option(help="Which it speaks of. Default: the best network.")] = None,
    genes: Annotated[
        str | None, typer.Option(help="Whose maps it shows, six at most. Default: the markers in the panel.")
    ] = None,
    section: Annotated[str | None, typer.Option(help="Whose maps it shows. Default: the one in the middle.")] = None,
) -> None:
    """Write what an evaluation, a benchmark or a run says as one page for a biologist: no network, ready to print.

    Example: `hifusion report evaluation -o report.html`
    """
    from hifusion import api

    typer.echo(str(api.report(source, out, model=model, genes=listed(genes), section=section)))


@app.command()
def register(
    data: Annotated[Path, typer.Argument(help="Patch store.")],
    moving: Annotated[str, typer.Argument(help="Section to lay over the other.")],
    fixed: Annotated[str, typer.Argument(help="Section that stays.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Picture: .png, .svg or .pdf.")],
    mirror: Annotated[bool, typer.Option("--mirror", help="Also try the moving section face down.")] = False,
    as_json: Json = False,
) -> None:
    """Lay one section over another of the same patient, and say how far off that may be.

    Example: `hifusion register store C3 C2 -o C3-on-C2.png`
    """
    from hifusion import api

    show(api.register(data, moving, fixed, out, mirror=mirror), as_json)


@app.command()
def labels(
    folder: Annotated[Path, typer.Argument(help="Evaluation or benchmark folder.")],
) -> None:
    """Ask whether predicted expression tells a pathologist's regions apart as the measured one does.

    Example: `hifusion labels evaluation`
    """
    from hifusion import api

    with progress_bar() as report:
        table = api.label_report(folder, report)
    typer.echo(table.round(3).to_string(index=False))
    typer.echo(f"\n{folder}/labels.csv")


@app.command()
def view(
    out: Annotated[
        list[Path],
        typer.Argument(
            help="Sections (.h5ad), measured or predicted; folders of a predicted slide, an archive, an evaluation, a "
            "benchmark or a store. What is of the same section comes together."
        ),
    ],
    export: Annotated[
        Path | None, typer.Option(help="Write the page into this folder instead, for any web server.")
    ] = None,
    genes: Annotated[str | None, typer.Option(help="Only these, separated by commas. Default: all.")] = None,
    port: Annotated[int, typer.Option(help="On 127.0.0.1. Default: any free one.", min=0, max=65535)] = 0,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Look at sections in the browser: the slide at every zoom, genes over it, measured beside predicted.

    Example: `hifusion view evaluation --open`
    """
    from hifusion import viewer  # not by api, which imports torch: the page is there three seconds sooner

    chosen = listed(genes)
    if export is None:
        viewer.view(out, genes=chosen, port=port, open_browser=open_browser, say=typer.echo)
        return
    with progress_bar() as report:
        folder = viewer.view(out, export=export, genes=chosen, progress=report)
    typer.echo(str(folder))
