"""What the commands share: their common options, progress on a terminal or in a log, results as text or JSON."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from hifusion.errors import InputError
from hifusion.ranks import is_first

INCOMPLETE = 3  # exit code: some of what was asked for failed, the rest is done
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Recipe = Annotated[str, typer.Option(help="recommended, her2st_2d, her2st_3d, stdata_2d, stdata_3d, quick or tiny.")]
Source = Annotated[str | None, typer.Option(help="Whose values a published recipe has: paper or code.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Change one value of the recipe: key=value. Repeatable.")]
Sections = Annotated[str | None, typer.Option(help="Names, separated by commas. Default: all.")]


def listed(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def numbers(option: str, text: str) -> list[int]:
    """Whole numbers separated by commas, each once."""
    try:
        return list(dict.fromkeys(int(part) for part in listed(text) or ()))
    except ValueError as error:
        raise InputError(f"{option} {text!r} is not a list of whole numbers; write for example 0,1,2") from error


def named(option: str, values: list[str] | None) -> dict[str, str]:
    """What NAME=VALUE texts say, by name."""
    wrong = [text for text in values or () if not all(text.partition("="))]
    if wrong:
        raise InputError(f"{option} {wrong[0]!r} is not NAME=VALUE; write for example {option} C2=...")
    return {name: value for name, _, value in (text.partition("=") for text in values or ())}


def show(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        typer.echo(f"{key:{width}}  {_plain(value)}")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(one)}" for key, one in value.items())
    if isinstance(value, list):
        return ("; " if value and isinstance(value[0], dict) else ", ").join(map(_plain, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not known" if value is None else str(value)


class _Rate(ProgressColumn):
    """Spots per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar with rate and time left on a terminal; elsewhere a line every half minute, for log files."""
    console = Console(stderr=True)
    if not console.is_terminal or not is_first():
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
