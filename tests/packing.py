"""Archives made by code: zip and 7z, locked or not, with members that a decent program would not write."""

import io
import stat
from collections.abc import Mapping, Sequence

import pytest

PASSWORD = "open sesame"
Members = Mapping[str, bytes] | Sequence[tuple[str, bytes]]  # pairs, where a name comes twice


def zipped(members: Members, password: str | None = PASSWORD, kind: int = stat.S_IFREG) -> bytes:
    """A zip; ``kind`` is the type that it says its members have."""
    pyzipper = pytest.importorskip("pyzipper")  # of the extra `download`
    buffer = io.BytesIO()
    how = {"compression": pyzipper.ZIP_DEFLATED} | ({"encryption": pyzipper.WZ_AES} if password else {})
    with pyzipper.AESZipFile(buffer, "w", **how) as archive:
        if password:
            archive.setpassword(password.encode())
        for name, data in _pairs(members):
            archive.writestr(name, data)
            archive.infolist()[-1].external_attr = (kind | 0o777) << 16  # written when the archive is closed
    return buffer.getvalue()


def sevenzipped(
    members: Members,
    password: str | None = PASSWORD,
    kind: int = stat.S_IFREG,
    attributes: int | None = None,
    **how: object,
) -> bytes:
    """A 7z; ``attributes`` are those of Windows instead of a ``kind``, ``how`` goes to py7zr."""
    attributes = (kind | 0o777) << 16 | 0x8000 if attributes is None else attributes
    py7zr = pytest.importorskip("py7zr")  # of the extra `download`
    buffer = io.BytesIO()
    with py7zr.SevenZipFile(buffer, "w", password=password, **how) as archive:
        archive.set_encoded_header_mode("header_encryption" in how)  # else as it is, to be damaged
        for name, data in _pairs(members):
            archive.writestr(data, "checked by py7zr")
            archive.header.files_info.files[-1] |= {"filename": name, "attributes": attributes}
    return buffer.getvalue()


def locked_7z(members: Members, password: str = PASSWORD, kind: int = stat.S_IFREG) -> bytes:
    """A 7z that shows not even the names of its members without the password."""
    return sevenzipped(members, password, kind, header_encryption=True)


def _pairs(members: Members) -> list[tuple[str, bytes]]:
    return list(members.items() if isinstance(members, Mapping) else members)
