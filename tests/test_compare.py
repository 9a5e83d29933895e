"""Two evaluations compared: paired intervals and tests against scipy, by hand and by simulation."""

from __future__ import annotations

from statistics import fmean

import numpy as np
import pytest
from scipy import stats

from spark_vl.evaluation import reward_benchmarks
from spark_vl.evaluation.bootstrap import bootstrap, bootstrap_figures
from spark_vl.evaluation.compare import Comparison, compare, mcnemar
from spark_vl.evaluation.reward_benchmarks import Pick


def values(scores, name: str = "r") -> dict[str, float]:
    return {f"{name}/test/{place}": float(score) for place, score in enumerate(scores)}


def one(a, b, **settings) -> Comparison:
    return compare({"r": values(a)}, {"r": values(b)}, **settings)


def scores(n: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Of A and B, correlated, in [0, 1]."""
    rng = np.random.default_rng(seed)
    ease = rng.random(n)
    return np.clip(ease + rng.normal(0, 0.1, n), 0, 1), np.clip(ease + rng.normal(0.02, 0.1, n), 0, 1)


# ── what is compared ──


def test_items_of_one_side_are_counted_and_no_recipe_is_lost() -> None:
    a = {"x": {"x/1": 1.0, "x/2": 0.0, "x/3": 1.0}, "y": {"y/1": 1.0}, "z": {"z/1": 1.0, "z/2": 1.0}, "old": {"o": 0.5}}
    b = {"x": {"x/2": 1.0, "x/3": 1.0, "x/4": 1.0, "x/5": 0.0}, "y": {"y/1": 0.0}, "z": {"z/3": 1.0}, "new": {}}
    found = compare(a, b)
    assert list(found.recipes) == ["x", "y"]
    x = found.recipes["x"]
    assert (x.n, x.only_a, x.only_b, x.a, x.b, x.difference) == (2, 1, 2, 0.5, 1.0, 0.5)
    assert (x.gained, x.lost, found.recipes["y"].lost) == (("x/2",), (), ("y/1",))
    assert found.apart == {"z": (2, 1), "old": (1, 0), "new": (0, 0)}
    macro = found.macro
    assert (macro.n, macro.only_a, macro.only_b, macro.gained, macro.lost) == (3, 1, 2, ("x/2",), ("y/1",))
    assert (macro.a, macro.b, macro.difference) == (0.75, 0.5, -0.25)  # x and y count the same
    with pytest.raises(ValueError, match="no item in common: z"):
        compare({"z": a["z"]}, {"z": b["z"]})
    with pytest.raises(ValueError, match="both are empty"):
        compare({}, {})
    for bad in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"r/test/0: the value is .*; 0 to 1 is allowed"):
            one([1], [bad])


def test_the_same_arguments_give_the_same_numbers_whatever_else_is_compared() -> None:
    a, b = scores(50, seed=0)
    alone = one(a, b)
    assert one(a, b) == alone != one(a, b, seed=1)
    both = compare({"q": values(b, "q"), "r": values(a)}, {"q": values(a, "q"), "r": values(b)})
    assert both.recipes["r"] == alone.recipes["r"]
    # One recipe is the other with A and B exchanged.
    assert both.macro.difference == pytest.approx(0)
    assert both.macro.low < 0 < both.macro.high


def test_equal_evaluations_do_not_differ() -> None:
    for same in ([0, 1, 1], [0.25, 0.5, 1]):
        [found] = one(same, same).recipes.values()
        assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)


# ── tests ──


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 0), (3, 9), (9, 3), (4, 4), (60, 41), (900, 1010)])
def test_mcnemar_is_a_binomial_test_of_the_items_that_changed(gained: int, lost: int) -> None:
    changed = gained + lost
    expected = stats.binomtest(gained, changed).pvalue if changed else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected)


def test_zeros_and_ones_of_independent_items_have_the_exact_test() -> None:
    a, b = [1] * 6 + [0] * 14, [0] + [1] * 13 + [0] * 6
    [found] = one(a, b).recipes.values()
    assert (len(found.gained), len(found.lost), found.test) == (8, 1, "mcnemar")
    assert found.p == pytest.approx(stats.binomtest(1, 9).pvalue)
    assert one(a, b).macro.test == "sign_flip"
    assert one(a, b).macro.p == pytest.approx(found.p, abs=0.01)  # the same question


def test_other_values_have_a_permutation_test() -> None:
    a, b = scores(40, seed=3)
    [found] = one(a, b).recipes.values()
    expected = stats.permutation_test(
        (b, a), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples", n_resamples=10_000, rng=0
    )
    assert found.test == "sign_flip"
    assert found.difference == pytest.approx(expected.statistic)
    assert 0.02 < found.p == pytest.approx(expected.pvalue, abs=0.02)
    # Four differences of one sign: 2 of 16 signs are as far apart.
    assert one([0.1, 0.2, 0.3, 0.4], [0.2, 0.4, 0.6, 0.8]).macro.p == pytest.approx(2 / 16, abs=0.01)


def test_a_true_hypothesis_is_rejected_as_often_as_it_should_be() -> None:
    rng = np.random.default_rng(0)
    for discrete in (True, False):
        rejected = 0
        for _ in range(300):
            ease = rng.random(60)
            a, b = rng.random((2, 60)) < ease if discrete else rng.beta(1 + 4 * ease, 5 - 4 * ease, (2, 60))
            rejected += one(a, b, resamples=400).recipes["r"].p < 0.05
        assert 1 <= rejected <= 27  # 15 and 3 standard deviations; the exact test is conservative


# ── intervals ──


def test_the_interval_is_that_of_scipy() -> None:
    a, b = scores(80, seed=1)
    [found] = one(a, b).recipes.values()
    expected = stats.bootstrap((b - a,), np.mean, method="percentile", n_resamples=10_000, rng=0).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.002)
    separate = stats.sem(a) + stats.sem(b)
    assert found.high - found.low < 2 * separate  # pairs are kept together: far below 4 standard errors


def test_the_interval_holds_the_difference_in_95_of_100_evaluations() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        ease = rng.random(150)
        a, b = rng.random(150) < ease, rng.random(150) < ease + 0.1 * (1 - ease)
        found = one(a, b, resamples=500).recipes["r"]
        held += found.low <= 0.05 <= found.high
    assert 362 <= held <= 396  # 380 and 4 standard deviations


def test_clusters_are_drawn_as_a_whole() -> None:
    """Ten variants of a problem that are all alike are one observation."""
    rng = np.random.default_rng(2)
    a, b = rng.integers(2, size=(2, 40))
    many = {"a": np.repeat(a, 10), "b": np.repeat(b, 10)}
    clusters = {f"r/test/{place}": str(place // 10) for place in range(400)}
    single, naive = one(a, b).recipes["r"], one(**many).recipes["r"]
    whole = one(**many, clusters=clusters).recipes["r"]
    assert whole.difference == single.difference == naive.difference
    assert (whole.low, whole.high) == pytest.approx((single.low, single.high), abs=0.03)
    assert naive.high - naive.low < 0.5 * (whole.high - whole.low)
    assert (naive.test, whole.test, whole.n) == ("mcnemar", "sign_flip", 400)
    assert whole.p == pytest.approx(single.p, abs=0.02)
    assert whole.p > naive.p


def test_clusters_of_different_sizes_count_by_their_items() -> None:
    a = values([0, 0, 0, 0])
    b = values([1, 1, 1, 0])
    clusters = dict.fromkeys(list(a)[:3], "large")
    [found] = compare({"r": a}, {"r": b}, clusters).recipes.values()
    assert (found.difference, found.low, found.high) == (0.75, 0, 1)  # both drawn large, or both small


def test_the_macro_interval_adds_independent_recipes() -> None:
    a, b = scores(100, seed=5)
    c, d = scores(30, seed=6)
    found = compare({"r": values(a), "s": values(c, "s")}, {"r": values(b), "s": values(d, "s")})
    error = np.hypot(stats.sem(b - a), stats.sem(d - c)) / 2
    assert found.macro.difference == pytest.approx((fmean(b - a) + fmean(d - c)) / 2)
    assert (found.macro.high - found.macro.low) / 2 == pytest.approx(1.96 * error, rel=0.06)


# ── any figure ──


def test_a_bootstrapped_figure_is_that_of_scipy() -> None:
    sample, _ = scores(80, seed=7)
    found = bootstrap(values(sample), np.median, resamples=4000)
    expected = stats.bootstrap((sample,), np.median, method="percentile", n_resamples=4000, rng=0).confidence_interval
    assert (found["value"], found["n"]) == (np.median(sample), 80)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), abs=0.02)
    assert bootstrap(values(sample), np.median) == bootstrap(values(sample), np.median)
    with pytest.raises(ValueError, match="there are no items"):
        bootstrap({}, fmean)


def test_an_item_is_whatever_the_figure_takes_and_may_define_none() -> None:
    items = {"a": [1, 1], "b": [0], "c": []}
    found = bootstrap(items, lambda drawn: sum(map(sum, drawn)) / max(1, sum(map(len, drawn))))
    assert (found["value"], found["low"], found["high"]) == (pytest.approx(2 / 3), 0, 1)

    def positive(drawn):
        chosen = [value for value in drawn if value > 0]
        return {"positive": fmean(chosen)} if chosen else {}

    assert bootstrap_figures({"a": 0.0, "b": 0.5}, positive)["positive"] == {
        "value": 0.5,
        "low": 0.5,
        "high": 0.5,
        "n": 2,
    }


def test_official_figures_of_reward_benchmarks_have_intervals() -> None:
    """An item that is drawn twice is two items, with all its votes: with one vote each, it is an accuracy."""
    rng = np.random.default_rng(0)
    right = rng.random(120) < 0.7
    votes = [Pick(str(n), "abc"[n % 3], 0, (0, 1), 0 if r else 1) for n, r in enumerate(right)]
    found = reward_benchmarks.official("vl_rewardbench", votes)
    assert {name: figure["value"] for name, figure in found.items()} == reward_benchmarks.vl_rewardbench(
        [[vote] for vote in votes]
    )
    expected = stats.bootstrap((right,), np.mean, method="percentile", n_resamples=4000, rng=0).confidence_interval
    assert (found["overall"]["low"], found["overall"]["high"]) == pytest.approx((expected.low, expected.high), abs=0.02)
    assert (found["dropped"]["low"], found["dropped"]["high"], found["overall"]["n"]) == (0, 0, 120)
    # Of three votes two decide, also where the item is drawn again.
    three = [pick for pick in votes for _ in range(3)]
    assert reward_benchmarks.official("vl_rewardbench", three)["overall"] == found["overall"]
    unread = [Pick("a", "x", 0, (0, 1), None), Pick("b", "x", 0, (0, 1), 0)]
    assert reward_benchmarks.official("mmrb2", unread)["overall"] == {"value": 1, "low": 1, "high": 1, "n": 2}
    with pytest.raises(ValueError, match="no verdict can be read"):
        reward_benchmarks.official("mmrb2", unread[:1])
