"""`analyze`'s page, from a request to what it shows: on a tiny random model and invented files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.support.lamp_files import WORDS, write_files
from tests.support.lamp_requests import small_request
from typer.testing import CliRunner, Result

from perfit_cloud.analysis.queries import QueryOptions
from perfit_cloud.analysis.request import AnalysisRequest
from perfit_cloud.analysis.run import run_analysis
from perfit_cloud.cli.main import app
from perfit_cloud.lamp.results import Run
from perfit_cloud.lamp.run import run_lamp
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_shared.errors import InvalidInput, PerfitError

OPTIONS = QueryOptions(retrieved=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("lamp") / "news_headline")


@pytest.fixture(scope="module")
def request_for(data: Path, model_folder: Callable[[str], Path]) -> Callable[..., AnalysisRequest]:
    def make(out: Path, **changes: Any) -> AnalysisRequest:
        values = {"task": "news_headline", "model": str(model_folder("llama")), "data": (data,), "out": out}
        return AnalysisRequest(**{**values, "queries": OPTIONS, "texts": False, **changes})

    return make


@pytest.fixture(scope="module")
def finished(
    request_for: Callable[..., AnalysisRequest],
    load: Callable[[str], BaseModel],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("analysis")
    return out, run_analysis(request_for(out), base=load("llama"))


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_holds_its_pictures_and_no_texts_unless_asked(
    finished: tuple[Path, dict[str, Any]],
    request_for: Callable[..., AnalysisRequest],
    load: Callable[[str], BaseModel],
) -> None:
    out, numbers = finished
    text = (out / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.tags.count("img") == 3 and "script" not in page.tags
    assert all(link.startswith("data:image/png;base64,") for link in page.links) and "http" not in text
    assert not any(f"{word} {word}" in text for word in WORDS), "nobody's titles"
    assert json.loads((out / "analysis.json").read_text()) == json.loads(json.dumps(numbers))
    of_task = numbers["tasks"]["news_headline"]
    assert of_task["users"] == 5 and len(of_task["blocks"]) == load("llama").blocks
    assert {one["where"] for one in of_task["placed"]} == {"closest", "middle", "farthest"}
    assert "paper, LaMP-4</th>" in text and "--layers" in text
    run_analysis(request_for(out, texts=True), base=load("llama"))  # of the same vectors
    assert any(f"title: {word} {word}" in (out / "report.html").read_text() for word in WORDS)


@pytest.mark.slow
def test_several_tasks_share_a_map_and_an_artefact_brings_its_cross_term(
    request_for: Callable[..., AnalysisRequest],
    load: Callable[[str], BaseModel],
    make_artefact: Callable[..., Artefact],
    data: Path,
    tmp_path: Path,
) -> None:
    base = load("llama")
    make_artefact(base).save(tmp_path / "artefact")
    both = (data, data / "user_others.json")
    out = tmp_path / "out"
    found = run_analysis(
        request_for(out, data=both, artefacts=(tmp_path / "artefact",), control=False, users=4), base=base
    )
    assert set(found["tasks"]) == {"news_headline", "news_headline-user_others"}
    assert all(len(of_task["cross_terms"]) == 2 for of_task in found["tasks"].values())
    page = Page()
    page.feed((out / "report.html").read_text())
    assert page.tags.count("img") == 5 and (out / "tasks.png").is_file(), "two a task, and the map"
    assert found["tasks"]["news_headline"]["blocks"][0]["control_norm"] is None


def broken(data: Path, tmp_path: Path) -> Path:
    (tmp_path / "user_others.json").write_text('[{"user_id": 1, "profile": [{"text": 1}]')
    return tmp_path


def lonely(data: Path, tmp_path: Path) -> Path:
    one = json.loads((data / "user_others.json").read_text())[:2]
    (tmp_path / "user_others.json").write_text(
        json.dumps([{**r, "profile": r["profile"][:1], "query": []} for r in one])
    )
    return tmp_path


def test_changed_data_is_another_analysis(
    request_for: Callable[..., AnalysisRequest], load: Callable[[str], BaseModel], data: Path, tmp_path: Path
) -> None:
    """Its old vectors stood beside the new texts."""
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    request = request_for(tmp_path / "out", data=(copy,), control=False)
    run_analysis(request, base=load("llama"))
    path = copy / "user_top_100_history.json"
    path.write_text(path.read_text().replace("cat", "dog"))
    with pytest.raises(InvalidInput, match="other data digest"):
        run_analysis(request, base=load("llama"))


@pytest.mark.parametrize(
    ("folder", "changes", "says"),
    [
        (lambda _data, tmp: tmp, {}, "holds none of"),
        (broken, {}, "user_others.json"),
        (lonely, {}, "and none has"),
        (lambda data, _tmp: data, {"users": 1}, "no spectrum"),
        (lambda data, _tmp: data, {"layer": 4}, "blocks 0 to 3"),
        (lambda data, _tmp: data, {"task": "no_such"}, "no_such"),
        (lambda data, _tmp: data, {"artefacts": (Path("nowhere"),)}, "not a usable artefact"),
    ],
)
def test_bad_input_is_one_clear_error(
    folder: Callable[[Path, Path], Path],
    changes: dict[str, Any],
    says: str,
    request_for: Callable[..., AnalysisRequest],
    load: Callable[[str], BaseModel],
    data: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(PerfitError, match=says):
        chosen = folder(data, tmp_path)
        run_analysis(request_for(tmp_path / "out", data=(chosen,), **changes), base=load("llama"))
    assert not (tmp_path / "out/report.html").exists()


@pytest.mark.slow
def test_a_runs_shifts_are_measured_on_their_own_artefact_alone(
    model_folder: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    """Shifts of another artefact were, and a run whose shifts were not found was measured with the seed."""
    model = model_folder("llama")
    same: dict[str, Any] = {
        "data": data,
        "dtype": "float32",
        "epochs": 1,
        "modes": ("personal",),
        "queries": 1,
    }
    run = run_lamp(small_request(model, out=tmp_path / "run", **same))
    given = {
        "artefact": tmp_path / "run" / "artefact",
        "collective_epochs": None,
        "collective_learning_rate": None,
    }
    retrieving = run_lamp(small_request(model, out=tmp_path / "rag", method="perfit+rag", **same, **given))
    another = run_lamp(small_request(model, out=tmp_path / "another", seed=1, **same))

    def analyze(of: Run, *more: str) -> Result:
        command = [
            "analyze",
            "--task",
            "news_headline",
            "--model",
            str(model),
            "--data",
            str(data),
            "--run",
            str(of.folder),
            *more,
        ]
        command += ["--dtype", "float32", "--no-control", "--no-texts", "--out", str(tmp_path / "out")]
        return CliRunner().invoke(app, command)

    found = analyze(run)
    assert found.exit_code == 0, found.output
    numbers = json.loads((tmp_path / "out" / "analysis.json").read_text())
    terms = numbers["tasks"]["news_headline"]["cross_terms"]
    assert terms
    nobody = run_lamp(small_request(model, out=tmp_path / "nobody", **(same | {"modes": ("seed",)}), **given))
    none = analyze(nobody, "--artefact", str(given["artefact"]))
    assert none.exit_code != 0 and "nobody's shift" in str(none.exception)
    without = analyze(retrieving, "--artefact", str(given["artefact"]))
    assert without.exit_code != 0 and "perfit+rag" in str(without.exception)
    wrong = analyze(run, "--artefact", str(another.folder / "artefact"))
    assert wrong.exit_code != 0 and "not trained on" in str(wrong.exception)
