"""Pre-tokenizers: the regular expressions that cut a text into words before byte-pair encoding starts.

GGUF does not store them. It stores a name (tokenizer.ggml.pre), and llama.cpp compiles the meaning of each name in:
src/llama-vocab.cpp lists the expressions, applied one after the other, each to the pieces the former left. A Hugging
Face tokenizer.json writes the same thing as a structure of Split, Digits and ByteLevel steps. An entry here holds both:

- `regexes`: what llama.cpp does, written for Oniguruma, the engine of the tokenizers library;
- `hf`: what the models were trained with where that is not the same; empty means `regexes`.

Known differences between the two columns, all of them llama.cpp's own:
- (?i:'s|...) also matches U+017F (long s); llama.cpp compares with the two ASCII cases only.
- tekken, gpt-4o: \\p{Lu} and \\p{Ll} are all of \\p{L} to llama.cpp, with case known for a-z and A-Z only, and marks
  (\\p{M}) do not belong to words: text with combining marks or non-ASCII case is cut elsewhere.
- qwen2, qwen35: the files normalise to NFC first, llama.cpp does not.
- deepseek: white space beyond ASCII belongs to no literal range in llama.cpp.
- llama.cpp's character tables are those of Unicode 15; the library's are newer.

Names are matched by structure, never by hash, so a new fine-tune of a known family is recognised.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from weightsmith.errors import UnsupportedError

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
GPT2 = _WORDS + r"|\s+"
DIGIT, DIGITS = r"\p{N}", r"\p{N}+"

_ENDINGS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_ENDINGS_HF = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TAIL_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _words3(endings: str, number: str) -> str:
    return rf"{endings}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{number}|{_TAIL}"


def _marks(endings: str) -> str:
    tail = r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return rf"{endings}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|{tail}"


def _cased(upper: str, lower: str, endings: str, number: str) -> str:
    lead = r"[^\r\n\p{L}\p{N}]?"
    return f"{lead}{upper}*{lower}+{endings}|{lead}{upper}+{lower}*{endings}|{number}|{_TAIL_SLASH}"


_UPPER, _LOWER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
_UPPER_HF, _LOWER_HF = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

# The letters of deepseek-llm's second step, as code points (it lists them instead of naming a class).
_DEEPSEEK_LETTERS = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 "
    "3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A "
    "1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 "
    "1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 "
    "212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D "
    "A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F "
    "104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)


def _class(points: str) -> str:
    """A character class of literal characters from ranges of hexadecimal code points."""
    ends = [[chr(int(end, 16)) for end in item.split("-")] for item in points.split()]
    return "[" + "".join("-".join(end) for end in ends) + "]"


_DEEPSEEK_CJK = _class("4E00-9FA5 800-4E00 AC00-D7FF")
_DEEPSEEK_V3_CJK = _class("4E00-9FA5 3040-309F 30A0-30FF")


# llama.cpp rewrites white space beyond ASCII to a vertical tab before steps that name no Unicode class, so literal
# ranges do not match it there.
_DEEPSEEK_CJK_ASCII_SPACE = _DEEPSEEK_CJK[:-1] + r"&&[^\s]]"


def _deepseek_llm(punctuation: str, cjk: str, number: str) -> tuple[str, ...]:
    letters = _class(_DEEPSEEK_LETTERS)
    return ("[\r\n]", rf"\s?{letters}+", rf"\s?{punctuation}+", r"\s+$", f"{cjk}+", number)


def _deepseek_coder(cjk: str) -> tuple[str, ...]:
    return ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", f"{cjk}+", DIGIT)


_DEEPSEEK_POINTS = "21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F"
_DEEPSEEK_V3_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)


@dataclass(frozen=True, slots=True)
class Pattern:
    """One pre-tokenizer. ignore_merges, add_bos, clean_spaces: what llama.cpp implies with the name.

    any_merges: the files of the family come with either setting of ignore_merges. nfc: the files of the family
    normalise to NFC. aliases: names that mean the same to llama.cpp.
    """

    name: str
    regexes: tuple[str, ...]
    hf: tuple[str, ...] = ()
    ignore_merges: bool = False
    any_merges: bool = False
    add_bos: bool = False
    clean_spaces: bool = True
    nfc: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def trained(self) -> tuple[str, ...]:
        """The expressions the models were trained with."""
        return self.hf or self.regexes


_LLAMA3 = _words3(_ENDINGS, r"\p{N}{1,3}")
_LLAMA3_HF = _words3(_ENDINGS_HF, r"\p{N}{1,3}")
_QWEN2, _QWEN2_HF = _words3(_ENDINGS, DIGIT), _words3(_ENDINGS_HF, DIGIT)
_FALCON_MARKS = r"[\p{P}\$\+<=>\^~\|`]+"
_TEKKEN_HF = _cased(_UPPER_HF, _LOWER_HF, "", DIGIT)
_GPT4O = _cased(_UPPER, _LOWER, _ENDINGS + "?", r"\p{N}{1,3}")
_GPT4O_HF = _cased(_UPPER_HF, _LOWER_HF, _ENDINGS_HF + "?", r"\p{N}{1,3}")

# Several names share their expressions. The first that fits is the one that is written.
PATTERNS: tuple[Pattern, ...] = (
    Pattern(
        "llama-bpe",
        (_LLAMA3,),
        (_LLAMA3_HF,),
        ignore_merges=True,
        add_bos=True,
        aliases=("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    ),
    Pattern("smaug-bpe", (_LLAMA3,), (_LLAMA3_HF,), aliases=("dbrx", "chatglm-bpe")),
    Pattern(
        "tekken",
        (_cased(_UPPER, _LOWER, "", DIGIT),),
        (_TEKKEN_HF,),
        ignore_merges=True,
        any_merges=True,
        add_bos=True,
        clean_spaces=False,
    ),
    Pattern("smollm", (DIGIT, GPT2), clean_spaces=False, aliases=("command-r",)),
    Pattern("starcoder", (DIGIT, GPT2), aliases=("refact", "codeshell", "exaone", "minerva-7b", "mellum2")),
    Pattern(
        "gpt-2",
        (GPT2,),
        aliases=("phi-2", "mpt", "olmo", "jais", "exaone4", "gigachat", "a.x-4.0", "mellum", "modern-bert"),
    ),
    Pattern("trillion", (GPT2,), clean_spaces=False, aliases=("granite-docling",)),
    Pattern(
        "qwen2",
        (_QWEN2,),
        (_QWEN2_HF,),
        clean_spaces=False,
        nfc=True,
        aliases=("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"),
    ),
    Pattern("grok-2", (_QWEN2,), (_QWEN2_HF,), clean_spaces=False, aliases=("hunyuan", "solar-open", "stablelm2")),
    Pattern("qwen35", (_marks(_ENDINGS),), (_marks(_ENDINGS_HF),), clean_spaces=False, nfc=True),
    Pattern("gpt-4o", (_GPT4O,), (_GPT4O_HF,), clean_spaces=False, aliases=("llama4", "kanana2", "minimax-m2")),
    Pattern(
        "deepseek-llm",
        _deepseek_llm(_class(_DEEPSEEK_POINTS + " 3001-3002"), _DEEPSEEK_CJK_ASCII_SPACE, DIGITS),
        _deepseek_llm(_class(_DEEPSEEK_POINTS + " 3000-3002"), _DEEPSEEK_CJK, DIGIT),
        clean_spaces=False,
    ),
    Pattern(
        "deepseek-coder",
        _deepseek_coder(_DEEPSEEK_CJK_ASCII_SPACE),
        _deepseek_coder(_DEEPSEEK_CJK),
        clean_spaces=False,
    ),
    Pattern(
        "deepseek-v3",
        (r"\p{N}{1,3}", f"{_DEEPSEEK_V3_CJK}+", _DEEPSEEK_V3_WORDS),
        clean_spaces=False,
        aliases=("hunyuan-dense", "joyai-llm", "hy_v4"),
    ),
    Pattern("falcon", (_FALCON_MARKS, GPT2, "[0-9][0-9][0-9]")),
    Pattern("default", (_FALCON_MARKS.replace("`", ""), GPT2, DIGITS, "[0-9][0-9][0-9]")),
)

_BY_NAME = {name: pattern for pattern in PATTERNS for name in (pattern.name, *pattern.aliases)}


def names() -> tuple[str, ...]:
    """Every name that `--pre` accepts."""
    return tuple(sorted(_BY_NAME))


def by_name(name: str) -> Pattern:
    """The pattern called `name`; an empty name is llama.cpp's "default". UnsupportedError if there is none."""
    pattern = _BY_NAME.get(name or "default")
    if pattern is None:
        raise UnsupportedError(f"unknown pre-tokenizer {name!r}", hint=f"Known: {', '.join(names())}.")
    return pattern


def steps(pre_tokenizer: object) -> list[str]:
    """What a tokenizer.json's pre_tokenizer does, as plain regexes in order, one per cut.

    A step that is no plain cut appears as its JSON type in angle brackets and so matches no known pattern.
    """
    if not isinstance(pre_tokenizer, Mapping):
        return []
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        inner = pre_tokenizer.get("pretokenizers")
        return [step for item in inner for step in steps(item)] if isinstance(inner, list) else ["<Sequence>"]
    if kind == "ByteLevel" and not pre_tokenizer.get("add_prefix_space"):
        return [GPT2] if pre_tokenizer.get("use_regex", True) else []
    if kind == "Digits":
        return [DIGIT if pre_tokenizer.get("individual_digits") else DIGITS]
    if kind == "Split":
        return [_split(pre_tokenizer)]
    return [f"<{str(kind)[:40]}>"]


def _split(step: Mapping[str, Any]) -> str:
    pattern = step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, Mapping) else None
    # Cutting around matches and keeping everything, or keeping only the matches of what matches everything.
    plain = (step.get("behavior"), bool(step.get("invert"))) in (("Isolated", False), ("Removed", True))
    return regex if isinstance(regex, str) and plain else "<Split>"


def has_byte_level(pre_tokenizer: object) -> bool:
    """Whether a ByteLevel step is there: then tokens are in the byte alphabet."""
    if not isinstance(pre_tokenizer, Mapping):
        return False
    inner = pre_tokenizer.get("pretokenizers")
    nested: Iterable[object] = inner if isinstance(inner, list) else ()
    return pre_tokenizer.get("type") == "ByteLevel" or any(has_byte_level(item) for item in nested)


def match(cuts: list[str], *, ignore_merges: bool, nfc: bool) -> Pattern | None:
    """The first pattern whose training form is `cuts`, or None."""
    fits = [
        pattern
        for pattern in PATTERNS
        if list(pattern.trained) == cuts and (pattern.any_merges or pattern.ignore_merges == ignore_merges)
    ]
    exact = [pattern for pattern in fits if pattern.nfc == nfc]
    loose = [pattern for pattern in fits if pattern.nfc and not nfc]
    return next(iter(exact + loose), None)
