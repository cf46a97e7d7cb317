"""The one error a user can cause, and names from files and users told in one line."""

import difflib
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """Input that cannot be used: the message is one line saying what was given, what is allowed and what to do."""


def refuse_unknown(what: str, wanted: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse the first of the ``wanted`` names that is not ``known``, naming the nearest ones.

    Parameters
    ----------
    what
        What the names are of: "gene", "section".
    where
        Where they were looked for.
    """
    known = list(dict.fromkeys(known))
    for name in wanted:
        if name not in known:
            upper = {one.upper(): one for one in reversed(known)}
            near = difflib.get_close_matches(str(name).upper(), upper, n=4, cutoff=0.0)
            nearest = ", ".join(plain(upper[match]) for match in near) or "none"
            raise InputError(f"{what} {plain(name)!r} is not in {where}; the nearest of {len(known)}: {nearest}")


def plain(text: Any, most: int = 60) -> str:
    """A name from a file on one line: what cannot be printed becomes "?", what is too long is cut."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in str(text))
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"
