"""The chat session: pictures of every kind, questions of every kind, one look per picture, turns that remember."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny_chat
from PIL import Image

from helpers import files as storage
from helpers.anomalygpt import conversations
from helpers.anomalygpt.imagebind import ImageBind
from helpers.chat import references
from helpers.chat import session as chat
from helpers.chat.references import NO_REFERENCES
from helpers.chat.session import BadInput
from helpers.data import images
from helpers.judge import figures


@pytest.fixture(scope="module")
def model():
    return tiny_chat.build_model()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_chat.write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def known(model, dataset):
    return references.of_dataset(model, dataset, settings=tiny_chat.SETTINGS)


@pytest.fixture
def session(model, known):
    return tiny_chat.session(model, known)


@pytest.fixture
def picture(dataset):
    sample = dataset.select(split="test", category="one", kind="box")[0]
    return chat.open_picture(sample.image_path, category="one")


@pytest.fixture
def n_passes(monkeypatch):
    """Pictures that went through the image tower."""
    passes, real = [], ImageBind.features

    def counted(self, pixels):
        passes.append(len(pixels))
        return real(self, pixels)

    monkeypatch.setattr(ImageBind, "features", counted)
    return passes


# --- pictures --------------------------------------------------------------------------------------------------------


def test_a_path_may_be_quoted_relative_or_in_the_home_folder(dataset, monkeypatch):
    path = dataset.samples[0].image_path
    monkeypatch.setenv("HOME", str(path.parent))
    monkeypatch.chdir(path.parent)
    for text in (path, f' "{path}" ', path.name, f"~/{path.name}"):
        opened = chat.open_picture(text)
        assert opened.path == path and opened.name == path.name
        assert opened.sha256 == dataset.samples[0].sha256
        np.testing.assert_array_equal(opened.image, images.load_image(path))


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "0 bytes"), (b"hello, I am a text", "no picture"), (b"\xff\xd8\xff\xe0", "no picture")]
)
def test_a_file_that_is_no_picture_is_refused_in_words(tmp_path, content, words):
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=words):
        chat.open_picture(path)
    with pytest.raises(BadInput, match=words) as refusal:
        chat.receive_picture("photo.jpg", content)
    assert str(refusal.value).startswith("photo.jpg ")  # the user's name, not that of a temporary file


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "There is no path"),
        ("  ", "There is no path"),
        ("https://example.org/a.jpg", "Web addresses"),
        ("/no/such/file.png", "does not exist"),
        ("/", "is a folder"),
        ("a\0b", "does not exist|null"),
        ("x" * 5000, "too long"),
    ],
)
def test_a_path_without_a_picture_is_refused_in_words(text, words):
    with pytest.raises(BadInput, match=words):
        chat.open_picture(text)


def test_a_picture_of_50_megabytes_is_read_small_from_a_path_and_refused_as_an_upload(tmp_path):
    path = tmp_path / "large.bmp"
    Image.new("RGB", (4096, 4096), (200, 10, 10)).save(path)
    assert path.stat().st_size > 50_000_000
    assert chat.open_picture(path).image.shape == (1024, 1024, 3)
    with pytest.raises(BadInput, match=r"large\.bmp has 50 MB; an upload may have 40\. Put the file on the machine"):
        chat.receive_picture("large.bmp", path.read_bytes())


def test_50_megabytes_of_nothing_are_no_picture(tmp_path):
    path = tmp_path / "noise.png"
    path.write_bytes(bytes(50_000_000))
    with pytest.raises(BadInput, match="no picture"):
        chat.open_picture(path)


def test_an_upload_is_known_by_the_hash_of_its_file(dataset):
    path = dataset.samples[0].image_path
    received = chat.receive_picture(f"C:\\pictures\\{path.name}", path.read_bytes())
    assert received.sha256 == storage.sha256_file(path) and received.path is None
    assert received.name == path.name
    np.testing.assert_array_equal(received.image, images.load_image(path))


def test_samples_show_genuine_pictures_and_every_kind(dataset):
    samples = chat.sample_pictures(dataset, n_normal=1)
    assert list(samples) == ["One: genuine 1", "One: box", "One: replica", "Two: genuine 1", "Two: box", "Two: replica"]
    assert all(sample.split == "test" for sample in samples.values())
    assert samples["Two: box"].is_anomalous and not samples["Two: genuine 1"].is_anomalous


def test_the_telling_sample_is_anomalous_with_a_known_place(dataset):
    samples = chat.sample_pictures(dataset)
    assert chat.telling_sample(samples) == "One: box"
    marked = dataclasses.replace(samples["Two: replica"], mask_path=Path("mask.png"))
    assert chat.telling_sample(samples | {"Two: replica": marked}) == "Two: replica"
    genuine = {name: sample for name, sample in samples.items() if not sample.is_anomalous}
    assert chat.telling_sample(genuine) == "One: genuine 1"


def test_a_folder_of_genuine_pictures(dataset, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(BadInput, match="holds no picture"):
        chat.pictures_in(tmp_path)
    with pytest.raises(BadInput, match="is no folder"):
        chat.pictures_in(tmp_path / "none")
    for name in ("b.png", "a.png"):
        images.save_png(tmp_path / name, np.zeros((4, 5, 3), np.uint8))
    assert [one.name for one in chat.pictures_in(f" {tmp_path} ")] == ["a.png", "b.png"]
    assert len(chat.pictures_in(tmp_path, limit=1)) == 1


# --- questions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  Is it\n\twhole? ", "Is it whole?"),
        ("\x00Is\x07 it?\x1b", "Is it?"),
        ("这幅画完整吗? 👩‍🎨 هل هي سليمة؟ क्या?", "这幅画完整吗? 👩‍🎨 هل هي سليمة؟ क्या?"),
        ("broken \ud83d half", "broken half"),
        (tiny_chat.HOSTILE, tiny_chat.HOSTILE),
        ("a" * 1000, "a" * 1000),
    ],
)
def test_questions_are_put_on_one_line_and_keep_every_script(text, cleaned):
    assert " ".join(chat.clean_question(text).split()) == cleaned


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "empty"), (" \n\t", "empty"), ("\x00", "empty"), ("a" * 10_000, "10,000 characters; 1,000 are allowed")],
)
def test_empty_and_endless_questions_are_refused(text, words):
    with pytest.raises(BadInput, match=words):
        chat.clean_question(text)


@pytest.mark.parametrize("question", [tiny_chat.HOSTILE, "这幅画完整吗? 👩‍🎨", "هل هي سليمة؟", "a" * 900])
def test_any_text_gets_an_answer(session, picture, question):
    session.choose(picture)
    assert session.ask(question).answer
    assert session.history[-1].question == question


def test_without_a_picture_everything_says_so(session):
    for action in (lambda: session.ask("Is it whole?"), session.verdict, session.yes_no, session.context):
        with pytest.raises(BadInput, match="no picture yet"):
            action()
    assert session.says_anomalous is None


# --- one look, many turns --------------------------------------------------------------------------------------------


def test_a_picture_is_looked_at_once(session, picture, dataset, n_passes, monkeypatch):
    looks, look = [], type(session.model).look

    def counted(*given, **named):
        looks.append(named)
        return look(*given, **named)

    monkeypatch.setattr(type(session.model), "look", counted)
    session.choose(picture)
    first = session.anomaly_map
    for question in ("Is it whole?", "Where?", "Why?"):
        session.ask(question)
    session.verdict(), session.yes_no()
    session.compare_with(NO_REFERENCES)  # other references: another map
    assert not np.allclose(session.anomaly_map, first)
    session.choose(picture)
    np.testing.assert_array_equal(session.anomaly_map, first)
    assert n_passes == [1, 1] and len(looks) == 2  # one for each choice of references
    session.choose(chat.open_picture(dataset.samples[0].image_path))
    assert n_passes == [1, 1, 1]


def test_only_some_looks_are_kept(session, dataset, n_passes):
    pictures = [chat.open_picture(sample.image_path) for sample in dataset.samples[:10]]
    for one in (*pictures, pictures[-1], pictures[0]):
        session.choose(one)
    assert len(n_passes) == 11  # the first one was given up


def test_turns_are_remembered_and_computed_once(session, model, picture):
    session.choose(picture)
    turns = [session.ask(question) for question in ("Is it whole?", "Where?", "Why?")]
    history = []
    for turn in turns:
        assert turn.answer == model.ask(session.look, turn.prompt, history=history, max_new_tokens=4)[0]
        history.append((turn.prompt, turn.answer))
    session.start_over()
    assert session.history == [] and session.picture is picture
    assert session.ask("Is it whole?").answer == turns[0].answer


def test_another_picture_or_other_references_start_anew(session, picture, dataset):
    session.choose(picture)
    session.ask("Is it whole?")
    session.compare_with("two")
    assert session.history == [] and session.key == "two"
    other = chat.open_picture(dataset.select(split="test", category="two")[0].image_path)  # unknown artwork: two stays
    session.ask("Is it whole?")
    session.choose(other)
    assert session.history == [] and session.key == "two"
    session.choose(picture)
    assert session.key == "one"
    with pytest.raises(BadInput, match="no references 'three'; there are none, one, two"):
        session.compare_with("three")
    assert session.key == "one"


def test_a_picture_that_fails_leaves_the_session_as_it_was(session, picture, monkeypatch):
    session.choose(picture)
    session.ask("Is it whole?")

    def fail(*_, **__):
        raise RuntimeError("no memory")

    monkeypatch.setattr(type(session.model), "look", fail)
    with pytest.raises(RuntimeError):
        session.compare_with("two")
    assert session.key == "one" and len(session.history) == 1 and session.anomaly_map.shape == (224, 224)


def test_the_artwork_is_named_as_in_training(session, picture):
    session.choose(picture)
    assert session.ask("Where?").prompt == "This is the painting one. Where?"
    assert session.ask(conversations.QUESTION).prompt == conversations.question("one", wording="short")
    session.compare_with(NO_REFERENCES)
    assert session.ask("Where?").prompt == "Where?"


def test_words_come_one_by_one(session, picture):
    session.choose(picture)
    shown = []
    turn = session.ask("Is it whole?", on_text=shown.append)
    assert len(shown) == 4 and shown[-1] == turn.answer


def test_a_conversation_that_is_too_long_can_be_cleared(session, picture):
    session.choose(picture)
    with pytest.raises(BadInput, match="“Start over” clears it"):
        for _ in range(12):
            session.ask("word " * 199)
    n_turns = len(session.history)
    session.start_over()
    assert 1 < n_turns < 12 and session.ask("word").answer


# --- verdict and record ----------------------------------------------------------------------------------------------


def test_the_verdict_is_that_of_the_map(session, picture, known):
    session.choose(picture)
    verdict = session.verdict()
    normal = known["one"].normal_scores
    assert verdict.method == "anomalygpt" and verdict.threshold == known["one"].threshold
    assert verdict.anomaly_score == session.anomaly_map.max() == session.anomaly_score
    assert verdict.p_value == pytest.approx((1 + (normal >= verdict.anomaly_score).sum()) / (len(normal) + 1))
    assert verdict.is_predicted_anomalous == (verdict.anomaly_score > verdict.threshold)
    assert verdict.limits == known["one"].limits and verdict.seconds > 0 and verdict.note == ""
    assert session.yes_no() == model_score(session)


def model_score(session):
    return session.model.first_token(session.look, conversations.question("one", wording="short"))[0][0]


def test_a_reference_is_not_judged_without_a_word(session, dataset):
    member = next(s for s in dataset.samples if s.sha256 in session.known["one"].members)
    session.choose(chat.open_picture(member.image_path, category="one"))
    assert "one of the references" in session.verdict().note and session.anomaly_score < 1e-3


def test_the_last_clear_answer_is_the_label(session, picture):
    session.choose(picture)
    by_map = session.anomaly_score > session.references.threshold
    assert session.says_anomalous is by_map
    for answer, said in (("Perhaps.", by_map), ("Yes, there is an anomaly.", True), ("A lady.", True), ("No.", False)):
        session.history.append(chat.Turn("q", "q", answer, "", 0.0, 0))
        assert session.says_anomalous is said


def test_the_record_holds_what_a_judgement_needs_and_no_pixels(session, picture, model):
    session.choose(picture)
    turn = session.ask("Is it whole?")
    record = json.loads(json.dumps(session.context(), allow_nan=False))
    assert record["sha256"] == picture.sha256 and record["category"] == "one" and record["references"] == "One"
    assert (record["question"], record["answer"]) == ("Is it whole?", turn.answer)
    assert (record["score"], record["threshold"]) == (session.anomaly_score, session.references.threshold)
    assert record["checkpoint_hash"] == model.checkpoint_id and record["profile"] == "mini"
    assert record["is_predicted_anomalous"] is session.says_anomalous and record["session"] == session.id
    assert "image" not in record


def test_own_references_are_used_and_replaced(session, picture, dataset):
    mine = [chat.open_picture(s.image_path) for s in dataset.select(split="train", category="one")]
    session.choose(picture)
    session.add_references("mine", mine)
    assert session.key == "mine" and session.references.n == 3 and session.references.category is None
    with_three = session.anomaly_map
    session.add_references("mine", mine[:2])
    assert session.references.n == 2 and not np.allclose(session.anomaly_map, with_three)
    with pytest.raises(BadInput, match="1 genuine picture given, at least 2"):
        session.add_references("mine", mine[:1])
    for name in ("one", NO_REFERENCES):
        with pytest.raises(BadInput, match="belongs to the dataset"):
            session.add_references(name, mine)


def test_a_session_needs_the_choice_of_no_references(model, known):
    with pytest.raises(ValueError, match="lacks 'none'"):
        chat.ChatSession(model, {"one": known["one"]})


def test_errors_are_noted_with_their_traceback(session):
    try:
        raise KeyError("map")
    except KeyError as error:
        details = session.record_error(error)
    assert session.errors == ["KeyError: 'map'"] and "test_chat.py" in details


# --- what is drawn ---------------------------------------------------------------------------------------------------


IMAGE = np.full((40, 60, 3), (90, 120, 150), np.uint8)


def peak(value: float) -> np.ndarray:
    anomaly_map = np.zeros((8, 12), np.float32)
    anomaly_map[2:4, 8:10] = value
    return anomaly_map


def test_the_original_is_untouched_and_large_pictures_are_shrunk():
    np.testing.assert_array_equal(chat.draw_view(IMAGE, peak(1), (0, 1), view="original", threshold=0.5), IMAGE)
    np.testing.assert_array_equal(chat.draw_view(IMAGE, None, (0, 1), view="overlay"), IMAGE)
    assert chat.draw_view(IMAGE, peak(1), (0, 1), view="map", max_side=30).shape == (20, 30, 3)


def test_equal_values_have_equal_colours_whatever_else_is_in_the_map():
    low, high = (chat.draw_view(IMAGE, peak(v), (0, 1), view="map") for v in (0.5, 1.0))
    assert (low[0, 0] == high[0, 0]).all() and (low[15, 45] != high[15, 45]).any()
    beyond = chat.draw_view(IMAGE, peak(7.0), (0, 1), view="map")
    np.testing.assert_array_equal(beyond[15, 45], high[15, 45])


def test_the_overlay_is_more_opaque_where_the_map_is_higher():
    drawn = chat.draw_view(IMAGE, peak(1.0), (0, 1), opacity=0.6)
    np.testing.assert_array_equal(drawn, figures.overlay(IMAGE, peak(1.0), (0, 1), opacity=0.6))
    assert (chat.draw_view(IMAGE, peak(1.0), (0, 1), opacity=0.0) == drawn[0, 0]).all()


@pytest.mark.parametrize("view", ["map", "overlay"])
def test_a_line_runs_around_what_lies_above_the_threshold(view):
    def line(threshold):
        drawn = chat.draw_view(IMAGE, peak(1.0), (0, 1), view=view, threshold=threshold)
        return (drawn == (0, 229, 255)).all(axis=2)

    assert line(0.5).any() and line(0.5)[:, :30].sum() == 0
    assert not line(1.0).any() and not line(math.nan).any()


def test_an_unknown_view_is_refused():
    with pytest.raises(ValueError, match="allowed are original, map, overlay"):
        chat.draw_view(IMAGE, peak(1), (0, 1), view="mask")


def test_the_map_in_words():
    assert chat.describe_map(peak(1.0), 0.5) == (
        "Highest value 1.000 (top right); threshold 0.500: 4.2% of the picture lies above it."
    )
    assert chat.describe_map(peak(0.4), 0.5).endswith("nothing lies above it.")


def test_a_conversation_as_plain_lines():
    turns = [chat.Turn("Is it whole?", "…", "Yes.", "", 0.0, 0), chat.Turn("Sure?", "…", "No.", "", 0.0, 0)]
    lines = chat.as_text(turns).splitlines()
    assert lines[0].endswith("Is it whole?") and lines[3] == "AnomalyGPT: No." and len(lines) == 4


def test_pngs_are_read_back(tmp_path: Path):
    image = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(chat.png_bytes(image))
    np.testing.assert_array_equal(images.load_image(tmp_path / "a.png"), image)
