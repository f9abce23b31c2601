"""Bytes of a file as text, in the encodings that spreadsheets and editors write."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from pathlib import Path

from perfit_shared.errors import InvalidData
from perfit_shared.json_input import refuse_html

__all__ = ["LARGEST", "cannot_be_read", "decoded", "read_bytes"]

LARGEST = 256 * 1024 * 1024  # bytes of one file
# Longest first: a mark of UTF-32 begins with one of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_BINARY = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # what .xlsx and .ods files are, and .xls


def read_bytes(path: Path) -> bytes:
    """Raises InvalidData when it cannot be read or is too large."""
    try:
        if path.stat().st_size > LARGEST:
            raise InvalidData(f"larger than {LARGEST >> 20} MiB; split it")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise cannot_be_read(error) from error


def cannot_be_read(error: OSError | ValueError) -> InvalidData:
    """What to say of it. ValueError: a name with a null byte."""
    reason = getattr(error, "strerror", None) or "not a file's name"
    return InvalidData(f"cannot be read ({reason})")


def decoded(data: bytes, notify: Callable[[str], None], *, may_be_html: bool = False) -> str:
    """By its mark, else UTF-8, else Windows-1252, which `notify` reports. Raises InvalidData.

    UTF-8 with a few bad bytes is refused: as Windows-1252 every accent of it would be two letters.
    """
    if len(data) > LARGEST:
        raise InvalidData(f"larger than {LARGEST >> 20} MiB; split it")
    if data.startswith(_BINARY):
        raise InvalidData("a spreadsheet or an archive, not text; save it as CSV")
    mark, encoding = next(((m, e) for m, e in _MARKS if data.startswith(m)), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        if mark:
            raise InvalidData(f"not text, though its mark says {encoding}; save it as UTF-8") from error
        if _is_mostly_utf8(data):
            raise InvalidData(
                f"not whole UTF-8: byte {error.start} (from 0) is wrong; mend it, or save the file anew"
            ) from error
        text = _western(data)
        notify("the file is not UTF-8, so it was read as Windows-1252; check an accent or two")
    if "\0" in text:
        raise InvalidData("not text: it holds null characters; save it as UTF-8")
    if not may_be_html:
        refuse_html(text)
    return text


def _is_mostly_utf8(data: bytes) -> bool:
    """Whether at least as many characters beyond ASCII are whole as broken."""
    text = data.decode("utf-8", "replace")
    broken = text.count("\ufffd") - data.count("\ufffd".encode())
    ascii_count = len(data.translate(None, bytes(range(128, 256))))
    return len(text) - ascii_count - broken >= broken


def _western(data: bytes) -> str:
    try:
        return data.decode("cp1252")
    except UnicodeDecodeError as error:
        raise InvalidData("not text in UTF-8 or Windows-1252; save it as UTF-8") from error
