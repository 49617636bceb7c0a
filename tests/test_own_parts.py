"""Parts of one's own: the checks say what is wrong with them, and the examples pass and go through the whole."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import duorl
from duorl import agents, learners, testing
from duorl.cli import main
from duorl.inputs import update_norm
from duorl.rewards import LogitLensShaping, LossImprovement, RedundancyCharge, Reward, TeacherKL
from duorl.routers import ConstantRouter, HeadRouter, PatternRouter, RandomRouter, Router
from examples.big_so_far import big_so_far
from examples.early_layers import EarlyLayers
from examples.evolution import Evolution


def fails(check, part, message, **options):
    with pytest.raises(testing.CheckFailed) as failed:
        check(part, **options)
    assert re.search(message, str(failed.value)), failed.value


@pytest.mark.parametrize("reward", [LossImprovement(), TeacherKL(), LogitLensShaping() + RedundancyCharge()])
def test_our_rewards_pass(reward):
    testing.check_reward(reward)
    testing.check_reward(lambda step: step.gain - step.compute)


def test_wrong_rewards_are_told_what_is_wrong():
    class Nan(Reward):
        def __call__(self, step):
            return step.compute / 0 * 0

    class Later(Reward):
        def __call__(self, step):
            return step.compute

        def contextual(self, step):
            return step.compute[:3]

    class Moody(Reward):
        def __call__(self, step):
            return torch.rand(step.compute.shape)

    fails(testing.check_reward, lambda step: 1.0, "one reward per token")
    fails(testing.check_reward, Nan(), "Nan .*not finite, in layer 0")
    fails(testing.check_reward, Later(), "Later fails in layer")
    fails(testing.check_reward, Moody(), "the same rewards for the same step")
    fails(testing.check_reward, Reward(), "must define __call__")


@pytest.mark.parametrize(
    "router",
    [ConstantRouter("skip"), PatternRouter([2, 1, 0]), HeadRouter(3, 32, inputs=["update_norm"]), EarlyLayers(2)],
    ids=lambda router: type(router).__name__,
)
def test_right_routers_pass(router):
    testing.check_router(router)


class Wrong(Router):
    def __init__(self, kind: str = "shape"):
        super().__init__(kind=kind)
        self.calls = 0

    def forward(self, hidden, layer, compute):
        self.calls += 1
        return {
            "shape": torch.ones(3, dtype=torch.int64),
            "type": torch.ones_like(compute),
            "code": torch.full(compute.shape, 7),
            "memory": torch.full(compute.shape, 1 + (self.calls > 3)),
        }[self.config["kind"]]


class Unsaved(Router):
    def __init__(self, action):
        super().__init__()
        self.action = action

    def forward(self, hidden, layer, compute):
        return torch.full(compute.shape, self.action)


def test_wrong_routers_are_told_what_is_wrong():
    fails(testing.check_router, Wrong("shape"), r"shape \(6, 8\), not \(3,\)")
    fails(testing.check_router, Wrong("type"), "int64 action codes, not torch.float32")
    fails(testing.check_router, Wrong("code"), "not \\[7\\]")
    fails(testing.check_router, Wrong("memory"), "stores something about a pass")
    fails(testing.check_router, Unsaved(1), "cannot be saved and loaded")
    testing.check_router(RandomRouter())  # chance is no memory


@pytest.mark.parametrize("name", ["PPO", "A2C", "REINFORCE", "ReinMax", "DQN", "MEX", "GFlowNet"])
def test_our_agents_pass(name):
    testing.check_learner(getattr(agents, name))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (learners.Supervised, {"windows": 2, "epochs": 3, "batch_size": 24}),
        (learners.Soft, {"updates": 4}),
        (learners.Ensemble, {"windows": 2, "epochs": 2, "members": 2}),
        (learners.KNN, {"windows": 1, "neighbours": 3}),
        (Evolution, {}),
    ],
)
def test_our_other_learners_pass(make, options):
    testing.check_learner(make, **options)


class Forgets(agents.REINFORCE):
    stateful = ("critic", "optimizer")


class Once(agents.REINFORCE):
    def span(self, total_decisions):
        return 0 if self.planned else total_decisions


def test_wrong_learners_are_told_what_is_wrong():
    fails(testing.check_learner, Forgets, "Forgets goes on otherwise after restore")
    fails(testing.check_learner, Once, "does nothing when it is called again")
    fails(testing.check_learner, lambda env: env, "must make a duorl.learners.Learner")


def test_inputs_are_checked():
    testing.check_input(update_norm)
    testing.check_input(big_so_far)
    fails(testing.check_input, lambda view: view.compute, r"shape \(\.\.\., k\)")
    fails(testing.check_input, lambda view: view.hidden[:, :1], "any shape")
    fails(testing.check_input, lambda view: (view.compute - view.compute.mean())[..., None], "mixes tokens")
    fails(testing.check_input, lambda view: view.compute[..., None] / 0 * 0, "not finite")
    fails(testing.check_input, lambda view: view.hidden[..., : view.layer + 1], "same number of values in every layer")


# From the command line to deployment

FEW = ["--quick", "--evaluation.windows=4", "--evaluation.reference_windows=1", "--evaluation.fixed_windows=1"]
FEW += ["--evaluation.finalists=2", "--evaluation.final_windows=2"]
OWN_ENV = ["--env.windows_per_batch=1", "--env.window=32", "--rivals=[]", "--total_decisions=1500", "--validations=1"]


@pytest.fixture
def here(tmp_path, monkeypatch, small_corpus):
    """An empty folder that one works in, and the words that evaluate a router there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return ["--corpus", small_corpus, *FEW]


def rows(run):
    return {row["router"]: row for row in json.loads(Path(run, "comparison.json").read_text())["rows"]}


def deploy(router):
    """Generate with a saved router, and without."""
    model, ids = duorl.load(), torch.tensor([duorl.load_tokenizer()("def add(a, b):")["input_ids"]])
    longer = model.generate(ids, router=router, max_new_tokens=4, do_sample=False)
    assert longer.shape == (1, ids.shape[1] + 4)
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids, router=router).logits, model(input_ids=ids).logits)


@pytest.mark.slow
def test_the_examples_go_from_the_command_line_to_comparison_and_deployment(here):
    own = ["--agent", "examples.evolution.Evolution", "--env.inputs", '["examples.big_so_far.big_so_far"]']
    main(["train", *own, *OWN_ENV, *here, "--out", "run"])
    trained = rows("run")["Evolution"]
    router = duorl.routers.load("run/router")
    assert router.config["inputs"] == ["examples.big_so_far.big_so_far"]
    main(["evaluate", "--router", "run/router", "--window=32", *here, "--out", "again"])
    again = rows("again")["run/router"]
    assert (again["loss"], again["compute"]) == pytest.approx((trained["loss"], trained["compute"]))
    deploy(router)
    EarlyLayers(layers=4).save_pretrained("early")
    main(["evaluate", "--router", "early", "--window=32", *here, "--out", "early-measured"])
    assert 0 < rows("early-measured")["early"]["actions"]["big"] <= 4 / 8
    deploy(duorl.routers.load("early"))


MINE = """
import torch
from duorl.learners import HeadLearner
from duorl.routers import Router


def depth(view):
    return torch.full((*view.compute.shape, 1), view.layer / 8)


class Alternating(Router):
    def __init__(self, first: int = 2):
        super().__init__(first=first)

    def forward(self, hidden, layer, compute):
        return torch.full(compute.shape, self.config["first"] if layer % 2 == 0 else 1)


class Bandit(HeadLearner):
    def __init__(self, env, *, scale: float = 1.0, learning_rate: float = 0.01):
        super().__init__(env, learning_rate=learning_rate)
        self.scale = scale

    def update(self):
        self.env.draw()
        chosen = []
        while not self.env.done:
            choices = torch.distributions.Categorical(logits=self.router.logits(self.env.view))
            actions = choices.sample()
            chosen.append(choices.log_prob(actions))
            self.env.step(actions)
        returns = self.env.outcome.rewards.sum(0)
        self.descend(-self.scale * (torch.stack(chosen).sum(0) * (returns - returns.mean())).mean())
        return self.env.outcome.metrics()
"""


@pytest.mark.slow
def test_a_learner_a_router_and_an_input_from_the_current_folder(here):
    """Named `mine`, and nowhere but there; what follows is another process, as a user's next command is."""
    Path("mine.py").write_text(MINE)
    own = ["--agents", "{Bandit: mine.Bandit}", "--env.inputs", "[update_norm, mine.depth]", "--processes", "1"]
    main(["compare", *own, *OWN_ENV, *here, "--out", "run"])
    assert rows("run")["Bandit"]["seeds"] == 1
    router = duorl.routers.load("run/routers/Bandit")
    assert router.config["inputs"] == ["update_norm", "mine.depth"]
    deploy(router)
    code = "from mine import Alternating\nfrom duorl.cli import main\nAlternating().save_pretrained('alternating')\n"
    for saved in ("run/routers/Bandit", "alternating"):
        words = ["evaluate", "--router", saved, "--window=32", *here, "--out", f"{Path(saved).name}-measured"]
        code += f"main({words})\n"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    again, trained = rows("Bandit-measured")["routers/Bandit"], rows("run")["Bandit"]
    assert (again["loss"], again["compute"]) == pytest.approx((trained["loss"], trained["compute"]))
    assert rows("alternating-measured")["alternating"]["actions"] == {"skip": 0, "small": 0.5, "big": 0.5}


def test_a_router_brings_no_code(tmp_path, monkeypatch):
    """Its folder names a class, which may lie in the current folder, but not where that is the router's own."""
    code = "import pathlib\nimport torch\nfrom duorl.routers import Router\npathlib.Path('ran').touch()\n"
    code += (
        "class Mine(Router):\n    def forward(self, hidden, layer, compute):\n        return torch.ones_like(compute)\n"
    )
    for name in ("brought", "beside"):
        (tmp_path / name).mkdir()
        module = tmp_path / name if name == "brought" else tmp_path
        (module / f"mine_{name}.py").write_text(code)
        (tmp_path / name / "router.json").write_text(json.dumps({"router": f"mine_{name}.Mine", "config": {}}))
    nested = {"router": "mine_brought.Mine", "config": {}}
    (tmp_path / "brought" / "mixed").mkdir()
    (tmp_path / "brought" / "mixed" / "router.json").write_text(
        json.dumps({"router": "MixedRouter", "config": {"routers": [nested], "shares": [1.0]}})
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path / "brought")
    with pytest.raises(ValueError, match="beside what names it: code is imported from elsewhere alone"):
        duorl.routers.load(".")
    with pytest.raises(ValueError, match="mine_brought"):
        duorl.routers.load(tmp_path / "brought")
    assert not Path("ran").exists()
    monkeypatch.chdir(tmp_path)
    assert type(duorl.routers.load("beside")).__name__ == "Mine" and Path("ran").exists()


@pytest.mark.parametrize("here", ["own_router", ".", ".."])
def test_a_model_with_a_router_brings_no_code(here, tmp_path, monkeypatch):
    """Its router names a class; the module lies in the folder, in one in it, or where Python looks first."""
    folder, ran = tmp_path / "model", tmp_path / "ran"
    duorl.load().with_router(duorl.routers.ConstantRouter("small")).save_pretrained(folder)
    duorl.load_tokenizer().save_pretrained(folder)
    for name in ("own_router", "own_router/evil_package", "."):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    for words in ({"router": "evil.Mine", "config": {}}, {"router": "evil_package.evil.Mine", "config": {}}):
        (folder / "own_router" / "router.json").write_text(json.dumps(words))
        for path in (list(sys.path), [str((folder / here).resolve()), str(folder / "own_router"), *sys.path]):
            monkeypatch.setattr(sys, "path", list(path))
            monkeypatch.chdir(folder / here)
            with pytest.raises(ValueError, match=r"evil.* (lies in|No module named)"):
                duorl.load(folder)
            assert sys.path == path and not ran.exists()
