"""What README and docs say of the kept results follows from them: sentences are made from the files and stand there."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import acceptance
from duorl.evaluation.budgets import load_texts

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
FIXED = "best fixed"


def page(name: str) -> str:
    return re.sub(r"[\s*]+", " ", (ROOT / name).read_text())


def study(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())["texts"]


def minus(texts: list[dict], router: str, rival: str = FIXED, targets: tuple[float, ...] = ()) -> list[float]:
    """Differences of a router to a rival, at all targets that both reach, of all texts."""
    rows = [row for found in texts for row in found["rows"] if row["router"] == router]
    asked = [row["minus"] for row in rows if not targets or row["target"] in targets]
    return [differences[rival]["difference"] for differences in asked if rival in differences]


def spread(values: list[float], digits: int = 2) -> str:
    """By how much a router is below, least and most."""
    assert max(values) < 0
    return f"{-max(values):.{digits}f} to {-min(values):.{digits}f} nats"


def levels(texts: list[dict], router: str) -> list[float]:
    return sorted(one["level_at"] for found in texts for one in found["routers"] if one["router"] == router)


def share_of_flops(found: dict, compute: float) -> float:
    """All FLOPs at a compute, as a share of all-big's: linear, from two rows of a router without its own FLOPs."""
    low, *_, high = [row for row in found["rows"] if row["router"] == FIXED]
    slope = (high["flops_share"] - low["flops_share"]) / (high["compute"] - low["compute"])
    return low["flops_share"] + slope * (compute - low["compute"])


def percent(values: list[float]) -> str:
    shown = [f"{100 * value:.0f}" for value in values]
    return f"{shown[0]} to {shown[-1]} %"


def smollm2_sentences() -> list[str]:
    texts = study("budgets-smollm2")
    two, other = [texts["stdlib-code"], texts["stdlib-docs"]], texts["moby-dick.jsonl"]
    targets = [row["target"] for row in other["rows"] if row["router"] == FIXED]
    flops = [f"{100 * share_of_flops(other, target):.0f}" for target in targets]
    level = minus(two, "REINFORCE")
    met = levels(two, "ReinMax")
    (elsewhere,) = levels([other], "ReinMax")
    seeds = {row["seeds"] for found in texts.values() for row in found["rows"] if row["router"] != FIXED}
    assert seeds == {3} and len(targets) == 4
    return [
        f"At {', '.join(f'{100 * t:.0f}' for t in targets[:-1])} and {100 * targets[-1]:.0f} % of this compute "
        f"({', '.join(flops[:-1])} and {flops[-1]} % of all FLOPs), the loss of ReinMax is "
        f"{spread(minus(two, 'ReinMax'))} below that of the best mixture of fixed patterns, on two texts. That of PPO "
        f"is {spread(minus(two, 'PPO'))} below it.",
        f"its difference is {min(level):+.2f} to {max(level):+.2f} nats.",
        f"ReinMax meets the loss of the whole model at {percent(met)} of this compute "
        f"({percent([share_of_flops(other, compute) for compute in met])} of all FLOPs); on a text of another kind at "
        f"{100 * elsewhere:.0f} %.",
        f"is ahead of ReinMax by {spread(minus(two, 'soft', 'ReinMax'))}.",
    ]


@pytest.mark.parametrize("sentence", smollm2_sentences())
def test_the_readme_says_of_smollm2_what_was_kept(sentence):
    assert sentence in page("README.md")


def test_the_page_of_smollm2_says_what_was_kept():
    texts, found = study("budgets-smollm2"), page("docs/explanation/smollm2.md")
    code, docs, other = (texts[name] for name in ("stdlib-code", "stdlib-docs", "moby-dick.jsonl"))
    assert f"by {spread(minus([code], 'ReinMax'))} on code, by {spread(minus([docs], 'ReinMax'))} on docs" in found
    assert f"PPO is {spread(minus([code, docs], 'PPO'))} below it" in found
    (on_code,), (on_docs,) = levels([code], "ReinMax"), levels([docs], "ReinMax")
    assert f"ReinMax with {100 * on_code:.0f} % (code) and {100 * on_docs:.0f} % (docs)" in found
    shares = [f"{100 * share_of_flops(code, compute):.0f}" for compute in (on_code, on_docs)]
    assert f"which is {' and '.join(shares)} % of all FLOPs" in found
    assert f"The supervised router is {spread(minus([code, docs], 'supervised'))} below it" in found
    assert f"PPO is {spread([-x for x in minus([code, docs], 'PPO', 'soft')])} behind soft" in found
    assert f"ReinMax is {spread(minus([other], 'ReinMax'))} below the best mixture of fixed patterns" in found
    assert f"soft {spread(minus([other], 'soft')).removesuffix(' nats')}." in found
    assert min(minus([other], "REINFORCE")) > 0.02 and max(map(abs, minus([other], "PPO"))) < 0.04


def test_the_readme_says_of_duo_tiny_what_was_kept():
    texts = list(study("budgets").values())
    rows = [row for found in texts for row in found["rows"] if row["router"] in ("PPO", "ReinMax")]
    assert {row["seeds"] for row in rows} == {5}
    better = {"PPO": 0, "ReinMax": 0}
    for row in rows:
        if row["target"] == 0.25:
            better[row["router"]] += row["minus"][FIXED]["holds"] and row["minus"][FIXED]["difference"] < 0
    where = {2: "on both texts", 1: "on one of them"}
    readme = page("README.md")
    assert (
        f"ReinMax has a lower loss than the best mixture of fixed patterns {where[better['ReinMax']]}, "
        f"PPO {where[better['PPO']]}"
    ) in readme
    assert "At 50 %, no reinforcement-learning router is clearly better." in readme
    for row in rows:
        if row["target"] == 0.5:
            low, high = row["minus"][FIXED]["interval"]
            assert low < 0 < high
    assert "No router is shown to meet the loss of the whole model with less compute." in readme
    for router in (router for found in texts for router in found["routers"] if router["router"] != FIXED):
        assert router["level_at"] is None and router["level_at_interval"][1] is None


def test_the_page_of_experiments_says_what_was_kept():
    texts, found = study("budgets"), page("docs/explanation/experiments.md")
    code, docs = texts["stdlib-code"], texts["stdlib-docs"]
    at_a_quarter = {
        name: [-minus([text], name, targets=(0.25,))[0] for text in (code, docs)] for name in ("ReinMax", "soft")
    }
    said = {name: f"{one:.3f} and {other:.3f} nats" for name, (one, other) in at_a_quarter.items()}
    assert f"ReinMax by {said['ReinMax']}, soft by {said['soft']}." in found
    both = [code, docs]
    assert f"by {spread(minus(both, 'ReinMax', 'supervised'), 3)}. All four" in found
    assert f"by {spread(minus(both, 'PPO', 'supervised'), 3)}. None of its four" in found
    holds = {"ReinMax": True, "PPO": False}
    for row in (row for text in both for row in text["rows"] if row["router"] in holds and row["minus"]):
        assert row["minus"]["supervised"]["holds"] is holds[row["router"]]
    assert max(map(abs, minus(both, "ReinMax", "soft"))) < 0.003
    comparison = json.loads((RESULTS / "compare.json").read_text())["rows"]
    for name in ("soft", "ReinMax", "PPO", "supervised"):
        row = next(row for row in comparison if row["router"] == name)
        low, high = row["loss_minus_mix_interval"]
        assert f"{-row['loss_minus_mix']:.3f} ({-high:.3f} to {-low:.3f})" in found.replace(" nats (", " (")
        assert row["loss_minus_mix_holds"] is (name in ("soft", "ReinMax"))


KEPT = [("budgets", "ladders"), ("budgets-neighbours", "ladders-neighbours")]


@pytest.mark.parametrize(("result", "ladders"), KEPT, ids=[result for result, _ in KEPT])
def test_tables_at_equal_compute_follow_from_the_kept_ladders(result, ladders):
    """Every loss, difference, interval and test of the tables again, from measurements per window, without training."""
    texts, kept = study(result), load_texts(RESULTS / f"{ladders}.safetensors.gz")
    assert list(kept) == list(texts)
    for text, found in kept.items():
        targets = list(dict.fromkeys(row["target"] for row in texts[text]["rows"]))
        assert json.loads(json.dumps(found.numbers(targets))) == approximately(texts[text])


def approximately(value):
    """Numbers but for rounding, in nested dictionaries and lists."""
    if isinstance(value, dict):
        return {key: approximately(one) for key, one in value.items()}
    if isinstance(value, list):
        return [approximately(one) for one in value]
    return pytest.approx(value, rel=1e-4, abs=1e-7) if isinstance(value, float) else value


def test_acceptance_follows_from_the_kept_ladders():
    path = RESULTS / "acceptance.json"
    kept = json.loads(path.read_text())["rows"]
    assert json.loads(json.dumps(acceptance.again(path))) == approximately(kept)


def test_the_page_of_drafts_says_what_was_kept():
    rows = json.loads((RESULTS / "acceptance.json").read_text())["rows"]
    differences = {row["name"]: row["targets"] for row in rows if row["name"] != FIXED}
    key, found = f"minus {FIXED}", page("docs/explanation/drafts.md")
    at = {target: [one[target][key] for one in differences.values()] for target in ("0.25", "0.5", "0.75")}
    ahead = [differences[name]["0.25"][key] for name in differences if name.startswith(("ReinMax", "soft, distance"))][
        :3
    ]
    assert all(low > 0 for _, low, _ in ahead)
    assert f"by {min(v for v, *_ in ahead):.3f} to {max(v for v, *_ in ahead):.3f}. The intervals of the three" in found
    for name in ("PPO, acceptance", "REINFORCE, acceptance"):
        assert differences[name]["0.25"][key][1] < 0
    assert all(low < 0 < high for _, low, high in at["0.5"])
    assert len(at["0.75"]) == 10 and all(high < 0 for _, _, high in at["0.75"])
    worse = [-value for value, *_ in at["0.75"]]
    assert f"by {min(worse):.3f} to {max(worse):.3f}; all ten intervals are below 0" in found
