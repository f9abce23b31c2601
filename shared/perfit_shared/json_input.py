"""Values read from JSON and text files, and the messages that say where a wrong one stands.

Whatever is malformed is InvalidData.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

from perfit_shared.errors import InvalidData

__all__ = [
    "as_text",
    "date_of",
    "error_context",
    "id_of",
    "is_date",
    "is_list_of_objects",
    "is_text",
    "list_of",
    "numbered_lines",
    "parse_json",
    "read_text",
    "refuse_html",
    "shown_id",
    "text_of",
]

_DATE = re.compile(r"\d{4}(-\d\d(-\d\d([T ][0-9:.]+(Z|[+-]\d\d:?\d\d)?)?)?)?")
_SHOWN = 40  # characters of an id in a message


# -- files -------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """A file as text, UTF-8 with or without a mark. Raises InvalidData, also on a web page saved as data."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidData("not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise InvalidData(f"cannot be read ({error.strerror})") from error
    refuse_html(text)
    return text


def refuse_html(text: str) -> None:
    """Raises InvalidData on a web page saved as data."""
    if re.match(r"\s*<", text):
        raise InvalidData(
            "an HTML page, not data: the download went wrong; check its address, fetch it again"
        )


def parse_json(text: str) -> Any:
    """Raises InvalidData on what is no JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidData(f"not JSON ({error.msg}, line {error.lineno}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; brackets 100,000 deep
        raise InvalidData("not JSON") from error


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of JSON lines, without empty ones.

    Not splitlines(): it also splits at U+2028, which JSON allows inside strings.
    """
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


@contextmanager
def error_context(context: str) -> Iterator[None]:
    """Prefix the message of an InvalidData with `context`."""
    try:
        yield
    except InvalidData as error:
        raise InvalidData(f"{context}: {error}") from error


# -- values ------------------------------------------------------------------------------------------


def id_of(record: Mapping[str, Any], key: str = "id") -> str:
    """An id as text. Raises InvalidData when it is missing, empty or neither text nor a whole number."""
    value = _value(record, key)
    if not isinstance(value, str | int) or isinstance(value, bool) or not (text := as_text(value)):
        raise InvalidData(f'field "{key}" should be text or a whole number')
    return text


def is_date(text: str) -> bool:
    """Whether it is an ISO 8601 date, year alone or with a time included: these sort as text."""
    return _DATE.fullmatch(text) is not None


def date_of(raw: Mapping[str, Any]) -> str:
    value = raw.get("date")
    if value is None:
        return ""
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise InvalidData('field "date" should be text')
    return as_text(value) or ""  # LaMP-5's dates are years, as numbers


def list_of(record: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    value = record.get(key, [])
    if not is_list_of_objects(value):
        raise InvalidData(f'field "{key}" should be a list of objects')
    return value


def is_list_of_objects(value: Any) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _value(record: Mapping[str, Any], key: str) -> Any:
    if key not in record:
        raise InvalidData(f'field "{key}" is missing')
    return record[key]


def text_of(record: Mapping[str, Any], key: str) -> str:
    """A field as stripped text; "" for null. Raises InvalidData on any other type."""
    text = as_text(_value(record, key))
    if text is None:
        raise InvalidData(f'field "{key}" should be text')
    return text


def as_text(value: Any) -> str | None:
    """A field as items hold it, stripped; None for what is no finite number, nor text that UTF-8 carries."""
    if value is None:
        return ""
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else str(value)  # a score of 4.0 is the label "4"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value.strip() if is_text(value) else None


def is_text(value: Any) -> TypeGuard[str]:
    """A string that UTF-8 can carry: JSON also makes lone surrogates."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def shown_id(record: Mapping[str, Any], number: int, key: str = "id") -> str:
    """An id for a message, on one short line; the number from 1 where there is none."""
    value = record.get(key)
    text = " ".join((as_text(value) or "").split())[:_SHOWN] if isinstance(value, str | int) else ""
    return text or f"number {number + 1}"
