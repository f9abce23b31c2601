"""Which lines of a mail are its writer's, and which it quotes, in whatever language the mail program speaks.

email-reply-extractor knows how English and German mails quote, and looks for it in the whole text. So what
is quoted goes before it sees the text: lines behind `>` with the line that says who wrote them, and all that
stands below the head of another mail, as Outlook quotes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["answered", "divided", "without_attribution"]

_FROM = "From|Von|De|Da|Van|Från|Fra|Od|Lähettäjä|От|发件人|差出人"
_SENT = (
    "Sent|Date|Gesendet|Datum|Envoyé|Enviado(?: el)?|Enviada(?: em)?|Fecha|Data|Inviato|Verzonden|Skickat|"
    "Sendt|Dato|Wysłano|Lähetetty|Отправлено|Дата|发送时间|日期|送信日時"
)
_COLON = r"[ \t]*[:：]\*?[ \t]*\S"
# The head of a mail that is quoted below it: who wrote it, and at most two lines later, when.
_HEAD = re.compile(
    rf"^[ \t]*\*?(?:{_FROM}){_COLON}.*\n(?:.*\n){{0,2}}?[ \t]*\*?(?:{_SENT}){_COLON}",
    re.MULTILINE | re.IGNORECASE,
)
_RULE = re.compile(r"[ \t]*[-_=*]{2,}.*")  # stands above such a head: "-----Original Message-----"
_LEVELS = re.compile(r"[ \t]*((?:>[ \t]?)+)")
_YEAR = r"\b(?:19|20)\d\d\b"
# An address, a time, or a day and a year.
_WHEN = re.compile(rf"@|\d{{1,2}}[:.h]\d\d|\b\d{{1,2}}\b.*{_YEAR}|{_YEAR}.*\b\d{{1,2}}\b")
_LINES = 3  # over which a line that names who wrote may be wrapped
_LETTERS = 300


def divided(text: str) -> tuple[str, str]:
    """(the writer's lines, the lines of the mail that it answers); what that one quotes goes."""
    head = _HEAD.search(text)
    if head is None or _LEVELS.match(head[0]):
        return _by_marks(text.split("\n"))
    own, quoted = _by_marks(_above(text, head).split("\n"))
    return own, quoted if quoted.strip() else answered(text[head.start() :].partition("\n\n")[2])


def answered(quoted: str) -> str:
    """Of mails in mails without marks, as Outlook and HTML quote, the lines of the newest."""
    if (head := _HEAD.search(quoted)) is not None:
        quoted = _above(quoted, head)
    lines = quoted.strip("\n").split("\n")
    lines = lines[1:] if _is_attribution(lines[0]) else lines
    older = next((at for at, line in enumerate(lines) if _is_attribution(line)), len(lines))
    return _by_marks(lines[:older])[0]


def _above(text: str, head: re.Match[str]) -> str:
    above = text[: head.start()].rstrip()
    before, _, last = above.rpartition("\n")
    return before if _RULE.fullmatch(last) else above


def without_attribution(lines: Sequence[str]) -> list[str]:
    """Without the last paragraph's end that says who wrote what is quoted below: "Le 7 juil. 2026 …:"."""
    kept = list(lines)
    while kept and not kept[-1].strip():
        kept.pop()
    for count in range(1, min(_LINES, len(kept)) + 1):
        if not kept[-count].strip():
            break
        is_whole = count == _LINES or count == len(kept) or not kept[-count - 1].strip()
        if is_whole and _is_attribution(" ".join(kept[-count:])):
            return kept[:-count]
    return list(lines)


def _is_attribution(said: str) -> bool:
    return said.rstrip().endswith((":", "：")) and len(said) <= _LETTERS and bool(_WHEN.search(said))


def _by_marks(lines: Sequence[str]) -> tuple[str, str]:
    """By `>` at the fronts of lines."""
    own, quoted = list[str](), list[str]()
    was_quoted = False
    for line in lines:
        match = _LEVELS.match(line)
        if match is None:
            own.append(line)
        elif not was_quoted:
            own = [*without_attribution(own), ""]
        if match is not None and match[1].count(">") == 1:
            quoted.append(line[match.end() :])
        was_quoted = match is not None
    return "\n".join(own), "\n".join(without_attribution(quoted))
