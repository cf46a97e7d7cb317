"""LZW strips and tiles decoded by libtiff: on damaged ones imagecodecs' own LZW decoder ends the process."""

import struct

import imagecodecs
import numpy as np

_SHORT, _LONG = 3, 4
_LZW, _MIN_IS_BLACK = 5, 1


def decode_lzw(data: bytes, height: int, row_bytes: int, fillorder: int) -> np.ndarray:
    """The bytes that LZW data hold, uint8 ``(height, row_bytes)``; a predictor is not undone.

    libtiff decodes whole TIFFs only, so the data are handed to it as the one strip of a grey image.
    """
    tags = (
        *((256, _LONG, row_bytes), (257, _LONG, height), (258, _SHORT, 8), (259, _SHORT, _LZW)),
        *((262, _SHORT, _MIN_IS_BLACK), (266, _SHORT, fillorder), (273, _LONG, 134), (277, _SHORT, 1)),
        *((278, _LONG, height), (279, _LONG, len(data))),
    )
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    head += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags) + bytes(4)
    assert len(head) == 134  # where tag 273 says that the strip begins
    return imagecodecs.tiff_decode(head + data)
