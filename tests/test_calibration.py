"""Routers that are calibrated: they spend on a text what they shall, by their price or by shifted logits."""

import pytest
import torch

from duorl import routers
from duorl.corpus import Windows
from duorl.evaluation import Ladder, learned_on, measure, transfer_rows
from duorl.routers import BudgetRouter, ConstantRouter, HeadRouter, LogitRouter, ShiftedRouter, spent


@pytest.fixture
def windows():
    return torch.randint(61, (24, 8), generator=torch.Generator().manual_seed(2))


class Thrifty(LogitRouter):
    """Takes big where a token's state is above the price, in a range of prices."""

    def __init__(self, prices=(0.1, 0.6), price=None):
        super().__init__(prices=list(prices), price=price)
        self.register_buffer("codes", torch.tensor([1, 2]), persistent=False)

    def logits(self, view):
        worth = view.hidden[..., 0].sigmoid() - self.config["price"]
        return torch.stack([torch.zeros_like(worth), worth], dim=-1)


def test_the_compute_is_that_of_a_measurement(duo, windows):
    router = HeadRouter(3, 32, seed=1)
    assert spent(duo, router, windows) == measure(duo, router, windows).compute.mean().item()


@pytest.mark.parametrize("actions", [("small", "big"), ("skip", "small", "big")])
def test_logits_are_shifted_until_the_compute_is_met(duo, windows, actions, tmp_path):
    router = HeadRouter(3, 32, actions, seed=1)
    for target in (0.3, 0.8):
        found = router.calibrated(duo, windows, compute=target)
        assert spent(duo, found, windows) == pytest.approx(target, abs=0.01)
        shifts = torch.tensor(found.config["shifts"])
        costs = (duo.flops.ffns[0, router.codes] / duo.flops.ffns[0, 2]).float()
        assert torch.allclose(shifts, shifts[-1] * costs, atol=1e-6)  # a charge for compute
    found.save_pretrained(tmp_path)
    assert torch.equal(measure(duo, routers.load(tmp_path), windows).routes, measure(duo, found, windows).routes)


def test_a_price_is_found_and_beyond_its_range_logits_are_shifted(duo, windows):
    router = Thrifty()
    low, high = (spent(duo, router.at(price=price), windows) for price in (0.6, 0.1))
    found = router.calibrated(duo, windows, compute=(low + high) / 2)
    assert isinstance(found, Thrifty) and 0.1 < found.config["price"] < 0.6
    assert spent(duo, found, windows) == pytest.approx((low + high) / 2, abs=0.005)
    beyond = router.calibrated(duo, windows, compute=low / 2 + 0.125)  # all-small is 0.25
    assert isinstance(beyond, ShiftedRouter) and beyond.router.config["price"] == 0.6
    assert spent(duo, beyond, windows) == pytest.approx(low / 2 + 0.125, abs=0.01)


def test_what_cannot_be_calibrated_is_refused(duo, windows):
    for router in (ConstantRouter("big"), BudgetRouter(HeadRouter(3, 32), 2)):
        with pytest.raises(ValueError, match="Router has neither a range of prices nor free logits"):
            router.calibrated(duo, windows, compute=0.5)
    with pytest.raises(ValueError, match=r"compute 0.1 is out of reach: the router spends 0.25 to 1.00"):
        HeadRouter(3, 32).calibrated(duo, windows, compute=0.1)
    with pytest.raises(ValueError, match=r"between 0 and 1, not 1\.5"):
        HeadRouter(3, 32).calibrated(duo, windows, compute=1.5)
    with pytest.raises(ValueError, match="needs so many shifts, not 1"):
        ShiftedRouter(HeadRouter(3, 32), [0.5])


def test_a_router_that_cannot_spend_a_target_says_so(duo, windows):
    """Its choices depend on the layer alone, so it spends few computes: 0.5, 0.75 and 1 of three equal layers."""
    router = HeadRouter(3, 32)
    for parameter in router.parameters():
        parameter.data *= 0
    router.leaning([2, 1, 2]).requires_grad_(False)
    reached = spent(duo, router, windows)
    assert spent(duo, router.calibrated(duo, windows, compute=reached + 0.01), windows) == reached
    for target in (0.4, 0.6, 0.9):
        with pytest.raises(ValueError, match=r"compute \d\.\d is out of reach: the nearest .* is \d\.\d\d, mix two"):
            router.calibrated(duo, windows, compute=target)


def test_on_a_new_text_the_compute_drifts_until_it_is_calibrated():
    """Each step spends a tenth more on the new text; its windows lose 1 and 3 nats at the first step, then half."""
    losses = torch.tensor([[1.0, 3.0], [0.5, 1.5]])

    def on_router_text(*spends):
        return Ladder(torch.tensor(spends)[:, None].expand(2, 2), losses)

    old = Ladder(torch.ones(2, 3), torch.ones(2, 3), chosen=on_router_text(0.2, 0.6))
    spent_there = torch.tensor([[0.2, 0.4], [0.6, 0.8]])
    new = Ladder(spent_there, losses, chosen=on_router_text(0.3, 0.7))
    (row,) = transfer_rows({"mine": [new]}, [{"mine": [old]}], [0.4], torch.arange(2))
    assert (row["as_learned"]["compute"], row["as_learned"]["loss"]) == pytest.approx((0.5, 1.5))
    assert (row["calibrated"]["compute"], row["calibrated"]["loss"]) == pytest.approx((0.4, 1.75))
    (row,) = transfer_rows({"mine": [new]}, [{"mine": [old]}], [0.65], torch.arange(2))
    assert row["as_learned"] is None and row["calibrated"]["compute"] == pytest.approx(0.65)
    with pytest.raises(ValueError, match="lacks the measurements on router text"):
        transfer_rows({"mine": [Ladder(spent_there, losses)]}, [{"mine": [old]}], [0.4], torch.arange(2))


def test_the_drift_of_a_router_is_between_two_texts(duo, windows):
    router, files = HeadRouter(3, 32, seed=1), torch.arange(12)
    found = learned_on(duo, router, Windows(windows[:12], files), Windows(windows[12:], files))
    here, there = (measure(duo, router, half).compute.mean(1) for half in windows.split(12))
    assert found["drift"] == pytest.approx((here.mean() - there.mean()).item(), abs=1e-6)
    spread = (2.201**2 * (here.var() + there.var()) / 12) ** 0.5  # the t quantile of 11 degrees of freedom
    low, high = found["drift_interval"]
    assert (high - low) / 2 == pytest.approx(spread.item(), rel=1e-3)
