"""One model, many calls: threads do not mix them up, and what others hang on its modules stays."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import make_duo, random_routes
from torch._dynamo.testing import CompileCounter
from transformers.generation.configuration_utils import CompileConfig

from duorl.models.calls import Call, calling, current
from duorl.routed_pass import RoutedPass
from duorl.routers import ConstantRouter, PatternRouter

_JOBS = 40


def forward_with(model, tokens, action):
    return model(input_ids=tokens[:, :-1], router=ConstantRouter(action)).logits


def routed_pass(model, tokens, action):
    walk, router = RoutedPass(model, tokens), ConstantRouter(action)
    while not walk.done:
        walk.step(router.decide(walk.view))
    return walk.losses()


def reference_pass(model, tokens, action):
    walk = RoutedPass(model, tokens, context="reference")
    while not walk.done:
        walk.take(("skip", "small", "big").index(action))
    return walk.losses()


@pytest.mark.parametrize("run", [forward_with, routed_pass, reference_pass])
@pytest.mark.parametrize("skip", ["ffn", "block"])
def test_threads_do_not_mix_up_their_calls(tokens, run, skip):
    model = make_duo("llama")
    model.config.skip = skip
    jobs = ["skip", "small", "big"] * (_JOBS // 3)
    alone = {action: run(model, tokens, action) for action in ("skip", "small", "big")}
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(lambda action: run(model, tokens, action), jobs))
    assert all(torch.equal(found, alone[action]) for action, found in zip(jobs, together, strict=True))


def test_threads_of_different_kinds_do_not_meet(duo, tokens):
    kinds = [(run, action) for run in (forward_with, routed_pass, reference_pass) for action in ("small", "big")]
    alone = [run(duo, tokens, action) for run, action in kinds]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(lambda kind: kind[0](duo, tokens, kind[1]), kinds * 6))
    assert all(torch.equal(found, alone[index % len(kinds)]) for index, found in enumerate(together))


def test_a_call_ends_with_an_error(duo, tokens):
    def broken(hidden, layer, compute):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        duo(input_ids=tokens, router=broken)
    assert current() is None


def test_a_plain_call_changes_nothing(duo, tokens):
    expected = duo(input_ids=tokens).logits
    with calling(Call()):
        assert torch.equal(duo.backbone(input_ids=tokens).logits, expected)


class Counting(ModelHook):
    def __init__(self):
        self.before = self.after = 0

    def pre_forward(self, module, *args, **kwargs):
        self.before += 1
        return args, kwargs

    def post_forward(self, module, output):
        self.after += 1
        return output


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_accelerates_hooks_stay_and_are_called(family, tokens):
    model = make_duo(family)
    routes = random_routes(model, tokens)
    expected = model(input_ids=tokens[:, :-1], routes=routes).logits
    stack = model.stack
    modules = [*stack.layers, *stack.ffns, model.backbone.base_model]
    hooks = [Counting() for _ in modules]
    for module, hook in zip(modules, hooks, strict=True):
        add_hook_to_module(module, hook)

    def walked():
        walk = RoutedPass(model, tokens)
        while not walk.done:
            walk.step(routes[..., walk.layer])
        return walk.logits()

    runs = (
        lambda: model(input_ids=tokens[:, :-1], routes=routes).logits,
        walked,
        lambda: model.generate(tokens, router=ConstantRouter("small"), max_new_tokens=2, do_sample=False),
    )
    for number, run in enumerate(runs):
        before = [hook.before for hook in hooks]
        found = run()
        assert all(
            hook.before > earlier and hook.before == hook.after for hook, earlier in zip(hooks, before, strict=True)
        )
        assert all(module._hf_hook is hook for module, hook in zip(modules, hooks, strict=True))
        if number < 2:
            assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_torch_compile_changes_nothing(tokens):
    """All-big is one graph, as the original is; a pass that is routed runs as without it."""
    model, x = make_duo("llama"), tokens[:, :-1]
    routes = random_routes(model, tokens)
    ways = [{}, {"routes": routes}, {"routes": 2 - routes.clamp(max=2)}, {"router": ConstantRouter("small")}, {}]
    expected = [model(input_ids=x, **way).logits for way in ways]
    walked = routed_pass(model, tokens, "small"), reference_pass(model, tokens, "small")
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    for way, logits in zip(ways, expected, strict=True):
        assert torch.allclose(compiled(input_ids=x, **way).logits, logits, atol=1e-5)
    assert counter.frame_count == 1
    for layer in model.stack.layers:
        layer.compile(backend=counter)
    for way, logits in zip(ways, expected, strict=True):
        assert torch.allclose(model(input_ids=x, **way).logits, logits, atol=1e-5)
    assert torch.allclose(routed_pass(model, tokens, "small"), walked[0], atol=1e-5)
    assert torch.allclose(reference_pass(model, tokens, "small"), walked[1], atol=1e-5)


@pytest.mark.slow
def test_generate_with_a_compiled_model_gives_the_same_tokens(tokens):
    model, options = make_duo("llama"), {"max_new_tokens": 4, "do_sample": False, "router": PatternRouter([1, 2, 1])}
    how = CompileConfig(backend="eager", mode=None, fullgraph=False)
    how._compile_all_devices = True  # as on an accelerator
    prompt, more = tokens[:1, :5], {"cache_implementation": "static", "compile_config": how}
    torch._dynamo.reset()
    assert torch.equal(model.generate(prompt, **options, **more), model.generate(prompt, **options))
