"""Captions of scenes in English, Chinese and Japanese, from a grammar of synonyms, word orders and sentence frames.

Of every language some frames are held out: training never uses them, evaluation does.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wan_nano import vocab
from wan_nano.scenes import BACKGROUNDS, COLOURS, KINDS, MOTIONS, SPEEDS, Scenes

LANGUAGES = ("en", "zh", "ja")
MENTION_BACKGROUND = 0.5  # how many captions name the background, as a part of 1


class English:
    """One object's clause; the format after the colon in a frame picks the form."""

    def __init__(self, pick: random.Random, kind: str, colour: str, motion: str, speed: str):
        name = _noun(pick, kind, vocab.EN_SHAPES, vocab.EN_DIGITS)
        noun = f"{pick.choice(vocab.EN_COLOURS[colour])} {name}"
        article = pick.choice(("a", "a", "the", "one"))
        self.noun = f"{'an' if article == 'a' and noun[0] in 'aeiou' else article} {noun}"
        verbs = vocab.EN_VERBS.get(motion, ())
        if motion in vocab.EN_WHERE and (not verbs or pick.random() < 0.7):
            finite, ing = pick.choice(vocab.EN_GO)
            where = " " + pick.choice(vocab.EN_WHERE[motion])
        else:
            finite, ing = pick.choice(verbs)
            where = ""
        front = middle = end = ""
        if speed != "normal":
            adverb = pick.choice(vocab.EN_SPEEDS[speed])
            place = pick.random()
            if adverb in vocab.EN_FRONT and place < 0.4:
                front = f"{adverb} "
            elif where and place < 0.6:
                middle = f" {adverb}"
            else:
                end = f" {adverb}"
        self.finite = f"{front}{finite}{middle}{where}{end}"
        self.ing = f"{front}{ing}{middle}{where}{end}"

    def __format__(self, form: str) -> str:
        return {
            "finite": f"{self.noun} {self.finite}",
            "ing": f"{self.noun} {self.ing}",
            "that": f"{self.noun} that {self.finite}",
        }[form]


class Chinese:
    """One object's clause, with a numeral or bare."""

    def __init__(self, pick: random.Random, kind: str, colour: str, motion: str, speed: str):
        of = pick.choice(("", "", "的"))
        self.noun = pick.choice(vocab.ZH_COLOURS[colour]) + of + _noun(pick, kind, vocab.ZH_SHAPES, vocab.ZH_DIGITS)
        verbs = vocab.ZH_VERBS.get(motion, ())
        if motion in vocab.ZH_WHERE and (not verbs or pick.random() < 0.7):
            verb = pick.choice(vocab.ZH_TOWARD) + pick.choice(vocab.ZH_WHERE[motion]) + pick.choice(vocab.ZH_GO)
        else:
            verb = pick.choice(verbs)
        self.verb = verb if speed == "normal" else pick.choice(vocab.ZH_SPEEDS[speed]) + verb

    def __format__(self, form: str) -> str:
        return ("一个" if form == "one" else "") + self.noun + self.verb


class Japanese:
    """One object's clause: its particle, and the verb plain or going on."""

    def __init__(self, pick: random.Random, kind: str, colour: str, motion: str, speed: str):
        self.noun = pick.choice(vocab.JA_COLOURS[colour]) + _noun(pick, kind, vocab.JA_SHAPES, vocab.JA_DIGITS)
        verbs = vocab.JA_VERBS.get(motion, ())
        if motion in vocab.JA_WHERE and (not verbs or pick.random() < 0.7):
            where = pick.choice(vocab.JA_WHERE[motion]) + pick.choice("にへ")
            verb = tuple(where + form for form in pick.choice(vocab.JA_GO))
        else:
            verb = pick.choice(verbs)
        adverb = "" if speed == "normal" else pick.choice(vocab.JA_SPEEDS[speed])
        self.verb, self.going_on = (adverb + form for form in verb)

    def __format__(self, form: str) -> str:
        particle = "は" if form == "ha" else "が"
        return self.noun + particle + (self.going_on if form == "ing" else self.verb)


CLAUSES = {"en": English, "zh": Chinese, "ja": Japanese}
BACKGROUND_WORDS: dict[str, Mapping[str, Sequence[str]]] = {
    "en": vocab.EN_BACKGROUNDS,
    "zh": vocab.ZH_BACKGROUNDS,
    "ja": vocab.JA_BACKGROUNDS,
}


@dataclass(frozen=True)
class Caption:
    """A text, and whether it names the background."""

    text: str
    names_background: bool


def write_caption(
    scenes: Scenes, index: int, language: str, pick: random.Random, *, held_out_frame: bool = False
) -> Caption:
    """One caption of one scene; `pick` decides among all ways to say it."""
    names = [
        (KINDS[kind], list(COLOURS)[colour], MOTIONS[motion], SPEEDS[speed])
        for kind, colour, motion, speed in zip(
            *(getattr(scenes, name)[index] for name in ("kind", "colour", "motion", "speed")), strict=True
        )
    ]
    count = int(scenes.count[index])
    clauses = [CLAUSES[language](pick, *name) for name in names[:count]]
    frames = vocab.FRAMES[language][held_out_frame]
    on_background = pick.random() < MENTION_BACKGROUND
    words = BACKGROUND_WORDS[language][list(BACKGROUNDS)[scenes.background[index]]]
    if not held_out_frame and pick.random() < vocab.LOOSE_PART:
        text = _loose(pick, language, clauses, pick.choice(words) if on_background else None)
    elif on_background:
        text = pick.choice(frames.two_on if count == 2 else frames.one_on).format(*clauses, b=pick.choice(words))
    else:
        text = pick.choice(frames.two if count == 2 else frames.one).format(*clauses)
    if not held_out_frame and pick.random() < vocab.FILLER_PART:
        text = pick.choice(vocab.FILLERS[language]) + text
    if pick.random() < 0.3:
        text = text[0].upper() + text[1:]
    if not text.endswith((".", "。")) and pick.random() < 0.2:
        text += "." if language == "en" else "。"
    return Caption(text, on_background)


def _loose(pick: random.Random, language: str, clauses: Sequence[Any], background: str | None) -> str:
    """The clauses and the background joined anyhow, made-up words among them."""
    space = " " if language == "en" else ""

    def one_word() -> str:
        longer = language == "en" and pick.random() < 0.5
        return pick.choice(vocab.MADE_UP[language]) + (pick.choice(vocab.MADE_UP[language]) if longer else "")

    def made_up() -> str:
        number = pick.choice((0, 0, 0, 1, 1, 2)) if language == "en" else pick.choice((0, 0, 0, 1, 2, 3))
        return space.join(one_word() for _ in range(number))

    pieces = [format(clause, pick.choice(vocab.LOOSE_FORMS[language])) for clause in clauses]
    if background is not None:
        named = pick.choice(vocab.LOOSE_BACKGROUNDS[language]).format(background, words=made_up()).strip()
        pieces.insert(pick.choice((0, len(pieces))), named)
    text = made_up()
    for number, piece in enumerate(pieces):
        joint = pick.choice(vocab.LOOSE_JOINTS[language]) if number else space
        text = text + joint + space.join(part for part in (piece, made_up()) if part) if text else piece
        if number + 1 < len(pieces) and pick.random() < 0.5 and (words := made_up()):
            text += space + words
    return text.strip()


def write_captions(scenes: Scenes, seed: int, *, held_out_frames: bool = False) -> list[list[Caption]]:
    """Every scene's captions, one in each of LANGUAGES; the same seed gives the same ones."""
    pick = random.Random(seed)
    return [
        [write_caption(scenes, index, language, pick, held_out_frame=held_out_frames) for language in LANGUAGES]
        for index in range(len(scenes))
    ]


def _noun(pick: random.Random, kind: str, shapes: Mapping[str, Sequence[str]], digits: Sequence[str]) -> str:
    if kind in shapes:
        return pick.choice(shapes[kind])
    words = vocab.CHINESE_DIGITS if digits is vocab.ZH_DIGITS else vocab.ENGLISH_DIGITS
    return pick.choice(digits).format(kind, words[int(kind)])
