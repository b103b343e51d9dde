"""The words of captions in English, Chinese and Japanese: synonyms, verbs, and sentence frames.

Words that stand twice are drawn twice as often.
"""

from collections.abc import Sequence
from dataclasses import dataclass

ENGLISH_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CHINESE_DIGITS = "零一二三四五六七八九"


@dataclass(frozen=True)
class Frames:
    """Sentence frames; in them {0} and {1} are the objects' clauses, {b} is the background."""

    one: Sequence[str]
    two: Sequence[str]
    one_on: Sequence[str]  # with the background
    two_on: Sequence[str]


def _forms(*verbs: str) -> tuple[tuple[str, ...], ...]:
    """Splits the forms of each verb: "rises/rising"."""
    return tuple(tuple(verb.split("/")) for verb in verbs)


# English: a clause is a noun phrase and a verb phrase, finite ("moves right") or not ("moving right").
EN_COLOURS = {
    "red": ("red", "red", "crimson", "scarlet"),
    "orange": ("orange", "orange", "bright orange"),
    "yellow": ("yellow", "yellow", "bright yellow"),
    "green": ("green", "green", "grass green"),
    "cyan": ("cyan", "cyan", "turquoise", "aqua"),
    "blue": ("blue", "blue", "deep blue"),
    "purple": ("purple", "purple", "violet"),
    "pink": ("pink", "pink", "rosy pink"),
}
EN_SHAPES = {
    "circle": ("circle", "circle", "disc", "round dot"),
    "square": ("square", "square", "square block"),
    "triangle": ("triangle", "triangle", "triangular shape"),
    "star": ("star", "star", "five-pointed star"),
    "cross": ("cross", "cross", "plus sign"),
    "ring": ("ring", "ring", "hoop"),
    "heart": ("heart", "heart", "heart shape"),
    "moon": ("moon", "crescent", "crescent moon"),
}
EN_DIGITS = (
    *("{0}", "digit {0}", "number {0}", "handwritten {0}", "handwritten digit {0}"),
    *("{1}", "digit {1}", "number {1}"),
)
# Each verb as (finite, not finite), then what follows it.
EN_GO = (("moves", "moving"), ("moves", "moving"), ("goes", "going"), ("slides", "sliding"), ("travels", "traveling"))
EN_WHERE = {
    "left": ("left", "to the left", "leftwards", "toward the left"),
    "right": ("right", "to the right", "rightwards", "toward the right"),
    "up": ("up", "upwards", "to the top", "straight up"),
    "down": ("down", "downwards", "to the bottom", "straight down"),
    "up left": ("up and left", "to the upper left", "diagonally up left", "to the top left"),
    "up right": ("up and right", "to the upper right", "diagonally up right", "to the top right"),
    "down left": ("down and left", "to the lower left", "diagonally down left", "to the bottom left"),
    "down right": ("down and right", "to the lower right", "diagonally down right", "to the bottom right"),
    "circle": ("in a circle", "in circles", "around in a circle", "along a circular path"),
}
EN_VERBS = {
    "up": _forms("rises/rising"),
    "down": _forms("sinks/sinking"),
    "circle": _forms("circles around/circling around", "orbits/orbiting"),
    "bounce": _forms(
        "bounces/bouncing",
        "bounces up and down/bouncing up and down",
        "hops/hopping",
        "jumps up and down/jumping up and down",
    ),
    "grow": _forms(
        "grows/growing", "gets bigger/getting bigger", "becomes larger/becoming larger", "expands/expanding"
    ),
    "shrink": _forms(
        "shrinks/shrinking", "gets smaller/getting smaller", "becomes smaller/becoming smaller", "contracts/contracting"
    ),
    "rotate": _forms(
        "rotates/rotating",
        "spins/spinning",
        "turns around its center/turning around its center",
        "spins in place/spinning in place",
    ),
    "stay": _forms(
        "stays still/staying still",
        "does not move/not moving",
        "stands still/standing still",
        "rests in place/resting in place",
        "stays where it is/staying where it is",
    ),
}
EN_SPEEDS = {
    "slow": ("slowly", "slowly", "at a slow pace", "at low speed"),
    "fast": ("quickly", "fast", "rapidly", "at high speed"),
}
EN_FRONT = ("slowly", "quickly", "rapidly")  # of those, what may stand before the verb
EN_BACKGROUNDS = {
    "white": ("white", "plain white"),
    "light gray": ("light gray", "light grey", "pale gray"),
    "dark gray": ("dark gray", "dark grey"),
    "black": ("black", "plain black"),
}
EN_TRAINED = Frames(
    one=(
        *("{0:finite}", "{0:finite}", "{0:ing}", "a video of {0:ing}", "{0:that}", "there is {0:that}"),
        *("a short clip in which {0:finite}", "an animation of {0:ing}", "show {0:ing}"),
    ),
    two=(
        *("{0:finite} and {1:finite}", "{0:finite} while {1:finite}", "{0:finite}, {1:finite}"),
        *("{0:ing} and {1:ing}", "a video of {0:ing} and {1:ing}", "{0:finite}; at the same time {1:finite}"),
        *("two objects: {0:ing} and {1:ing}", "{0:ing}, {1:ing}", "as {0:finite}, {1:finite}"),
    ),
    one_on=(
        *("{0:finite} on a {b} background", "on a {b} background, {0:finite}"),
        *("{0:ing} against a {b} background", "{b} background, {0:ing}", "{0:finite}. the background is {b}"),
        *("a video of {0:ing}, {b} background",),
    ),
    two_on=(
        *("{0:finite} and {1:finite} on a {b} background", "on a {b} background, {0:finite} and {1:finite}"),
        *("on a {b} background, {0:finite} while {1:finite}", "{b} background, {0:ing} and {1:ing}"),
        *("{0:ing} and {1:ing} against a {b} background", "{0:finite}, {1:finite}. the background is {b}"),
    ),
)
EN_HELD_OUT = Frames(
    one=("this clip shows {0:ing}", "{0:finite} across the scene", "we see {0:that}"),
    two=("this clip shows {0:ing} and {1:ing}", "{0:finite}, and {1:finite}", "{0:finite}. {1:finite}."),
    one_on=("in front of a {b} backdrop {0:finite}", "{0:finite} in front of {b}"),
    two_on=("in front of a {b} background {0:finite}, and {1:finite}", "{0:finite} and {1:finite}, on {b}"),
)

# Chinese: a clause is colour, noun, and a verb phrase with the speed before it.
ZH_COLOURS = {
    "red": ("红色", "红色", "红"),
    "orange": ("橙色", "橙色", "橘色"),
    "yellow": ("黄色", "黄色", "黄"),
    "green": ("绿色", "绿色", "绿"),
    "cyan": ("青色", "青色", "青绿色"),
    "blue": ("蓝色", "蓝色", "蓝"),
    "purple": ("紫色", "紫色", "紫"),
    "pink": ("粉色", "粉红色", "粉红"),
}
ZH_SHAPES = {
    "circle": ("圆形", "圆", "圆点"),
    "square": ("正方形", "方块", "方形"),
    "triangle": ("三角形", "三角形", "三角"),
    "star": ("星星", "五角星", "星形"),
    "cross": ("十字", "十字形", "加号"),
    "ring": ("圆环", "环形", "圆圈"),
    "heart": ("心形", "爱心", "心"),
    "moon": ("月亮", "月牙", "弯月"),
}
ZH_DIGITS = ("数字{0}", "数字{0}", "手写数字{0}", "手写的{0}", "数字{1}")
ZH_TOWARD = ("向", "向", "往", "朝")
ZH_WHERE = {
    "left": ("左", "左边", "左侧"),
    "right": ("右", "右边", "右侧"),
    "up": ("上", "上方"),
    "down": ("下", "下方"),
    "up left": ("左上", "左上方", "左上角"),
    "up right": ("右上", "右上方", "右上角"),
    "down left": ("左下", "左下方", "左下角"),
    "down right": ("右下", "右下方", "右下角"),
}
ZH_GO = ("移动", "移动", "滑动", "运动", "走")
ZH_VERBS = {
    "up": ("上升",),
    "down": ("下降",),
    "circle": ("绕圈移动", "沿圆形路径移动", "做圆周运动", "绕着圆圈运动"),
    "bounce": ("弹跳", "上下弹跳", "蹦跳", "上下跳动"),
    "grow": ("变大", "逐渐变大", "放大", "膨胀"),
    "shrink": ("变小", "逐渐变小", "缩小", "收缩"),
    "rotate": ("旋转", "原地旋转", "自转", "转动"),
    "stay": ("静止不动", "保持静止", "不动", "停在原地"),
}
ZH_SPEEDS = {"slow": ("缓慢地", "慢慢地", "慢速"), "fast": ("快速地", "迅速地", "飞快地", "高速")}
ZH_BACKGROUNDS = {
    "white": ("白色", "纯白色"),
    "light gray": ("浅灰色", "淡灰色"),
    "dark gray": ("深灰色", "暗灰色"),
    "black": ("黑色", "纯黑色"),
}
ZH_TRAINED = Frames(
    one=(
        *("{0:one}", "{0:one}", "{0:bare}", "有{0:one}", "视频里{0:one}", "一段视频,{0:one}", "画面中{0:one}"),
        *("动画:{0:bare}",),
    ),
    two=(
        *("{0:one},{1:one}", "{0:one},同时{1:one}", "{0:bare},{1:bare}", "{0:one},而{1:one}", "画面中{0:one},{1:one}"),
        *("{0:bare}和{1:bare}", "一段视频,{0:one},{1:one}"),
    ),
    one_on=("{b}背景上,{0:one}", "在{b}背景上{0:one}", "{0:one},背景是{b}", "{b}的背景,{0:bare}"),
    two_on=(
        *("{b}背景上,{0:one},{1:one}", "在{b}背景上{0:one},同时{1:one}", "{0:one},{1:one},背景是{b}"),
        *("{b}的背景,{0:bare},{1:bare}",),
    ),
)
ZH_HELD_OUT = Frames(
    one=("这里有{0:one}", "请看{0:one}", "屏幕上{0:bare}"),
    two=("这里有{0:one},还有{1:one}", "请看,{0:one}。{1:one}。", "{0:one},另外{1:one}"),
    one_on=("背景为{b},{0:one}", "{0:bare},在{b}的画面上"),
    two_on=("背景为{b},{0:one},{1:one}", "{b}背景:{0:one},而{1:one}"),
)

# Japanese: a clause is colour, noun, particle, and a verb phrase with the speed before it; verbs as (plain, going on).
JA_COLOURS = {
    "red": ("赤い", "赤い", "赤色の"),
    "orange": ("オレンジ色の", "オレンジの", "橙色の"),
    "yellow": ("黄色い", "黄色の", "黄色い"),
    "green": ("緑の", "緑色の", "緑の"),
    "cyan": ("水色の", "シアンの", "水色の"),
    "blue": ("青い", "青い", "青色の"),
    "purple": ("紫の", "紫色の", "紫の"),
    "pink": ("ピンクの", "ピンク色の", "桃色の"),
}
JA_SHAPES = {
    "circle": ("円", "丸", "円形"),
    "square": ("四角", "正方形", "四角形"),
    "triangle": ("三角", "三角形", "三角形"),
    "star": ("星", "星形", "星"),
    "cross": ("十字", "十字形", "プラス記号"),
    "ring": ("輪", "リング", "円環"),
    "heart": ("ハート", "ハート形", "ハート"),
    "moon": ("三日月", "月", "三日月"),
}
JA_DIGITS = ("数字の{0}", "数字の{0}", "手書きの{0}", "手書き数字の{0}", "数字{0}")
JA_WHERE = {
    "left": ("左", "左側", "左の方"),
    "right": ("右", "右側", "右の方"),
    "up": ("上", "上の方", "上方"),
    "down": ("下", "下の方", "下方"),
    "up left": ("左上", "左上の方", "斜め左上"),
    "up right": ("右上", "右上の方", "斜め右上"),
    "down left": ("左下", "左下の方", "斜め左下"),
    "down right": ("右下", "右下の方", "斜め右下"),
}
JA_GO = (("動く", "動いている"), ("移動する", "移動している"), ("進む", "進んでいる"), ("滑る", "滑っている"))
JA_VERBS = {
    "up": _forms("上昇する/上昇している"),
    "down": _forms("下降する/下降している"),
    "circle": _forms(
        "円を描いて動く/円を描いて動いている",
        "円を描く/円を描いている",
        "円形に動く/円形に動いている",
        "円周上を動く/円周上を動いている",
    ),
    "bounce": _forms(
        "跳ねる/跳ねている", "弾む/弾んでいる", "上下に跳ねる/上下に跳ねている", "バウンドする/バウンドしている"
    ),
    "grow": _forms("大きくなる/大きくなっている", "拡大する/拡大している", "膨らむ/膨らんでいる"),
    "shrink": _forms("小さくなる/小さくなっている", "縮小する/縮小している", "縮む/縮んでいる"),
    "rotate": _forms("回転する/回転している", "その場で回る/その場で回っている", "くるくる回る/くるくる回っている"),
    "stay": _forms(
        "静止する/静止している", "動かない/動かないでいる", "止まる/止まっている", "じっとする/じっとしている"
    ),
}
JA_SPEEDS = {"slow": ("ゆっくり", "ゆっくりと", "遅い速度で"), "fast": ("速く", "素早く", "高速で", "すばやく")}
JA_BACKGROUNDS = {
    "white": ("白い", "真っ白な"),
    "light gray": ("明るい灰色の", "薄い灰色の", "ライトグレーの"),
    "dark gray": ("暗い灰色の", "濃い灰色の", "ダークグレーの"),
    "black": ("黒い", "真っ黒な"),
}
JA_TRAINED = Frames(
    one=("{0:ga}", "{0:ga}", "{0:ing}", "{0:ga}動画", "画面の中で{0:ga}", "{0:ing}映像", "アニメーション:{0:ga}"),
    two=(
        *(
            "{0:ga}、{1:ga}",
            "{0:ing}、{1:ing}",
            "{0:ha}。{1:ha}",
            "{0:ga}間に、{1:ga}",
            "画面の中で{0:ga}、そして{1:ga}",
        ),
        *("{0:ga}、同時に{1:ga}", "{0:ing}、{1:ing}動画"),
    ),
    one_on=("{b}背景で{0:ga}", "{b}背景の上で、{0:ing}", "{0:ga}、{b}背景", "{b}背景に、{0:ga}動画"),
    two_on=(
        "{b}背景で{0:ga}、{1:ga}",
        "{b}背景の上で、{0:ing}、{1:ing}",
        "{0:ga}、同時に{1:ga}、{b}背景",
        "{b}背景で、{0:ha}。{1:ha}",
    ),
)
JA_HELD_OUT = Frames(
    one=("ここで{0:ga}", "{0:ga}様子", "見て、{0:ing}"),
    two=("ここで{0:ga}、また{1:ga}", "{0:ga}と{1:ga}", "{0:ing}、一方{1:ing}"),
    one_on=("背景は{b}もので、{0:ga}", "{b}画面で{0:ga}"),
    two_on=("背景は{b}もので、{0:ga}、{1:ga}", "{b}画面で{0:ga}、{1:ga}"),
)
# Now and then a caption begins with words that say nothing about the scene: prompts of people do.
FILLERS = {
    "en": ("please show: ", "a simple video: ", "make a clip: ", "a nice animation where ", "here ", "imagine "),
    "zh": ("请生成:", "一个简单的视频:", "做一段动画:", "现在", "想象一下,", "我想看"),
    "ja": ("動画を作って:", "簡単な動画:", "ここでは", "今、", "想像して、", "きれいな映像:"),
}
FILLER_PART = 0.1
# People say it in other words than any list has. Part of training's captions is therefore loose: the clauses in their
# order and the background, before or after, with made-up words between them that mean nothing.
LOOSE_PART = 0.4
MADE_UP = {
    "en": [first + second for first in "bdfgklmnprstvwz" for second in "aeiouy"],
    "zh": "的了在是这那个里和看有就把到很都会可以请给为及与景面前后外中",
    "ja": "のをにでとはもやよねがかこそあうえおてしたまなれるようです",
}
LOOSE_JOINTS = {
    "en": (", ", " ", ". ", "; ", " and "),
    "zh": (",", "。", ";", "", "和"),
    "ja": ("、", "。", "", "と", "、そして"),
}
LOOSE_FORMS = {"en": ("finite", "ing", "that"), "zh": ("one", "bare"), "ja": ("ga", "ha", "ing")}
LOOSE_BACKGROUNDS = {
    "en": ("{}", "a {} background", "{} background", "the background is {}", "on {} {words}", "{words} {}"),
    "zh": ("{}", "{}背景", "{}的背景", "背景是{}", "在{}的{words}上", "在{}{words}里"),
    "ja": ("{}", "{}背景", "背景は{}", "{}{words}の上で"),
}
FRAMES = {"en": (EN_TRAINED, EN_HELD_OUT), "zh": (ZH_TRAINED, ZH_HELD_OUT), "ja": (JA_TRAINED, JA_HELD_OUT)}
