"""Example of a reward: the price is for measured time, not for FLOPs.

The small network of duo-tiny has 1/16 of the FLOPs of the big one, but it takes more than 1/16 of the time, because
processors are slower on small matrices.

    python train.py --reward examples.latency.LatencyPrice --reward.price 0.3

The reward measures the networks only, not the grouping of tokens by network. The comparison after the training still
counts FLOPs, at the same price. Two runs do not measure exactly the same times. So a run with this reward does not give
the same result when it is repeated; all other runs do.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

import duorl
from duorl.costs import ACTIONS, BIG, SKIP
from duorl.rewards import LossImprovement, Step


class LatencyPrice(LossImprovement):
    """gain - price * time, where time is a share of the time of all big networks.

    A reward cannot read the model, so it loads its own model and measures it on the CPU, where `duorl train` runs.

    Args:
        price: price of all big networks of a pass, in nats; at least 0.
        model: `duo-tiny` or a folder; use the model of the training.
        tokens: number of tokens in each measurement; an episode of `duorl train` has 2048, for two networks.
        repeats: number of measurements of each network; the median is used.
    """

    def __init__(self, price: float = 0.1, model: str = "duo-tiny", tokens: int = 1024, repeats: int = 15):
        super().__init__(price)
        self.shares = time_shares(network_seconds(duorl.load(model), tokens, repeats))

    def __call__(self, step: Step) -> Tensor:
        """(N,) nats."""
        time_spent = self.shares.to(step.compute)[step.layer, step.action]
        return step.gain - self.price * time_spent


def time_shares(seconds: Tensor) -> Tensor:
    """Times as shares of the time of all-big: (L, 3) to (L, 3); those of big sum to 1 over the layers."""
    return seconds / seconds[:, BIG].sum()


@torch.no_grad()
def network_seconds(model: duorl.DuoForCausalLM, tokens: int, repeats: int) -> Tensor:
    """Median wall time of each layer's networks, by action: (L, 3) seconds; 0 for skip.

    Args:
        model: a model on the CPU.
        tokens: number of tokens in each measurement.
        repeats: number of rounds. In each round all networks are measured once, so that a slow moment of the machine
            does not affect one network only.
    """
    hidden = torch.randn(tokens, model.hidden_size, generator=torch.Generator().manual_seed(0))
    seconds = torch.zeros(repeats + 1, model.num_layers, len(ACTIONS))
    for turn in seconds:
        for layer, ffn in enumerate(model.stack.ffns):
            for action in range(SKIP + 1, len(ACTIONS)):
                started = time.perf_counter()
                ffn.run(hidden, action)
                turn[layer, action] = time.perf_counter() - started
    return seconds[1:].median(0).values  # the first round is a warm-up
