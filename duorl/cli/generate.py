"""`duorl generate`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jsonargparse import Namespace
from rich.text import Text
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import BaseStreamer

from duorl.checks import require_positive
from duorl.cli.console import console, is_unicode, say, typed_command
from duorl.colours import as_hex, of_compute
from duorl.costs import ACTIONS
from duorl.experiments.material import placed
from duorl.files import write_text
from duorl.models import DuoForCausalLM, Transcript, check_windows, load, load_tokenizer
from duorl.models.families import keys_width
from duorl.models.footprint import Batch, require_room, stored_bytes
from duorl.reports.generated import generated_page, token_rows
from duorl.routers import ConstantRouter, Router
from duorl.routers import load as load_router

if TYPE_CHECKING:
    from duorl.models.config import DuoConfig

_CELLS = {True: "·▁█", False: ".sB"}  # skip, small, big; on a terminal without these characters


def prepare(options: Namespace, config: dict[str, Any]) -> tuple[str, Callable[[Path | None], None]]:
    """The function that generates a text and shows it.

    Raises:
        ValueError, OSError: the model, a router or the prompt cannot be used.
    """
    require_positive(max_new_tokens=options.max_new_tokens)
    if options.temperature < 0:
        raise ValueError(f"temperature must be at least 0, not {options.temperature}")
    router, draft = _at_price(_router(options.router), options.price), options.draft and _router(options.draft)
    model, tokenizer = load(options.model, **placed(options)), load_tokenizer(options.model)
    model.generation_config = _what_ends(model.generation_config)
    for one in (router, draft):
        if one is not None:
            one.to(model.device).require_fit(model)
    prompt = _prompt(options, tokenizer).to(model.device)
    _require_positions(model, prompt, options.max_new_tokens)
    _require_room(model, prompt.shape[1], options)

    def work(_: Path | None) -> None:
        writer = Writer(model, tokenizer, router)
        text = writer.write(prompt, options, draft)
        if options.show == "routes":
            writer.show_routes()
        if options.html is not None:
            rows = token_rows(model, router, text, tokenizer, written=prompt.shape[1])
            settings = {"command": typed_command(), **config}
            write_text(options.html, generated_page(str(tokenizer.decode(text[0, :1])), rows, settings))
            say(f"wrote {options.html}")

    return "", work


def _what_ends(settings: GenerationConfig) -> GenerationConfig:
    """Of the settings in a model's folder, those that end a text. The others would change what the options say."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "stop_strings")
    return GenerationConfig(**{name: getattr(settings, name) for name in names})


def _router(name: str) -> Router:
    return ConstantRouter(name) if name in ACTIONS else load_router(name)


def _at_price(router: Router, price: float | None) -> Router:
    """A router for a range of prices needs one, and others have none."""
    if price is not None:
        return router.at(price=price)
    if router.takes_price:
        low, high = router.config["prices"]
        raise ValueError(f"this router is for prices from {low:g} to {high:g}: give --price")
    return router


def _prompt(options: Namespace, tokenizer: Any) -> Tensor:
    """The tokens of the prompt, (1, P)."""
    text = options.prompt
    if options.chat:
        if not tokenizer.chat_template:
            raise ValueError(f"the tokenizer of {options.model} has no chat template: leave out --chat")
        said = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not options.chat)["input_ids"].long()
    if ids.shape[1] == 0:
        raise ValueError("the prompt is empty: give --prompt some text")
    return ids


def _require_room(model: DuoForCausalLM, length: int, options: Namespace) -> None:
    """Refuse a text that does not fit into memory: the prompt is one pass, and for a page, the whole text is another.

    Args:
        model: the model.
        length: tokens of the prompt.
        options: the options; a draft has keys and values of its own.
    """
    whole, config = length + options.max_new_tokens, cast("DuoConfig", model.config)
    stored = (2 if options.draft else 1) * stored_bytes(config, keys_width(config.backbone), model.dtype)
    batch = Batch(1, length if options.html is None else whole)
    require_room(model, batch, "shorten the prompt, or lower max_new_tokens", whole * stored)


def _require_positions(model: DuoForCausalLM, prompt: Tensor, more: int) -> None:
    """Refuse a text that is longer than the model's positions."""
    most, length = model.most_positions, prompt.shape[1]
    if most is not None and length + more > most:
        said = f"the prompt has {length} tokens, and with {more} more the text is beyond the model's {most} positions"
        raise ValueError(f"{said}: shorten it, or lower max_new_tokens")
    check_windows(model, torch.cat([prompt, prompt[:, -1:]], dim=1))


class Writer(BaseStreamer):
    """Prints a text while it is generated, each token in a colour for the compute of the pass that predicted it.

    Args:
        model: generates.
        tokenizer: of the model.
        router: decides.
    """

    def __init__(self, model: DuoForCausalLM, tokenizer: Any, router: Router):
        self.model, self.tokenizer = model, tokenizer
        self.transcript = Transcript(router, model)
        self.tokens: list[int] = []
        self._prompt = 0  # number of tokens of the prompt; 0 before it comes
        self._printed = ""

    def write(self, prompt: Tensor, options: Namespace, draft: Router | None) -> Tensor:
        """Generate and print; the tokens of the whole text, (1, S)."""
        torch.manual_seed(options.seed)  # transformers samples with the global generator
        sampling = {"do_sample": options.temperature > 0}
        if options.temperature > 0:
            sampling |= {"temperature": options.temperature, "top_k": 0, "top_p": 1.0}
        began = time.perf_counter()
        found = self.model.generate(
            prompt,
            router=self.transcript,
            draft=draft,
            max_new_tokens=options.max_new_tokens,
            prompt_lookup_num_tokens=options.lookup,
            streamer=self,
            tokenizer=self.tokenizer,
            return_dict_in_generate=True,
            **sampling,
        )
        seconds, count = time.perf_counter() - began, len(self.tokens) - self._prompt
        said = f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s"
        said += f"; compute {found.compute[0, self._prompt - 1 :].mean():.2f}"
        if drafts := found.get("drafts"):
            said += f"; {drafts.accepted} of {drafts.drafted} drafted tokens kept"
            said += f", {drafts.tokens_per_pass:.2f} tokens per pass"
        say(said)
        return found.sequences

    def put(self, value: Tensor) -> None:
        """Print the next tokens; the first call brings the prompt."""
        last = len(self.tokens) - 1
        self.tokens += value.flatten().tolist()
        if not self._prompt:
            self._prompt = len(self.tokens)
            self._print(style="dim")
        elif not self._text().endswith("\ufffd"):  # a character of several tokens
            self._print(style=f"on {as_hex(of_compute(self.transcript.latest(last)))} black")

    def end(self) -> None:
        """Print what is left of a text that ends within a character, and end the last line."""
        self._print(style="dim")
        console.print()

    def _text(self) -> str:
        return self.tokenizer.decode(self.tokens, skip_special_tokens=True)

    def _print(self, style: str) -> None:
        text = self._text()
        console.print(Text(text[len(self._printed) :], style=style), end="")
        self._printed = text

    def show_routes(self) -> None:
        """Print a line per generated token: its route, from the first layer to the last, and its compute."""
        routes, marks = self.transcript.routes[0, self._prompt - 1 :], _CELLS[is_unicode()]
        for token, route in zip(self.tokens[self._prompt :], routes, strict=True):
            cells = "".join(marks[action] for action in route.tolist())
            share = self.model.route_compute(route).item()
            console.print(Text(f"{cells} {share:.2f} {self.tokenizer.decode([token])!r}"))
