"""Directives that write pages from the program itself, so that no list is kept twice: commands, columns, recipes."""

from collections.abc import Callable, Iterable
from typing import Any

import typer
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from hifusion.cli import app as program
from hifusion.leaderboard import COLUMNS
from hifusion.recipes import NETWORKS


def commands() -> str:
    """Every command with its help, arguments and options, as Markdown."""
    return "\n\n".join(_command(name, its) for name, its in sorted(typer.main.get_group(program).commands.items()))


def _command(name: str, its: Any) -> str:
    context = typer.Context(its, info_name=f"hifusion {name}")
    usage = " ".join(its.get_usage(context).split()).removeprefix("Usage: ")
    records = [record for parameter in its.params if (record := parameter.get_help_record(context))]
    rows = [(f"`{flags}`", meaning) for flags, meaning in records]
    return "\n\n".join([f"## {name}", f"```text\n{usage}\n```", its.help or "", _table(("", "what it is"), rows)])


def columns() -> str:
    """Columns of a leaderboard and what they mean."""
    return _table(("column", "meaning"), [(its.title, its.meaning) for its in COLUMNS.values() if its.meaning])


def networks() -> str:
    """Names that `--model` and `--recipe` take."""
    return ", ".join(f"`{name}`" for name in NETWORKS)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), ["---"] * 2, *map(list, rows)]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |" for row in lines
    )


def _directive(write: Callable[[], str]) -> type[SphinxDirective]:
    class Written(SphinxDirective):
        def run(self) -> list[nodes.Node]:
            node = nodes.section()
            node.document = self.state.document
            self.state.nested_parse(StringList(write().splitlines(), source=write.__name__), 0, node, match_titles=True)
            return node.children

    return Written


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the directives."""
    for write in (commands, columns, networks):
        app.add_directive(f"hifusion-{write.__name__}", _directive(write))
    return {"parallel_read_safe": True}
