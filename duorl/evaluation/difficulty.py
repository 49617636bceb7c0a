"""Token difficulty (Duo-LLM, Fig. 5 and 6): reference loss - oracle loss.

table = duorl.oracle.exhaustive(model, tokens)
rows = token_difficulty(table, tokens, tokenizer)
save_table(rows, Path("tokens.parquet"))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from duorl.costs import BIG, SMALL
from duorl.oracle import RouteTable

_MARKS = ".sB"  # skip, small, big


class TokenRow(NamedTuple):
    """One predicted token.

    Attributes:
        window, position: its place; `position` counts from the window's first prediction.
        token: its text.
        all_small, all_big, oracle: its losses in nats, in the context of the search. If the routes are not the best,
            `oracle` and all after it are those of the routes that were found, and `difficulty` is a lower bound.
        difficulty: all_small - oracle, nats.
        compute: compute of the oracle's route, in [0, 1].
        route: the oracle's route, one character per layer: `.` skip, `s` small, `B` big.
    """

    window: int
    position: int
    token: str
    all_small: float
    all_big: float
    oracle: float
    difficulty: float
    compute: float
    route: str


def token_difficulty(
    table: RouteTable, tokens: Tensor, tokenizer: PreTrainedTokenizerBase, *, price: float = 0.0
) -> list[TokenRow]:
    """Losses and difficulty of every token.

    Args:
        table: a search of these tokens with small and big among its actions.
        tokens: (B, T+1).
        tokenizer: gives their text.
        price: price of the oracle, nats per all-big pass.

    Raises:
        ValueError: small and big are not among the actions of the search.
    """
    best = table.best(price)
    constant = [torch.full_like(table.routes[0], action) for action in (SMALL, BIG)]
    small, big = (table.losses[..., table.index_of(route)] for route in constant)
    routes, losses, compute = table.routes[best], table.loss(best), table.compute[best]
    return difficulty_rows(tokens, tokenizer, small=small, big=big, best=losses, compute=compute, routes=routes)


def difficulty_rows(
    tokens: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    *,
    small: Tensor,
    big: Tensor,
    best: Tensor,
    compute: Tensor,
    routes: Tensor,
) -> list[TokenRow]:
    """Rows of tokens (B, T+1) from the routes of any search.

    Args:
        tokens: (B, T+1).
        tokenizer: gives their text.
        small: (B, T), losses of all-small, nats.
        big: (B, T), losses of all-big, nats.
        best: (B, T), losses of the routes, nats; if the routes are not the best, difficulties are lower bounds.
        compute: (B, T), compute of the routes.
        routes: (B, T, L), action codes.
    """
    numbers = torch.stack((small, big, best, small - best, compute), -1).flatten(0, 1).tolist()
    length = tokens.shape[1] - 1
    names = token_names(tokens[:, 1:].flatten(), tokenizer)
    marks = ["".join(_MARKS[action] for action in route) for route in routes.flatten(0, 1).tolist()]
    rows = []
    for place, (name, values, route) in enumerate(zip(names, numbers, marks, strict=True)):
        rows.append(TokenRow._make([place // length, place % length, name, *values, route]))
    return rows


def token_names(tokens: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token, (N,)."""
    return [str(tokenizer.decode([token])) for token in tokens.tolist()]


def named_rows(rows: Sequence[TokenRow], *, exact: bool) -> list[dict[str, Any]]:
    """Rows for files. If the routes are not the best (`exact` is false), `lower_bound` stands in place of `oracle`."""
    names = [name if exact or name != "oracle" else "lower_bound" for name in TokenRow._fields]
    return [dict(zip(names, row, strict=True)) for row in rows]


def save_table(rows: Sequence[TokenRow], path: Path, *, exact: bool = True) -> None:
    """Write the rows as .parquet or .csv, by the suffix of the path; see `named_rows`."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    table = Dataset.from_list(named_rows(rows, exact=exact))
    table.to_parquet(path) if path.suffix == ".parquet" else table.to_csv(path)
