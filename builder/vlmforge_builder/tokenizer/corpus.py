"""The texts on which a converted tokenizer must equal the original."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence

_LANGUAGES = (
    "The quick brown fox jumps over the lazy dog. It's 5 o'clock; don't be late!",
    "Voix ambiguë d'un cœur qui, au zéphyr, préfère les jattes de kiwis.",
    "Falsches Üben von Xylophonmusik quält jeden größeren Zwerg. Straße, STRASSE.",
    "Zażółć gęślą jaźń. Příliš žluťoučký kůň úpěl ďábelské ódy. Đường, phở, ổ bánh mì.",
    "İstanbul'da ığdır. Ñandú, ¿qué pasa? ¡Olé! Fjørd, smörgåsbord, þungur hnífur.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. ΑΒΓ αβγ ς",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Щастя, ґрунт, їжак.",
    "نص حكيم له سر قاطع وذو شأن عظيم. ١٢٣٤٥ مُحَمَّد",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה. שָׁלוֹם",
    "ऋषियों को सताने वाले दुष्ट राक्षसों का सर्वनाश। क्षत्रिय १२३",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน ๑๒๓",
    "天地玄黃,宇宙洪荒。请描述这张图片：一只猫坐在桌子上。「你好」——𠮷野家",
    "いろはにほへと ちりぬるを。カタカナ ﾊﾝｶｸ 漢字かな交じり文、ー〜！",
    "키스의 고유조건은 입술끼리 만나야 하고. 각 각",
    "ქართული ენა, հայերեն լեզու, አማርኛ, ខ្មែរ, བོད་ཡིག, தமிழ், తెలుగు, বাংলা",
)
_UNUSUAL = (
    "😀 🎉👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇯🇵 1️⃣ ❤️ ☺",
    "e\u0301 a\u0308o\u0302\u0323 n\u0303 Z\u0351\u036b\u0343a\u0321\u034al\u0348g\u0321o",
    "\u200bzero\u200bwidth\u200c\u200d\u2060\ufeff soft\u00adhyphen \u202eright-to-left\u202c",
    "no\u00a0break\u2003em\u3000ideographic\u2028line\u2029paragraph\u0085next",
    "\x00 \x01\x02 \x07\x08\x0b\x0c \x1b[0m \x1c\x1d\x1e\x1f \x7f \x80\x9f",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𓀀 𒀀 🜀 \U00020000 \U0002ffff \U0010fffd \ue000 \ufffd \uffff",
    "ﬁ ﬂ ½ ² ℃ Ⅳ ｆｕｌｌ ㍿ ﷺ ǆ ſ K Å",
    "1 12 123 1234 1,234,567.89 -0.5e-10 0x1F 3.14159265358979 2024-01-31T23:59:60Z 50% $9.99",
    "def f(x: int) -> str:\n    return f\"{x!r}\" if x else ''\n\n\nclass A:\n\tpass  # done\n",
    "<div class='a b'>&nbsp;</div>\r\n#include <stdio.h>\r\nint main(){return 0;}\r\n",
    '{"a": [1, 2.0, null], "b": {"c": "\\u00e9\\n"}}\\\\server\\share ~/.ssh/id_rsa',
    "$\\frac{\\partial f}{\\partial x} = \\sum_{i=0}^{n} x_i^2$ ∀x∈ℝ ∃y: x≤y ⟹ ¬(x>y) → ∞",
    "https://example.org/a/b?c=d&e=%20f#g user.name+tag@example.org @handle #hash",
    "<0x0A> <0x41><0xFF> <unk> <s> </s> <pad> [INST] [/INST] <<SYS>> <|im_start|> <image>",
    "\u2581 \u2581\u2581a \u2581b",
    "ababababab abcabcabc aaaaaaaaaaaaaaaa bbbbbbb inininin onononon thethethe",
)
_SPACES = (
    "",
    " ",
    "  ",
    "   ",
    "a",
    " a",
    "  a",
    "a ",
    "a  ",
    " a  b   c    d     e",
    "\n",
    "\n\n",
    " \n ",
    "\t",
    "\t\ta\tb",
    "a\nb",
    "a\r\nb\r\n",
    "a \n b\n  c",
    "line one\n\n\nline two \n",
    "word" * 200,
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
)
_CHAT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: \nWhat is in the "
    "picture? ASSISTANT:",
    "### Human: Describe the image.\n### Assistant: A dog on a beach.\n###",
    "[INST]  \nWhere is the cat? [/INST]",
)
_RUNS = tuple(
    character * length
    for character in " -=#*._~\n\ta0!/"
    for length in (*range(2, 21), 31, 32, 33, 63, 64, 65)
)

PROOF_CORPUS: tuple[str, ...] = (*_LANGUAGES, *_UNUSUAL, *_SPACES, *_CHAT, *_RUNS)
"""Scripts, marks, code, numbers, white space and control characters, and runs of characters."""


def token_texts(tokens: Iterable[str]) -> Iterator[str]:
    """Texts with the given special or added tokens in every position.

    Not beside U+2581 or the separators U+001C to U+001F: what a token that strips white space
    takes along there differs between the original and the `tokenizers` library.
    """
    tokens = tuple(tokens)
    for token, other in zip(tokens, (*tokens[1:], *tokens[:1]), strict=True):
        yield from (token, f"{token}{token}", f"{token}{other}", f"{token} {other}")
        yield from (f"{token}a", f"{token} a", f"{token}  a", f"a{token}", f"a {token}")
        yield from (f" {token}", f"  {token}", f"{token} ", f"{token}\n", f"\n{token}\n")
        yield from (f"a{token}b", f"a {token} b{other}")
        yield from (token[:-1], token[1:], f"{token[:-1]} {token[-1:]}", token.swapcase())


def piece_texts(scores: Mapping[str, float]) -> Iterator[str]:
    """Each piece alone, random pieces in a row, and pieces that compete for the same characters.

    Two pieces of equal score are merged in the order in which they stand in the text, and so are
    two ways to make one piece, so overlapping ones are where a conversion may differ.
    """
    pieces = tuple(scores)
    yield from pieces
    choose = random.Random(0)
    for _ in range(2000 if pieces else 0):
        yield "".join(choose.choices(pieces, k=12))
    yield from overlapping_texts(scores)


def overlapping_texts(scores: Mapping[str, float], *, limit: int = 5000) -> Iterator[str]:
    """Pairs of pieces of equal score, where one begins with the character the other ends with."""
    beginning: dict[tuple[float, str], list[str]] = {}
    for piece, score in scores.items():
        if len(piece) > 1:
            beginning.setdefault((score, piece[0]), []).append(piece)
    found = 0
    for piece, score in scores.items():
        followers: Sequence[str] = beginning.get((score, piece[-1]), ()) if len(piece) > 1 else ()
        for follower in followers[:4]:
            if found == limit:
                return
            found += 1
            yield piece + follower[1:]
            yield piece + follower[1:] + follower[1:]
