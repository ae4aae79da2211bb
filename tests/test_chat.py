"""The chat without widgets: pictures, verdicts, answers from numbers, and words that contradict the map."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_chat as tiny

from helpers import results
from helpers.chat import detectors
from helpers.chat import session as chat
from helpers.chat.session import ASKED, SURE, WHERE, BadInput
from helpers.data import images


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    home = tmp_path_factory.mktemp("home")
    model, dataset = tiny.build_model(), tiny.write_dataset(home / "data")
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


@pytest.mark.parametrize("text", ["", "  ", "https://example.org/a.png", "no_such_file.png", "folder"])
def test_paths_that_cannot_be_opened_get_a_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(BadInput):
        chat.open_picture(text if "/" in text or not text.strip() else tmp_path / text)


def test_a_path_may_be_quoted(made) -> None:
    path = made[1].samples[0].image_path
    assert chat.open_picture(f' "{path}" ').sha256 == made[1].samples[0].sha256


@pytest.mark.parametrize("content", [b"", b"<svg></svg>", b"\x89PNG\r\n\x1a\n cut"])
def test_uploads_that_are_no_pictures_are_named(content: bytes) -> None:
    with pytest.raises(BadInput, match="evil.png"):
        chat.receive_picture("../../evil.png", content)


def test_an_upload_is_the_picture_and_a_large_one_is_refused(made, monkeypatch) -> None:
    path = made[1].samples[0].image_path
    received = chat.receive_picture("C:\\photos\\a.png", path.read_bytes())
    assert received.name == "a.png" and received.path is None and received.sha256 == made[1].samples[0].sha256
    np.testing.assert_array_equal(received.image, images.load_image(path))
    monkeypatch.setattr(chat, "MAX_UPLOAD_BYTES", 10)
    with pytest.raises(BadInput, match="path"):
        chat.receive_picture("a.png", path.read_bytes())


def test_samples_show_every_painting_genuine_and_not(made) -> None:
    samples = chat.sample_pictures(made[1])
    assert list(samples) == ["One: box", "One: replica", "One: genuine", "Two: box", "Two: replica", "Two: genuine"]


@pytest.mark.parametrize(("text", "clean"), [(" Is it\n whole?\x00 ", "Is it whole?"), ("完整吗 🎨", "完整吗 🎨")])
def test_questions_are_cleaned(text: str, clean: str) -> None:
    assert chat.clean_question(text) == clean


@pytest.mark.parametrize("text", ["", " \n\t", "\x00\x07", "why? " * 2000])
def test_questions_that_cannot_be_asked(text: str) -> None:
    with pytest.raises(BadInput):
        chat.clean_question(text)


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_verdicts_are_those_of_the_results(made, talk: chat.ChatSession) -> None:
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


def test_detectors_that_are_missing_are_named_with_the_notebook(talk: chat.ChatSession, made) -> None:
    talk.choose(picture(made, "box"))
    table = detectors.table(talk.verdicts)
    assert len(table) == len(detectors.NOTEBOOKS)
    assert "notebook 05_reference" in table.loc["Aligned with its reference", "note"]
    assert table.loc["AnomalyCLIP", "verdict"] == "anomalous"


def test_a_detector_that_fails_or_has_learnt_the_picture_says_so(made) -> None:
    model, dataset, home = made

    def broken(category: str, pictures: list) -> list:
        raise ValueError("too small")

    found = detectors.load(dataset, home / "results", {"anomalyclip": lambda: broken})
    talk = chat.ChatSession(model, found, settings=tiny.SETTINGS)
    talk.choose(picture(made, "box"))
    assert any("too small" in one.note for one in talk.verdicts)
    learnt = dataset.select(split="train", category="one")[0]
    talk.choose(chat.open_picture(learnt.image_path, category="one"))
    assert detectors.LEARNT in [one.note for one in talk.verdicts]


def test_an_unknown_painting_and_missing_results_are_refused(made, talk: chat.ChatSession, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="one, two"):
        talk.choose(picture(made, "box"), category="three")
    found = detectors.load(made[1], tmp_path, {})
    with pytest.raises(ValueError, match="07_anomalygpt_test"):
        chat.ChatSession(made[0], found, settings=tiny.SETTINGS)


def test_an_own_picture_is_compared_with_the_chosen_painting(made, talk: chat.ChatSession) -> None:
    own = replace(picture(made, "replica", "two"), category=None)
    talk.choose(own, category="two")
    assert talk.category == "two"
    first = talk.own.anomaly_score
    talk.choose(own, category="one")
    assert talk.category == "one" and talk.own.anomaly_score != first


# --- answers ---------------------------------------------------------------------------------------------------------


def test_without_a_picture_nothing_is_answered(talk: chat.ChatSession) -> None:
    for question in (ASKED, WHERE, SURE):
        with pytest.raises(BadInput, match="no picture"):
            talk.ask(question)


def test_place_and_certainty_come_from_the_numbers(made, talk: chat.ChatSession, monkeypatch) -> None:
    asked = says(monkeypatch, talk, "I am 99% sure that the image is right-side-up.")
    talk.choose(picture(made, "box"))
    talk.threshold = talk.own.anomaly_score * 0.9
    where, sure = talk.ask(WHERE), talk.ask(SURE)
    assert where.source == sure.source == chat.NUMBERS and asked == []
    assert "top" in where.answer and "AnomalyCLIP" in where.answer and "exceeds the limit by 11%" in sure.answer
    talk.threshold = talk.own.anomaly_score * 2
    assert "nowhere" in talk.ask(WHERE).answer.lower() and "stays below the limit by 50%" in talk.ask(SURE).answer


@pytest.mark.parametrize(
    ("map_is_high", "answer", "contradicts"),
    [
        (True, "Yes, there is an anomaly in the image.", False),
        (True, "No, there is no anomaly in the image.", True),
        (True, "Yes, there is an anomaly in the image, at the bottom right of the image.", True),
        (False, "No, there is no anomaly in the image.", False),
        (False, "Yes, there is an anomaly in the image, at the top of the image.", True),
        (False, "It is in red, at the bottom left.", True),
        (False, "A portrait of a woman.", True),
        (True, "", True),
    ],
)
def test_words_against_the_map_get_a_comment(
    made, talk: chat.ChatSession, monkeypatch, map_is_high: bool, answer: str, contradicts: bool
) -> None:
    says(monkeypatch, talk, answer)
    talk.choose(picture(made, "box"))
    talk.threshold = talk.own.anomaly_score * (0.5 if map_is_high else 2)
    turn = talk.ask(ASKED)
    assert bool(turn.comment) == contradicts
    disagree = answer.startswith("No" if map_is_high else "Yes")
    assert ("disagree" in talk.verdict_line()[1]) == disagree


def test_detectors_against_map_and_words_are_said_and_free_answers_are_marked_as_unchecked(made, talk, monkeypatch):
    says(monkeypatch, talk, "No, there is no anomaly in the image.")
    talk.choose(picture(made, "box"))
    talk.threshold = talk.own.anomaly_score * 2
    talk.verdicts += [replace(one, method="aligned") for one in talk.verdicts if one.is_anomalous] * 3
    assert talk.ask(ASKED).comment.startswith("Do not rely on these words. Probably anomalous")
    assert "Most detectors disagree" in talk.verdict_line()[1]
    free = talk.ask("Is this the original?")
    assert free.comment.startswith("Words that nothing has checked. Probably anomalous") and talk.words_say is False


def test_fixed_questions_have_no_history_and_free_ones_only_free_turns(made, talk, monkeypatch) -> None:
    asked = says(monkeypatch, talk, "Yes, there is an anomaly in the image.")
    talk.choose(picture(made, "box"))
    for question in (ASKED, "What is in the middle?", WHERE, "Why?", ASKED):
        talk.ask(question)
    assert [len(one["history"]) for one in asked] == [0, 0, 1, 0]
    assert asked[2]["history"][0][0].endswith("What is in the middle?") and "painting one" in asked[2]["prompt"]
    talk.start_over()
    assert talk.history == [] and talk.words_say is None


def test_the_real_model_streams_its_answer(made, talk: chat.ChatSession) -> None:
    talk.choose(picture(made, "box"))
    grown = []
    turn = talk.ask("What is it?", on_text=grown.append)
    assert turn.source == chat.MODEL and (not turn.answer or grown)


def test_a_conversation_that_is_too_long_is_refused(made, talk: chat.ChatSession) -> None:
    talk.choose(picture(made, "box"))
    talk.history = [chat.Turn("q", "why " * 3000, "because " * 3000, chat.MODEL)]
    with pytest.raises(BadInput, match="Start over"):
        talk.ask("And now?")


def test_the_line_counts_the_detectors(made, talk: chat.ChatSession) -> None:
    talk.choose(picture(made, "box"))
    talk.threshold = talk.own.anomaly_score * 0.9
    assert "2 of 2" in talk.verdict_line()[0] and talk.verdict_line()[0].startswith("Probably anomalous")
    talk.threshold = talk.own.anomaly_score * 2
    assert talk.verdict_line()[0].startswith("Undecided: 1 of 2")


def test_the_context_is_json_and_says_what_was_judged(made, talk: chat.ChatSession, monkeypatch) -> None:
    says(monkeypatch, talk, "No, there is no anomaly in the image.")
    talk.choose(picture(made, "box"))
    talk.ask(ASKED)
    context = talk.context()
    assert context["is_predicted_anomalous"] is False and context["category"] == "one" and context["answer"]
    assert chat.describe_place(np.zeros((9, 9)), 1.0) == "nothing exceeds the limit"
