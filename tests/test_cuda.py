"""On a GPU: the results of the processor, and no wait for the device in every layer. Skipped without a GPU."""

from __future__ import annotations

import warnings
from collections import Counter
from functools import cache, partial

import gymnasium
import pytest
import torch
from conftest import FAMILIES, make_original

import duorl
from duorl import agents, learners
from duorl.envs import Lockstep
from duorl.evaluation import Ladder, measure
from duorl.learners.base import Learner
from duorl.oracle import beam, descent, exhaustive, fixed_patterns
from duorl.rewards import Acceptance, LogitLensShaping, LossImprovement, TeacherKL
from duorl.routed_pass import RoutedPass
from duorl.routers import ConstantRouter, HeadRouter, PatternRouter, RandomRouter
from duorl.runs import checkpoints

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")

DEVICES = "cpu", "cuda"
WINDOWS = torch.randint(5, 2000, (6, 17), generator=torch.Generator().manual_seed(0))
ROUTES = torch.randint(0, 3, (6, 16, 8), generator=torch.Generator().manual_seed(1))
LEARNERS: dict[str, tuple[type[Learner], dict]] = {
    **{name: (getattr(agents, name), {}) for name in ("PPO", "A2C", "MaskablePPO", "DQN", "MEX")},
    **{name: (getattr(agents, name), {}) for name in ("REINFORCE", "GFlowNet", "ReinMax")},
    "ReinMax, corrected": (agents.ReinMax, {"correction": 0.5}),
    "REINFORCE, value": (agents.REINFORCE, {"baseline": "value"}),
    "Soft": (learners.Soft, {"updates": 4}),
    "Soft, teacher": (learners.Soft, {"updates": 4, "target": "teacher"}),
    "Supervised": (learners.Supervised, {"windows": 4}),
    "KNN": (learners.KNN, {"windows": 4, "neighbours": 4}),
    "Ensemble": (learners.Ensemble, {"windows": 4}),
}
ONE_COPY = "DQN", "MEX", "ReinMax", "Soft", "Soft, teacher"


@cache
def tiny(device):
    return duorl.load("duo-tiny", device=device)


@cache
def trained(device):
    """A router for a range of prices, trained on the processor."""
    env = Lockstep(tiny("cpu"), WINDOWS, windows_per_batch=2, group_size=2, prices=(0.05, 1.0), seed=0)
    return agents.REINFORCE(env).learn(2000).to(device)


def both(function):
    """What a function of the device gives on each, on the processor."""
    on_cpu, on_gpu = map(function, DEVICES)
    return on_cpu, on_gpu.cpu()


def assert_close(function, within=2e-4):
    torch.testing.assert_close(*reversed(both(function)), rtol=within, atol=within)


@pytest.mark.parametrize("context", ["routed", "reference"])
def test_a_walk_has_the_losses_of_the_processor(context):
    def losses(device):
        return RoutedPass(tiny(device), WINDOWS.to(device), context=context).follow(ROUTES.to(device)).losses()

    assert_close(losses)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_logits_of_the_processor(family):
    tokens = torch.randint(5, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    duo = duorl.convert(make_original(family), small_ratio=4).eval()
    routes = torch.randint(0, 3, (*tokens.shape, duo.num_layers), generator=torch.Generator().manual_seed(1))
    on_cpu = duo(input_ids=tokens, routes=routes).logits.detach()
    duo.to("cuda")
    on_gpu = duo(input_ids=tokens.cuda(), routes=routes.cuda()).logits.detach()
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-4, atol=1e-4)
    converted = duorl.convert(make_original(family).to("cuda"), small_ratio=4)
    assert {weight.device.type for weight in converted.parameters()} == {"cuda"}


def waits(run):
    """Where the host waits for the device, once for every time."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{one.filename}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)]


@pytest.mark.parametrize("router", [HeadRouter(8, 192), PatternRouter([1, 2] * 4), RandomRouter()])
def test_a_routed_pass_does_not_wait_in_every_layer(router):
    model, router = tiny("cuda"), router.to("cuda")
    tokens = WINDOWS.cuda()
    with torch.no_grad():
        RoutedPass(model, tokens).steer(router.decide)
        found = waits(lambda: RoutedPass(model, tokens).steer(router.decide))
    assert len(found) <= 3, found


def test_a_rollout_waits_for_the_device_a_few_times_in_all():
    env = Lockstep(tiny("cuda"), WINDOWS, windows_per_batch=2, group_size=2, seed=0)
    generator = torch.Generator("cuda").manual_seed(0)

    def rollout():
        env.draw()
        while not env.done:
            env.step(torch.randint(2, (env.num_tokens,), generator=generator, device="cuda"))

    with torch.no_grad():
        rollout()
        found = waits(rollout)
    assert max(Counter(found).values()) < tiny("cuda").num_layers, found


@pytest.mark.parametrize(
    "reward", [LossImprovement(), TeacherKL(), Acceptance(), LossImprovement() + LogitLensShaping()]
)
@pytest.mark.parametrize("discount", [0.0, 0.5])
def test_an_environment_gives_the_rewards_of_the_processor(reward, discount):
    actions = torch.randint(0, 2, (8, 64), generator=torch.Generator().manual_seed(0))

    def credits(device):
        env = Lockstep(
            tiny(device), WINDOWS, windows_per_batch=2, group_size=2, seed=0, reward=reward, token_discount=discount
        )
        env.draw()
        while not env.done:
            env.step(actions[env.layer].to(device))
        return env.outcome.credits

    assert_close(credits, within=1e-3)


def learner(name):
    kind, options = LEARNERS[name]
    copies = 1 if name in ONE_COPY else 2
    reward = LossImprovement(0.3)
    env = Lockstep(tiny("cuda"), WINDOWS, windows_per_batch=2, group_size=copies, seed=0, reward=reward)
    return kind(env, **options)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learner_learns_on_a_gpu_and_its_router_works_on_the_processor(name, tmp_path):
    router = learner(name).learn(1200)
    router.save_pretrained(tmp_path)
    there = measure(tiny("cuda"), router, WINDOWS)
    here = measure(tiny("cpu"), duorl.routers.load(tmp_path), WINDOWS)
    assert abs(there.compute.mean() - here.compute.mean()) < 0.02 and abs(there.loss.mean() - here.loss.mean()) < 0.02


@pytest.mark.parametrize("name", ["PPO", "REINFORCE", "ReinMax", "Soft", "DQN"])
def test_a_checkpoint_of_a_gpu_goes_on(name, tmp_path):
    whole, second = learner(name), learner(name)
    whole.learn(600)
    checkpoints.save(tmp_path / "state", whole.state())
    second.restore(checkpoints.load(tmp_path / "state"))
    theirs, own = (one.learn(600).state_dict() for one in (whole, second))
    for key, value in theirs.items():
        torch.testing.assert_close(own[key], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("context", ["reference", "routed", "uniform"])
def test_the_oracle_finds_the_losses_of_the_processor(context):
    tokens = WINDOWS[:1, :6]
    assert_close(lambda device: exhaustive(tiny(device), tokens.to(device), context=context).losses, within=1e-3)


def test_approximate_searches_and_patterns_agree():
    tokens = WINDOWS[:2, :9]
    for search in (beam, partial(descent, start=[1] * 8)):
        assert_close(lambda device, find=search: find(tiny(device), tokens.to(device), price=0.3).losses, within=1e-3)
    for method in ("program", "greedy"):
        on_cpu, on_gpu = (fixed_patterns(tiny(device), WINDOWS, method=method) for device in DEVICES)
        assert [one.compute for one in on_cpu] == [one.compute for one in on_gpu]
        assert all(abs(one.loss - two.loss) < 0.01 for one, two in zip(on_cpu, on_gpu, strict=True))


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"price": torch.tensor([0.1, 0.3, 1.0])}],
    ids=["greedy", "beams", "static cache", "a price per row"],
)
def test_generation_writes_the_tokens_of_the_processor(options):
    prompts, mask = WINDOWS[:3, :8].clone(), torch.ones(3, 8, dtype=torch.long)
    mask[1, :3] = 0

    def written(device):
        return tiny(device).generate(
            prompts.to(device),
            attention_mask=mask.to(device),
            router=trained(device),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
            **{"price": 0.3, **options},
        )

    on_cpu, on_gpu = both(written)
    assert torch.equal(on_cpu, on_gpu)


def test_drafts_do_not_change_the_text():
    model, prompt = tiny("cuda"), WINDOWS[:1, :8].cuda()
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(prompt, **options)
    for router in (ConstantRouter("small"), trained("cuda").at(price=0.3)):
        assert torch.equal(model.generate(prompt, draft=router, **options), plain)
    torch.manual_seed(0)
    sampled = model.generate(prompt, draft=ConstantRouter("small"), **{**options, "do_sample": True})
    assert sampled.device.type == "cuda"


def test_a_ladder_and_a_target_agree():
    def ladder(device):
        router, steps = trained(device), []
        for compute in (0.3, 0.7):
            steps.append(router.calibrated(tiny(device), WINDOWS, compute=compute))
        return Ladder.climb(tiny(device), steps, WINDOWS).spent.mean(1)

    assert_close(ladder, within=0.02)


def test_gymnasium_environments_run_on_a_gpu():
    for make in (gymnasium.make, lambda name, **options: gymnasium.make_vec(name, num_envs=4, **options)):
        env = make("duorl/Routing-v0", model=tiny("cuda"), windows=WINDOWS)
        env.reset(seed=0)
        for _ in range(8):
            found = env.step(env.action_space.sample())
        assert found[2].all() if hasattr(found[2], "all") else found[2]


def test_half_precision_stays_near_single_precision():
    full, half = tiny("cuda"), duorl.load("duo-tiny", device="cuda", dtype=torch.bfloat16)
    tokens, routes = WINDOWS.cuda(), ROUTES.cuda()
    one, two = (RoutedPass(model, tokens).follow(routes).losses().mean() for model in (full, half))
    assert abs(one - two) < 0.05
