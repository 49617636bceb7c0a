"""A price on measured time in place of FLOPs.

The small network of duo-tiny has a sixteenth of the big one's FLOPs, and takes more than a sixteenth of its time: small
matrices use a processor badly. Whoever pays for time should let the router see that.

    python train.py --reward examples.latency.LatencyPrice --reward.price 0.3

What is measured is the networks alone, not the sorting of tokens to them. The comparison after training still counts
FLOPs, at the same price. And no two runs measure quite the same, so a run with this reward does not repeat to the last
digit, as all others do.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

import duorl
from duorl.costs import ACTIONS, BIG, SKIP
from duorl.rewards import LossImprovement, Step


class LatencyPrice(LossImprovement):
    """gain - price * time, the time as a share of what all big networks take.

    A reward does not see the model, so it loads its own to measure; on the CPU, where `duorl train` runs.

    Args:
        price: what all big networks of a pass cost, in nats; at least 0.
        model: `duo-tiny` or a folder, the model that is trained on.
        tokens: that a network is measured on at once; an episode of `duorl train` has 2048, for two networks.
        repeats: measurements of each network, of which the median counts.
    """

    def __init__(self, price: float = 0.1, model: str = "duo-tiny", tokens: int = 1024, repeats: int = 15):
        super().__init__(price)
        self.shares = time_shares(network_seconds(duorl.load(model), tokens, repeats))

    def __call__(self, step: Step) -> Tensor:
        """(N,) nats."""
        time_spent = self.shares.to(step.compute)[step.layer, step.action]
        return step.gain - self.price * time_spent


def time_shares(seconds: Tensor) -> Tensor:
    """Times as shares of an all-big route's: (L, 3) to (L, 3); big's sum to 1 over the layers."""
    return seconds / seconds[:, BIG].sum()


@torch.no_grad()
def network_seconds(model: duorl.DuoForCausalLM, tokens: int, repeats: int) -> Tensor:
    """Median wall time of each layer's networks, by action: (L, 3) seconds; skip takes none.

    Args:
        model: on the CPU.
        tokens: number of tokens that each network runs on at once.
        repeats: the networks take turns so often, so that a slow moment of the machine does not hit one alone.
    """
    hidden = torch.randn(tokens, model.hidden_size, generator=torch.Generator().manual_seed(0))
    seconds = torch.zeros(repeats + 1, model.num_layers, len(ACTIONS))
    for turn in seconds:
        for layer, ffn in enumerate(model.stack.ffns):
            for action in range(SKIP + 1, len(ACTIONS)):
                started = time.perf_counter()
                ffn.run(hidden, action)
                turn[layer, action] = time.perf_counter() - started
    return seconds[1:].median(0).values  # the first turn warms up
