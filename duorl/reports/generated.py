"""The page of a generated text: a click on a token shows its route, its loss and the alternatives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from duorl.colours import as_hex, of_compute
from duorl.costs import ACTIONS
from duorl.models import DuoForCausalLM
from duorl.reports.charts import ACTION_COLORS, Numbers, document
from duorl.routed_pass import RoutedPass
from duorl.routers import Router

_ALTERNATIVES = 5
_SCRIPT = """
const rows = JSON.parse(document.getElementById('rows').textContent), shown = document.getElementById('shown');
function show(place) {
  const row = rows[place], colours = %s, names = %s;
  document.querySelectorAll('.token').forEach(each => each.classList.toggle('chosen', each.dataset.place == place));
  const cells = row.route.map((action, layer) =>
    `<i title="layer ${layer}: ${names[action]}" style="background:${colours[action]}"></i>`).join('');
  const list = row.alternatives.map(([token, share]) =>
    `<tr><td><code>${token}</code></td><td>${(100 * share).toFixed(1)} %%</td></tr>`).join('');
  shown.innerHTML = `<p><code>${row.shown}</code>: loss ${row.loss.toFixed(2)} nats, compute ` +
    `${row.compute.toFixed(2)}</p><p class="route">${cells}</p><table>${list}</table>`;
}
document.querySelectorAll('.token').forEach(each => each.addEventListener('click', () => show(each.dataset.place)));
show(%d);
"""
_STYLE = """
<style>.token { cursor: pointer; color: #222; } .token.chosen { outline: 2px solid #222; } .given { opacity: 0.65; }
.route i { display: inline-block; width: 14px; height: 22px; margin-right: 2px; }
#shown { position: sticky; bottom: 0; background: #fff; border-top: 1px solid #ccc; padding: 4px 0; }</style>
"""


@torch.no_grad()
def token_rows(model: DuoForCausalLM, router: Router, text: Tensor, tokenizer: Any, *, written: int) -> list[Numbers]:
    """What the page shows of each token but the first.

    Args:
        model: generated the text.
        router: decides.
        text: (1, S) tokens.
        tokenizer: of the model.
        written: number of tokens of the prompt.

    Returns:
        Per token its text, the route and compute of the pass that predicted it, its loss, and the most likely tokens
        there with their probabilities.
    """
    walk = RoutedPass(model, text)
    router.begin(model, text)
    routes = walk.steer(router.decide)
    shares, alternatives = walk.likely(_ALTERNATIVES)
    columns = (text[0, 1:], routes[0], walk.compute[0], walk.losses()[0], alternatives[0], shares[0])
    return [
        {
            "token": tokenizer.decode([token]),
            "route": route,
            "compute": compute,
            "loss": loss,
            "alternatives": [[tokenizer.decode([one]), share] for one, share in zip(likely, odds, strict=True)],
            "given": place + 1 < written,
        }
        for place, (token, route, compute, loss, likely, odds) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        )
    ]


def generated_page(begins: str, rows: Sequence[Numbers], settings: Numbers) -> str:
    """The page; it needs no other file and no network.

    Args:
        begins: the text of the first token, which no pass predicted.
        rows: of the tokens after it, see `token_rows`.
        settings: of the command.
    """
    spans = f"<span class='given'>{escape(begins)}</span>" + "".join(
        f"<span class='token{' given' if row['given'] else ''}' data-place='{place}' "
        f"style='background:{as_hex(of_compute(row['compute']))}'>{escape(row['token'])}</span>"
        for place, row in enumerate(rows)
    )
    safe = [{**row, "shown": _visible(row["token"]), "alternatives": _escaped(row["alternatives"])} for row in rows]
    data = json.dumps(safe).replace("</", "<\\/")
    colours, names = json.dumps([ACTION_COLORS[name] for name in ACTIONS]), json.dumps(ACTIONS)
    first = next((place for place, row in enumerate(rows) if not row["given"]), 0)
    note = "The colour is the compute of the pass that predicted the token. Pale tokens are the prompt. A click on a "
    note += "token shows the route of that pass, from the first layer to the last, and what else was likely."
    script = _SCRIPT % (colours, names, first)
    parts = [
        f"{_STYLE}<p class='note'>{note}</p><div class='coloured'>{spans}</div><div id='shown'></div>",
        f"<script type='application/json' id='rows'>{data}</script><script>{script}</script>",
    ]
    return document("A generated text", settings, parts, charts=False)


def _visible(token: str) -> str:
    return escape(repr(token))


def _escaped(alternatives: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [[_visible(token), share] for token, share in alternatives]
