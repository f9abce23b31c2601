"""Versions as a person handles them, forgetting by name, shifts from files, and artefacts that change."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.device import Perfit
from tests.support.fake_cloud import SPEC

from perfit_device import answers
from perfit_device.answers import Answer
from perfit_device.vault.store import Vault
from perfit_shared.errors import IdentityRevoked, Unavailable
from perfit_shared.shifts import LayerShift, ShiftTensors


@pytest.fixture
def trained(ready: Perfit) -> Perfit:
    ready.ok("update", "--epochs", "2")
    ready.ok("history", "add", "The latest.", "Latest", "--task", "news_headline")
    ready.ok("update", "--epochs", "3", "--anyway")
    return ready


def numbers(perfit: Perfit) -> list[tuple[int, bool]]:
    return [(v["number"], v["current"]) for v in perfit.json("versions", "list")["versions"]]


def kinds(home: Path, kind: str) -> dict[str, bytes]:
    with Vault.open(home / "profiles" / "default" / "vault.db", "correct horse") as vault:
        return vault.list(kind)


# -- versions --------------------------------------------------------------------------------------


def test_versions_are_shown_used_and_dropped_without_the_cloud(trained: Perfit, cloud: Any) -> None:
    cloud.stop()
    assert numbers(trained) == [(1, False), (2, True)]
    assert trained.json("versions", "list") == trained.json("undo", "--list")
    shown = trained.json("versions", "show")
    assert (shown["version"]["number"], shown["version"]["follows"], shown["is_current"]) == (2, 1, True)
    assert shown["examples"] and shown["numbers"] == SPEC.personal_parameters()
    text = trained.ok("versions", "show", "1")
    assert "version           1\n" in text and "artefact          v1" in text and "→" in text
    assert "version 7 of news_headline is not kept" in trained.fails("versions", "show", "7")
    assert trained.json("versions", "use", "1") == {"task": "news_headline", "updates": 1, "number": 1}
    assert "current one" in trained.fails("versions", "use", "1")
    assert "Say so with --yes" in trained.fails("versions", "drop", "2")
    assert numbers(trained) == [(1, True), (2, False)]
    assert "is the current one" in trained.fails("versions", "drop", "1", "--yes")
    assert "its number, or --all" in trained.fails("versions", "drop", "--yes")
    assert trained.json("versions", "drop", "2", "--yes") == {"task": "news_headline", "dropped": 1}
    assert trained.json("versions", "drop", "--all", "--yes")["dropped"] == 1
    assert "no personal shift yet" in trained.fails("versions", "list")


# -- forgetting -------------------------------------------------------------------------------------


def named(perfit: Perfit, title: str) -> str:
    found = (item for item in perfit.json("history", "list") if item["fields"]["title"] == title)
    return str(next(found)["name"])


def test_forgetting_says_which_versions_know_the_example(trained: Perfit, home: Path, cloud: Any) -> None:
    with Vault.open(home / "profiles" / "default" / "vault.db", "correct horse") as vault:
        answers.put(vault, Answer("Meeting 0", "news_headline"))
        answers.put(vault, Answer("Something else", "news_headline"))
    name, asked = named(trained, "Meeting 0"), list(cloud.calls)
    line = trained.fails("forget", name[:8])
    assert "forgets 1 examples for good, deletes 1 kept answers" in line
    assert "drops version 1 of news_headline, leaves version 2 of news_headline" in line
    assert len(trained.json("history", "list")) == 21
    done = trained.json("forget", name[:8], "--yes")
    assert [(v["number"], v["is_certain"]) for v in done["dropped"]] == [(1, True)]
    assert [(v["number"], v["is_current"]) for v in done["left"]] == [(2, True)]
    assert numbers(trained) == [(2, True)]
    assert cloud.calls == asked
    mark = bytes.fromhex(name)[:16]
    assert not any(
        mark in row or name.encode() in row for k in ("trained", "shift") for row in kinds(home, k).values()
    )
    assert [json.loads(row)["text"] for row in kinds(home, "answer").values()] == ["Something else"]


def test_what_no_version_knows_is_forgotten_without_harm(trained: Perfit) -> None:
    trained.ok("history", "add", "Never trained on.", "New", "--task", "news_headline")
    done = trained.json("forget", named(trained, "New"), "--yes")
    assert done == {"forgotten": 1}
    assert numbers(trained) == [(1, False), (2, True)]


def test_retraining_leaves_no_version_that_knows_it(trained: Perfit, home: Path) -> None:
    name = named(trained, "Meeting 0")
    done = trained.json("forget", name, "--retrain", "--yes")
    assert done["retrained"] == ["news_headline"] and "left" not in done
    assert [v["number"] for v in done["dropped"]] == [1, 2]
    assert [number for number, _ in numbers(trained)] == [3]
    mark = bytes.fromhex(name)[:16]
    assert not any(mark in row for row in kinds(home, "trained").values())
    assert len(kinds(home, "version")) == 1


def test_retraining_that_stops_half_way_forgets_nothing_and_goes_on(
    trained: Perfit, cloud: Any, home: Path
) -> None:
    """Once the example was gone the command could not be given again, and the shift still knew it."""
    name, before = named(trained, "Meeting 0"), kinds(home, "shift")
    steps = iter(range(1000))
    refused = IdentityRevoked("not now")
    cloud.fail = lambda method: refused if method == "ComputeGradient" and next(steps) > 40 else None
    code, _, err = trained("forget", name, "--retrain", "--yes")
    assert code == 4 and "nothing is forgotten yet" in err
    assert kinds(home, "shift") == before and named(trained, "Meeting 0") == name
    cloud.fail = lambda method: None
    _, _, err = trained("forget", name, "--retrain", "--yes")
    assert "resuming after step" in err
    assert [number for number, _ in numbers(trained)] == [3]
    assert "Meeting 0" not in trained.ok("history", "list")


def test_retraining_that_cannot_be_forgets_nothing(trained: Perfit, cloud: Any) -> None:
    names = [item["name"] for item in trained.json("history", "list")]
    line = trained.fails("forget", *names[:15], "--retrain", "--yes")
    assert "so nothing was forgotten" in line
    cloud.fail = lambda method: Unavailable("away")
    trained.fails("forget", names[0], "--retrain", "--yes", code=3)
    assert len(trained.json("history", "list")) == 21
    assert numbers(trained) == [(1, False), (2, True)]


# -- shifts from files ------------------------------------------------------------------------------


def test_an_exported_shift_comes_back_as_a_new_version(trained: Perfit, cloud: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.shift"
    trained.ok("export", "--shift", str(file))
    first = trained.json("versions", "show", "2")
    trained.ok("undo")
    cloud.stop()
    assert trained.json("import", "--shift", str(file)) == {"task": "news_headline", "number": 3}
    shown = trained.json("versions", "show")
    assert (shown["version"]["origin"], shown["version"]["updates"], shown["version"]["follows"]) == (
        "imported",
        first["version"]["updates"],
        1,
    )
    assert shown["norm"] == pytest.approx(first["norm"]) and shown["examples"] is None
    assert trained.json("undo")["number"] == 1
    assert [n for n, _ in numbers(trained)] == [1, 2, 3]


def harmed(how: str, tensors: ShiftTensors, metadata: dict[str, str]) -> bytes:
    one = tensors.layers[1]
    layers = dict(tensors.layers)
    if how == "names":
        layers[7] = layers.pop(1)
    elif how == "shapes":
        layers[1] = LayerShift(one.rotation[:1], one.source, one.bias)
    elif how == "finiteness":
        layers[1] = LayerShift(one.rotation, one.source, np.full_like(one.bias, np.nan))
    elif how == "norm":
        layers[1] = LayerShift(one.rotation, one.source, np.full_like(one.bias, 1e6))
    elif how == "rotation":
        layers[1] = LayerShift(one.rotation * np.float32(1.1), one.source, one.bias)
    elif how in metadata:
        metadata = metadata | {how: "other"}
    data = ShiftTensors(layers).to_bytes(metadata=metadata)
    if how == "cut":
        return data[:-9]
    return b"\xff" * 8 + data[8:] if how == "header" else data


@pytest.mark.parametrize(
    "how", ["names", "shapes", "finiteness", "norm", "rotation", "artefact", "version", "cut", "header"]
)
def test_hostile_files_are_refused_and_change_nothing(
    trained: Perfit, tmp_path: Path, home: Path, how: str
) -> None:
    tensors = ShiftTensors.identity(SPEC, SPEC.personal_rank, 5)
    metadata = {"artefact": "news_headline", "version": "v1", "task": "news_headline"}
    file, before = tmp_path / "theirs.shift", kinds(home, "shift")
    file.write_bytes(harmed("nothing", tensors, metadata))
    assert trained.json("import", "--shift", str(file))["number"] == 3
    trained.ok("undo")
    before = kinds(home, "shift")
    file.write_bytes(harmed(how, tensors, metadata))
    trained.fails("import", "--shift", str(file))
    assert kinds(home, "shift") == before


# -- another artefact ---------------------------------------------------------------------------------


def test_a_new_artefact_is_moved_to_and_the_old_version_stays(trained: Perfit, cloud: Any) -> None:
    assert "nothing to migrate" in trained("migrate")[2]
    cloud.version = "v2"
    cloud.seed = ShiftTensors.identity(SPEC, SPEC.personal_rank, 4)
    assert "perfit migrate" in trained.fails("ask", "x")
    before = trained.json("versions", "show")["version"]["learned"]["gate_after"]
    (done,) = trained.json("migrate")
    assert (done["before"], done["after"], done["loss_before"]) == (2, 3, before)
    assert done["loss_after"] is not None and done["same_model"] and done["keeps_old"]
    versions = trained.json("versions", "list")["versions"]
    assert [(v["artefact_version"], v["current"]) for v in versions] == [
        ("v1", False),
        ("v1", False),
        ("v2", True),
    ]
    trained.ok("ask", "x")
    assert trained.json("migrate") == []


def test_what_cannot_be_compared_is_said(trained: Perfit, cloud: Any, home: Path) -> None:
    with Vault.open(home / "profiles" / "default" / "vault.db", "correct horse") as vault:
        from perfit_device.shift_versions import TrainingSummary, Versions

        ((row, data),) = vault.list("shift").items()
        versions = Versions.from_bytes(data)
        kept = [dataclasses.replace(each, learned=TrainingSummary()) for each in versions.kept]
        vault.put("shift", row, dataclasses.replace(versions, kept=tuple(kept)).to_bytes())
    cloud.version = "v2"
    _, _, err = trained("migrate")
    assert "was not recorded, and cannot be measured any more" in err
    assert "version 3 is your shift now, and version 2 kept beside it" in err
