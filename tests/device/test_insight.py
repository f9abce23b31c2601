"""`perfit insight`: what it measures, what the page holds, and the page in a browser."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import browser
from tests.support.device import Perfit
from tests.support.updates import SEED

from perfit_device.insight.page import render
from perfit_device.insight.report import Answered, Insight, Layer, Learned
from perfit_device.training.distance import distances
from perfit_device.training.journal import Entry, Measured
from perfit_device.vault.store import Vault
from perfit_shared.shifts import LayerShift, ShiftTensors

HOSTILE = """</title><script>document.title='owned'</script><img src="http://127.0.0.1/x" onerror="alert(1)">
"'&<style>*{display:none}</style>\u202e\x1b[2J\x00"""


def entry(n: int, *, accepted: bool = True) -> Entry:
    gate = 3.6 - 0.25 * n
    return Entry(
        date=f"2026-0{n}-14T09:00:00Z",
        known=20 * n,
        examples=20 * n,
        judges=20 * n,
        train_before=3.9 - 0.2 * n,
        train_after=2.6 - 0.2 * n,
        gate_before=gate + 0.45,
        gate_after=gate + (0.0 if accepted else 0.5),
        error=0.04,
        accepted=accepted,
        version=n if accepted else None,
    )


SAMPLE = Insight(
    artefact="news_headline",
    version=5,
    date="2026-06-01T10:00:00Z",
    updates=(entry(1), entry(2), entry(3, accepted=False), entry(4), entry(5)),
    layers=(Layer(6, 0.412, 0.921), Layer(10, 0.733, 1.204), Layer(14, 1.288, 1.02)),
    measured=Measured(
        "2026-05-30T08:00:00Z",
        5,
        18,
        "rouge_1",
        {"base": 5.05, "collective": 4.25, "seed": 4.17, "personal": 3.84},
        {"base": 0.061, "collective": 0.108, "seed": 0.115, "personal": 0.143},
    ),
    examples=tuple(
        Learned(f"{n:08}", f"The council met in room {n} until dawn, and nobody left early.", title, *losses)
        for n, (title, losses) in enumerate(
            [
                ("Dawn finds the council still talking", (4.9, 2.1)),
                ("Room 12 stays locked", (4.4, 2.6)),
                ("A long night for the mayor", (3.9, 2.9)),
                ("Nothing new from the harbour", (3.1, 3.0)),
            ]
        )
    ),
    examples_date="2026-05-31T08:00:00Z",
    examples_version=5,
    answers=(
        Answered(
            "The ferry did not sail.", "Ferry stays put", "The ferry did not sail today.", "Ferry stays"
        ),
        Answered("Rain for a week.", "Seven wet days", "It will rain for one week.", "Seven days of rain"),
    ),
    gain_on_test=0.41,
)


# -- what it measures ----------------------------------------------------------------------------


def moved(tensors: ShiftTensors, by: float) -> ShiftTensors:
    rng = np.random.default_rng(3)
    return ShiftTensors(
        {
            layer: LayerShift(
                shift.rotation,
                shift.source + by * rng.standard_normal(shift.source.shape).astype(np.float32),
                shift.bias + np.float32(by),
            )
            for layer, shift in tensors.layers.items()
        }
    )


def test_the_distance_is_that_of_the_maps() -> None:
    """Equal maps whose tensors differ are no distance apart: a turned r-space is the same φ."""
    mine = moved(SEED, 0.3)
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))[0].astype(np.float32)
    turned = ShiftTensors({k: LayerShift(turn @ s.rotation, turn @ s.source, turn @ s.bias)
                           for k, s in mine.layers.items()})  # fmt: skip
    assert distances(turned, mine)[0].moved == pytest.approx(0.0, abs=1e-3)
    (found,) = distances(turned, SEED)
    one, seed = mine.layers[1], SEED.layers[1]
    whole = one.rotation.T @ (one.source - one.rotation) - seed.rotation.T @ (seed.source - seed.rotation)
    shifted = one.rotation.T @ one.bias - seed.rotation.T @ seed.bias
    assert found.moved == pytest.approx(np.sqrt((whole**2).sum() + (shifted**2).sum()), rel=1e-5)


def test_insight_offline_then_online(ready: Perfit, cloud: Any) -> None:
    assert "no personal shift yet" in ready.fails("insight")
    ready.ok("update")
    cloud.calls.clear()
    found = ready.json("insight")
    assert not cloud.calls
    assert [each["accepted"] for each in found["updates"]] == [True]
    assert [each["number"] for each in found["layers"]] == [1, 2] and found["layers"][0]["moved"] > 0
    assert found["examples"] == [] and found["answers"] == []
    found = ready.json("insight", "--online")
    drops = [each["before"] - each["after"] for each in found["examples"]]
    assert len(drops) == 16 and drops == sorted(drops, reverse=True) and drops[0] > 0
    assert len(found["answers"]) == 4 and found["answers"][0]["mine"].startswith("Meeting")
    assert found["gain_on_test"] > 0
    cloud.calls.clear()
    assert len(ready.json("insight")["examples"]) == 16, "the scores are kept"
    assert not cloud.calls
    out = ready.ok("insight")
    assert "learned most of" in out and "distance from the seed, by layer" in out


@pytest.mark.parametrize("columns", [60, 100])
def test_insight_fits_the_terminal(
    columns: int, ready: Perfit, cloud: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    cloud.answer = "many words " * 20
    ready.ok("update")
    lines = ready.ok("insight", "--online").splitlines()
    assert max(map(len, lines)) == min(columns, 80), "long answers are cut, and not before they must be"
    assert sum(line.endswith("…") for line in lines) == 8


def test_what_is_forgotten_is_not_kept_by_insight(ready: Perfit, home: Path) -> None:
    ready.ok("update")
    ready.ok("insight", "--online")
    name = ready.json("insight")["examples"][0]["name"]
    ready.ok("history", "forget", name, "--yes")
    with Vault.open(home / "profiles" / "default" / "vault.db", "correct horse") as vault:
        kinds = ("influence", "updates", "measured", "seed")
        assert not any(name.encode() in row for kind in kinds for row in vault.list(kind).values())


# -- the page ------------------------------------------------------------------------------------


def test_the_file_is_its_owner_s_alone(ready: Perfit, tmp_path: Path) -> None:
    ready.ok("update")
    page = tmp_path / "insight.html"
    _, _, err = ready("insight", "--html", str(page))
    assert stat.S_IMODE(page.stat().st_mode) == 0o600 and "texts of your own" in err
    assert "exists" in ready.fails("insight", "--html", str(page))
    ready.ok("insight", "--html", str(page), "--force")
    assert "cannot write" in ready.fails("insight", "--html", str(tmp_path / "no" / "x.html"))


def hostile() -> Insight:
    return replace(
        SAMPLE,
        artefact=HOSTILE,
        examples=(Learned("x", HOSTILE, HOSTILE, 3.0, 2.0),),
        answers=(Answered(HOSTILE, HOSTILE, HOSTILE, HOSTILE),),
        measured=Measured("2026-01-01", 1, 3, HOSTILE, {HOSTILE: 2.0}, {HOSTILE: 0.1}),
    )


def test_hostile_texts_stay_texts() -> None:
    page = render(hostile())
    for markup in ("<script", "<img", 'onerror="', "\x1b", "\u202e", "\x00", "*{display:none}</style>"):
        assert markup not in page
    assert page.count("<style>") == 1 and "&lt;script&gt;" in page


def test_a_shift_of_which_little_is_known() -> None:
    page = render(Insight("a", 1, "2026-01-01T00:00:00Z", (entry(1),), (), None, ()))
    for text in ("Not measured yet", "The seed is not kept", "Not scored yet", "Not asked"):
        assert text in page
    assert "No update has been recorded" in render(replace(SAMPLE, updates=()))


# -- in a browser --------------------------------------------------------------------------------


@pytest.mark.skipif(browser.PROGRAM is None, reason="there is no Chromium here (Debian's package: chromium)")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    """It opens without a complaint, asks nobody for anything, shows its texts, and fits every width."""
    pages = {"sample": render(SAMPLE), "hostile": render(hostile())}
    for name, text in pages.items():
        (tmp_path / f"{name}.html").write_text(text)
    with browser.Browser() as opened:
        opened.open(tmp_path / "sample.html")
        text = opened.evaluate("document.body.innerText")
        for part in (
            "What your shift for news_headline learned",
            "Dawn finds the council",
            "Ferry stays put",
        ):
            assert part in text
        colours = set()
        for width in (1280, 360):
            for dark in (False, True):
                opened.show(width=width, dark=dark)
                wide = opened.evaluate("document.documentElement.scrollWidth")
                assert wide <= width, "nothing needs scrolling sideways"
                colours.add(opened.evaluate("getComputedStyle(document.body).backgroundColor"))
                (tmp_path / f"{width}-{'dark' if dark else 'light'}.png").write_bytes(opened.picture())
        assert len(colours) == 2
        complaints(opened)
        opened.open(tmp_path / "hostile.html")
        assert opened.evaluate("document.scripts.length + document.images.length") == 0
        assert opened.evaluate("document.title") != "owned"
        assert "onerror" in opened.evaluate("document.body.innerText"), "it is shown as it was written"
        complaints(opened)


def complaints(opened: browser.Browser) -> None:
    methods = [event["method"] for event in opened.events if "method" in event]
    assert not {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"} & set(methods), [
        json.dumps(event) for event in opened.events if event["method"] == "Log.entryAdded"
    ]
    sent = [
        e["params"]["request"]["url"] for e in opened.events if e["method"] == "Network.requestWillBeSent"
    ]
    assert sent and all(url.startswith("file:") for url in sent) and len(sent) == 1
