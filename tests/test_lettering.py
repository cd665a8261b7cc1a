"""Names of any language in pictures: letters of a font that has them, else ASCII; no boxes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from wds_convnext.lettering import Lettering, system_fonts

DEJAVU = [path for path in system_fonts() if path.endswith("DejaVuSans.ttf")]
needs_dejavu = pytest.mark.skipif(not DEJAVU, reason="DejaVu Sans is not installed")


def drawn(text: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    image = Image.new("L", (400, 30))
    ImageDraw.Draw(image).text((2, 2), text, 255, font)
    return np.asarray(image)


@given(text=st.text(max_size=8))
def test_without_fonts_every_text_is_readable_ascii(text):
    chosen, font = Lettering(14, find_fonts=list).choose(text)

    assert all(char.isascii() and char.isprintable() for char in chosen if char not in text)
    drawn(chosen, font)  # takes any text that was chosen


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("golden retriever", "golden retriever"),
        ("中文", r"\u4e2d\u6587"),
        ("猫 cat", r"\u732b cat"),
        ("собака", "sobaka"),
        ("Щука, ёж", "Shchuka, ezh"),
        ("كلب", r"\u0643\u0644\u0628"),
        ("🐶", ":dog face:"),
        ("👨‍👩‍👧 family", ":man::woman::girl: family"),
        ("❤️", ":heavy black heart:"),
        ("Müller's café", "Muller's cafe"),
        ("Łódź, Ærø, Straße", "Lodz, Aero, Strasse"),
        ("개", r"\uac1c"),
        ("two\nlines\t\x1b", r"two\nlines\t\x1b"),
        ("not UTF-8 \udcff", r"not UTF-8 \udcff"),
        ("", ""),
    ],
)
def test_letters_that_no_font_has_are_written_in_ascii(name, expected):
    chosen, _ = Lettering(14, find_fonts=lambda: ["/nowhere/font.ttf", __file__]).choose(name)

    assert chosen == expected


@needs_dejavu
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("собака", "собака"),
        ("Ελλάδα", "Ελλάδα"),
        ("كلب", "كلب"),
        ("café", "café"),
        ("cafe\N{COMBINING ACUTE ACCENT}", "café"),
        ("собака 中 🐶", r"собака \u4e2d :dog face:"),
    ],
)
def test_a_font_that_has_the_letters_is_used(name, expected):
    """What it lacks of them is in ASCII; what is drawn differs from a row of boxes."""
    chosen, font = Lettering(14, find_fonts=lambda: DEJAVU).choose(name)

    assert chosen == expected
    assert font.path == DEJAVU[0]
    boxes = "".join("\U0010fffe" if char.isalpha() else char for char in chosen)
    assert (drawn(chosen, font) != drawn(boxes, font)).any()


def test_a_name_is_cut_to_its_column():
    lettering = Lettering(14, find_fonts=list)

    text, font = lettering.fit("a name that is far too long for it 中", 90)

    assert text.startswith("a name") and text.endswith("...")
    assert 60 < font.getlength(text) <= 90
    assert lettering.fit("ant", 90)[0] == "ant"
