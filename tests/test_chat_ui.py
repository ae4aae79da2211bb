"""The widgets of the chat: every action works, refusals are said, errors are kept, and no text becomes markup."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_chat as tiny

from helpers.chat import feedback, widgets
from helpers.chat import session as chat


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    home = tmp_path_factory.mktemp("home")
    model, dataset = tiny.build_model(), tiny.write_dataset(home / "data")
    tiny.write_results(model, dataset, home)
    return model, dataset, home


@pytest.fixture
def ui(made, tmp_path: Path) -> widgets.ChatUI:
    talk = tiny.session(*made)
    log, transcripts = tmp_path / "feedback.jsonl", tmp_path / "chat"
    return widgets.ChatUI(talk, chat.sample_pictures(made[1]), log=log, transcripts=transcripts)


def test_a_picture_is_there_from_the_start(ui: widgets.ChatUI) -> None:
    assert ui.session.picture is not None and bytes(ui.image.value).startswith(b"\x89PNG")
    assert "of 2 detectors" in ui.line.value and "AnomalyCLIP" in ui.table.value
    assert ui.threshold.value == pytest.approx(ui.session.threshold, abs=1e-3)


def test_choosing_comparing_and_moving_the_threshold(ui: widgets.ChatUI) -> None:
    ui.sample.value = "Two: replica"
    assert ui.session.category == ui.compared_with.value == "two"
    ui.compared_with.value = "one"
    assert ui.session.category == "one" and ui.session.picture.category == "two"
    ui.threshold.value = ui.threshold.max
    assert not ui.session.map_says and "map: no" in ui.line.value
    ui.threshold.value = 0.0
    before = bytes(ui.image.value)
    ui.view.value = "picture"
    assert bytes(ui.image.value) != before


def test_paths_and_uploads_of_both_versions(ui: widgets.ChatUI, made) -> None:
    sample = made[1].samples[0]
    ui.path.value = str(sample.image_path)
    assert ui.session.picture.sha256 == sample.sha256
    content = made[1].samples[1].image_path.read_bytes()
    for value in ({"a.png": {"content": content}}, ({"name": "a.png", "content": memoryview(content)},)):
        ui.upload = type("Upload", (), {"value": value})
        ui._receive()
        assert ui.session.picture.name == "a.png" and ui.sample.value is None and ui.session.errors == []
    ui.path.value = "no_such_picture.jpg"
    assert "no_such_picture.jpg" in ui.message.value and ui.session.errors == []


def test_questions_and_answers_are_shown(ui: widgets.ChatUI) -> None:
    for button in ui.quick:
        button.click()
    ui.question.value = "What is it?"
    ui.send.click()
    assert [turn.question for turn in ui.session.history] == [*chat.FIXED_QUESTIONS, "What is it?"]
    assert ui.question.value == "" and "What is it?" in ui.talk.value and "From the map" in ui.talk.value
    ui.send.click()
    assert "empty" in ui.message.value
    ui.again.click()
    assert ui.session.history == [] and ui.session.errors == []


def test_no_text_becomes_markup(ui: widgets.ChatUI, monkeypatch) -> None:
    monkeypatch.setattr(type(ui.session.model), "ask", lambda self, look, prompt, **options: [tiny.HOSTILE])
    ui.question.value = tiny.HOSTILE
    ui.send.click()
    ui.path.value = f"/{tiny.HOSTILE}"
    ui.save.click()
    (page,) = (ui._transcripts).iterdir()
    for text in (ui.talk.value, ui.message.value, ui.line.value, ui.table.value, page.read_text("utf-8")):
        assert "<script" not in text and "<img src=x" not in text
    assert "&lt;script" in ui.talk.value and "Written" in ui.message.value


def test_an_exception_is_shown_and_kept(ui: widgets.ChatUI, monkeypatch) -> None:
    def fail(*_given, **_options):
        raise RuntimeError("<b>out of luck</b>")

    monkeypatch.setattr(type(ui.session.model), "ask", fail)
    ui.quick[0].click()
    assert ui.session.errors == ["RuntimeError: <b>out of luck</b>"]
    assert "&lt;b&gt;out of luck" in ui.message.value and "Traceback" in ui.message.value
    ui.quick[1].click()
    assert len(ui.session.history) == 1, "the chat goes on"


def test_judgements_are_saved(ui: widgets.ChatUI) -> None:
    ui.give.click()
    assert "Say first" in ui.message.value
    ui.verdict.value, ui.label.value, ui.region.value, ui.comment.value = "wrong", "anomalous", "top left", "<b>"
    ui.give.click()
    (entry,), skipped = feedback.read(ui._log)
    assert (entry.verdict, entry.region, entry.is_anomalous, skipped) == ("wrong", "top left", True, [])
    assert entry.comment == "<b>" and entry.context["category"] == "one"
    ui.verdict.value, ui.label.value, ui.region.value = "wrong", "genuine", "top"
    ui.give.click()
    assert "Clear one" in ui.message.value and ui.session.errors == []


def test_an_action_during_an_action_is_ignored(ui: widgets.ChatUI) -> None:
    ui._busy = True
    ui.quick[0].click()
    assert ui.session.history == []
