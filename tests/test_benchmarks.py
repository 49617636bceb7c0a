"""What benchmarks measure, against closed forms."""

import torch

from benchmarks import later
from duorl.costs import BIG, SMALL
from duorl.routed_pass import RoutedPass


def test_effects_on_own_and_later_tokens_are_those_of_changed_routes(duo, monkeypatch):
    """If all tokens change, nothing but own effects is left; the last layer has no effect on later tokens."""
    monkeypatch.setattr(later, "_LEAST", 1)
    windows = torch.randint(61, (3, 9), generator=torch.Generator().manual_seed(0))
    small = torch.full((3, 8, duo.num_layers), SMALL)
    with torch.no_grad():
        assert later.effects(duo, windows, small, chosen=SMALL, batch=2)[-1]["later"] == 0
        monkeypatch.setattr(later, "_CHANGED", 1.1)
        rows = later.effects(duo, windows, small, chosen=SMALL, batch=2)
        before = RoutedPass(duo, windows).follow(small).losses().mean()
        for layer, row in enumerate(rows):
            routes = small.clone()
            routes[..., layer] = BIG
            after = RoutedPass(duo, windows).follow(routes).losses().mean()
            assert abs(row["own"] - (before - after).item()) < 1e-5 and row["later"] == 0 and row["share"] == 1
        assert later.effects(duo, windows, small, chosen=BIG, batch=2)[0]["own"] is None
        back = later.effects(duo, windows, torch.full_like(small, BIG), chosen=BIG, batch=2)
        all_big = RoutedPass(duo, windows).follow(torch.full_like(small, BIG)).losses().mean()
        routes = torch.full_like(small, BIG)
        routes[..., 0] = SMALL
        assert abs(back[0]["own"] - (RoutedPass(duo, windows).follow(routes).losses().mean() - all_big).item()) < 1e-5
    assert later.totals(rows)["own"] == sum(row["own"] for row in rows)
