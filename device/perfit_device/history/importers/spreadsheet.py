"""Excel's own files, .xlsx: the first sheet, whose first row names the columns as in CSV.

openpyxl reads it row by row. What a small file can unpack to is bounded before that.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from datetime import date, datetime
from typing import Any
from xml.etree.ElementTree import ParseError

from perfit_device.history.importers.rows import collect
from perfit_device.history.importers.source import Format, Source, check_sizes
from perfit_device.history.importers.table import COLUMNS, table_rows
from perfit_device.history.items import HistoryItem
from perfit_shared.errors import InvalidData
from perfit_shared.tasks import Task

__all__ = ["FORMAT"]

_BYTES = 64 << 20  # unpacked
_ROWS = 200_000
_CELLS = 5_000_000  # that are looked at, empty ones too


def fits(source: Source) -> bool:
    return "xl/workbook.xml" in source.members


def read(source: Source, task: Task) -> Iterator[HistoryItem]:
    yield from collect(table_rows(_rows(source), task, source.choices), task)


def _rows(source: Source) -> Iterator[tuple[str, list[str]]]:
    try:
        from openpyxl import load_workbook
        from openpyxl.utils.exceptions import InvalidFileException
    except ImportError as error:
        raise InvalidData(
            "reading a spreadsheet needs openpyxl: pip install 'perfit[xlsx]', or save it as CSV"
        ) from error
    broken = (
        zipfile.BadZipFile, InvalidFileException, ParseError, KeyError, ValueError, TypeError, IndexError,
        AttributeError, OSError, EOFError, NotImplementedError, RuntimeError,
    )  # fmt: skip
    with source.open() as file:
        try:
            with zipfile.ZipFile(file) as archive:
                check_sizes(archive, _BYTES)
            workbook = load_workbook(file, read_only=True, data_only=True, keep_links=False)
            sheet: Any = workbook.worksheets[0]
            sheet.reset_dimensions()  # what the file says of its size may be anything
            # One column more than there may be, so that too many are seen.
            rows = enumerate(sheet.iter_rows(max_col=COLUMNS + 1, max_row=_ROWS + 1, values_only=True), 1)
            yield from _checked(rows)
        except broken as error:
            raise InvalidData("not a whole spreadsheet; open it and save it anew, or as CSV") from error


def _checked(rows: Iterator[tuple[int, Any]]) -> Iterator[tuple[str, list[str]]]:
    """Rows as texts, without the empty cells that stand at their ends."""
    width = cells = 0
    for number, values in rows:
        cells += len(values)
        if number > _ROWS or cells > _CELLS:
            raise InvalidData(f"larger than {_ROWS} rows or {_CELLS} cells; save what you need as CSV")
        row = [_text_of(value) for value in values]
        while row and not row[-1]:
            row.pop()
        width = width or len(row)
        yield f"row {number}", row + [""] * (width - len(row))


def _text_of(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%dT%H:%M:%SZ}" if value.time() != value.min.time() else f"{value:%Y-%m-%d}"
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, float) and value.is_integer() and abs(value) < 10**15:
        return str(int(value))  # a score of 4
    return str(value).strip()


FORMAT = Format("xlsx", "a spreadsheet", fits, read, reads=("text_column", "answer_column"))
