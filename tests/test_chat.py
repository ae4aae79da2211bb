"""The chat: pictures, verdicts, answers from numbers, words that contradict the map; and its widgets."""

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import tiny_anomalygpt
import tiny_chat as tiny
import tiny_dataset

from helpers import results
from helpers.chat import detectors, feedback, widgets
from helpers.chat import session as chat
from helpers.chat.session import ASKED, SURE, WHERE, BadInput
from helpers.data import images


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    home = tmp_path_factory.mktemp("home")
    model, dataset = tiny_anomalygpt.talker(), tiny_dataset.write_dataset(home / "data")
    tiny.write_results(model, dataset, home)
    return model, dataset, home


@pytest.fixture
def talk(made) -> chat.ChatSession:
    return tiny.session(*made)


def picture(made, kind: str, category: str = "one") -> chat.Picture:
    sample = next(s for s in made[1].select(split="test", category=category) if s.kind == kind)
    return chat.open_picture(sample.image_path, category=sample.category)


def says(monkeypatch, talk: chat.ChatSession, answer: str) -> list[dict]:
    """The language model gives this answer; what it was asked is kept."""
    asked = []

    def ask(self, look, prompt: str, **options) -> list[str]:
        asked.append({"prompt": prompt} | options)
        return [answer]

    monkeypatch.setattr(type(talk.model), "ask", ask)
    return asked


def test_what_cannot_be_opened_or_asked_gets_a_sentence(tmp_path: Path) -> None:
    for text in ("", "  ", "https://example.org/a.png", tmp_path / "no_such_file.png", tmp_path):
        with pytest.raises(BadInput):
            chat.open_picture(text)
    for content in (b"", b"<svg></svg>", b"\x89PNG\r\n\x1a\n cut"):
        with pytest.raises(BadInput, match="evil.png"):
            chat.receive_picture("../../evil.png", content)
    assert chat.clean_question(" Is it\n whole?\x00 完整吗 🎨") == "Is it whole? 完整吗 🎨"
    for text in ("", " \n\t", "\x00\x07", "why? " * 2000):
        with pytest.raises(BadInput):
            chat.clean_question(text)


def test_a_path_may_be_quoted_an_upload_is_the_picture_unless_it_is_large_and_samples_show_all(made, monkeypatch):
    assert list(chat.sample_pictures(made[1])) == [
        "One: box", "One: replica", "One: genuine", "Two: box", "Two: replica", "Two: genuine"
    ]  # fmt: skip
    sample = made[1].samples[0]
    content = sample.image_path.read_bytes()
    assert chat.open_picture(f' "{sample.image_path}" ').sha256 == sample.sha256
    received = chat.receive_picture("C:\\photos\\a.png", content)
    assert received.name == "a.png" and received.path is None and received.sha256 == sample.sha256
    np.testing.assert_array_equal(received.image, images.load_image(sample.image_path))
    monkeypatch.setattr(chat, "MAX_UPLOAD_BYTES", 10)
    with pytest.raises(BadInput, match="path"):
        chat.receive_picture("a.png", content)


def test_verdicts_are_those_of_the_results_and_missing_detectors_are_named_with_the_notebook(made, talk) -> None:
    _, dataset, home = made
    for method in ("anomalygpt", "anomalyclip"):
        result = results.read(home / "results" / method, dataset.samples, dataset.folder, dataset.hash)
        for prediction in result.predictions:
            sample = prediction.sample
            talk.choose(chat.open_picture(sample.image_path, category=sample.category))
            found = next(one for one in talk.verdicts if one.method == method)
            assert found.anomaly_score == pytest.approx(prediction.anomaly_score, rel=1e-4)
            assert found.threshold == prediction.threshold and found.is_anomalous == prediction.is_predicted_anomalous
            assert found.p_value == pytest.approx(prediction.p_value)
    shown = picture(made, "box")
    talk.choose(shown)
    scores = {one.method: one.anomaly_score for one in talk.verdicts}
    assert talk.detectors.scores(shown.image, "one") == {"anomalyclip": pytest.approx(scores["anomalyclip"])}
    table = detectors.table(talk.verdicts)
    assert len(table) == len(detectors.NOTEBOOKS)
    assert "notebook 05_reference" in table.loc["Reference comparison", "note"]
    assert table.loc["AnomalyCLIP", "verdict"] == "anomalous"


def test_a_detector_that_fails_or_has_learnt_the_picture_says_so(made) -> None:
    model, dataset, home = made
    broken = Mock(side_effect=ValueError("too small"))
    found = detectors.load(dataset, home / "results", {"anomalyclip": lambda: broken})
    talk = chat.ChatSession(model, found, settings=tiny.SETTINGS)
    talk.choose(picture(made, "box"))
    assert any("too small" in one.note for one in talk.verdicts)
    away = detectors.load(dataset, home / "results", {"anomalyclip": Mock(side_effect=OSError("no route to the hub"))})
    assert "no route to the hub" in away.missing["anomalyclip"] and away.scores(talk.picture.image, "one") == {}
    learnt = dataset.select(split="train", category="one")[0]
    talk.choose(chat.open_picture(learnt.image_path, category="one"))
    assert detectors.LEARNT in [one.note for one in talk.verdicts]


def test_an_own_picture_is_compared_with_the_chosen_painting_and_an_unknown_one_is_refused(made, talk, tmp_path):
    own = replace(picture(made, "replica", "two"), category=None)
    talk.choose(own, category="two")
    assert talk.category == "two"
    first = talk.own.anomaly_score
    talk.choose(own, category="one")
    assert talk.category == "one" and talk.own.anomaly_score != first
    with pytest.raises(BadInput, match="one, two"):
        talk.choose(picture(made, "box"), category="three")
    found = detectors.load(made[1], tmp_path, {})
    with pytest.raises(ValueError, match="07_anomalygpt_test"):
        chat.ChatSession(made[0], found, settings=tiny.SETTINGS)


def test_place_and_certainty_come_from_the_numbers(made, talk: chat.ChatSession, monkeypatch) -> None:
    asked = says(monkeypatch, talk, "I am 99% sure that the image is right-side-up.")
    for question in (ASKED, WHERE, SURE):
        with pytest.raises(BadInput, match="no picture"):
            talk.ask(question)
    talk.choose(picture(made, "box"))
    talk.threshold = talk.own.anomaly_score * 0.9
    assert "2 of 2" in talk.verdict_line()[0] and talk.verdict_line()[0].startswith("Probably anomalous")
    where, sure = talk.ask(WHERE), talk.ask(SURE)
    assert where.source == sure.source == chat.NUMBERS and asked == []
    assert "top" in where.answer and "AnomalyCLIP" in where.answer and "exceeds the limit by 11%" in sure.answer
    talk.threshold = talk.own.anomaly_score * 2
    assert talk.verdict_line()[0].startswith("Undecided: 1 of 2")
    assert "nowhere" in talk.ask(WHERE).answer.lower() and "stays below the limit by 50%" in talk.ask(SURE).answer


def test_words_against_the_map_get_a_comment(made, talk: chat.ChatSession, monkeypatch) -> None:
    talk.choose(picture(made, "box"))
    for map_is_high, answer, contradicts in (
        (True, "Yes, there is an anomaly in the image.", False),
        (True, "No, there is no anomaly in the image.", True),
        (True, "Yes, there is an anomaly in the image, at the bottom right of the image.", True),
        (False, "No, there is no anomaly in the image.", False),
        (False, "Yes, there is an anomaly in the image, at the top of the image.", True),
        (False, "It is in red, at the bottom left.", True),
        (False, "A portrait of a woman.", True),
        (True, "", True),
    ):
        talk.start_over()
        says(monkeypatch, talk, answer)
        talk.threshold = talk.own.anomaly_score * (0.5 if map_is_high else 2)
        assert bool(talk.ask(ASKED).comment) == contradicts, answer
        disagree = answer.startswith("No" if map_is_high else "Yes")
        assert ("disagree" in talk.verdict_line()[1]) == disagree, answer


def test_detectors_against_map_and_words_are_said_and_free_answers_are_marked_as_unchecked(made, talk, monkeypatch):
    says(monkeypatch, talk, "No, there is no anomaly in the image.")
    talk.choose(picture(made, "box"))
    talk.threshold = talk.own.anomaly_score * 2
    talk.verdicts += [replace(one, method="aligned") for one in talk.verdicts if one.is_anomalous] * 3
    assert talk.ask(ASKED).comment.startswith("Do not rely on these words. Probably anomalous")
    assert "Most detectors disagree" in talk.verdict_line()[1]
    free = talk.ask("Is this the original?")
    assert free.comment.startswith("Words that nothing has checked. Probably anomalous") and talk.words_say is False


def test_fixed_questions_have_no_history_free_ones_only_free_turns_and_the_context_is_json(made, talk, monkeypatch):
    asked = says(monkeypatch, talk, "Yes, there is an anomaly in the image.")
    talk.choose(picture(made, "box"))
    for question in (ASKED, "What is in the middle?", WHERE, "Why?", ASKED):
        talk.ask(question)
    assert [len(one["history"]) for one in asked] == [0, 0, 1, 0]
    assert asked[2]["history"][0][0].endswith("What is in the middle?") and "painting one" in asked[2]["prompt"]
    talk.threshold = talk.own.anomaly_score * 2
    context = json.loads(json.dumps(talk.context()))
    assert context["is_predicted_anomalous"] and not talk.map_says, "the words are judged"
    assert context["category"] == "one" and context["answer"]
    talk.start_over()
    assert talk.history == [] and talk.words_say is None
    assert chat.describe_place(np.zeros((9, 9)), 1.0) == "nothing exceeds the limit"


def test_the_real_model_streams_its_answer_until_the_conversation_is_too_long(made, talk: chat.ChatSession) -> None:
    talk.choose(picture(made, "box"))
    grown = []
    turn = talk.ask("What is it?", on_text=grown.append)
    assert turn.source == chat.MODEL and (not turn.answer or grown)
    talk.history = [chat.Turn("q", "why " * 3000, "because " * 3000, chat.MODEL)]
    with pytest.raises(BadInput, match="Start over"):
        talk.ask("And now?")


@pytest.fixture
def ui(made, talk, tmp_path: Path) -> widgets.ChatUI:
    places = {"log": tmp_path / "feedback.jsonl", "transcripts": tmp_path / "chat"}
    return widgets.ChatUI(talk, chat.sample_pictures(made[1]), **places)


def test_a_picture_is_there_from_the_start_another_is_chosen_compared_and_the_threshold_moved(ui) -> None:
    assert ui.session.picture is not None and bytes(ui.image.value).startswith(b"\x89PNG")
    assert "of 2 detectors" in ui.line.value and "AnomalyCLIP" in ui.table.value
    assert ui.threshold.value == pytest.approx(ui.session.threshold, abs=1e-3)
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
    (page,) = ui._transcripts.iterdir()
    for text in (ui.talk.value, ui.message.value, ui.line.value, ui.table.value, page.read_text("utf-8")):
        assert "<script" not in text and "<img src=x" not in text
    assert "&lt;script" in ui.talk.value and "Written" in ui.message.value


def test_an_exception_is_shown_and_kept(ui: widgets.ChatUI, monkeypatch) -> None:
    fail = Mock(side_effect=RuntimeError("<b>out of luck</b>"))
    monkeypatch.setattr(type(ui.session.model), "ask", fail)
    ui.quick[0].click()
    assert ui.session.errors == ["RuntimeError: <b>out of luck</b>"]
    assert "&lt;b&gt;out of luck" in ui.message.value and "Traceback" in ui.message.value
    ui.quick[1].click()
    assert len(ui.session.history) == 1, "the chat goes on"
    ui._busy = True
    ui.quick[1].click()
    assert len(ui.session.history) == 1, "an action during an action is ignored"


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
