"""Sent mail, mbox or Maildir: what the person answered to whom.

An example is a reply in the person's own words, without quotes and signature, with the mail that it
answers: the one in the same box that In-Reply-To names, else what the reply quotes of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC
from email.message import Message
from email.parser import BytesHeaderParser
from email.utils import getaddresses, parsedate_to_datetime

from perfit_device.history.importers.mail_text import Body, TooSlow, body_of, header, parsed
from perfit_device.history.importers.mailboxes import Mailbox, is_maildir, is_mbox
from perfit_device.history.importers.rows import check_pairs, of_pair
from perfit_device.history.importers.source import Format, Source
from perfit_device.history.items import HistoryItem
from perfit_shared.errors import InvalidData
from perfit_shared.json_input import is_text
from perfit_shared.tasks import Task
from perfit_shared.terminal import one_line

__all__ = ["FORMAT"]

_HEADERS = 1 << 16  # bytes of a mail's headers
_SLOW = 20  # mails that take too long, or every 50th: more of them make a hostile box
_WORDS = 1500  # of an answer that one writes
_PREFIXES = ("fwd:", "fw:", "wg:", "tr:", "rv:", "vs:")  # of what is forwarded


@dataclass(frozen=True)
class _Mail:
    place: str
    key: int | str
    sender: str
    answers: int  # digest of a message's id; 0: none


@dataclass
class _Index:
    mails: list[_Mail] = field(default_factory=list)
    by_id: dict[int, int] = field(default_factory=dict)  # digest → row of mails
    senders: Counter[str] = field(default_factory=Counter)


def fits(source: Source) -> bool:
    return is_maildir(source.path) if source.is_folder else is_mbox(source)


def read(source: Source, task: Task) -> Iterator[HistoryItem]:
    check_pairs(task, FORMAT.kind)
    box = Mailbox(source)
    index = _indexed(box)
    me = _addresses(source, index)
    source.report.format = f"mail of {', '.join(sorted(me))}"
    slow = 0
    for mail in index.mails:
        if mail.sender not in me:
            source.report.skip("from others", mail.place)
            continue
        try:
            found = _example(box, index, mail, me, task)
        except TooSlow:
            found, slow = "that take too long to read", slow + 1
            if slow > max(_SLOW, len(index.mails) // 50):
                raise InvalidData(f"{slow} mails take too long to read, up to {mail.place}") from None
        if isinstance(found, str):
            source.report.skip(found, mail.place)
        else:
            yield found


def _indexed(box: Mailbox) -> _Index:
    """Headers alone: who wrote what, and what it answers."""
    index, parser = _Index(), BytesHeaderParser()
    for place, key, data in box.fronts():
        head = parser.parsebytes(data[:_HEADERS])
        addresses = _addresses_in(header(head, "From"))
        sender = addresses[0] if addresses else ""
        index.senders[sender] += 1
        if name := header(head, "Message-ID"):
            index.by_id.setdefault(hash(name), len(index.mails))
        answers = (header(head, "In-Reply-To") or header(head, "References")).split()
        index.mails.append(_Mail(place, key, sender, hash(answers[-1]) if answers else 0))
    return index


def _addresses_in(text: str) -> list[str]:
    return [address.casefold() for _, address in getaddresses([text]) if "@" in address]


def _addresses(source: Source, index: _Index) -> set[str]:
    """The person's: those that they name, else whose mails are more than half. Raises InvalidData."""
    if source.choices.me:
        return {address.strip().casefold() for address in source.choices.me}
    top = [pair for pair in index.senders.most_common(4) if pair[0]]
    if top and 2 * top[0][1] > len(index.mails):
        return {top[0][0]}
    said = ", ".join(f"{one_line(address)[:60]} ({count})" for address, count in top)
    raise InvalidData(
        f"say which address is yours, with --me ADDRESS; most mails are from {said or 'nobody'}"
    )


def _example(box: Mailbox, index: _Index, of: _Mail, me: set[str], task: Task) -> HistoryItem | str:
    """The example, or why it is none. Raises TooSlow."""
    mail = parsed(box.read(of.key))
    if mail is None:
        return "that cannot be read"
    reason = _by_headers(mail)
    body = None if reason else body_of(mail)
    if body is None:
        return reason or "without text (attachments alone, or encrypted)"
    heard = _heard(box, index, of, me, body) if body.own else ""
    reasons = {
        "without words of their own": not body.own,
        f"of more than {_WORDS} words": len(body.own.split()) > _WORDS,
        "new mails, or answers to what is neither in the box nor quoted": not heard,
        "that cannot be read": not is_text(body.own) or not is_text(heard),
    }
    for reason, holds in reasons.items():
        if holds:
            return reason
    return of_pair(task, heard, body.own, date=_date_of(mail), origin=of.place)


def _heard(box: Mailbox, index: _Index, of: _Mail, me: set[str], body: Body) -> str:
    """What the mail answers, in the words of whoever wrote that."""
    row = index.by_id.get(of.answers) if of.answers else None
    if row is not None and index.mails[row].sender not in me:
        answered = parsed(box.read(index.mails[row].key))
        said = body_of(answered) if answered is not None else None
        if said is not None and said.own:
            return said.own
    return body.quoted


def _by_headers(mail: Message) -> str:
    if header(mail, "Auto-Submitted").lower() not in ("", "no") or mail.get("X-Autoreply"):
        return "sent automatically"
    precedence = header(mail, "Precedence").lower()
    if precedence in ("auto_reply", "bulk", "junk"):
        return "sent automatically"
    if mail.get("List-Id") or mail.get("List-Post") or precedence == "list":
        return "to mailing lists"
    if header(mail, "Subject").lower().startswith(_PREFIXES):
        return "that are forwarded"
    if mail.get_content_type() in ("multipart/encrypted", "application/pkcs7-mime"):
        return "without text (attachments alone, or encrypted)"
    return ""


def _date_of(mail: Message) -> str:
    try:
        date = parsedate_to_datetime(header(mail, "Date"))
        return f"{date.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
    except (ValueError, TypeError, OverflowError, IndexError, OSError):
        return ""


FORMAT = Format("mail", "mail", fits, read, tasks=("reply", "chat"), reads=("me",))
