"""What the chat shows as HTML and Markdown: nothing a user, a model or a file name says becomes markup."""

from __future__ import annotations

import dataclasses
import html.parser
import math

import numpy as np
import pytest
import tiny_chat
from tiny_chat import HOSTILE

from helpers.chat import chat_html, references
from helpers.chat import session as chat
from helpers.chat.detectors import Verdict
from helpers.chat.session import Turn

TURN = Turn(HOSTILE, HOSTILE, HOSTILE, "2026-01-01T12:34:56+00:00", 1.25, 40)
IMAGE = np.full((30, 40, 3), 120, np.uint8)
VERDICTS = [
    Verdict("clip_lof", 1.5, 1.25, 0.014, seconds=0.1),
    Verdict("anomalyclip", 0.25, 0.5, 0.5, np.eye(4, dtype=np.float32), (0.0, 1.0), 0.2),
    Verdict("clip_resnet50", note=f"Nothing saved: {HOSTILE}"),
]


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a piece of HTML."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        assert self.open == [], "an element is not closed"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def checked(text: str) -> Page:
    page = Page(text)
    assert not {"script", "a", "iframe", "link", "object"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name != "src" or value.startswith("data:image/")
        assert "url(" not in (value or "") and "http" not in (value or "")
    return page


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    model = tiny_chat.build_model()
    dataset = tiny_chat.write_dataset(tmp_path_factory.mktemp("dataset"))
    known = references.of_dataset(model, dataset, settings=tiny_chat.SETTINGS)
    known["one"] = dataclasses.replace(known["one"], label=f"One {HOSTILE}")
    session = tiny_chat.session(model, known)
    picture = chat.open_picture(dataset.samples[0].image_path, category="one")
    session.choose(dataclasses.replace(picture, name=f"{HOSTILE}.png"))
    session.history = [TURN, dataclasses.replace(TURN, question="这幅画? 🎨", answer="لا.\nsecond line", n_reused=0)]
    return session


def test_bubbles_show_every_text_as_text():
    page = checked(chat_html.bubbles([TURN], asking=f"again {HOSTILE}", answer_so_far=f"so far {HOSTILE}"))
    assert page.text.count(HOSTILE) == 4 and f"so far {HOSTILE} …" in page.text
    assert "1.2 s, 40 tokens reused" in page.text and "You · 12:34 UTC" in page.text


def test_bubbles_say_what_to_do_and_what_goes_on():
    assert "Choose <one>" in checked(chat_html.bubbles([], empty="Choose <one>")).text
    assert "thinking …" in checked(chat_html.bubbles([], asking="Is it whole?")).text
    assert "(no words)" in checked(chat_html.bubbles([dataclasses.replace(TURN, answer="")])).text


def test_right_to_left_text_keeps_to_its_bubble():
    page = checked(chat_html.bubbles([dataclasses.replace(TURN, question="\u202eسليمة")]))
    assert page.attributes.count(("dir", "auto")) == 2
    assert any(name == "style" and "unicode-bidi:isolate" in value for name, value in page.attributes)


@pytest.mark.parametrize("kind", ["note", "error", "done"])
def test_messages_are_escaped_and_fold_their_details(kind):
    page = checked(chat_html.message(HOSTILE, kind=kind, details=f"Traceback {HOSTILE}"))
    assert page.text.count(HOSTILE) == 2 and "details" in page.tags
    assert "details" not in checked(chat_html.message("short")).tags
    colours = {kind: chat_html.message("x", kind=kind) for kind in ("note", "error", "done")}
    assert len(set(colours.values())) == 3


def test_headings_and_legend_are_escaped():
    assert HOSTILE in checked(chat_html.heading(HOSTILE, HOSTILE, ruled=True)).text
    page = checked(chat_html.legend((0.1, 0.5), 0.3, HOSTILE))
    assert HOSTILE in page.text and "0.1 normal" in page.text and "0.5 anomalous" in page.text


@pytest.mark.parametrize(("threshold", "place"), [(0.3, "50.0%"), (0.1, "0.0%"), (9.0, "100.0%"), (-9.0, "0.0%")])
def test_the_threshold_stands_on_the_scale(threshold, place):
    assert f"left:{place};" in chat_html.legend((0.1, 0.5), threshold, "")


def test_cards_stand_side_by_side_and_hide_nothing():
    page = checked(chat_html.cards(VERDICTS, IMAGE))
    for words in ("CLIP LOF", "AnomalyCLIP", "CLIP + CNN similarity", f"Nothing saved: {HOSTILE}"):
        assert words in page.text
    assert page.text.index("CLIP LOF") < page.text.index("AnomalyCLIP") < page.text.index("CNN similarity")
    for words in ("anomalous", "normal", "no verdict", "1.5", "1.25", "0.014", "no map"):
        assert words in page.text
    assert page.tags.count("img") == 1 and "nan" not in page.text


def test_the_transcript_is_one_page_without_a_script(session):
    page = checked(chat_html.transcript(session, VERDICTS))
    assert page.text.count(HOSTILE) >= 5
    for words in ("这幅画? 🎨", "لا.", session.id, "CLIP LOF", "Compared with: One", "no proof of a forgery"):
        assert words in page.text
    assert page.tags.count("img") == 3 and TURN.time in page.text


def test_a_transcript_before_anything_was_asked(session):
    fresh = tiny_chat.session(session.model, session.known)
    page = checked(chat_html.transcript(fresh))
    assert "no picture" in page.text and "Nothing was asked." in page.text
    assert "transcript" in chat_html.markdown(fresh)


def test_markdown_shows_markup_as_text(session):
    text = chat_html.markdown(session, VERDICTS)
    plain = "&lt;script&gt;alert\\(1\\)&lt;/script&gt;&lt;img src=x onerror=alert\\(2\\)&gt;"
    assert text.count(plain) == 4  # picture, references, question, answer
    assert "<" not in text and "\\[x\\]\\(javascript:alert\\(3\\)\\)" in text and "\\`\\*\\_" in text
    assert "لا\\. second line" in text  # a new line could begin a heading or a list
    assert "| CLIP LOF | anomalous | 1.5 | 1.25 | 0.014 |" in text
    assert "| CLIP \\+ CNN similarity | no verdict | – | – | – |" in text


def test_transcripts_are_written_and_replaced(session, tmp_path):
    page, text = chat_html.write_transcript(session, tmp_path / "chat")
    again = chat_html.write_transcript(session, tmp_path / "chat", VERDICTS)
    assert again == (page, text) and sorted(page.parent.iterdir()) == sorted([page, text])
    assert page.read_text(encoding="utf-8") == chat_html.transcript(session, VERDICTS)
    assert text.read_text(encoding="utf-8") == chat_html.markdown(session, VERDICTS)


def test_numbers_without_a_value_are_a_dash():
    assert chat_html._number(math.nan) == "–" and chat_html._number(0.01234) == "0.0123"
