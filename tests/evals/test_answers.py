"""VQA's normalisation and accuracy against the published description; POPE's reading of answers."""

from itertools import combinations

import pytest

from mmfoundry.evals.answers import normalise_answer, says_yes_or_no, vqa_accuracy


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Yes.", "yes"),
        ("  Two\n", "2"),
        ("none", "0"),
        ("The red apple", "red apple"),
        ("an owl, a cat", "owl cat"),
        ("100,978", "100978"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("dont", "don't"),
        ("it’s", "it's"),
        ("john's", "john's"),
        ("12:30", "12:30"),
        ("black-and-white", "black and white"),
        ("left/right", "left right"),
        ("were", "were"),
        ("its", "its"),
        ("", ""),
    ],
)
def test_normalisation(given: str, expected: str) -> None:
    assert normalise_answer(given) == expected
    assert normalise_answer(expected) == expected  # nothing is left to change


def test_accuracy_with_one_answer_is_exact_match() -> None:
    assert vqa_accuracy("Two", ["2"]) == 1
    assert vqa_accuracy("two cats", ["2"]) == 0
    with pytest.raises(ValueError):
        vqa_accuracy("2", [])


@pytest.mark.parametrize("agreeing", range(11))
def test_accuracy_with_ten_people_is_the_mean_over_subsets_of_nine(agreeing: int) -> None:
    people = ["red"] * agreeing + ["blue"] * (10 - agreeing)
    subsets = [min(1, nine.count("red") / 3) for nine in combinations(people, 9)]
    assert vqa_accuracy("Red!", people) == pytest.approx(sum(subsets) / len(subsets))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("No", "no"),
        ("no, there is none", "no"),
        ("There is not a dog.", "no"),
        ("Yes. No doubt.", "yes"),
        ("yes", "yes"),
        ("a notable dog", "yes"),
    ],
)
def test_yes_or_no(given: str, expected: str) -> None:
    assert says_yes_or_no(given) == expected
