"""Sent mail as examples: own words, the mail that was answered, what is left out, and hostile boxes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from perfit_device.history.importers import Choices, Report, mail_text, read_history
from perfit_device.history.items import HistoryItem
from perfit_shared.errors import InvalidData
from perfit_shared.tasks import TASKS

TASK = TASKS["reply"]
ME = "Nell <nell@example.org>"
BODY = """Hey Dan,

Seven it is, as ever.

On Tue, Jul 7, 2026, at 03:25, Dan Wing wrote:
> Are we still on for Friday?
> > an older line

Cheers,
Nell

--\x20
Nell Quick
Example Ltd | +44 123
"""


def mail(body: str, *, sender: str = ME, number: int = 0, **headers: str) -> str:
    lines = {"From": sender, "Message-ID": f"<{number}@x>", "Subject": "Re: Friday"}
    lines |= {
        "Date": f"Tue, 7 Jul 2026 {10 + number % 10}:00:00 +0200",
        "Content-Type": "text/plain; charset=utf-8",
    }
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    return "\n".join(f"{name}: {value}" for name, value in lines.items()) + f"\n\n{body}\n"


def mbox(path: Path, *mails: str) -> Path:
    path.write_text("".join(f"From x Tue Jul  7 10:00:00 2026\n{each}\n" for each in mails), "utf-8")
    return path


def read(path: Path, report: Report | None = None, *me: str) -> list[HistoryItem]:
    return read_history(path, TASK, choices=Choices(me=me), report=report)


def pairs(items: list[HistoryItem]) -> list[tuple[str, str]]:
    return [(item.fields["message"], item.fields["reply"]) for item in items]


def test_own_words_and_what_the_reply_quotes(tmp_path: Path) -> None:
    report = Report()
    items = read(mbox(tmp_path / "Sent", mail(BODY)), report)
    assert pairs(items) == [("Are we still on for Friday?", "Hey Dan,\nSeven it is, as ever.")]
    assert items[0].date == "2026-07-07T08:00:00Z", "of UTC"
    assert report.name == "mail" and report.format == "mail of nell@example.org"


def test_the_mail_that_was_answered_is_the_prompt(tmp_path: Path) -> None:
    asked = mail("Shall we?\n\n-- \nBo", sender="Bo <bo@x>", number=1)
    answer = mail("Let us!", number=2, In_Reply_To="<1@x>")
    more = mail("Bare words.", number=3)
    report = Report()
    items = read(mbox(tmp_path / "all.mbox", asked, answer, more), report)
    assert pairs(items) == [("Shall we?", "Let us!")]
    assert [(each.reason, each.count, each.places) for each in report.skipped] == [
        ("from others", 1, ("mail 1",)),
        ("new mails, or answers to what is neither in the box nor quoted", 1, ("mail 3",)),
    ]


def test_a_maildir_says_the_same(tmp_path: Path) -> None:
    for name in ("cur", "new", "tmp", ".Sent/cur", ".Sent/new"):
        (tmp_path / "box" / name).mkdir(parents=True)
    (tmp_path / "box/.Sent/cur/1:2,S").write_text(mail(BODY))
    (tmp_path / "box/new/2").write_text(mail("x", sender="bo@x"))
    (tmp_path / "box/cur/loop").symlink_to(tmp_path / "box")
    items = read(tmp_path / "box", None, "NELL@example.org")
    assert pairs(items) == [("Are we still on for Friday?", "Hey Dan,\nSeven it is, as ever.")]


def test_whose_box_it_is_shows_or_is_asked(tmp_path: Path) -> None:
    box = mbox(tmp_path / "b", mail(BODY), mail(BODY, sender="bo@x"), mail(BODY, sender="cy@x"))
    with pytest.raises(InvalidData, match=r"--me ADDRESS; most mails are from nell@example.org \(1\)"):
        read(box)
    assert len(read(box, None, "bo@x")) == 1


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({"Auto_Submitted": "auto-replied"}, "sent automatically"),
        ({"Precedence": "bulk"}, "sent automatically"),
        ({"List_Id": "<dev.x>"}, "to mailing lists"),
        ({"Subject": "Fwd: Friday"}, "that are forwarded"),
        (
            {"Content_Type": "multipart/encrypted; boundary=x"},
            "without text (attachments alone, or encrypted)",
        ),
        ({"Content_Type": "application/pdf"}, "without text (attachments alone, or encrypted)"),
    ],
)
def test_what_is_left_out_is_counted_by_reason(tmp_path: Path, headers: dict[str, str], reason: str) -> None:
    report = Report()
    assert len(read(mbox(tmp_path / "b", mail(BODY), mail(BODY, **headers)), report)) == 1
    assert [(each.reason, each.places) for each in report.skipped] == [(reason, ("mail 2",))]


def test_html_alone_and_old_encodings(tmp_path: Path) -> None:
    html = '<p>Sieben, wie immer. Gr&uuml;n!</p><blockquote type="cite"><p>Um wie viel Uhr?</p></blockquote>'
    box = mbox(tmp_path / "b", mail(html, Content_Type="text/html; charset=us-ascii"))
    assert pairs(read(box)) == [("Um wie viel Uhr?", "Sieben, wie immer. Grün!")]
    for charset, name in (("cp1252", "windows-1252"), ("cp1252", "no-such-charset"), ("utf-8", "idna")):
        data = mail("Grün!\n\n> Rot?", Content_Type=f"text/plain; charset={name}").encode(charset)
        (tmp_path / "b").write_bytes(b"From x\n" + data)
        assert pairs(read(tmp_path / "b")) == [("Rot?", "Grün!")]


_OLDER = "> > Older words.\n"
_QUOTES = {
    "french": "Le mar. 7 juil. 2026 à 10:00, Bo Lee <bo@x.org> a écrit :\n> Shall we?\n> Bo\n" + _OLDER,
    "spanish, wrapped": "El mar, 7 jul 2026 a las 10:00, Bo Lee\n(<bo@x.org>) escribió:\n\n> Shall we?\n",
    "dutch, nested": "Op di 7 jul 2026 om 10:00 schreef Bo:\n> Shall we?\n>\n> Op 6 juli 2026 schreef Al:\n"
    + _OLDER,
    "german outlook": "-----Ursprüngliche Nachricht-----\nVon: Bo Lee\nGesendet: Dienstag, 7. Juli 2026\n"
    "An: Nell\nBetreff: Friday\n\nShall we?\n\nFrom: Al\nSent: Monday\nTo: Bo\n\nOlder words.",
    "french outlook": "________________\nDe : Bo Lee <bo@x.org>\nEnvoyé : mardi\nÀ : Nell\n\nShall we?\n",
    "apple forwards heads": "*From:* Bo Lee\n*Date:* 7 July\n*To:* Nell\n\nShall we?\n",
}


@pytest.mark.parametrize("signature", ["", "\n-- \nNell Quick\nExample Ltd"])
@pytest.mark.parametrize("quote", _QUOTES.values(), ids=_QUOTES)
def test_each_way_to_quote_leaves_own_words(tmp_path: Path, quote: str, signature: str) -> None:
    """Only English and German were known: others' whole threads counted as the writer's own words."""
    items = read(mbox(tmp_path / "b", mail(f"Hey Bo,\n\nOui, at 10:30:\nthe café.\n{signature}\n\n{quote}")))
    ((heard, own),) = pairs(items)
    assert own == "Hey Bo,\nOui, at 10:30:\nthe café."
    assert heard.split("\n")[0] == "Shall we?" and "Older" not in heard and "2026" not in heard


def test_html_quotes_in_quotes_are_of_the_newest_mail(tmp_path: Path) -> None:
    line = '<div class="gmail_attr">Le mar. 7 juil. 2026 à 10:00, Bo &lt;bo@x.org&gt; a écrit :</div>'
    inner = f"{line}<blockquote>Older words.</blockquote>"
    html = f'<div>Oui.</div><div class="gmail_quote">{line}<blockquote>Shall we?{inner}</blockquote></div>'
    box = mbox(tmp_path / "b", mail(html, Content_Type="text/html; charset=utf-8"))
    assert pairs(read(box)) == [("Shall we?", "Oui.")]


def test_a_from_line_inside_a_mail_is_text(tmp_path: Path) -> None:
    box = mbox(tmp_path / "b", mail("It came.\n>From afar.\n\n> Did it?"))
    assert pairs(read(box)) == [("Did it?", "It came.\nFrom afar.")]


# -- hostile boxes -------------------------------------------------------------------------------


def test_ten_thousand_parts_and_deep_nesting(tmp_path: Path) -> None:
    part = "--x\nContent-Type: application/x\n\ny\n"
    many = mail(part * 10_000 + "--x--\n", Content_Type="multipart/mixed; boundary=x")
    deep = "".join(f"Content-Type: multipart/mixed; boundary=b{n}\n\n--b{n}\n" for n in range(3000))
    nested = mail("", Content_Type="multipart/mixed; boundary=z").rstrip() + f"\n\n--z\n{deep}"
    report = Report()
    assert len(read(mbox(tmp_path / "b", mail(BODY), many, nested), report)) == 1
    assert sum(each.count for each in report.skipped) == 2


def test_a_mail_that_would_take_minutes_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's patterns are cubic in these: 66 s for 24,000 characters."""
    monkeypatch.setattr(mail_text, "_SECONDS", 0.1)
    report = Report()
    started = time.process_time()
    box = mbox(tmp_path / "b", mail(BODY), mail("From: a@b\n" * 2400), mail("On " * 8000))
    assert len(read(box, report)) == 1
    assert [(each.reason, each.count) for each in report.skipped] == [("that take too long to read", 2)]
    assert time.process_time() - started < 20
    monkeypatch.setattr(mail_text, "_SECONDS", 0.01)
    with pytest.raises(InvalidData, match="21 mails take too long"):
        read(mbox(tmp_path / "c", mail(BODY), *[mail("On " * 8000)] * 21))


def test_broken_headers_break_nothing(tmp_path: Path) -> None:
    bad = mail(BODY, number=1, Date="Tue, 99 Foo 99999 99:99:99", References="<" * 5000)
    worse = mail(BODY + "again", number=2, Date="\ud7ff", Subject="=?utf-8?b?" + "=" * 3000)
    items = read(mbox(tmp_path / "b", bad, worse))
    assert [item.date for item in items] == [""] * len(items) and items
