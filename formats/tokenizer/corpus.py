"""Texts that tell tokenizers apart: the ones where patterns, normalizers and merge orders disagree in practice.

Every step of every known pattern has texts here that only it cuts in its way: contractions in both cases, digit runs,
punctuation against letters and newlines, runs of mixed white space, scripts without case, combining marks, characters
outside the basic plane, control characters. Texts are combined with a fixed seed, so a verdict never changes from one
run to the next. Left out are characters on which the engines themselves differ (U+017F, and what Unicode added after
version 15).
"""

from __future__ import annotations

# ruff: noqa: RUF001  (look-alike characters are the point)
import random
from collections.abc import Sequence

_WORDS = (
    "Hello world",
    "don't I'll we've they're I'm you'd it's",
    "DON'T I'LL WE'VE THEY'RE I'M YOU'D IT'S",
    "I'Ll we'Ve",
    "'s 's' 'sun 'tis 'Re-do",
    "internationalization",
    "HTTPServer camelCase snake_case SCREAMING_CASE kebab-case",
    "0 1 12 123 1234 12345 123456 1234567890",
    "3.14159 1,000,000 0x1F 1e-9 10% $5.00 v2.0.1",
    "a1b2c3 x86_64 2nd",
    "½ ² Ⅷ ① ٣٤ ৪৫",
    "for (int i = 0; i < n; ++i) { x[i] += y->z; }",
    "def f(x):\n    return x ** 2\n\n\nprint(f(3))",
    "if(a==b&&c||!d){}",
    '<html><body class="x">&nbsp;</body></html>',
    "https://example.org/a/b?c=d&e=f#g",
    "path/to/file.txt C:\\dir\\file",
    "...!!! ??? --- === *** ///// \\\\\\",
    '("quoted"), [list]; {set}: `code`',
    "a/b\n/c /\n/ \r\n/",
    "#!/bin/sh\r\nexit 0\r\n",
    "|a|b|\n|-|-|\n",
    "SELECT * FROM t WHERE a = 'b''c';",
)
_SPACES = (
    " ",
    "  ",
    "   ",
    "    ",
    "        ",
    " " * 16,
    " " * 33,
    "\t",
    "\t\t",
    "\n",
    "\n\n",
    "\n\n\n",
    "\r\n",
    "\r\n\r\n",
    " \n",
    "\n ",
    " \n \n ",
    "\t \t",
    "  \t\n\n  ",
    "\u00a0",
    " \u00a0 ",
    "\u2003\u2009",
    "\u3000",
    "\u2028\u2029",
    "\x85",
    "\x0b\x0c",
)
_SCRIPTS = (
    "Привет, мир! ЁЖИК ёжик",
    "Γειά σου Κόσμε ΑΒΓ",
    "你好,世界。中文分词测试",
    "日本語のテキスト、カタカナとひらがな",
    "안녕하세요 세계",
    "שלום עולם",
    "مرحبا بالعالم ١٢٣",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "Ünïcödé ÀÉÎÕÜ àéîõü ßẞ",
    "ÅNGSTRÖM Ångström İstanbul ıI",
    "e\u0301 a\u0308 n\u0303 o\u0302\u0323 Z\u0351\u036b",
    "\u0301\u0302 x\u20dd",
    "ﬁﬂ ＡＢＣ ａｂｃ １２３ ！？",
    "ǅ ǈ ʰ ˈ ª º",
    "ა ბ Ა Ბ",
)
_SYMBOLS = (
    "😀😃 👍🏽 👩‍👩‍👧‍👦 🇩🇪🇫🇷 ❤️ ☃",
    "🏴\U000e0067\U000e0062\U000e007f",
    "€ £ ¥ ₿ ¢",
    "∑∫√∞≠≤≥±×÷",
    "← ↑ → ↓ ⇒ ■ □ ▲ ★",
    "“quotes” ‘single’ «guillemets» – — …",
    "\u200b\u200c\u200d\u2060\ufeff",
    "\ufffd\ufffe",
    "\ue000\U000f0000\U0010fffd",
    "𝒜𝓑𝔠 𐍈 𠀀𪛖",
    "ⓐⒷ ☑✓ №℡™",
)
_CONTROLS = (
    "\x00",
    "a\x00b",
    "\x01\x02\x03",
    "!\x04!",
    "\x07\x08",
    "\x13.\x14",
    "\x1b[31mred\x1b[0m",
    "\x1c\x1d\x1e\x1f",
    "\x7f",
    "\xad",
)
_LOOKALIKES = (
    "<0x0A> <0xFF>",
    "<s> </s> <unk>",
    "\u2581 \u2581\u2581 a\u2581b",
    "Ġ Ċ Ä",
    "<|endoftext|> <|im_start|>user",
    "[INST] x [/INST]",
    "[PAD0]",
)

_GROUPS = (_WORDS, _SPACES, _SCRIPTS, _SYMBOLS, _CONTROLS, _LOOKALIKES)


def corpus(tokens: Sequence[str] = ()) -> list[str]:
    """Some five hundred texts; with `tokens` also ones strung together from random tokens of that vocabulary."""
    rng = random.Random(20240417)
    texts = [text for group in _GROUPS for text in group]
    texts += [" " + text for text in texts] + [text + "\n" for text in _WORDS + _SCRIPTS]
    for _ in range(200):
        texts.append("".join(rng.choice(rng.choice(_GROUPS)) for _ in range(rng.randint(2, 6))))
    short = [token for token in tokens if len(token) <= 32]
    for _ in range(100 if short else 0):
        texts.append("".join(rng.choice(short) for _ in range(rng.randint(1, 8))))
    return texts
