"""Every metric by hand arithmetic, and against examples of its reference implementation if it has one."""

from __future__ import annotations

import math

import pytest

from ernie_align.evaluation.intervals import bootstrap_interval, paired_difference, ratio, wilson_interval
from ernie_align.evaluation.metrics import anls, f1, levenshtein, pass_at_k, relaxed_accuracy


def test_wilson_by_hand():
    """8 of 10: p 0.8, z² 3.841459; (0.8 + 0.192073 ± 1.959964·sqrt(0.016 + 0.0096036)) / 1.3841459."""
    assert wilson_interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    low, high = wilson_interval(0, 10)
    assert low == 0.0 and high == pytest.approx(0.277533, abs=1e-6)  # z² / (n + z²)
    assert wilson_interval(10, 10) == pytest.approx((1 - 0.277533, 1.0), abs=1e-6)
    with pytest.raises(ValueError, match="at least one trial"):
        wilson_interval(0, 0)


def test_the_bootstrap_of_a_mean_is_the_textbook_interval():
    """400 rows, half 0 and half 2: mean 1, standard error 1 / sqrt(400) = 0.05, so 1 ± 0.098."""
    parts = [(2.0 * (row % 2), 1.0) for row in range(400)]
    # 2000 draws estimate a percentile to about a twentieth of the interval
    assert bootstrap_interval(parts) == pytest.approx((0.902, 1.098), abs=0.01)
    assert bootstrap_interval(parts) == bootstrap_interval(parts)
    assert bootstrap_interval([(0.7, 1.0)]) == (0.7, 0.7)
    with pytest.raises(ValueError, match="at least one row"):
        bootstrap_interval([])


def test_a_ratio_weighs_rows_by_their_tokens():
    """(6 + 1) / (2 + 5) = 1, which is not the mean of 3 and 0.2."""
    assert ratio([(6.0, 2.0), (1.0, 5.0)]) == 1.0
    low, high = bootstrap_interval([(6.0, 2.0), (1.0, 5.0)])
    assert (low, high) == (0.2, 3.0)  # one row twice, at either end


def test_pairing_removes_variance_between_rows():
    """Rows from 0 to 99, the other better by exactly 1 on each: unpaired the means overlap, paired they cannot."""
    theirs = [(float(row), 1.0) for row in range(100)]
    ours = [(value + 1, weight) for value, weight in theirs]
    low, high = paired_difference(ours, theirs)
    assert (low, high) == pytest.approx((1.0, 1.0))
    assert bootstrap_interval(ours)[0] < bootstrap_interval(theirs)[1]
    of_exp = paired_difference([(math.log(3), 1.0)] * 2, [(math.log(2), 1.0)] * 2, of_exp=True)
    assert of_exp == pytest.approx((1.0, 1.0))
    with pytest.raises(ValueError, match="1 rows against 2"):
        paired_difference(ours[:1], theirs[:2])


def test_levenshtein():
    assert levenshtein("kitten", "sitting") == 3 and levenshtein("", "abc") == 3 and levenshtein("abc", "abc") == 0


def test_anls():
    """ "hell" for "hello": 1 edit of 5, 0.8. "help" for "hello": 2 of 5, 0.6. Half right counts, less does not."""
    assert anls("hell", ["hello"]) == pytest.approx(0.8)
    assert anls("Help ", ["bye", "hello"]) == pytest.approx(0.6)
    assert anls("ab", ["ax"]) == 0.5 and anls("abc", ["axy"]) == 0.0
    assert anls("", [""]) == 1.0 and anls("", ["x"]) == 0.0


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("104", "100", True),  # 4 % off
        ("105", "100", True),  # just within
        ("94.9", "100", False),
        ("0.53", "50%", False),  # 6 % off 0.5
        ("52%", "0.5", True),  # 4 %
        ("0", "0", True),
        ("0.01", "0", False),  # an expected 0 is compared as text
        ("Yes", "yes", True),
        ("yes.", "yes", False),
        ("inf", "100", False),
    ],
)
def test_relaxed_accuracy(answer, expected, right):
    assert relaxed_accuracy(answer, [expected]) == right
    assert relaxed_accuracy(answer, ["other", expected]) == right


def test_f1():
    """ "the cat sat" has words cat, sat; "a cat sat down" cat, sat, down: P 1, R 2/3, F1 0.8."""
    assert f1("The cat sat!", ["a cat sat down"]) == pytest.approx(0.8)
    assert f1("cat", ["dog", "cat"]) == 1.0 and f1("bird", ["dog"]) == 0.0
    assert f1("", [""]) == 1.0 and f1("", ["dog"]) == 0.0 and f1("cat cat", ["cat"]) == pytest.approx(2 / 3)


def test_pass_at_k():
    """5 samples of which 2 pass: k 1 is 2/5; k 2 is 1 - C(3,2)/C(5,2) = 1 - 3/10; k 4 cannot miss both."""
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4) and pass_at_k(5, 2, 2) == pytest.approx(0.7)
    assert pass_at_k(5, 2, 4) == 1.0 and pass_at_k(5, 0, 5) == 0.0
    with pytest.raises(ValueError, match="pass@6"):
        pass_at_k(5, 2, 6)


def test_pass_at_k_is_the_product_form_of_its_paper():
    """The paper's own code: 1 - prod(1 - k / i for i in n - c + 1 .. n)."""
    for n, c, k in [(10, 3, 2), (20, 1, 5), (7, 6, 1)]:
        product = math.prod(1 - k / i for i in range(n - c + 1, n + 1))
        assert pass_at_k(n, c, k) == pytest.approx(1 - product)
