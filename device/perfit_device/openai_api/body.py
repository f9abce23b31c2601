"""A request's JSON body, read with one clear error for whatever is wrong in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from perfit_shared.json_input import is_text

__all__ = ["Body", "Refused", "parse", "shown"]

_SHOWN = 64  # characters of a client's own value in a message
_MOST = 65_536  # values and names of a body, in lists and objects; the longest talk taken has 41,000
_NAME = 64  # characters of a name in `texts`
_NUMBER = 64  # characters of a number: reading one takes time by the square of its digits


class Refused(Exception):
    """What the client gets instead of an answer, in OpenAI's error shape."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status, self.kind = param, code, status, kind
        self.headers = dict(headers or {})

    def to_json(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def parse(data: bytes) -> Body:
    """Raises Refused on anything but one JSON object of finite numbers, or on one of too many values.

    It runs in the event loop, and the parser stops for nobody: so the values are counted before.
    """
    if _values_in(data) > _MOST:
        raise Refused(
            f"the body may have {_MOST} values in lists and objects; send fewer messages or tools",
            status=413,
            code="request_too_large",
        )
    try:
        value = json.loads(
            data.decode("utf-8"), parse_constant=_no_number, parse_int=_whole, parse_float=_number
        )
    except (ValueError, RecursionError) as error:
        raise Refused("the body should be JSON in UTF-8, without NaN, Infinity or endless numbers") from error
    if not isinstance(value, dict):
        raise Refused("the body should be a JSON object")
    return Body(value)


def _values_in(data: bytes) -> int:
    """How many values and names there are: each stands behind a mark of its own, outside of texts.

    Of what is no JSON it is the count up to there, or more.
    """
    plain = data.replace(rb"\\", b"").replace(rb"\"", b"")
    texts = plain.count(b'"') // 2
    if texts > _MOST:
        return texts
    outside = b"".join(plain.split(b'"')[::2])
    return sum(map(outside.count, (b",", b":", b"[", b"{")))


def _whole(text: str) -> int:
    if len(text) > _NUMBER:
        raise ValueError("a number that nobody means")
    return int(text)


def _number(text: str) -> float:
    if len(text) > _NUMBER:
        raise ValueError("a number that nobody means")
    return float(text)


def _no_number(name: str) -> float:
    raise ValueError(name)


class Body:
    """The fields of an object. Null counts as absent, and fields that nobody asks for are left alone."""

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self.values = values
        self._path = path

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not is_text(value):
            raise self.wrong(key, "text")
        return value

    def number(self, key: str, low: float, high: float, default: float) -> float:
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.wrong(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def whole(self, key: str, low: int, high: int) -> int | None:
        value = self.values.get(key)
        if value is None:
            return None
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(key, f"a whole number from {low} to {high}")
        return value

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return bool(value)

    def items(self, key: str) -> list[Any]:
        value = self.values.get(key)
        if value is not None and not isinstance(value, list):
            raise self.wrong(key, "a list")
        return value or []

    def object(self, key: str) -> Body:
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Body(value or {}, self._at(key))

    def texts(self, key: str, most: int, longest: int) -> dict[str, str]:
        """An object of texts by name."""
        values = self.object(key).values
        if len(values) > most or not all(
            is_text(name) and len(name) <= _NAME and is_text(value) and len(value) <= longest
            for name, value in values.items()
        ):
            raise self.wrong(
                key,
                f"an object of at most {most} texts of at most {longest} characters, with names of at most "
                f"{_NAME}",
            )
        return dict(values)

    def element(self, key: str, number: int) -> Body:
        """One object of a list."""
        value = self.items(key)[number]
        path = f"{key}[{number}]"
        if not isinstance(value, dict):
            raise self.wrong(path, "an object")
        return Body(value, self._at(path))

    def wrong(self, key: str, wanted: str) -> Refused:
        return Refused(f"{self._at(key)} should be {wanted}", param=self._at(key), code="invalid_value")

    def refuse(self, key: str, message: str) -> Refused:
        return Refused(message, param=self._at(key), code="unsupported_value")

    def _at(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key


def shown(value: object) -> str:
    """A client's own word in a message."""
    return "".join(c if c.isprintable() else "?" for c in str(value)[:_SHOWN])
