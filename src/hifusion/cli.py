"""The command line: parse, call one function, print one result. Imports stay inside commands: --help is instant."""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from hifusion.errors import InputError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Spatial gene expression from H&E: prepare, train, evaluate, predict, look.",
)
_debug = False

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Recipe = Annotated[str, typer.Option(help="her2st_2d, her2st_3d, stdata_2d, stdata_3d, quick or tiny.")]
Source = Annotated[str | None, typer.Option(help="Whose values a published recipe has: paper or code.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Change one value of the recipe: key=value. Repeatable.")]
Sections = Annotated[str | None, typer.Option(help="Names, separated by commas. Default: all.")]


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    global _debug
    _debug = debug
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)


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

    with _progress() as report:
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

    with _progress() as report:
        api.prepare(data, out, recipe=recipe, sections=_list(sections), region_px=region_px, mpp=mpp, progress=report)
    _print(api.info(out), as_json)


@app.command()
def train(
    data: Annotated[Path, typer.Argument(help="Patch store.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Run folder.")],
    recipe: Recipe = "quick",
    source: Source = None,
    overrides: Set = None,
    sections: Sections = None,
    validation: Annotated[
        str | None, typer.Option(help="Sections to select the epoch on. Default: blocks of spots.")
    ] = None,
    seed: int = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT.")] = False,
    as_json: Json = False,
) -> None:
    """Train HiFusion on a store and leave a self-contained run folder.

    Example: `hifusion train store -o run --recipe quick --sections C2 --set epochs=10`
    """
    from hifusion import api

    with _progress() as report:
        run = api.train(
            data,
            out,
            recipe=recipe,
            source=source,
            overrides=overrides or (),
            sections=_list(sections),
            validation=_list(validation) or (),
            seed=seed,
            resume=resume,
            progress=report,
        )
    _print(api.info(run.root), as_json)


@app.command()
def evaluate(
    data: Annotated[Path, typer.Option(help="Patch store; or a raw data folder, for models that see counts only.")],
    protocol: Annotated[
        str, typer.Option(help="patient_folds, first_section, leave_one_section_out or leave_one_patient_out.")
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(help="hifusion, ridge, kernel_ridge, train_mean, own_mean, depth, shuffled. Repeatable."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for metrics, report, predictions and runs.")
    ] = None,
    recipe: Recipe = "quick",
    source: Source = None,
    overrides: Set = None,
    panel: Annotated[
        str | None, typer.Option(help="top_mean, highly_variable, moran, paper, or a gene list file.")
    ] = None,
    sections: Sections = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the networks, separated by commas.")] = "0",
    nulls: Annotated[bool, typer.Option(help="Score the nulls and simple rivals too.")] = True,
    shuffled: Annotated[
        bool, typer.Option(help="Train the shuffled null too (as long as one seed of the network).")
    ] = True,
    leak_check: Annotated[bool, typer.Option(help="Refuse folds that leak.")] = True,
    as_json: Json = False,
) -> None:
    """Score models by a protocol, with every null beside them.

    Example: `hifusion evaluate --data her2st --protocol patient_folds --model train_mean --panel paper --json`
    """
    from hifusion import api, reporting

    try:
        numbers = [int(seed) for seed in _list(seeds) or ()]
    except ValueError as error:
        raise InputError(f"--seeds {seeds!r} is not a list of whole numbers; write for example 0,1,2") from error
    models = model or ["hifusion"]
    with _progress() as report:
        result = api.evaluate(
            data,
            out,
            protocol=protocol,
            models=models,
            recipe=recipe,
            source=source,
            overrides=overrides or (),
            panel=panel,
            sections=_list(sections),
            seeds=numbers,
            with_nulls=nulls,
            with_shuffled=shuffled,
            leak_check=leak_check,
            progress=report,
        )
    if as_json:
        # The scores of the first model asked for stand at the top, so that a script need not dig for them.
        typer.echo(json.dumps({"model": models[0], **result["models"][models[0]], **result}, indent=2))
    else:
        typer.echo(reporting.table(result, reporting.BRIEF))
        if out:
            typer.echo(f"\n{out}/report.md")


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    section: Annotated[Path, typer.Argument(help="Section with spot positions, .h5ad.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Predicted section, .h5ad.")],
    image: Annotated[Path | None, typer.Option(help="The slide, where the section does not name it.")] = None,
) -> None:
    """Predict the expression of a section's spots from its slide.

    Example: `hifusion predict run store/sections/C3.h5ad -o C3_predicted.h5ad`
    """
    from hifusion import api

    with _progress() as report:
        predicted = api.predict(run, section, out, image=image, progress=report)
    typer.echo(
        f"{out}: {predicted.n_obs} spots x {predicted.n_vars} genes, {predicted.uns['hifusion']['normalisation']}"
    )


@app.command()
def plot(
    source: Annotated[list[Path], typer.Argument(help="Evaluation folder, or predicted sections (.h5ad).")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Picture: .png, .svg or .pdf.")],
    genes: Annotated[
        str | None, typer.Option(help="Default: ERBB2, KRT19, CD74, TMSB10, where they are in the panel.")
    ] = None,
    sections: Sections = None,
    models: Annotated[
        str | None, typer.Option(help="Labels such as ridge,hifusion-seed0. Default: all but oracles.")
    ] = None,
    bare: Annotated[bool, typer.Option("--bare", help="Without the H&E behind the spots.")] = False,
) -> None:
    """Draw gene maps: measured, then each model's prediction with its MAE and correlation.

    Example: `hifusion plot evaluation -o maps.png --genes ERBB2,CD74 --sections C3`
    """
    from hifusion import plots

    path = plots.plot_genes(
        source[0] if len(source) == 1 else source,
        out,
        genes=_list(genes),
        sections=_list(sections),
        models=_list(models),
        over_image=not bare,
    )
    typer.echo(str(path))


@app.command()
def info(
    path: Annotated[Path, typer.Argument(help="Store, run, evaluation, raw data folder, section or slide.")],
    as_json: Json = False,
) -> None:
    """Say what a file or folder is and what it holds.

    Example: `hifusion info store`
    """
    from hifusion import api

    _print(api.info(path), as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine offers: versions, device, precision, memory, disk.

    Example: `hifusion doctor`
    """
    from hifusion import api

    _print(api.doctor(), as_json)


def _list(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _print(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        shown = (
            ", ".join(f"{k} {v}" for k, v in value.items())
            if isinstance(value, dict)
            else ", ".join(map(str, value))
            if isinstance(value, list)
            else value
        )
        typer.echo(f"{key:{width}}  {shown}")


class _Rate(ProgressColumn):
    """Spots per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar with rate and time left on a terminal; elsewhere a line every half minute, for log files."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def report(what: str, done: int, total: int) -> None:
            if done < bar.tasks[0].completed or total != bar.tasks[0].total:
                bar.reset(task, total=total)
            bar.update(task, description=what, completed=done)

        yield report


def _lines(console: Console, every_s: float = 30.0) -> Callable[[str, int, int], None]:
    last = time.monotonic()

    def report(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= every_s:
            last = time.monotonic()
            console.print(f"{what}: {done}/{total}", markup=False, highlight=False)

    return report


def main() -> None:
    """Run the command line: an error a user can mend is one line and exit code 2."""
    try:
        app()
    except InputError as error:
        if _debug:
            raise
        sys.exit(_say(str(error), 2))
    except OSError as error:
        if _debug:
            raise
        sys.exit(_say(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), 1))
    except KeyboardInterrupt:
        sys.exit(_say("stopped; the same command goes on from what is complete (train: with --resume)", 130))


def _say(message: str, code: int) -> int:
    print(f"hifusion: {message}", file=sys.stderr)
    return code
