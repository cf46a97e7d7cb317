"""Files from the web: resumed where they stopped, checked by digest, never half there under their name."""

import json
import logging
import os
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from hifusion import files
from hifusion.errors import InputError

TRIES = 3  # of one file in one run; each goes on where the last one stopped
TIMEOUT_S = (30, 60)  # to connect, and between two pieces of an answer
MOST_LISTING_BYTES = 2**24
CHUNK = 1 << 16  # what a cut may cost: a piece that is not whole is not given out
_PAGES = ("text/html", "application/json")  # what hosts answer with instead of a file, some under status 200

Advance = Callable[[int], None]


class RemoteFile(NamedTuple):
    """A published file: its plain name, address, bytes and digest (``md5:...`` or ``sha256:...``)."""

    name: str
    url: str
    size: int
    digest: str

    def checked(self, source: str) -> "RemoteFile":
        """Itself, where its name is a plain one and its digest is one that can be checked."""
        plain = re.fullmatch(r"\w[\w .()+-]*", self.name) and re.fullmatch(r"(md5|sha256):[0-9a-f]+", self.digest)
        if not plain or not isinstance(self.size, int) or self.size <= 0:
            raise InputError(
                f"{source}: lists {self.name[:80]!r}, {self.size!r} bytes, {self.digest[:80]!r}: no usable file"
            )
        return self


class _Broken(Exception):
    """An answer that stopped, or was no file: another try may end well."""


def fetch_json(url: str) -> Any:
    """What ``url`` answers, as JSON.

    Raises
    ------
    InputError
        The host cannot be reached, says no, or answers something else.
    """
    requests = _requests()
    try:
        with requests.get(url, headers=_headers(), timeout=TIMEOUT_S, stream=True) as answer:
            _refuse_status(url, answer)
            body = b""
            for chunk in answer.iter_content(CHUNK):
                body += chunk
                if len(body) > MOST_LISTING_BYTES:
                    raise InputError(f"{url}: answers with more than {MOST_LISTING_BYTES >> 20} MiB; this is no list")
            return json.loads(body)
    except requests.RequestException as error:
        raise InputError(
            f"{url}: cannot be reached ({type(error).__name__}); look at the network and run the same command again"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{url}: does not answer with JSON; the host may have a bad day, try again later") from error


def fetch(file: RemoteFile, folder: Path, advance: Advance = lambda _: None) -> Path:
    """Download ``file`` into ``folder``, or find it there, and check its digest; gives its path.

    What came before a cut is kept in a hidden file beside it: the next call goes on from there.

    Parameters
    ----------
    advance
        Told how many bytes of the file are there.

    Raises
    ------
    InputError
        The host cannot be reached, says no or sends something else; the disk is full; the digest is not the published
        one (what came is then thrown away).
    """
    pooch = _pooch()
    part = folder / f".{file.name}.part"

    def resume(url: str, output_file: str, _: Any) -> None:
        _download(file, part, advance)
        os.replace(part, output_file)

    try:
        return Path(pooch.retrieve(file.url, file.digest, fname=file.name, path=folder, downloader=resume))
    except OSError as error:
        files.raise_if_full(error, folder / file.name)
        raise
    except InputError:
        raise
    except ValueError as error:  # pooch's word for a digest that does not match
        raise InputError(
            f"{file.url}: what came has another digest than the published {file.digest}, and was thrown away; run the "
            "same command again"
        ) from error


def _download(file: RemoteFile, part: Path, advance: Advance) -> None:
    """Bring ``part`` to the full size of ``file``, going on where it stops."""
    requests = _requests()
    reason = ""
    for _ in range(TRIES):
        have = part.stat().st_size if part.exists() else 0
        if have == file.size:
            return
        try:
            _append(file, part, have if have < file.size else 0, advance)
        except _Broken as error:
            reason = str(error)
        except requests.RequestException as error:
            reason = type(error).__name__
    have = part.stat().st_size if part.exists() else 0
    if have != file.size:
        raise InputError(
            f"{file.url}: {reason or 'the connection was cut'}, {have:,} of {file.size:,} bytes are here; look at the "
            "network and run the same command again: it goes on from there"
        )


def _append(file: RemoteFile, part: Path, have: int, advance: Advance) -> None:
    """Ask for what comes after the first ``have`` bytes, and write it after them; from the start where it must be."""
    headers = _headers() | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with _requests().get(file.url, headers=headers, timeout=TIMEOUT_S, stream=True) as answer:
        if answer.status_code == 416:  # "range not satisfiable": what is here is not a beginning of what is there
            part.unlink(missing_ok=True)
            raise _Broken("the host has no such range")
        _refuse_status(file.url, answer)
        if answer.headers.get("Content-Type", "").split(";")[0].strip().lower() in _PAGES:
            raise _Broken("the host sends a page instead of the file")
        if answer.status_code != 206:
            have = 0  # the host knows no ranges and starts from the beginning
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink(missing_ok=True)
            raise _Broken("the host sends another range than asked for")
        length = answer.headers.get("Content-Length", "")
        if length.isdigit() and have + int(length) != file.size:
            raise _Broken(f"the host sends {have + int(length):,} bytes")
        with part.open("r+b" if have else "wb") as out:
            out.seek(have)
            for chunk in answer.iter_content(CHUNK):
                have += len(chunk)
                if have > file.size:
                    raise _Broken("the host sends more than the file")
                out.write(chunk)
                advance(have)


def _refuse_status(url: str, answer: Any) -> None:
    if not answer.ok:
        raise InputError(
            f"{url}: the host says {answer.status_code} {answer.reason}; look whether the data set has moved, "
            "or try again later"
        )


def _headers() -> dict[str, str]:
    return {"User-Agent": f"hifusion/{version('hifusion')}"}  # Mendeley turns Python's own away


def _pooch() -> Any:
    try:
        import pooch
    except ImportError as error:
        raise InputError("downloads need pooch; pip install 'hifusion[download]'") from error
    pooch.get_logger().setLevel(logging.WARNING)  # progress is told by the caller
    return pooch


def _requests() -> Any:
    _pooch()  # brings requests
    import requests

    return requests
