"""The command line: parse, call one function, print one result."""

import logging
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hifusion import cli_bench, cli_data, cli_look, cli_runs
from hifusion.errors import InputError


class _Program(TyperGroup):
    """Typer would say "Aborted." of Ctrl-C, and end as if something had failed."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise SystemExit(
                _say("stopped; the same command goes on from what is complete (train: with --resume)", 130)
            ) from None


app = typer.Typer(
    cls=_Program,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Spatial gene expression from H&E: prepare, train, evaluate, predict, look.",
)
app.add_typer(cli_data.app)
app.add_typer(cli_runs.app)
app.add_typer(cli_bench.app)
app.add_typer(cli_look.app)
_debug = False


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    global _debug
    _debug = debug
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)


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


def _say(message: str, code: int) -> int:
    print(f"hifusion: {message}", file=sys.stderr)
    return code
