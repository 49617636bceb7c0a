"""Measure a router on windows of text: losses, compute, routes and time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from duorl.models.attention import Memory
from duorl.models.modeling import DuoForCausalLM
from duorl.routed_pass import Context, RoutedPass
from duorl.routers import ConstantRouter, Router


@dataclass(frozen=True)
class Measurement:
    """Measurement of one router on W windows of T tokens.

    Attributes:
        loss: (W, T) nats.
        predicted: (W, T) int64, the most likely next token.
        compute: (W, T), in [0, 1].
        routes: (W, T, L) int64, action codes.
        seconds: (batches,), wall time per token of each batch, with the router's decisions, without `begin`.
    """

    loss: Tensor
    predicted: Tensor
    compute: Tensor
    routes: Tensor
    seconds: Tensor


def stacked(seeds: Sequence[Measurement]) -> Measurement:
    """Measurements of the same windows, stacked along a first axis S."""
    columns = zip(*(vars(measured).values() for measured in seeds), strict=True)
    return Measurement(*(torch.stack(column) for column in columns))


def top1_agreement(predicted: Tensor, all_big: Tensor) -> Tensor:
    """Share of a window's tokens with the same most likely token: (..., W) from (..., W, T) and all-big's (W, T)."""
    return (predicted == all_big).float().mean(-1)


@torch.no_grad()
def measure(
    model: DuoForCausalLM,
    router: Router,
    windows: Tensor,
    *,
    context: Context = "routed",
    batch: int = 16,
    memories: Sequence[Memory] | None = None,
) -> Measurement:
    """Let a router decide for every token of some windows.

    Args:
        model: a duo model.
        router: the router.
        windows: (W, T+1).
        context: `routed` (deployment) or `reference`.
        batch: windows per pass.
        memories: one per batch, for the reference context; several routers can share them.

    Raises:
        ValueError: the router does not fit the model; see `Router.require_fit`.
    """
    router.require_fit(model)
    parts = []
    for index, tokens in enumerate(windows.to(model.device).split(batch)):
        router.begin(model, tokens)
        started = time.perf_counter()
        walk = RoutedPass(model, tokens, context=context, memory=memories[index] if memories else None)
        routes = walk.steer(router.decide)
        # Copies wait for an accelerator, so that the time is right.
        loss, predicted = (found.cpu() for found in walk.losses_and_predictions())
        seconds = torch.tensor([(time.perf_counter() - started) / loss.numel()])
        parts.append((loss, predicted, walk.compute.cpu(), routes.cpu(), seconds))
    return Measurement(*(torch.cat(column) for column in zip(*parts, strict=True)))


def evaluate(
    model: DuoForCausalLM, router: Router, windows: Tensor, *, price: float, reference: str = "small"
) -> dict[str, float]:
    """A router's mean loss, gain, compute and return on some windows, in the routed context.

    Args:
        model: a duo model.
        router: the router.
        windows: (W, T+1).
        price: nats per all-big pass.
        reference: the action of the reference route, in every layer.
    """
    measured, baseline = measure(model, router, windows), measure(model, ConstantRouter(reference), windows)
    gain, compute = (baseline.loss - measured.loss).mean().item(), measured.compute.mean().item()
    return {"loss": measured.loss.mean().item(), "gain": gain, "compute": compute, "return": gain - price * compute}
