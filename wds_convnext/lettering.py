"""Text in pictures: a font that has the letters, else letters that a font has; never boxes."""

import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache
from pathlib import Path

from PIL import ImageFont, features

_FOLDERS = {
    "darwin": ["/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"],
    "win32": ["C:/Windows/Fonts"],
}
_LINUX_FOLDERS = ["/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"]
# One file per family is enough, and the last two have a box for each letter.
_LEFT_OUT = re.compile(
    r"bold|italic|oblique|light|thin|medium|black|heavy|cond|mono|math|lastresort|blank", re.I
)
_UNASSIGNED = "\U0010fffe"  # every font shows its mark for what it lacks
_CYRILLIC = "абвгдежзийклмнопрстуфхцчшщъыьэюяієґј"
_ITS_SOUNDS = "a b v g d e zh z i j k l m n o p r s t u f kh ts ch sh shch ' y ' e yu ya i ye g j"
_SOUNDS = dict(zip(_CYRILLIC, _ITS_SOUNDS.split())) | {"ß": "ss", "ı": "i"}
_LATIN = re.compile(r"LATIN (?:SMALL|CAPITAL) LETTER ([A-Z]{1,2})(?: WITH .*)?")  # ø, æ


def system_fonts() -> list[str]:
    """The font files of this system: as matplotlib knows them, else in the usual folders."""
    try:
        from matplotlib.font_manager import fontManager

        paths = [font.fname for font in fontManager.ttflist]
    except ImportError:
        folders = _FOLDERS.get(sys.platform, _LINUX_FOLDERS)
        files = [path for f in folders for path in Path(f).expanduser().rglob("*")]
        paths = [str(p) for p in files if p.suffix.lower() in (".ttf", ".otf", ".ttc")]
    return sorted(path for path in paths if not _LEFT_OUT.search(os.path.basename(path)))


class Lettering:
    """Chooses font and text for what is to be drawn.

    Args:
        size: of the letters, in pixels.
        find_fonts: gives the files of fonts to try after Pillow's own, which is Latin; called once
            there is a letter that it lacks.
    """

    def __init__(self, size: int, find_fonts: Callable[[], Iterable[str]] = system_fonts):
        self.size = size
        self.find_fonts = find_fonts
        own = ImageFont.load_default(size=size)
        assert isinstance(own, ImageFont.FreeTypeFont)  # as it is when a size is given
        self.latin = _Font(own)

    @cached_property
    def fonts(self) -> list["_Font"]:
        fonts = [self.latin]
        for path in self.find_fonts():
            try:
                fonts.append(_Font(ImageFont.truetype(path, self.size)))
            except OSError:  # damaged, or a bitmap font of other sizes
                continue
        return fonts

    def choose(self, text: str) -> tuple[str, ImageFont.FreeTypeFont]:
        """The text with what no one font has in ASCII, and the font that has the most of it."""
        text = unicodedata.normalize("NFC", text)
        font = self.latin
        if font.num_missing(text):
            font = min(self.fonts, key=lambda font: font.num_missing(text))
        drawn = "".join(char if font.has(char) else in_ascii(char) for char in text)
        return drawn, font.font

    def fit(self, text: str, width: float) -> tuple[str, ImageFont.FreeTypeFont]:
        """As `choose`, cut to a width in pixels."""
        text, font = self.choose(text)
        while len(text) > 3 and font.getlength(text) > width:
            text = text.removesuffix("...")[:-1] + "..."
        return text, font


class _Font:
    """A font that knows which characters it has."""

    def __init__(self, font: ImageFont.FreeTypeFont):
        self.font = font
        # Shaping would add to a glyph what is not its own, such as a circle under an accent.
        self.unshaped = font.font_variant(layout_engine=ImageFont.Layout.BASIC)
        self.missing = self._glyph(_UNASSIGNED)
        self.has = lru_cache(maxsize=None)(self._has)

    def num_missing(self, text: str) -> int:
        return sum(not self.has(char) for char in text)

    def _has(self, char: str) -> bool:
        if char.isascii() and char.isprintable():
            return True
        if unicodedata.category(char) in ("Cc", "Cn", "Co", "Cs", "Zl", "Zp"):
            return False
        if _needs_shaping(char) and not features.check("raqm"):
            return False
        return self._glyph(char) != self.missing

    def _glyph(self, char: str) -> tuple[tuple[int, int], bytes]:
        mask = self.unshaped.getmask(char)
        return mask.size, bytes(mask)


def _needs_shaping(char: str) -> bool:
    """Whether a character's form or place depends on its neighbors: right to left, Indic vowels."""
    return unicodedata.bidirectional(char) in ("R", "AL") or unicodedata.category(char) == "Mc"


def in_ascii(char: str) -> str:
    r"""A character in ASCII: its base letter, its sound, its name (a symbol's), or `\u4e2d`."""
    if char.isascii() and char.isprintable():
        return char
    category = unicodedata.category(char)
    if category in ("Mn", "Cf"):  # accents and joiners
        return ""
    parts = unicodedata.normalize("NFKD", char)
    if parts != char and category != "Lo":  # letters of Korean, for one, have no better parts
        return "".join(map(in_ascii, parts))
    name = unicodedata.name(char, "")
    latin = _LATIN.fullmatch(name)
    if sound := latin[1].lower() if latin else _SOUNDS.get(char.lower()):
        return sound if char.islower() else sound.capitalize()
    if category == "So" and name:
        return f":{name.lower()}:"
    return char.encode("unicode_escape").decode("ascii")
