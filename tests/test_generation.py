"""transformers' own generate on a duo: what it gives the original, it gives all-big, padded batches included."""

import copy
import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import FAMILIES, ROUTED_ONLY, make_duo, make_original
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    Trainer,
    TrainingArguments,
    pipeline,
)

import duorl
from duorl.models.transcript import NOT_ROUTED, Transcript
from duorl.routers import ConstantRouter, HeadRouter, OracleRouter, PatternRouter, Router

_GREEDY = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
_SHORT = torch.tensor([[5, 6, 7, 8]])
_PADDED = torch.tensor([[0, 0, 0, 5, 6, 7, 8], [9, 4, 3, 11, 12, 2, 1]])
_MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])


def generated(model, tokens, mask=None, **options):
    """Greedy tokens (B, n) and their logits (B, n, V)."""
    mask = torch.ones_like(tokens) if mask is None else mask
    returned = {"output_logits": True, "return_dict_in_generate": True}
    found = model.generate(tokens, attention_mask=mask, **_GREEDY, **returned, **options)
    return found.sequences[:, tokens.shape[1] :], torch.stack(found.logits, dim=1)


@pytest.mark.parametrize("family", [*FAMILIES, *ROUTED_ONLY])
def test_a_left_padded_batch_is_the_originals_and_the_unpadded_one(family):
    original = make_original(family)
    duo = duorl.convert(original, small_ratio=4)
    written, logits = generated(duo, _PADDED, _MASK)
    expected, expected_logits = generated(original, _PADDED, _MASK)
    assert torch.equal(written, expected) and torch.allclose(logits, expected_logits, atol=1e-5)
    alone, alone_logits = generated(duo, _SHORT)
    assert torch.equal(written[:1], alone) and torch.allclose(logits[:1], alone_logits, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "bloom", "opt 350M"])
def test_padding_does_not_change_what_a_router_decides(family):
    duo, router = make_duo(family), HeadRouter(3, 32)
    written, logits = generated(duo, _PADDED, _MASK, router=router)
    alone, alone_logits = generated(duo, _SHORT, router=router)
    assert torch.equal(written[:1], alone) and torch.allclose(logits[:1], alone_logits, atol=1e-5)


def a_router(model, **options):
    """A router that decides differently for every token."""
    router = HeadRouter(model.num_layers, model.hidden_size, **options)
    generator = torch.Generator().manual_seed(0)
    for parameter in router.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    return router.requires_grad_(False)


def routes_of_one_pass(model, router, sequences, mask):
    """(B, S - 1, L), the routes of finished texts, read at once and without a cache."""
    transcript = Transcript(router, model)
    mask = torch.cat([mask, torch.ones(len(mask), sequences.shape[1] - mask.shape[1], dtype=mask.dtype)], dim=1)
    model(input_ids=sequences, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), router=transcript)
    return transcript.routes.masked_fill(mask[..., None] == 0, NOT_ROUTED)[:, :-1]


_WAYS = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "prompt in parts": {"prefill_chunk_size": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams without a cache": {"num_beams": 3, "use_cache": False},
}


@pytest.mark.parametrize("family", [*FAMILIES, *ROUTED_ONLY])
def test_what_was_routed_is_what_one_pass_over_the_text_routes(family):
    duo = make_duo(family)
    router = a_router(duo)
    for name, way in _WAYS.items():
        if name == "static cache" and family in ROUTED_ONLY:
            continue
        torch.manual_seed(0)
        options = {**_GREEDY, "return_dict_in_generate": True, **way}
        found = duo.generate(_PADDED, attention_mask=_MASK, router=router, **options)
        mask = _MASK.repeat_interleave(len(found.sequences) // 2, 0)
        expected = routes_of_one_pass(duo, router, found.sequences, mask)
        assert torch.equal(found.routes, expected), name
        spent = sum(duo.action_compute[layer][expected[..., layer]] for layer in range(duo.num_layers))
        assert torch.allclose(found.compute[expected[..., 0] >= 0], spent[expected[..., 0] >= 0])
        assert torch.equal(found.compute.isnan(), expected[..., 0] == NOT_ROUTED)


class _Ends(StoppingCriteria):
    """A user's own: it counts its calls, as some do."""

    def __init__(self, token):
        self.token, self.calls = token, []

    def __call__(self, ids, scores, **_):
        self.calls.append(ids.shape[1])
        assert self.calls == sorted(set(self.calls))  # what is drafted, and may be refused, is none of its business
        return ids[:, -1] == self.token


_ENDINGS = {
    "option": lambda end: {"eos_token_id": end},
    "configuration": lambda end: {"generation_config": GenerationConfig(eos_token_id=end, pad_token_id=0)},
    "the model's": lambda end: {},
    "own criterion": lambda end: {"stopping_criteria": StoppingCriteriaList([_Ends(end)])},
}


@pytest.mark.parametrize("ending", _ENDINGS)
def test_what_comes_after_the_end_was_not_routed(duo, ending):
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    options["router"] = a_router(duo)
    end = duo.generate(_PADDED, attention_mask=_MASK, **options).sequences[0, 8].item()
    try:
        duo.generation_config.eos_token_id = end if ending == "the model's" else None
        found = duo.generate(_PADDED, attention_mask=_MASK, **options, **_ENDINGS[ending](end))
    finally:
        duo.generation_config.eos_token_id = None
    first, second = (row[7:].tolist() for row in found.sequences)
    assert first.index(end) == 1 and end not in second[:-1]  # so that one row goes on after the other's end
    assert (found.routes[0, 8:] == NOT_ROUTED).all() and (found.routes[0, 3:8] > 0).all()
    assert (found.routes[1] > 0).all()
    assert torch.allclose(found.spent, found.compute.nansum(1))  # each position was read once


def test_all_that_was_read_is_spent(duo):
    options = {**_GREEDY, "max_new_tokens": 8, "return_dict_in_generate": True}
    for router, compute in ((ConstantRouter("small"), duo.route_compute(torch.ones(3, dtype=torch.int64))), (None, 1)):
        found = duo.generate(_PADDED[1:], router=router, draft=ConstantRouter("big"), draft_tokens=3, **options)
        passes, drafted = found.drafts.passes, found.drafts.drafted
        assert found.spent.item() == pytest.approx(float((7 + passes + drafted) * compute + drafted))
    router = a_router(duo)
    again = duo.generate(_PADDED, attention_mask=_MASK, router=router, use_cache=False, **options)
    sizes = torch.arange(8)  # a text is read anew for each token
    expected = [again.compute[row, : 7 + size].nansum() for row in range(2) for size in sizes]
    assert torch.allclose(again.spent, torch.stack(expected).view(2, 8).sum(1))
    beams = duo.generate(_PADDED, attention_mask=_MASK, router=ConstantRouter("big"), num_beams=3, **options)
    assert beams.spent.tolist() == pytest.approx([3 * (4 + 7), 3 * (7 + 7)])


def test_embeddings_and_a_cache_of_earlier_turns_can_begin_a_text(duo):
    router, options = a_router(duo), {**_GREEDY, "return_dict_in_generate": True}
    whole = duo.generate(_PADDED[1:], router=router, **options)
    embedded = duo.get_input_embeddings()(_PADDED[1:])
    found = duo.generate(inputs_embeds=embedded, router=router, **options)
    assert torch.equal(found.sequences, whole.sequences[:, 7:]) and torch.equal(found.routes, whole.routes)
    turn = duo.generate(_PADDED[1:, :4], router=router, **{**options, "max_new_tokens": 1})
    later = duo.generate(_PADDED[1:], router=router, past_key_values=turn.past_key_values, **options)
    assert torch.equal(later.routes[:, 4:], whole.routes[:, 4:]) and (later.routes[:, :4] == NOT_ROUTED).all()


def test_each_prompt_has_its_price(duo):
    router, options = a_router(duo, prices=(0.1, 2.0)), {**_GREEDY, "return_dict_in_generate": True}
    together = duo.generate(_PADDED, attention_mask=_MASK, router=router, price=torch.tensor([0.1, 2.0]), **options)
    for row, price in enumerate((0.1, 2.0)):
        alone = duo.generate(_PADDED, attention_mask=_MASK, router=router.at(price=price), **options)
        assert torch.equal(together.sequences[row], alone.sequences[row])
        assert torch.equal(together.routes[row], alone.routes[row])
    assert not torch.equal(alone.routes[0], together.routes[0])
    with pytest.raises(ValueError, match=r"price 3 is outside of 0.1 to 2"):
        duo.generate(_PADDED, router=router, price=3.0, **_GREEDY)
    with pytest.raises(ValueError, match="trained for one price"):
        duo.generate(_PADDED, router=a_router(duo), price=0.3, **_GREEDY)
    with pytest.raises(ValueError, match="price: give a router too"):
        duo.generate(_PADDED, price=0.3, **_GREEDY)


def test_a_router_begins_once_with_the_prompts(duo):
    class Watching(Router):
        def begin(self, model, tokens):
            self.seen = [*getattr(self, "seen", []), tokens]

        def forward(self, hidden, layer, compute):
            return torch.ones(hidden.shape[:-1], dtype=torch.int64)

    text = _PADDED[1:]

    def one_by_one(router):
        view, cache = duo.with_router(router), None
        for token in text[0]:
            cache = view(input_ids=token[None, None], past_key_values=cache, use_cache=True).past_key_values

    ways = {
        "generate": lambda router: duo.generate(text, router=router, **_GREEDY),
        "without a cache": lambda router: duo.generate(text, router=router, use_cache=False, **_GREEDY),
        "in parts": lambda router: duo.generate(text, router=router, prefill_chunk_size=3, **_GREEDY),
        "draft": lambda router: duo.generate(text, draft=router, **_GREEDY),
        "transcript": lambda router: duo.generate(text, router=Transcript(router, duo), **_GREEDY),
        "forward": lambda router: duo(input_ids=text, router=router),
        "forward of a transcript": lambda router: duo(input_ids=text, router=Transcript(router, duo)),
        "view": lambda router: duo.with_router(router)(input_ids=text),
        "view's generate": lambda router: duo.with_router(router).generate(text, **_GREEDY),
        "own loop": one_by_one,
    }
    for name, way in ways.items():
        router = Watching()
        way(router)
        expected = text[:, :1] if name == "own loop" else text
        assert len(router.seen) == 1 and torch.equal(router.seen[0], expected), name
    router = Watching()
    duo.generate(inputs_embeds=duo.get_input_embeddings()(text), router=router, **_GREEDY)
    assert [tuple(seen.shape) for seen in router.seen] == [(1, 0)]
    with pytest.raises(ValueError, match=r"a router gave \(1, 6\) actions for \(1, 7\) tokens"):
        duo.generate(_PADDED[1:], router=OracleRouter(), **_GREEDY)


def test_a_view_with_a_router_is_a_model_like_any_other():
    duo, tokenizer = duorl.load(), duorl.load_tokenizer()
    router = a_router(duo)
    view = duo.with_router(router)
    ids = tokenizer("def f(x):", return_tensors="pt")["input_ids"]
    assert torch.equal(view(input_ids=ids).logits, duo(input_ids=ids, router=router).logits)
    assert not torch.equal(view(input_ids=ids).logits, duo(input_ids=ids).logits)
    small = ConstantRouter("small")
    assert torch.equal(view(input_ids=ids, router=small).logits, duo(input_ids=ids, router=small).logits)
    options = {"max_new_tokens": 8, "do_sample": False}
    written = duo.generate(ids, router=router, **options)
    assert torch.equal(view.generate(ids, **options), written)
    said = pipeline("text-generation", model=view, tokenizer=tokenizer)("def f(x):", **options)
    assert said[0]["generated_text"] == tokenizer.decode(written[0], skip_special_tokens=True)
    assert dict(view.named_parameters()).keys() == dict(duo.named_parameters()).keys()
    assert all(one is other for one, other in zip(view.parameters(), duo.parameters(), strict=True))
    assert torch.equal(copy.deepcopy(view)(input_ids=ids).logits, view(input_ids=ids).logits)
    with pytest.raises(ValueError, match="layers"):
        duo.with_router(PatternRouter([1, 2]))


def test_the_trainer_evaluates_a_view_with_its_router(tmp_path):
    ids = torch.randint(5, 2000, (4, 16), generator=torch.Generator().manual_seed(0))
    view, data = duorl.load().with_router(ConstantRouter("small")), [{"input_ids": row, "labels": row} for row in ids]
    options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "per_device_eval_batch_size": 4}
    trainer = Trainer(view, TrainingArguments(str(tmp_path), **options), eval_dataset=data)
    routes = torch.ones(4, 16, 8, dtype=torch.int64)
    expected = duorl.load()(input_ids=ids, labels=ids, routes=routes).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)


def test_threads_that_generate_do_not_mix_up_their_routers(duo):
    options = {**_GREEDY, "max_new_tokens": 8, "return_dict_in_generate": True}

    def generate(action):
        return duo.generate(_PADDED[1:], router=ConstantRouter(action), **options)

    expected = {action: generate(action) for action in ("small", "big")}
    jobs = ["small", "big"] * 6
    with ThreadPoolExecutor(4) as threads:
        for action, found in zip(jobs, threads.map(generate, jobs), strict=True):
            assert torch.equal(found.sequences, expected[action].sequences)
            assert (found.routes == ["skip", "small", "big"].index(action)).all()


def test_a_family_prepares_its_own_inputs():
    """Phi-3 throws its cache away where its rotary frequencies change, here at the ninth token."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 8, **factors}
    sizes = {**FAMILIES["phi3"], "original_max_position_embeddings": 8}
    torch.manual_seed(0)
    config = AutoConfig.for_model("phi3", rope_parameters=rope, **sizes)
    original = AutoModelForCausalLM.from_config(config).eval()
    expected, found = (generated(model, _PADDED[1:])[1] for model in (original, duorl.convert(original)))
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_signature_names_what_every_family_takes(duo):
    """generate, Trainer and others hand on only what they find there."""
    shared = {"input_ids", "attention_mask", "position_ids", "inputs_embeds", "labels", "use_cache", "logits_to_keep"}
    for family in [*FAMILIES, *ROUTED_ONLY]:
        kind = AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model(family))]
        ignored = {"position_ids"} if family == "bloom" else set()  # its positions follow from the mask
        assert shared - ignored <= set(inspect.signature(kind.forward).parameters), family
    assert shared <= set(inspect.signature(duo.forward).parameters)


def test_a_prompt_costs_one_heads_logits(duo, monkeypatch):
    heads = []
    head = duo.get_output_embeddings()
    monkeypatch.setattr(head, "forward", lambda x, own=head.forward: (heads.append(x.shape[1]), own(x))[1])
    generated(duo, _PADDED, _MASK)
    assert heads == [1, 1, 1]


def test_what_generates_is_told_as_the_original_was():
    original = make_original("llama")
    original.generation_config.eos_token_id = [3, 4]
    assert duorl.convert(original).generation_config.eos_token_id == [3, 4]


def test_duo_tiny_pads_and_its_text_keeps_its_tokens():
    tokenizer, model = duorl.load_tokenizer(), duorl.load()
    texts = ["def f(): return", "a", "<|endoftext|> x"]
    plain = [tokenizer.backend_tokenizer.encode(text).ids for text in texts]
    assert [tokenizer(text)["input_ids"] for text in texts] == plain and len(tokenizer) == 2048
    batch = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id == batch["input_ids"][1, 0] == 0
    written = model.generate(**batch, max_new_tokens=2, do_sample=False)
    alone = model.generate(torch.tensor([plain[1]]), max_new_tokens=2, do_sample=False)
    assert torch.equal(written[1, -2:], alone[0, -2:])
