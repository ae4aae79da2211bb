"""The chat's widgets, driven as a user would: choose, ask, look, judge, click twice, and break things."""

from __future__ import annotations

import datetime
import json
import sys
import time
import types

import ipywidgets as widgets
import numpy as np
import pytest
import tiny_chat
from ipywidgets import Widget

from helpers.chat import chat_html, references
from helpers.chat import session as chat
from helpers.chat import widgets as chat_ui
from helpers.chat.detectors import Verdict
from helpers.chat.references import NO_REFERENCES
from helpers.data import images

NOW = datetime.datetime(2026, 1, 1)


@pytest.fixture(scope="module")
def model():
    return tiny_chat.build_model()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_chat.write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def known(model, dataset):
    return references.of_dataset(model, dataset, settings=tiny_chat.SETTINGS)


class Detectors:
    """Records what it is asked; one detector answers, one is missing."""

    def __init__(self):
        self.asked = []

    def judge(self, image, *, sha256, category):
        self.asked.append((image.shape, sha256, category))
        return [Verdict("clip_lof", 1.5, 1.25, 0.25), Verdict("anomalyclip", note="run notebook 04")]


@pytest.fixture
def given():
    return []


@pytest.fixture
def ui(model, known, dataset, given, tmp_path):
    return chat_ui.ChatUI(
        tiny_chat.session(model, known),
        samples=chat.sample_pictures(dataset),
        detectors=Detectors(),
        on_feedback=lambda **judgement: given.append(judgement),
        transcripts=tmp_path / "chat",
    )


@pytest.fixture
def chosen(ui):
    ui.sample.value = "One: box"
    return ui


def fill(upload: widgets.FileUpload, files: dict[str, bytes]) -> None:
    """What the browser sends, in the form of the installed version."""
    if int(widgets.__version__.split(".")[0]) < 8:
        value = {name: {"metadata": {"name": name}, "content": content} for name, content in files.items()}
    else:
        value = tuple(
            {"name": name, "type": "", "size": len(content), "last_modified": NOW, "content": memoryview(content)}
            for name, content in files.items()
        )
    upload.set_trait("value", value)


def questions(ui) -> list[str]:
    return [turn.question for turn in ui.session.history]


# --- pictures --------------------------------------------------------------------------------------------------------


def test_both_forms_of_an_upload_are_read():
    seven = {"a.png": {"metadata": {"size": 2}, "content": b"ab"}, "b.png": {"metadata": {}, "content": b""}}
    eight = ({"name": "a.png", "content": memoryview(b"ab")}, {"name": "b.png", "content": memoryview(b"")})
    assert chat_ui.read_upload(seven) == chat_ui.read_upload(eight) == [("a.png", b"ab"), ("b.png", b"")]
    assert {type(content) for _, content in chat_ui.read_upload(eight)} == {bytes}
    assert chat_ui.read_upload({}) == chat_ui.read_upload(()) == []


def test_a_sample_is_shown_with_its_map_and_its_references(ui):
    assert ui.image.value == b"" and "Choose a picture" in ui.talk.value
    ui.sample.value = "Two: replica"
    assert ui.session.picture.category == "two" == ui.compared_with.value
    assert bytes(ui.image.value).startswith(b"\x89PNG")
    assert ui.threshold.value == pytest.approx(ui.session.references.threshold, abs=1e-3)
    assert "Highest value" in ui.legend.value and ui.message.value == ""


def test_a_path_is_opened_and_releases_the_sample(chosen, dataset):
    path = dataset.samples[0].image_path
    chosen.path.value = str(path)
    chosen.open_path.click()
    assert chosen.session.picture.path == path and chosen.sample.value == ""
    chosen.sample.value = "One: box"  # the same sample again
    assert chosen.session.picture.path != path


def test_an_upload_is_taken_and_the_button_renewed(ui, dataset):
    content = dataset.samples[0].image_path.read_bytes()
    for name in ("a.png", "b.png"):
        upload = ui.uploads.children[0]
        fill(upload, {name: content})
        assert ui.session.picture.name == name and ui.session.picture.path is None
        assert ui.uploads.children[0] is not upload
    assert ui.session.errors == [] and ui.message.value == ""


@pytest.mark.parametrize("content", [b"", b"no picture at all", bytes(50_000_000)])
def test_an_upload_that_is_no_picture_gets_a_sentence(chosen, content):
    before = chosen.session.picture
    fill(chosen.uploads.children[0], {f"{tiny_chat.HOSTILE[:8]}.png": content})
    assert chosen.session.picture is before and len(chosen.session.refused) == 1 and chosen.session.errors == []
    assert "&lt;script&gt;.png" in chosen.message.value and "<script" not in chosen.message.value


def test_a_wrong_path_gets_a_sentence_that_the_next_action_clears(chosen):
    chosen.path.value = "/no/such/file.png"
    chosen.open_path.click()
    assert "does not exist" in chosen.message.value and chosen.session.errors == []
    chosen.quick[0].click()
    assert chosen.message.value == "" and len(chosen.session.history) == 1


def test_other_references_change_map_scale_and_conversation(chosen):
    chosen.quick[0].click()
    before = bytes(chosen.image.value)
    for key in (NO_REFERENCES, "two", "one", NO_REFERENCES):  # scales up and down
        chosen.compared_with.value = key
        assert chosen.session.key == key and chosen.session.history == []
        low, high = chosen.session.references.limits
        assert chosen.threshold.min <= low < high <= chosen.threshold.max
        assert chosen.threshold.value == pytest.approx(chosen.session.references.threshold, abs=1e-3)
    assert bytes(chosen.image.value) != before and chosen.session.errors == []


def test_own_references_from_a_folder_and_from_files(chosen, dataset, tmp_path):
    genuine = [s.image_path for s in dataset.select(split="train", category="one")]
    for path in genuine[:2]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    chosen.own_folder.value = str(tmp_path)
    chosen.use_own.click()
    assert chosen.session.key == chosen.compared_with.value == chat_ui.OWN and chosen.session.references.n == 2
    fill(chosen.own_uploads.children[0], {path.name: path.read_bytes() for path in genuine})
    assert chosen.session.references.n == 3 and chosen.session.errors == []
    fill(chosen.own_uploads.children[0], {"one.png": genuine[0].read_bytes()})
    assert "at least 2 are needed" in chosen.message.value and chosen.session.references.n == 3


def test_colab_has_a_dialog_of_its_own(monkeypatch, dataset, model, known, capsys):
    assert chat_ui.upload_on_colab(False) == []
    assert chat_ui.upload_on_colab(True) == [] and "Not on Colab" in capsys.readouterr().out
    content = dataset.samples[0].image_path.read_bytes()
    colab = types.ModuleType("google.colab")
    colab.files = types.SimpleNamespace(upload=lambda: {"mine.png": content})
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    (picture,) = chat_ui.upload_on_colab(True)
    assert picture.name == "mine.png"
    ui = chat_ui.ChatUI(tiny_chat.session(model, known), pictures=[picture])
    ui.sample.value = "uploaded: mine.png"
    assert ui.session.picture is picture
    assert not any(isinstance(widget, widgets.FileUpload) for widget in every(ui.root))
    colab.files.upload = lambda: {"empty.png": b""}
    with pytest.raises(chat.BadInput, match="0 bytes"):
        chat_ui.upload_on_colab(True)


def every(widget: Widget) -> list[Widget]:
    return [widget, *(one for child in getattr(widget, "children", ()) for one in every(child))]


# --- questions -------------------------------------------------------------------------------------------------------


def test_quick_and_own_questions_in_several_turns(chosen):
    chosen.quick[0].click()
    chosen.quick[1].click()
    chosen.question.value = "Who painted it?"
    chosen.send.click()
    chosen.question.value = "And when?"
    chosen.send.click()
    assert questions(chosen) == [*chat.QUICK_QUESTIONS[:2], "Who painted it?", "And when?"]
    assert chosen.question.value == ""
    for turn in chosen.session.history:
        assert turn.answer in chosen.talk.value
    chosen.again.click()
    assert questions(chosen) == [] and "Ask something" in chosen.talk.value


@pytest.mark.parametrize(("question", "words"), [("", "empty"), ("  \n", "empty"), ("x" * 10_000, "10,000 characters")])
def test_a_question_that_cannot_be_asked_gets_a_sentence_and_stays(chosen, question, words):
    chosen.question.value = question
    chosen.send.click()
    assert words in chosen.message.value and chosen.question.value == question
    assert chosen.session.history == [] and chosen.session.errors == [] and len(chosen.session.refused) == 1
    assert "thinking" not in chosen.talk.value


def test_questions_of_all_kinds_are_shown_as_text(chosen):
    for question in (tiny_chat.HOSTILE, "这幅画完整吗? 👩‍🎨", "هل هي سليمة؟"):
        chosen.question.value = question
        chosen.send.click()
    assert questions(chosen)[0] == tiny_chat.HOSTILE and chosen.session.errors == []
    assert "<script" not in chosen.talk.value and "<img" not in chosen.talk.value
    assert "这幅画完整吗? 👩‍🎨" in chosen.talk.value and "هل هي سليمة؟" in chosen.talk.value


def test_without_a_picture_every_button_says_so(ui):
    ui.verdict.value = "correct"
    for button in (ui.quick[0], ui.ask_all, ui.give):
        ui.message.value = ""
        button.click()
        assert "no picture yet" in ui.message.value
    assert ui.session.errors == [] and "thinking" not in ui.talk.value


def test_a_double_click_asks_once(chosen):
    chosen.quick[0].click()
    chosen.quick[0].click()  # was on its way while the first one was answered
    chosen.question.value = "Who painted it?"
    chosen.send.click()
    chosen.send.click()
    assert questions(chosen) == [chat.QUICK_QUESTIONS[0], "Who painted it?"]
    assert chosen.message.value == "" and chosen.session.refused == []
    chosen._last = (chosen._last[0], time.monotonic() - 1)  # a second later it is meant
    chosen.send.click()
    assert "empty" in chosen.message.value


def test_clicks_during_an_answer_are_ignored_and_controls_are_off(chosen, monkeypatch):
    seen, real = [], chosen.session.ask

    def ask(question, *, on_text=None):
        seen.extend(control.disabled for control in (chosen.send, chosen.quick[1], chosen.sample))
        seen.append("thinking" in chosen.talk.value)
        chosen.quick[1].click()
        chosen.ask_all.click()
        chosen.sample.value = "Two: box"
        return real(question, on_text=on_text)

    monkeypatch.setattr(chosen.session, "ask", ask)
    chosen.quick[0].click()
    assert seen == [True, True, True, True]
    assert questions(chosen) == [chat.QUICK_QUESTIONS[0]] and chosen.verdicts == []
    assert not (chosen.send.disabled or chosen.quick[1].disabled or chosen.sample.disabled)


def test_words_are_shown_as_they_come(chosen):
    shown = []
    chosen.talk.observe(lambda change: shown.append(change["new"]), "value")
    chosen.quick[0].click()
    assert len(shown) == 6  # thinking, four words, the turn with its time
    assert "thinking" in shown[0] and "…" in shown[3] and "…" not in shown[-1]


def test_an_exception_shows_a_red_box_and_is_kept(chosen, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError(f"broken {tiny_chat.HOSTILE}")

    with monkeypatch.context() as patched:
        patched.setattr(type(chosen.session.model), "ask", fail)
        chosen.quick[0].click()
    assert chosen.session.errors == [f"RuntimeError: broken {tiny_chat.HOSTILE}"]
    red = chat_html._MESSAGES["error"][0]
    assert red in chosen.message.value and "Traceback" in chosen.message.value
    assert "<script" not in chosen.message.value and "thinking" not in chosen.talk.value
    chosen.quick[1].click()  # and it goes on
    assert questions(chosen) == [chat.QUICK_QUESTIONS[1]] and not chosen.send.disabled


def test_an_exception_while_drawing_is_kept_too(chosen, monkeypatch):
    monkeypatch.setattr(chat, "draw_view", lambda *_, **__: 1 / 0)
    chosen.view.value = "map"
    assert chosen.session.errors and chosen.session.errors[0].startswith("ZeroDivisionError")


def test_an_interrupt_does_not_leave_the_chat_dead(chosen, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(chosen.session, "ask", interrupt)
        with pytest.raises(KeyboardInterrupt):
            chosen._act("send", chosen._ask, "Is it whole?")
    assert not chosen.send.disabled
    chosen.quick[0].click()
    assert len(chosen.session.history) == 1


# --- views -----------------------------------------------------------------------------------------------------------


def test_views_opacity_and_threshold_change_the_picture(chosen, tmp_path):
    def drawn():
        (tmp_path / "view.png").write_bytes(bytes(chosen.image.value))
        return images.load_image(tmp_path / "view.png")

    pictures = {}
    for view in chat.VIEWS:
        chosen.view.value = view
        pictures[view] = drawn()
    np.testing.assert_array_equal(pictures["original"], chosen.session.picture.image)
    chosen.view.value = "overlay"
    chosen.opacity.value = 0.1
    assert (drawn() != pictures["overlay"]).any()
    chosen.opacity.value = 0.85
    np.testing.assert_array_equal(drawn(), pictures["overlay"])
    legend = chosen.legend.value
    chosen.threshold.value = chosen.threshold.min
    assert chosen.legend.value != legend and "100.0% of the picture" in chosen.legend.value


# --- all detectors ---------------------------------------------------------------------------------------------------


def test_every_detector_stands_beside_the_chat(chosen):
    chosen.ask_all.click()
    picture = chosen.session.picture
    assert chosen._detectors.asked == [(picture.image.shape, picture.sha256, "one")]
    assert [one.method for one in chosen.verdicts] == ["clip_lof", "anomalyclip", "anomalygpt"]
    assert chosen.verdicts[-1].anomaly_score == chosen.session.anomaly_score
    for words in ("CLIP LOF", "run notebook 04", "AnomalyGPT"):
        assert words in chosen.cards.value
    chosen.compared_with.value = NO_REFERENCES  # verdicts of other references do not stay
    assert chosen.verdicts == [] and chosen.cards.value == ""


def test_parts_without_use_are_left_out(model, known):
    bare = chat_ui.ChatUI(tiny_chat.session(model, known))
    shown = every(bare.root)
    assert bare.ask_all not in shown and bare.give not in shown and bare.send in shown


# --- judgement -------------------------------------------------------------------------------------------------------


def test_a_judgement_is_handed_on_whole(chosen, given):
    chosen.quick[0].click()
    chosen.verdict.value, chosen.label.value = "wrong", "anomalous"
    chosen.region[3].value = True
    chosen.region[8].value = True  # another cell: the first one springs back
    chosen.comment.value = tiny_chat.HOSTILE
    chosen.keep_image.value = True
    chosen.give.click()
    (judgement,) = given
    picture = chosen.session.picture
    assert judgement.pop("image") is picture.image and judgement["image_path"] == picture.path
    context = judgement["context"]
    assert context["sha256"] == picture.sha256 and context["question"] == chat.QUICK_QUESTIONS[0]
    assert {name: judgement[name] for name in ("verdict", "label", "region", "comment", "keep_image")} == {
        "verdict": "wrong", "label": "anomalous", "region": 8, "comment": tiny_chat.HOSTILE, "keep_image": True,
    }  # fmt: skip
    json.dumps(context, allow_nan=False)
    assert "Thank you" in chosen.message.value
    assert chosen.verdict.value is None and not any(button.value for button in chosen.region)
    assert chosen.comment.value == "" and chosen.label.value == "not sure"


@pytest.mark.parametrize(("label", "stored"), [("genuine", "normal"), ("not sure", None)])
def test_a_genuine_picture_has_no_place_of_an_anomaly(chosen, given, label, stored):
    chosen.region[2].value = True
    chosen.verdict.value, chosen.label.value = "correct", label
    assert all(button.disabled == (label == "genuine") for button in chosen.region)
    chosen.give.click()
    assert given[0]["label"] == stored and given[0]["region"] == (None if label == "genuine" else 2)


def test_a_judgement_needs_a_verdict_and_is_not_given_twice(chosen, given):
    chosen.give.click()
    assert given == [] and "correct, wrong, or" in chosen.message.value
    chosen._last = ("", 0.0)
    chosen.verdict.value = "unsure"
    chosen.give.click()
    chosen.give.click()
    assert len(given) == 1 and chosen.session.errors == []


def test_what_the_file_of_judgements_refuses_is_said(model, known, dataset):
    def refuse(**_):
        raise ValueError("The comment has 20,000 characters")

    ui = chat_ui.ChatUI(tiny_chat.session(model, known), samples=chat.sample_pictures(dataset), on_feedback=refuse)
    ui.sample.value = "One: box"
    ui.verdict.value, ui.comment.value = "wrong", "long"
    ui.give.click()
    assert "20,000 characters" in ui.message.value and ui.session.errors == []
    assert ui.comment.value == "long" and ui.verdict.value == "wrong"  # nothing is lost


# --- files and cells -------------------------------------------------------------------------------------------------


def test_the_transcript_is_written(chosen, tmp_path):
    chosen.quick[0].click()
    chosen.ask_all.click()
    chosen.save.click()
    page = tmp_path / "chat" / f"transcript_{chosen.session.id}.html"
    assert "CLIP LOF" in page.read_text(encoding="utf-8") and page.with_suffix(".md").exists()
    assert str(page) in chosen.message.value


def test_without_a_folder_no_transcript_is_promised(model, known):
    ui = chat_ui.ChatUI(tiny_chat.session(model, known))
    ui.save.click()
    assert "No folder" in ui.message.value and ui.session.errors == []


def n_widgets() -> int:
    """Widgets that the kernel keeps."""
    is_seven = int(widgets.__version__.split(".")[0]) < 8
    return len(Widget.widgets if is_seven else sys.modules[Widget.__module__]._instances)


def test_a_cell_that_runs_again_leaves_no_second_chat(model, known, dataset, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    session = tiny_chat.session(model, known)
    samples = chat.sample_pictures(dataset)
    first = chat_ui.show(session, samples=samples)
    n_first = n_widgets()
    first.sample.value = "One: box"
    for _ in range(3):
        ui = chat_ui.show(session, samples=samples)
    assert n_widgets() == n_first and len(shown) == 4 and shown[-1] is ui.root
    assert first.root.comm is None and first.send.comm is None and ui.root.comm is not None
    assert bytes(ui.image.value) and ui.sample.value == ""  # the session goes on
    assert ui.threshold.value == pytest.approx(session.references.threshold, abs=1e-3)
    ui.quick[0].click()
    assert len(session.history) == 1
    chat_ui._SHOWN.pop().close()
    assert n_widgets() < n_first
