"""Comparing free-text answers: VQA v2's normalisation and accuracy, POPE's reading of yes and no.

Written from the published descriptions: https://visualqa.org/evaluation.html (Antol et al. 2015, arXiv 1505.00468;
Goyal et al. 2017, arXiv 1612.00837) and Li et al. 2023, arXiv 2305.10355. One difference, on purpose: VQA's script
leaves punctuation alone where all ten people agree; here every answer is normalised.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Literal

_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = frozenset(("a", "an", "the"))
_NOT = "are ca could did does do had has have is might must need ought should was were wo would"
# Contractions that lost their apostrophe, where what is left is no English word of its own ("were" and "its" are).
_CONTRACTIONS = (
    {f"{verb}nt": f"{verb}n't" for verb in _NOT.split()}
    | {f"{who}ve": f"{who}'ve" for who in ["i", "you", "we", "they", "could", "should", "would", "might", "must"]}
    | {f"{who}re": f"{who}'re" for who in ["you", "they"]}
    | {f"{who}ll": f"{who}'ll" for who in ["you", "they", "it", "that", "what", "who"]}
    | {f"{who}d": f"{who}'d" for who in ["they", "that", "who"]}
    | {f"{who}s": f"{who}'s" for who in ["he", "she", "that", "there", "what", "where", "who", "how"]}
    | {"im": "i'm", "lets": "let's", "yall": "y'all", "oclock": "o'clock", "maam": "ma'am"}
)
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
_PERIOD_NOT_DECIMAL = re.compile(r"(?<!\d)\.|\.(?!\d)")
# Everything that is not a letter, digit, space, apostrophe, colon or (by now decimal) period.
_PUNCTUATION = re.compile(r"[^\w\s':.]|_")


def normalise_answer(answer: str) -> str:
    """VQA v2's processing of an answer before it is compared.

    Lower case; periods removed unless decimal; number words to digits; articles removed; apostrophes put back into
    contractions; other punctuation to a space, except apostrophe and colon, and except a comma between digits, which is
    dropped.
    """
    text = unicodedata.normalize("NFC", answer).lower().replace("’", "'")
    text = _COMMA_IN_NUMBER.sub("", text)
    text = _PERIOD_NOT_DECIMAL.sub("", text)
    text = _PUNCTUATION.sub(" ", text)
    words = (_DIGITS.get(word, word) for word in text.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy of one prediction.

    With one reference answer: 1 if the two are the same after normalisation. With several (people's answers): the mean,
    over each person left out, of min(1, agreeing others / 3).

    Raises:
        ValueError: no reference answer.
    """
    if not answers:
        raise ValueError("a question without a reference answer cannot be scored")
    given = normalise_answer(prediction)
    agree = [given == normalise_answer(answer) for answer in answers]
    if len(agree) == 1:
        return float(agree[0])
    return sum(min(1.0, (sum(agree) - left_out) / 3) for left_out in agree) / len(agree)


def says_yes_or_no(answer: str) -> Literal["yes", "no"]:
    """POPE's reading of an answer: `no` if its first sentence has the word no or not, otherwise `yes`."""
    words = answer.split(".")[0].replace(",", "").lower().split()
    return "no" if "no" in words or "not" in words else "yes"
