"""Figures on held-out comparisons, worked out by hand, and the files and tables that show them."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf import reward_report as rr
from rlhf.reward_report import Ranking

LN3 = math.log(3)


def ranking(ranks, scores, lengths=None, **more):
    texts = [f"answer {i}" for i in range(len(ranks))]
    return Ranking(more.pop("prompt", "Q"), texts, ranks, scores, lengths or [1] * len(ranks), **more)


def test_accuracy_by_hand():
    # K = 3, ranks 1, 2, 2: pairs (0, 1) right and (0, 2) wrong. K = 2: right. Three pairs, two right
    found = rr.report([ranking([1, 2, 2], [1.0, 0.0, 2.0]), ranking([2, 1], [0.0, 1.0], prompt="R")], {})
    assert found["accuracy"] == pytest.approx(2 / 3) and found["pairs"] == 3 and found["prompts"] == 2
    assert found["by_k"]["3"]["accuracy"] == 0.5 and found["by_k"]["2"]["accuracy"] == 1.0
    assert found["margins"]["mean"] == pytest.approx((1 - 1 + 1) / 3)
    low, high = found["accuracy_ci95"]
    assert low == 0.5 and high == 1.0  # of two prompts, resamples hold either one alone


def test_groups_and_length_by_hand():
    rankings = [
        ranking([1, 2], [2.0, 1.0], [9, 3], labeler="a", use_case="chat"),  # right, the longer one is preferred
        ranking([1, 2], [1.0, 2.0], [4, 6], labeler="b", use_case="chat"),  # wrong, the shorter one
        ranking([1, 2], [5.0, 2.0], [4, 8], labeler="b"),  # right, the shorter one
    ]
    found = rr.report(rankings, {})
    assert {name: group["accuracy"] for name, group in found["by_labeler"].items()} == {"b": 0.5, "a": 1.0}
    assert found["by_use_case"]["chat"]["pairs"] == 2 and found["by_source"] == {}
    assert found["by_length_difference"]["preferred is longer"]["accuracy"] == 1.0
    assert found["by_length_difference"]["preferred is shorter"]["accuracy"] == 0.5
    quarters = [group["pairs"] for name, group in found["by_length_difference"].items() if "apart" in name]
    assert sum(quarters) == 3
    assert found["longer_is_better"] == pytest.approx(1 / 3)
    assert found["over_longer_is_better"]["difference"] == pytest.approx(2 / 3 - 1 / 3)


def test_calibration_by_hand():
    # Gaps ln 3 twice (p = 3/4, right) and -ln 3 once (p = 1/4, the worse one preferred by the model).
    # Both ways: items at p = 3/4 are two with label 1 and one with label 0; at 1/4 two with 0 and one with 1.
    # Observed 2/3 against 3/4, and 1/3 against 1/4: half of the items each, so ECE = 1/12.
    found = rr.calibration([LN3, LN3, -LN3], [0, 1, 2])
    assert found["ece"] == pytest.approx(1 / 12)
    assert [(b["from"], b["items"]) for b in found["bins"]] == [(0.2, 3), (0.7, 3)]
    assert [b["observed"] for b in found["bins"]] == pytest.approx([1 / 3, 2 / 3])
    assert [b["predicted"] for b in found["bins"]] == pytest.approx([1 / 4, 3 / 4])
    assert found["nll"] == pytest.approx((2 * math.log(4 / 3) + math.log(4)) / 3)
    # Without symmetry every label would be 1, and a model that is always right and always sure would have an ECE of 0 by luck
    assert rr.calibration([0.0, 0.0], [0, 1])["ece"] == 0.0  # knows nothing and says so
    assert rr.calibration([50.0, 50.0], [0, 1])["ece"] == pytest.approx(0.0, abs=1e-9)
    assert rr.calibration([-50.0], [0])["ece"] == pytest.approx(1.0)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30))
def test_calibration_does_not_depend_on_which_is_named_first(gaps):
    found = rr.calibration(gaps, list(range(len(gaps))))
    assert 0 <= found["ece"] <= 1 and found["ece_ci95"][0] <= found["ece_ci95"][1] + 1e-12
    assert sum(b["items"] for b in found["bins"]) == 2 * len(gaps)
    assert sum(b["items"] * b["observed"] for b in found["bins"]) == pytest.approx(len(gaps))
    assert sum(b["items"] * b["predicted"] for b in found["bins"]) == pytest.approx(len(gaps))


def test_pairs_of_one_prompt_are_resampled_together():
    """One prompt of 28 pairs says no more about other prompts than one pair: its interval is all or nothing."""
    many = rr.calibration([LN3] * 28 + [-LN3] * 28, [0] * 28 + [1] * 28)["ece_ci95"]
    few = rr.calibration([LN3, -LN3], [0, 1])["ece_ci95"]
    assert many == pytest.approx(few)


def test_labelers_of_one_prompt_are_resampled_together():
    """Thirty labelers of each of two prompts, all right and all wrong, are two observations of the model."""
    right = [ranking([1, 2], [1.0, 0.0], labeler=str(i)) for i in range(30)]
    wrong = [ranking([1, 2], [0.0, 1.0], labeler=str(i), prompt="R") for i in range(30)]
    found = rr.accuracy(right + wrong)
    assert found["accuracy_ci95"] == [0.0, 1.0] and found["prompts"] == 2 and found["pairs"] == 60


def test_correlation_with_length_by_hand():
    # Within each prompt reward falls by one a token; between prompts it rises with the length
    rankings = [ranking([1, 2], [1.0, 0.0], [1, 2]), ranking([1, 2], [9.0, 8.0], [11, 12])]
    found = rr.reward_and_length(rankings)
    assert found["pearson_within_prompt"] == pytest.approx(-1.0)
    r, n = np.array([1, 0, 9, 8]), np.array([1, 2, 11, 12])
    assert found["pearson"] == pytest.approx(np.corrcoef(r, n)[0, 1])
    assert found["spearman"] == pytest.approx(np.corrcoef([1, 0, 3, 2], [0, 1, 2, 3])[0, 1])
    assert rr.reward_and_length([ranking([1, 2], [1.0, 1.0])])["pearson"] is None  # nothing varies


def record(prompt, texts, ranks, labeler):
    return {"prompt": prompt, "completions": texts, "ranks": ranks, "labeler": labeler}


def test_agreement_of_labelers_by_hand():
    data = [
        record("Q", ["x", "y", "z"], [1, 2, 3], "a"),
        record("Q", ["z", "y", "x"], [1, 2, 2], "b"),  # x, y: tied by b; x, z: not alike; y, z: not alike
        record("Q", ["x", "y", "z"], [1, 2, 3], "a"),  # the same labeler again is no second opinion
        record("R", ["x", "y"], [2, 1], "a"),
        record("R", ["x", "y"], [2, 1], "c"),  # alike
        record("S", ["x", "y"], [1, 2], "a"),  # alone
    ]
    found = rr.labeler_agreement([data[:4], data[4:]])
    # a and b on Q, twice (a ranked it twice): 4 strict pairs, none alike; R: 1 of 1
    assert found["pairs"] == 5 and found["prompts"] == 2
    assert found["agreement"] == pytest.approx(1 / 5)
    assert found["with_ties"] == pytest.approx((0.5 + 0.5 + 1) / 7)
    assert rr.labeler_agreement([[record("Q", ["x", "y"], [1, 2], None)]]) is None


def test_ensembles_by_hand():
    # margins of the two members: 1 and 3 (std 1, right), then -4 and 2 (std 3, the mean is wrong)
    rankings = [
        ranking([1, 2], [2.0, 0.0], members=[[1.0, 3.0], [0.0, 0.0]]),
        ranking([1, 2], [-1.0, 0.0], members=[[-4.0, 2.0], [0.0, 0.0]]),
    ]
    found = rr.report(rankings, {})["ensemble"]
    assert found["members"] == 2 and found["member_accuracy"] == [0.5, 1.0]
    assert found["std_of_margin"] == pytest.approx(2.0)
    assert found["half that they agree on more"]["accuracy"] == 1.0
    assert found["half that they agree on less"]["accuracy"] == 0.0


def test_controls():
    items = [
        {"prompt": [1, 2], "completions": [[3, 4, 9], [5, 9]], "ranks": [2, 1]},
        {"prompt": [6], "completions": [[7, 9], [8, 9]], "ranks": [1, 2]},
    ]
    rows = rr.control_rows(items, 50, [[1, 2, 3]])
    assert rows["demonstrations"] == [[1, 2, 3]]
    assert sorted(rows["answers to other prompts"]) == [[1, 2, 7, 9], [6, 5, 9]]
    assert sorted(map(len, rows["random tokens"])) == [3, 4] and all(row[-1] == 9 for row in rows["random tokens"])
    assert rows == rr.control_rows(items, 50, [[1, 2, 3]])
    # a long answer after a long prompt would be out of the model's context
    long = [{"prompt": [1] * 9, "completions": [[3], [4]], "ranks": [1, 2]}]
    long += [{"prompt": [1], "completions": [[3] * 9, [4]], "ranks": [1, 2]}]
    assert rr.control_rows(long, 50, [])["answers to other prompts"] == [[1, 3]]


def full_report():
    rng = np.random.default_rng(0)
    rankings = [
        ranking(
            list(range(1, 5)),
            rng.normal(size=4).tolist(),
            rng.integers(1, 50, 4).tolist(),
            labeler=f"l{i % 3}",
            source="web",
            prompt=str(i),
        )
        for i in range(20)
    ]
    return rr.report(rankings, {"demonstrations": rng.normal(size=9).tolist(), "random tokens": [-2.0, -1.0]})


def test_files_and_tables(tmp_path, capsys):
    found = full_report()
    path = rr.write(found, tmp_path / "evals" / "v1")
    assert json.loads(path.read_text()) == found  # plain values: nothing is lost
    names = {p.name for p in path.parent.iterdir()}
    figures = ("reliability", "scores", "margins", "length", "accuracy")
    assert names == {"rm.json", *(f"rm-{figure}.png" for figure in figures)}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in path.parent.glob("*.png"))
    assert path == rr.write(found, path.parent)  # again
    assert {p.name for p in path.parent.iterdir()} == names
    rr.print_report(found, "demo/rm/v1")
    told = capsys.readouterr().out
    for words in ("all pairs", "longer is better", "K = 4", "labeler l0", "from web", "ECE", "score of demonstrations"):
        assert words in told, words
    assert rr.summary(found)["ece"] == found["calibration"]["ece"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["$x_$ and $", "[/INST]", "[bold]", "王\n小明" * 30, "\\frac{", ""])
def test_names_are_shown_as_they_are(tmp_path, capsys, monkeypatch, name):
    """A labeler may be called what is markup for a terminal or a formula for a figure."""
    monkeypatch.setenv("COLUMNS", "200")
    rankings = [ranking([1, 2], [1.0, 0.0], labeler=name, use_case=name, source=name)]
    found = rr.report(rankings, {"demonstrations": [0.0]})
    rr.write(found, tmp_path)
    rr.print_report(found, name)
    assert name[:8].split("\n")[0] in capsys.readouterr().out


def test_held_out_labelers_and_ensembles_are_in_table_and_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    found = full_report()
    part = rr.accuracy([ranking([1, 2], [1.0, 0.0])])
    fold = {"labelers": ["l0", "l1"], "held_out_labelers": part, "training_labelers": part}
    found["held_out_labelers"] = {
        "groups": 2,
        "mean": 0.696,
        "standard_error": 0.009,
        "training_labelers_mean": 0.724,
        "training_labelers_standard_error": None,
        "folds": [fold],
    }
    found["ensemble"] = {"members": 2, "member_accuracy": [0.5, 0.75], "std_of_margin": 0.25, "mean": part}
    assert rr.accuracy_rows(found)[-1] == ("without l0, l1, on theirs", part)
    rr.write(found, tmp_path)
    rr.print_report(found, "demo/rm/v1")
    told = " ".join(capsys.readouterr().out.split())
    assert "held-out labelers 0.696 ± 0.009 (2 groups)" in told and "labelers trained on 0.724 ± –" in told
    assert "std of a margin 0.250; accuracy each 0.500, 0.750" in told and "their mean reward accuracy 1.000" in told


def test_one_pair_and_none(capsys):
    """Small data give what they give, and never a NaN, which JSON does not have."""
    for rankings in ([ranking([1, 2], [0.0, 0.0])], []):
        found = rr.report(rankings, {"demonstrations": []})
        assert "NaN" not in json.dumps(found, allow_nan=False)
        rr.print_report(found, "none")
        assert "none" in capsys.readouterr().out
        assert rr.summary(found)["pairs"] == len(rankings)
