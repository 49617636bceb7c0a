"""Self-speculative decoding gives what the model itself would have given, and drafts as many tokens as pay."""

import math
import random

import pytest
import torch
from conftest import FAMILIES, make_duo
from scipy.stats import chisquare
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

import duorl
from duorl.models.pace import Pace
from duorl.routers import ConstantRouter

_PROMPT = torch.tensor([[9, 4, 3, 11, 12, 2, 1]])
_GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
_SMALL = ConstantRouter("small")


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_the_models(family):
    duo = make_duo(family)
    expected = duo.generate(_PROMPT, **_GREEDY)
    for length in (1, 4, None):
        found = duo.generate(_PROMPT, draft=_SMALL, draft_tokens=length, return_dict_in_generate=True, **_GREEDY)
        assert torch.equal(found.sequences, expected)
        drafts = found.drafts
        assert (
            drafts.passes + drafts.accepted == 11 and drafts.drafted > 0
        )  # one token is from the pass over the prompt
        assert drafts.tokens_per_pass == pytest.approx(11 / drafts.passes)


def test_the_cache_of_a_draft_is_the_models_own(duo):
    """Of what it accepts, too: so that drafts by big itself are all accepted, and the cache ends as without drafts."""
    plain = duo.generate(_PROMPT, return_dict_in_generate=True, **_GREEDY)
    found = duo.generate(_PROMPT, draft=ConstantRouter("big"), draft_tokens=3, return_dict_in_generate=True, **_GREEDY)
    assert found.drafts.acceptance == 1.0 and found.drafts.passes == 3
    refused = duo.generate(_PROMPT, draft=_SMALL, draft_tokens=3, return_dict_in_generate=True, **_GREEDY)
    for one, other in zip(plain.past_key_values.layers, refused.past_key_values.layers, strict=True):
        assert torch.allclose(one.keys, other.keys, atol=1e-5) and torch.allclose(one.values, other.values, atol=1e-5)


def test_a_router_that_decides_can_have_a_draft(duo):
    """It verifies: tokens and routes are its own."""

    def router(hidden, layer, compute):
        return (hidden.sum(-1) > 0).long() + 1

    options = {**_GREEDY, "return_dict_in_generate": True, "router": router}
    expected, found = duo.generate(_PROMPT, **options), duo.generate(_PROMPT, draft=_SMALL, draft_tokens=3, **options)
    assert torch.equal(found.sequences, expected.sequences) and torch.equal(found.routes, expected.routes)


def test_padding_the_end_and_the_length_are_kept(duo):
    padded, mask = torch.cat([torch.zeros(1, 3, dtype=torch.int64), _PROMPT], 1), torch.tensor([[0] * 3 + [1] * 7])
    plain = duo.generate(_PROMPT, **_GREEDY)
    options = {**_GREEDY, "draft": ConstantRouter("big"), "draft_tokens": 5}
    assert torch.equal(duo.generate(padded, attention_mask=mask, **options)[:, 3:], plain)
    end = plain[0, 10].item()
    ended = duo.generate(_PROMPT, **{**options, "eos_token_id": end})
    assert torch.equal(ended, duo.generate(_PROMPT, **{**_GREEDY, "eos_token_id": end})) and ended.shape[1] <= 11
    for count in (1, 2, 3):
        assert torch.equal(duo.generate(_PROMPT, **{**options, "max_new_tokens": count}), plain[:, : 7 + count])


class _Says(StoppingCriteria):
    """Ends a text that has said something, and remembers it: a drafted token that is refused must not count."""

    def __init__(self, tokens):
        self.tokens, self.said = tokens, []

    def __call__(self, ids, scores, **_):
        if ids[0, -2:].tolist() == self.tokens:
            self.said.append(True)
        return torch.full((len(ids),), bool(self.said))


@pytest.mark.parametrize("lookup", [None, 4])
def test_a_draft_ends_where_the_text_ends(lookup):
    model, tokenizer = duorl.load(), duorl.load_tokenizer()
    prompt = tokenizer("def read(path):", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = model.generate(prompt, **options)[0].tolist()
    endings = {
        "stop string": lambda: {"stop_strings": ["path"], "tokenizer": tokenizer},
        "own criterion": lambda: {"stopping_criteria": StoppingCriteriaList([_Says(written[-12:-10])])},
    }
    for name, ending in endings.items():
        plain = model.generate(prompt, **options, **ending())
        assert len(plain[0]) < len(written), name
        for draft in (_SMALL, ConstantRouter("big")):
            for length in (3, 10):
                how = {"draft": draft, "draft_tokens": length, "prompt_lookup_num_tokens": lookup}
                assert torch.equal(model.generate(prompt, **how, **options, **ending()), plain), (name, length)


def test_tokens_that_are_looked_up_cost_no_draft():
    model, tokenizer = duorl.load(), duorl.load_tokenizer()
    prompt = tokenizer("def read(path):\n    return open(path)\n\ndef read(path):", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    expected = model.generate(prompt, **options).sequences
    for draft_tokens in (0, 2, Pace()):
        found = model.generate(prompt, draft=_SMALL, draft_tokens=draft_tokens, prompt_lookup_num_tokens=8, **options)
        assert torch.equal(found.sequences, expected)
        assert found.drafts.accepted > 0


def test_sampled_tokens_have_the_models_distribution():
    """Two tokens after the first are compared with their exact probabilities; those of the draft are others."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=4, eos_token_id=None, bos_token_id=None, pad_token_id=None, **sizes)
    original = LlamaForCausalLM(config).eval()
    for parameter in original.parameters():
        parameter.data += 0.7 * torch.randn_like(parameter)
    duo = duorl.convert(original, small_ratio=4)
    prompt, count = torch.tensor([[1, 2]]), 1500
    options = {"max_new_tokens": 3, "do_sample": True, "top_k": 0, "temperature": 0.8, "pad_token_id": 0}
    found = torch.stack([duo.generate(prompt, draft=_SMALL, draft_tokens=2, **options)[0, 2:] for _ in range(count)])
    texts = torch.cartesian_prod(*[torch.arange(4)] * 3)  # (64, 3)

    def expected(router):
        logits = duo(input_ids=torch.cat([prompt.expand(64, -1), texts], 1), router=router).logits[:, 1:-1]
        log_shares = (logits / 0.8).log_softmax(-1)
        return log_shares.gather(-1, texts[..., None]).squeeze(-1)  # (64, 3)

    own, draft = expected(ConstantRouter("big")).detach(), expected(_SMALL).detach()
    observed = torch.zeros(64).index_add_(0, found @ torch.tensor([16, 4, 1]), torch.ones(count))
    likely = own.sum(1).exp() * count > 3  # chi square wants a few in every cell

    def probability(log_shares):
        shares = log_shares.sum(1).exp()
        cells, counts = torch.cat([shares[likely], shares[~likely].sum()[None]]), observed[likely]
        counts = torch.cat([counts, observed[~likely].sum()[None]])
        return chisquare(counts.double(), cells.double() / cells.double().sum() * count).pvalue

    assert probability(own) > 0.01
    assert probability(torch.cat([own[:, :1], draft[:, 1:]], dim=1)) < 1e-6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_beams": 2}, "draft: beam search has no drafts: set num_beams to 1"),
        ({"draft_tokens": -1}, "draft_tokens must be at least 0, not -1"),
        ({"generation_config": GenerationConfig(num_beams=2)}, "draft: beam search has no drafts: set num_beams to 1"),
        ({"inputs": _PROMPT.repeat(2, 1)}, "draft: 2 prompts: give one at a time"),
        ({"inputs": None, "inputs_embeds": torch.zeros(1, 3, 32)}, "draft: a prompt of embeddings has no drafts"),
    ],
)
def test_what_cannot_have_a_draft_is_refused(duo, options, said):
    with pytest.raises(ValueError, match=said):
        duo.generate(**{"inputs": _PROMPT, **_GREEDY, "draft": _SMALL, **options})


MACHINES = {
    "steady": lambda passes: 1.0,
    "warms up": lambda passes: 3.0 if passes < 2 else 1.0,
    "drifts": lambda passes: 1.5 + 0.8 * math.sin(passes / 60),
}


def simulated(pace, draft, slope, kept, machine, tokens=3000):
    """Tokens per second of drafts that cost `draft`; a pass costs 1, and `slope` per token. A number drafts so many."""
    draw, time, done, passes = random.Random(0), 0.0, 0, 0
    while done < tokens:
        drafted = []
        while pace.another(drafted) if isinstance(pace, Pace) else len(drafted) < pace:
            drafted.append(draw.betavariate(kept, 1 - kept))
        accepted = next((place for place, share in enumerate(drafted) if draw.random() > share), len(drafted))
        slow = machine(passes)
        drafting, verifying = draft * slow * len(drafted), (1 + slope * len(drafted)) * slow * draw.uniform(0.95, 1.05)
        if isinstance(pace, Pace):
            pace.learn(drafted, accepted)
            pace.clock(len(drafted), drafting, len(drafted), verifying, accepted + 1)
        # the time of a steady machine: a number drafts as fast as the same number does on another
        time, done, passes = time + (drafting + verifying) / slow, done + accepted + 1, passes + 1
    return done / time


@pytest.mark.parametrize("draft", [0.1, 0.3, 0.6, 0.9, 1.2])
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_the_pace_is_close_to_the_best_number_and_never_slow(draft, kept, machine):
    for slope in (0.02, 0.1):
        numbers = [simulated(number, draft, slope, kept, machine) for number in range(9)]
        found = simulated(Pace(), draft, slope, kept, machine)
        assert found > 0.98 * numbers[0] and found > 0.93 * max(numbers)
