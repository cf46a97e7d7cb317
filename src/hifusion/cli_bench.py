"""Commands that compare many models. Imports stay inside commands: --help is instant."""

from pathlib import Path
from typing import Annotated

import typer

from hifusion.console import INCOMPLETE, Json, Recipe, Sections, Set, Source, listed, numbers, progress_bar, show

app = typer.Typer()


@app.command()
def benchmark(
    data: Annotated[Path, typer.Argument(help="Patch store.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder; what is finished there is not done again.")],
    protocol: Annotated[
        str, typer.Option(help="patient_folds, first_section, leave_one_section_out or leave_one_patient_out.")
    ],
    models: Annotated[
        str | None, typer.Option(help="Names, separated by commas. Default: hifusion and all its rivals.")
    ] = None,
    recipe: Recipe = "recommended",
    source: Source = None,
    overrides: Set = None,
    panel: Annotated[
        str | None, typer.Option(help="top_mean, highly_variable, moran, paper, or a gene list file.")
    ] = None,
    sections: Sections = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the networks, separated by commas.")] = "0",
    nulls: Annotated[bool, typer.Option(help="Score the nulls and simple rivals too.")] = True,
    shuffled: Annotated[bool, typer.Option(help="Train the shuffled null too.")] = True,
    test_epoch: Annotated[
        bool,
        typer.Option("--test-epoch", help="Each network also with its epoch selected on the test, as published."),
    ] = False,
    registered: Annotated[
        bool,
        typer.Option("--registered", help="HiFusion also blended with the patient's registered measured sections."),
    ] = False,
    leak_check: Annotated[bool, typer.Option(help="Refuse folds that leak.")] = True,
    jobs: Annotated[int, typer.Option("-j", "--jobs", help="Jobs at a time, each a process of its own.", min=1)] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what is left, and about how long.")] = False,
    as_json: Json = False,
) -> None:
    """Train and score many models by one protocol, and rank them. Stopped, the same command goes on.

    Example: `hifusion benchmark store -o benchmark --protocol first_section --recipe quick --seeds 0,1,2 -j 2`
    """
    from hifusion import api, reporting

    settings = api.BenchmarkSettings(
        data=str(data),
        protocol=protocol,
        models=tuple(listed(models) or api.BenchmarkSettings.models),
        recipe=recipe,
        source=source,
        overrides=tuple(overrides or ()),
        panel=panel,
        sections=None if sections is None else tuple(listed(sections) or ()),
        seeds=tuple(numbers("--seeds", seeds)),
        with_nulls=nulls,
        with_shuffled=shuffled,
        with_test_epoch=test_epoch,
        with_registered=registered,
        leak_check=leak_check,
    )
    if dry_run:
        show(api.estimate(settings, out, processes=jobs), as_json)
        return
    with progress_bar() as report:
        found = api.benchmark(settings, out, processes=jobs, progress=report)
    if as_json:
        show(found.scores.result, as_json)
    else:
        typer.echo(reporting.table(found.scores.result, reporting.BRIEF))
        typer.echo(f"\n{out}/leaderboard.html")
    _say_failed(found.failed, out)


@app.command()
def reproduce(
    study: Annotated[str, typer.Argument(help="her2st-2d, her2st-3d, stdata-2d or stdata-3d.")],
    data: Annotated[Path, typer.Option(help="Raw data, as `hifusion download` leaves them.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder; what is finished there is not done again.")],
    sections: Sections = None,
    models: Annotated[
        str | None, typer.Option(help="Names, separated by commas. Default: the paper's methods.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Default: the study's own. quick and tiny are reduced.")] = None,
    source: Source = None,
    overrides: Set = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the networks, separated by commas.")] = "0",
    jobs: Annotated[int, typer.Option("-j", "--jobs", help="Jobs at a time, each a process of its own.", min=1)] = 1,
    test_epoch: Annotated[
        bool,
        typer.Option("--test-epoch", help="Each network also with its epoch selected on the test, as published."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build the store and say how long the rest will take.")
    ] = False,
    as_json: Json = False,
) -> None:
    """The paper's Table 1 from raw data: a column of published figures, ours beside. Stopped, the same command goes on.

    Example: `hifusion reproduce her2st-3d --data her2st -o her2st-3d --sections C2,C3,C4,C5 --dry-run`
    """
    from hifusion import api

    with progress_bar() as report:
        found = api.reproduce(
            study,
            data,
            out,
            sections=listed(sections),
            models=listed(models),
            recipe=recipe,
            source=source,
            overrides=overrides or (),
            seeds=numbers("--seeds", seeds),
            processes=jobs,
            with_test_epoch=test_epoch,
            dry_run=dry_run,
            progress=report,
            say=lambda text: typer.echo(text, err=True),
        )
    if as_json or dry_run:
        show(found.facts if as_json else found.estimate, as_json)
    else:
        typer.echo(f"{found.markdown}\n{out}/table1.md")
    _say_failed(found.failed, out / "benchmark")


def _say_failed(failed: dict[str, str], out: Path) -> None:
    """Exit with 3 where jobs failed, naming them."""
    if not failed:
        return
    for job, reason in failed.items():
        typer.echo(f"failed: {job}: {reason} (all it said: {out}/jobs/{job}.log)", err=True)
    raise typer.Exit(INCOMPLETE)
