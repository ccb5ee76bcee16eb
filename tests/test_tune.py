import math
from types import SimpleNamespace

import pytest

from retrieval import tune as module
from retrieval.kinds import Kind
from retrieval.tune import confirm, tune


class Curve:
    """An index whose recall and speed are known functions of its knobs."""

    def __init__(self, recall, monkeypatch):
        self.recall_of, self.asked, self.index = recall, [], SimpleNamespace(ntotal=10**6)
        monkeypatch.setattr(module, "turn", lambda index, kind, *knobs: setattr(self, "knobs", knobs))

    def recall(self, index):
        self.asked.append(self.knobs)
        return self.recall_of(*self.knobs)

    def speed(self, index):
        value, k_factor = self.knobs
        return 1e6 / (100 + value + 5 * k_factor)


PLAIN, REFINED = Kind("SQ8", lists=4000), Kind("RaBitQ", lists=4000, refine="SQ8")


@pytest.mark.parametrize("needed", [1, 5, 30, 300, 2500])
@pytest.mark.parametrize("start", [0.2, 0.6])
def test_the_least_value_that_reaches_the_recall_is_found_whatever_the_way_there(needed, start, monkeypatch):
    def recall(value, _):  # as much for each doubling, 0.96 when `needed` lists are looked into
        return start + (0.96 - start) * math.log2(1 + value) / math.log2(1 + needed)

    curve = Curve(recall, monkeypatch)
    best, tried = tune(curve.index, PLAIN, curve, 0.96)
    assert best is not None and needed <= best.value <= needed * 1.07 + 1
    assert len(tried) < 35 and len(curve.asked) == len(set(curve.asked))


def test_a_ceiling_below_the_recall_is_seen_long_before_all_lists_are_looked_into(monkeypatch):
    curve = Curve(lambda value, _: 0.9 - 0.5 / (1 + value / 10), monkeypatch)
    best, tried = tune(curve.index, PLAIN, curve, 0.95)
    assert best is None and max(one.value for one in tried) < 700


def test_a_longer_second_look_is_taken_where_the_short_one_is_not_enough_and_the_fastest_wins(monkeypatch):
    def recall(value, k_factor):
        return min(1 - 0.3 / value, 1 - 0.2 / k_factor)  # 0.95 from k_factor 4 on, 0.98 from 10 on

    for asked, factor in ((0.94, 4), (0.98, 12)):
        curve = Curve(recall, monkeypatch)
        best, tried = tune(curve.index, REFINED, curve, asked)
        assert best.k_factor == factor and best.recall >= asked
        assert best.speed == max(one.speed for one in tried if one.recall >= asked)


def test_the_knob_is_raised_until_other_queries_are_satisfied_too(monkeypatch):
    curve = Curve(lambda value, _: 0.9 + value / 10_000, monkeypatch)
    best, _ = tune(curve.index, PLAIN, curve, 0.95)
    harder = Curve(lambda value, _: 0.895 + value / 10_000, monkeypatch)
    setting, recall = confirm(harder.index, best, harder, 0.95)
    assert setting.value > best.value and 0.95 <= recall < 0.955 and harder.knobs == (setting.value, 1)
    hopeless = Curve(lambda value, _: 0.94, monkeypatch)
    assert confirm(hopeless.index, best, hopeless, 0.95) is None
