"""What a mail says: the writer's own words, and the words that it quotes.

email-reply-extractor tells them apart, once what is plainly quoted is gone. Its patterns can take minutes on
a hostile text, so each mail gets a second of processor time.
"""

from __future__ import annotations

import codecs
import contextlib
import email
import email.message
import itertools
import re
import signal
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

from perfit_device.history.importers.mail_quotes import answered, divided, without_attribution

__all__ = ["Body", "TooSlow", "body_of", "header", "parsed"]

_CHARACTERS = 24_000  # of a body; nobody writes more in an answer
_HTML = 96_000
_PARTS = 100  # of a mail that are looked through
_SECONDS = 1.0  # of processor time for a mail
_HEADER = 2000  # characters of one that are read
_BLANK_LINES = re.compile(r"\n[ \t]*\n(?:[ \t]*\n)+")
_SLOW_CODECS = ("idna", "punycode")


class TooSlow(BaseException):
    """Not an Exception: the library would take it for a mail that it cannot read."""


@dataclass(frozen=True)
class Body:
    own: str  # greeting and text, without signature
    quoted: str  # own words of whom it answers, where it quotes them


def parsed(data: bytes) -> email.message.Message | None:
    """None for what is nested beyond reason."""
    try:
        return email.message_from_bytes(data)
    except (RecursionError, ValueError, LookupError, TypeError, AttributeError, IndexError):
        return None


def header(mail: email.message.Message, name: str) -> str:
    try:
        value = str(mail.get(name) or "")
    except (ValueError, LookupError, TypeError):
        return ""
    return " ".join(value[:_HEADER].split())


def body_of(mail: email.message.Message) -> Body | None:
    """None where there is no text in it. Raises TooSlow."""
    with _limited():
        plain, html = _texts(mail)
        if not plain.strip() and not html.strip():
            return None
        from email_reply_extractor import clean_for_scoring, extract_new_text, split_html_parts

        quoted = ""
        if not plain.strip():
            parts = split_html_parts(html[:_HTML])
            plain, quoted = parts.novel_text, parts.quoted_text
        text = _BLANK_LINES.sub("\n\n", plain[:_CHARACTERS])
        own, marked = divided(text)
        quoted = answered(_BLANK_LINES.sub("\n\n", quoted[:_CHARACTERS])) or marked
        said = extract_new_text("\n".join(without_attribution(own.split("\n")))).text
        cleaned = clean_for_scoring(said)
        greeting = _greeting(cleaned.ignored_lines, said.split("\n")) if cleaned.text.strip() else []
        heard = extract_new_text(quoted).text if quoted.strip() else ""
        heard = clean_for_scoring(heard).text or heard
    return Body("\n".join([*greeting, cleaned.text]).strip(), heard.strip())


def _greeting(ignored: Collection[int], lines: Sequence[str]) -> list[str]:
    """What the cleaning took from the front: a greeting is the writer's own."""
    front = itertools.takewhile(lambda at: at in ignored or not lines[at].strip(), range(len(lines)))
    return [lines[at] for at in front if lines[at].strip()]


def _texts(mail: email.message.Message) -> tuple[str, str]:
    """(plain, HTML): the first of each that is no attachment."""
    plain = html = ""
    for number, part in enumerate(mail.walk()):
        if number == _PARTS or plain:
            break
        if part.is_multipart() or part.get_content_disposition() == "attachment":
            continue
        if part.get_content_type() == "text/plain":
            plain = _decoded(part)
        elif part.get_content_type() == "text/html" and not html:
            html = _decoded(part)
    return plain, html


def _decoded(part: email.message.Message) -> str:
    """By its charset, else UTF-8, else Windows-1252."""
    try:
        data = part.get_payload(decode=True)
    except (ValueError, LookupError, TypeError, AssertionError):
        return ""
    if not isinstance(data, bytes):
        return ""
    for charset in (_charset_of(part), "utf-8"):
        with contextlib.suppress(UnicodeError, LookupError, ValueError):
            return data.decode(charset).replace("\r\n", "\n").replace("\0", "")
    return data.decode("cp1252", "replace").replace("\r\n", "\n").replace("\0", "")


def _charset_of(part: email.message.Message) -> str:
    with contextlib.suppress(LookupError, ValueError, TypeError):
        name = codecs.lookup(str(part.get_content_charset() or "utf-8")).name
        return "utf-8" if name in _SLOW_CODECS else name
    return "utf-8"


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Raises TooSlow inside after a second of work; never where there is no such timer, as on Windows."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
