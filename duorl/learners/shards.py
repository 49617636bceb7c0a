"""Labels on disk: the losses of routes on windows of text, as Parquet shards, which `datasets` reads too.

    labels = LabelFolder.open("runs/labels-1", model, actions)
    losses = labels.table(tokens).losses

`duorl label` makes such a folder. `labels.json` says for which model and actions its labels are. A row of a shard is a
window: its `tokens` (T+1), and flat lists of numbers in the order of their axes. If all routes were searched, `losses`
has (T, A^L) nats. Of deviations from the route of a base policy, `losses` and `spent` have (L, T, A), `routes` has
(T, L) action codes, and `price` (T,) nats.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duorl.files import write_json, writing
from duorl.inputs import Inputs
from duorl.learners.labels import Deviations, walked_in_parts
from duorl.models import DuoForCausalLM
from duorl.oracle import RouteTable
from duorl.oracle.search import all_routes
from duorl.routers.fit import identity, same_model

ABOUT = "labels.json"
SHARDS = "shards/*/*.parquet"


def write_about(folder: Path, model: DuoForCausalLM, actions: Sequence[str], *, searched: bool) -> None:
    """Write for which model and actions the labels of a folder are, and whether all routes were searched."""
    about = {"model": identity(model), "skip": model.config.skip, "actions": list(actions), "searched": searched}
    write_json(folder / ABOUT, about)


def write_shard(path: Path, tokens: Tensor, found: RouteTable | Deviations) -> None:
    """Write the labels of some windows (B, T+1)."""
    import pyarrow
    from pyarrow import parquet

    if isinstance(found, RouteTable):
        columns = {"losses": found.losses}
    else:
        columns = {
            "losses": _by_window(found.losses, tokens),
            "spent": _by_window(found.spent, tokens),
            "routes": found.routes.unflatten(0, (len(tokens), -1)).to(torch.uint8),
            "price": found.price.unflatten(0, (len(tokens), -1)),
        }
    rows = {name: list(values.flatten(1).cpu().numpy()) for name, values in columns.items()}
    with writing(path) as beside:
        parquet.write_table(pyarrow.table({"tokens": list(tokens.int().cpu().numpy()), **rows}), beside)


def _by_window(values: Tensor, tokens: Tensor) -> Tensor:
    """(L, B * T, A) to (B, L, T, A)."""
    return values.unflatten(1, (len(tokens), -1)).transpose(0, 1)


class LabelFolder:
    """The labels of a folder.

    Args:
        folder: made by `duorl label`.
        model: the model of the labels.
        about: content of `labels.json`.
    """

    def __init__(self, folder: Path, model: DuoForCausalLM, about: dict[str, Any]):
        self.folder, self.model, self.actions = folder, model, tuple(about["actions"])
        self.searched: bool = about["searched"]
        self._places = self._find()

    @classmethod
    def open(cls, folder: Path, model: DuoForCausalLM, actions: Sequence[str]) -> LabelFolder:
        """The labels of a folder, for a model and actions.

        Raises:
            ValueError: the labels are of another model or of other actions, or a file is broken.
        """
        try:
            about = json.loads((folder / ABOUT).read_text(encoding="utf8"))
            known, own = about["model"], identity(model)
            labelled, skip = list(about["actions"]), about["skip"]
            fits = same_model(known, own)
            found = cls(folder, model, about)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"cannot read the labels in {folder} ({error}): make them anew") from error
        if not fits:
            raise ValueError(
                f"{folder} has labels of the model {known.get('name') or 'without a name'}, not of "
                f"{own['name'] or 'this one'}: label text with this model"
            )
        if "skip" in labelled and skip != model.config.skip:
            raise ValueError(
                f"{folder} has labels of --skip {skip}, not of {model.config.skip}: give that, or label anew"
            )
        if labelled != list(actions):
            raise ValueError(
                f"{folder} has labels of the actions {', '.join(labelled)}, not of {', '.join(actions)}: give "
                f"--actions '{json.dumps(labelled)}', or label text anew"
            )
        return found

    def _find(self) -> dict[bytes, tuple[Path, int]]:
        """The file and the row of every window."""
        from pyarrow import parquet

        found = {}
        for path in sorted(self.folder.glob(SHARDS)):
            for row, tokens in enumerate(parquet.read_table(path, columns=["tokens"])["tokens"].to_pylist()):
                found[_key(torch.tensor(tokens))] = path, row
        return found

    def require(self, tokens: Tensor) -> None:
        """Refuse windows (W, T+1) of which some have no labels.

        Raises:
            ValueError: says how many are missing, and what to do.
        """
        missing = sum(_key(window) not in self._places for window in tokens)
        if missing:
            raise ValueError(
                f"{self.folder} has no labels of {missing} of {len(tokens)} windows: label more with `duorl label "
                f"--out {self.folder} --resume --windows N`, or give the text and the window of these labels"
            )

    def table(self, tokens: Tensor) -> RouteTable:
        """All routes of windows (B, T+1) in the reference context, if they were searched."""
        routes = all_routes(self.model.num_layers, self.actions).to(self.model.device)
        losses = self._column("losses", tokens).unflatten(1, (-1, len(routes)))
        return RouteTable(routes, losses, self.model.route_compute(routes), "reference")

    def deviations(self, tokens: Tensor, inputs: Inputs | None = None) -> Deviations:
        """Deviations from the routes of a base policy on windows (B, T+1), with the further inputs of a router."""
        length, layers = tokens.shape[1] - 1, self.model.num_layers
        routes = self._column("routes", tokens).long().unflatten(1, (length, layers))
        hidden, compute, extra = walked_in_parts(self.model, tokens.to(self.model.device), routes, inputs)
        losses, spent = (
            self._column(name, tokens).unflatten(1, (layers, length, -1)).transpose(0, 1).flatten(1, 2)
            for name in ("losses", "spent")
        )
        price = self._column("price", tokens).flatten()
        return Deviations(hidden, compute, extra, price, losses, spent, routes.flatten(0, 1))

    def _column(self, name: str, tokens: Tensor) -> Tensor:
        """The numbers of a column for some windows, (B, ...)."""
        from pyarrow import parquet

        self.require(tokens)
        places = [self._places[_key(window)] for window in tokens]
        files = {path: parquet.read_table(path, columns=[name])[name] for path, _ in dict.fromkeys(places)}
        rows = [torch.from_numpy(files[path][row].values.to_numpy().copy()) for path, row in places]
        return torch.stack(rows).to(self.model.device)


def _key(tokens: Tensor) -> bytes:
    return tokens.int().cpu().numpy().tobytes()
