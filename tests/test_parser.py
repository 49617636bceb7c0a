"""What is typed on a command line: options and their files, help, and what is refused in one line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import refused

from duorl.checks import in_words
from duorl.cli import main
from duorl.cli.commands import COMMANDS
from duorl.cli.console import resume_command
from duorl.cli.parser import build_parser, parse
from duorl.experiments.learners import LEARNERS, named
from duorl.learners.base import Learner
from duorl.paper import StudySize
from duorl.routers import HeadRouter

ROOT = Path(__file__).parent.parent
_COMMAND_OF = {
    "compare": "compare",
    "neighbours": "compare",
    "smollm2": "compare",
    "dense": "dense",
    "pretrain-tiny": "pretrain",
}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_is_valid(path):
    options, text = parse(_COMMAND_OF.get(path.stem, "train"), ["--config", str(path)])
    assert yaml.safe_load(text) and options


def test_the_default_config_is_the_default():
    spelled_out = parse("train", ["--config", str(ROOT / "configs" / "train.yaml")])[1]
    assert yaml.safe_load(spelled_out) == yaml.safe_load(parse("train", [])[1])


@pytest.mark.parametrize(
    ("arguments", "key", "expected"),
    [
        (["--agent", "REINFORCE"], "agent", {"learning_rate": 0.01, "baseline": "leave-one-out"}),
        (["--agent", "Soft"], "agent", {"learning_rate": 0.01, "updates": 120}),
        (["--config", str(ROOT / "configs" / "reinforce.yaml")], "agent", {"learning_rate": 0.01}),
        (["--agent", "REINFORCE", "--agent.learning_rate", "0.5"], "agent", {"learning_rate": 0.5}),
        (["--agent.learning_rate", "0.5"], "agent", {"learning_rate": 0.5, "epochs": 2}),
        (["--reward", "dear.Dear"], "reward", {"price": 7.0}),
        (["--reward", "dear.Dear", "--reward.price", "3"], "reward", {"price": 3.0}),
        (["--config", "dear.yaml"], "reward", {"price": 5.0}),
        (["--reward.price", "0.2"], "reward", {"price": 0.2}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_class_named_by_the_user_keeps_its_own_defaults(arguments, key, expected, tiny):
    (tiny / "dear.py").write_text(
        "import duorl.rewards\n"
        "class Dear(duorl.rewards.Reward):\n"
        "    def __init__(self, price: float = 7.0):\n"
        "        self.price = price\n"
    )
    (tiny / "dear.yaml").write_text("reward: {class_path: dear.Dear, init_args: {price: 5.0}}\n")
    text = parse("train", arguments)[1]
    assert expected.items() <= yaml.safe_load(text)[key]["init_args"].items()


def test_a_function_is_a_reward(tiny):
    (tiny / "plain.py").write_text("def thrifty(step):\n    return -step.compute\n")
    options, text = parse("train", ["--reward", "plain.thrifty"])
    assert yaml.safe_load(text)["reward"] == "plain.thrifty" and options.reward.__name__ == "thrifty"
    (tiny / "again.yaml").write_text(text)
    assert parse("train", ["--config", "again.yaml"])[1] == text


def test_learners_are_found_by_name():
    for name in LEARNERS:
        assert issubclass(named(name.lower()), Learner) and named(name).__name__ == name
    with pytest.raises(ValueError, match="unknown learner 'nobody': choose from PPO"):
        named("nobody")
    with pytest.raises(ValueError, match=r"json\.JSONDecoder is not a Learner"):
        named("json.JSONDecoder")


def test_lists_need_no_brackets_and_learners_no_capitals():
    short = ["--actions", "big,small", "--rivals=soft,KNN", "--env.prices", "0.1,1", "--agent", "reinforce"]
    whole = ["--actions", "[big, small]", "--rivals=[soft, KNN]", "--env.prices", "[0.1, 1]", "--agent", "REINFORCE"]
    assert parse("train", short)[1] == parse("train", whole)[1]
    assert yaml.safe_load(parse("compare", ["--targets", "0.5"])[1])["targets"] == [0.5]
    for flag in (["--learned_on", "a,b.txt"], ["--learned_on=a,b.txt"]):  # a text is one name
        assert parse("evaluate", ["--router", "r", *flag])[0].learned_on == "a,b.txt"


def test_compare_has_learners_by_default(capsys):
    options, text = parse("compare", ["--seeds", "2"])
    assert list(options.agents) == ["PPO", "REINFORCE"]
    given = yaml.safe_load(text)["agents"]["PPO"]["init_args"]
    assert given == yaml.safe_load(parse("train", [])[1])["agent"]["init_args"]
    assert list(parse("compare", ["--agents", "{A: DQN}"])[0].agents) == ["A"]


@pytest.mark.parametrize("option", ["agent", "reward"])
def test_help_without_a_class_is_about_the_default_one(option, capsys):
    with pytest.raises(SystemExit):
        parse("train", [f"--{option}.help"])
    expected = {"agent": "--agent.clip_range", "reward": "--reward.price"}
    assert expected[option] in capsys.readouterr().out


def test_rivals_are_names_or_learners_with_options():
    options, text = parse("train", ["--rivals", "[]"])
    assert options.rivals == []
    options, text = parse("train", ["--rivals", "{wide: {class_path: Supervised, init_args: {width: 7}}, KNN: KNN}"])
    assert yaml.safe_load(text)["rivals"]["wide"]["init_args"]["width"] == 7 and list(options.rivals) == ["wide", "KNN"]


def test_the_quick_study_changes_defaults_and_no_option_that_was_given(tmp_path):
    given = tmp_path / "paper.yaml"
    given.write_text("total_decisions: 3000")
    words = ["--quick", "--size.prices", "[0.7]", "--config", str(given)]
    options, config = parse("paper", words)
    assert (options.size.prices, options.size.windows, options.size.big) == ((0.7,), 8, (1,))
    assert (options.total_decisions, options.soft) == (3000, {"updates": 40})
    assert parse("paper", [])[0].size == StudySize()
    given.write_text("quick: true")
    assert parse("paper", ["--config", str(given)])[0].size.windows == 8
    given.write_text(config)
    again = parse("paper", ["--config", str(given)])[0]
    assert all(again[name] == options[name] for name in ("quick", "size", "soft", "total_decisions"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "gone"], "no run in gone"),
        (["report"], "run"),
        (["oracle", "--method", "exhaustive", "--memory_limit", "1000"], "memory_limit 1,000 is too small: .* need"),
        (["oracle", "--price", "-1"], "price must be at least 0"),
        (["oracle", "--shard", "0"], "shard must be at least 1"),
        (["oracle", "--skip", "half"], "half"),
        (["oracle", "--context", "causal"], "causal"),
        (["paper", "--dense", "gone"], "no dense.json at gone"),
        (["paper", "--size.windows", "1"], "windows must be at least 2"),
        (["paper", "--size.prices", "[]"], "prices must be at least one"),
        (["paper", "--size.prices", "[-1.0]"], "each at least 0"),
        (["paper", "--env.window", "4"], "at least 8 tokens"),
        (["dense", "--recipe.out", "x", "--recipe.corpus", "gone.txt"], "no text at 'gone.txt'"),
        (["paper", "--prose", "gone.txt"], "no text at 'gone.txt'"),
        (["dense", "--recipe.out", "x", "--recipe.model", "y"], "trained from scratch"),
        (["dense", "--recipe.out", "x", "--shares", "[2]"], "shares must be in"),
        (["pretrain", "--out", "x", "--trained", "small"], "give the model to start from"),
        (["pretrain", "--out", "x", "--big_share", "2"], "big_share must be in"),
        (["compare", "--agents", "{PPO: PPO}", "--targets", "[0.5]"], "give env.prices"),
        (["compare", "--agents", "{PPO: PPO}", "--env.prices", "[0.1, 1]", "--targets", "[2]"], "between 0 and 1"),
        (["compare", "--agents", "{soft: PPO}"], "cannot be called 'soft'"),
        (["compare", "--agents", "{lower bound: PPO}"], "cannot be called 'lower bound'"),
        (["compare", "--agents", "{PPO: PPO}", "--rivals", "[nobody]"], "unknown learner 'nobody'"),
        (["compare", "--agents", "{PPO: PPO}", "--own_env", "{A2C: {}}"], "'A2C', which is not among the learners"),
        (["compare", "--agents", "{PPO: PPO}", "--starts", "{soft: PPO}"], "'soft' cannot start from 'PPO', only from"),
        (["compare", "--agents", "{PPO: PPO}", "--starts", "{PPO: A2C}"], "order: supervised, soft, PPO"),
        (["compare", "--agents", "{KNN: KNN}", "--starts", "{KNN: soft}"], "KNN cannot start from a router"),
        (["trian"], r"unknown command 'trian' \(did you mean train\?\)"),
        ([], "no command"),
        (["compare", "--agents", "{PPO: PPO}", "--own_env", "{PPO: {copies: 2}}"], "copies"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_other_commands_refuse_bad_input_too(arguments, message, tiny, capsys):
    before = sorted(tiny.rglob("*"))
    assert re.search(message, refused(arguments, capsys))
    assert sorted(tiny.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--total_decision", "3"], "did you mean total_decisions"),
        (["--learning_rate", "3"], r"did you mean agent\.learning_rate\?"),
        (["--price", "3"], r"did you mean reward\.price\?"),
        (["--windows_per_batch", "3"], r"did you mean env\.windows_per_batch\?"),
        (["--wandb", "x"], r"unrecognized arguments: --wandb x \(see --help\)"),
        (["--agent", "ppoo"], 'option "agent": there is no class ppoo .choose from PPO'),
        (["--model", "duo_tiny"], r"no model 'duo_tiny': did you mean duo-tiny\?"),
        (["--agent.init", "has_one"], r"no router in has_one: there is one in has_one/routers/soft"),
        (["--agent.learnin_rate", "3"], "did you mean learning_rate"),
        (["--config", "wrong.yaml"], "'total_decison'.*did you mean total_decisions"),
        (["--config", "gone.yaml"], "gone.yaml"),
        (["--agent", "FOO"], "choose from PPO, A2C, MaskablePPO, REINFORCE"),
        (["--env.prices", "[0.5, 0.1]"], "prices must be the lowest and the highest"),
        (["--env.prices", "[0.5, 1.0]"], r"price 0\.3 is not among env\.prices"),
        (["--target_compute", "1.5"], "target_compute must be between 0 and 1"),
        (["--env.big_layers", "3"], "use MaskablePPO"),
        (["--agent", "MaskablePPO", "--env.big_layers", "9"], "big_layers must be in 0 to 8"),
        (["--agent.init", "nowhere"], "no router in nowhere"),
        (["--reward", "bare.Bare", "--env.prices", "[0.1, 1.0]"], "is not among env.prices"),
        (["--reward", "bare.Bare", "--target_compute", "0.5"], "no prices"),
        (["--seed", "x"], 'option "seed": must be a whole number, not x'),
        (["--env.context", "near"], 'option "env.context": choose from routed, reference, not near'),
        (["--corpus", '["gone.txt"]'], "no text at 'gone.txt'"),
        (["--corpus", '["zero.txt"]'], "zero.txt is empty"),
        (["--corpus", '["short.txt"]'], r"128 \+ 1"),
        (["--reward", "gone.Gone"], "No module named 'gone'"),
        (["--reward", "json.JSONDecoder"], "not correspond to a subclass of Reward"),
        (["--reward.price", "-1"], "price must be at least 0"),
        (["--actions", '["small", "huge"]'], "unknown action 'huge'"),
        (["--model", "nowhere"], "no model 'nowhere'.*duo-tiny"),
        (["--model", "empty"], "lacks config.json, model.safetensors, tokenizer.json"),
        (["--out", "full"], "full already holds files: give --overwrite"),
        (["--out", "full", "--overwrite"], "no run"),
        (["--out", "fresh", "--resume"], "nothing to resume"),
        (["--agent", "REINFORCE", "--env.group_size", "1"], "group_size to at least 2"),
        (["--evaluation.windows", "0"], "windows must be at least 1, not 0"),
        (["--total_decisions", "0"], "total_decisions must be at least 1"),
        (["--env.token_discount", "1"], r"token_discount must be in \[0, 1\)"),
        (["--env.windows_per_batch", "9999"], "a batch takes 9999"),
        (["--reference", "huge"], "unknown action 'huge'"),
        (
            ["--evaluation.windows", "8", "--evaluation.reference_windows", "16"],
            "reference_windows 16 must be among the 8",
        ),
        (["--env.inputs", "[nothing]"], "nothing"),
        (["--save_every", "x"], "save_every"),
        (["--agent.width", "-1"], "width must be at least 0"),
        (["--agent.batch_size", "1"], "batch_size"),
        (["--reward", "scalar.Scalar"], "Scalar must return one reward per token"),
        (["--out", "other", "--overwrite"], "holds files but no run"),
        (["--out", "ours", "--overwrite", "--resume"], "give one of them"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, message, tiny, small_corpus, capsys):
    (tiny / "zero.txt").touch()
    (tiny / "short.txt").write_text("short")
    (tiny / "wrong.yaml").write_text("total_decison: 3\n")
    (tiny / "empty").mkdir()
    (tiny / "full").mkdir()
    (tiny / "full" / "precious").touch()
    (tiny / "other").mkdir()
    (tiny / "other" / "config.yaml").touch()  # another program's
    HeadRouter(8, 192).save_pretrained(tiny / "has_one" / "routers" / "soft")
    (tiny / "ours").mkdir()
    (tiny / "ours" / ".duorl").touch()
    (tiny / "ours" / "config.yaml").touch()
    reward = (
        "import duorl.rewards\nclass Scalar(duorl.rewards.Reward):\n    def __call__(self, step):\n        return 1.0\n"
    )
    (tiny / "scalar.py").write_text(reward)
    (tiny / "bare.py").write_text(reward.replace("Scalar", "Bare").replace("1.0", "step.compute"))
    before = sorted(tiny.rglob("*"))
    text = [] if "--corpus" in arguments else ["--corpus", small_corpus]
    assert re.search(message, refused(["train", *text, *arguments], capsys))
    assert sorted(path for path in tiny.rglob("*") if "__pycache__" not in path.parts) == before


def test_errors_are_told_without_the_names_of_classes_and_numbers(tiny, capsys):
    assert refused(["train", "--model", "nowhere"], capsys).startswith("duorl: error: no model 'nowhere': give")
    said = {"No such file or directory: gone.txt": FileNotFoundError(2, "No such file or directory", "gone.txt")}
    said |= {"no file here": FileNotFoundError("no file here"), "KeyError: 'x'": KeyError("x")}
    assert {words: in_words(error) for words, error in said.items()} == {words: words for words in said}


def test_help_names_the_rewards(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    section = capsys.readouterr().out.split("\nrewards:\n")[1]
    for line in ("LossImprovement(price=0.1)", "TeacherKL(price=0.1, share=1.0)", "RedundancyCharge(charge=0.01"):
        assert f"\n  {line}" in section
    assert "--reward thrifty.Thrifty --reward.bonus 0.02" in section


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0 and COMMANDS[command].summary.split()[0] in capsys.readouterr().out
    actions = build_parser(command)._actions
    assert not [action.dest for action in actions if action.option_strings and not action.help]


def test_the_top_answers_from_its_table(capsys):
    for words in (["--help"], ["-h"], ["--version"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(command.summary in printed for command in COMMANDS.values()) and "duorl 0." in printed


_HEAVY = ("transformers", "datasets", "sklearn", "matplotlib", "plotly", "torch")


@pytest.mark.parametrize(
    ("words", "allowed"),
    [(["--help"], 0), (["--version"], 0), (["trian"], 0), (["train", "--help"], 1), (["train", "--agnet", "X"], 1)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_need_not_be_imported_is_not(words, allowed):
    """Heavy packages, the last `allowed` of them apart."""
    names = _HEAVY[: len(_HEAVY) - allowed]
    code = (
        "import sys\nfrom duorl.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {names} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


OWN_FOLDER = """
import sys
import duorl.cli
import duorl.agents
from duorl.cli.parser import parse
assert duorl.agents.PPO.__name__ == "PPO"
options, text = parse("compare", ["--agents", "{PPO: PPO}", "--reward", "rewards.Mine"])
assert sys.path[-1].endswith("own") and not sys.path[0].endswith("own"), sys.path
import agents
assert agents.__file__.endswith("own/agents/__init__.py")
print(type(options.reward).__name__)
"""


def test_folders_of_the_users_own_stand_in_for_nothing(tmp_path):
    own = tmp_path / "own"
    for name in ("agents", "envs", "tests", "configs", "rewards"):
        (own / name).mkdir(parents=True)
        (own / name / "__init__.py").touch()
    (own / "rewards" / "__init__.py").write_text("import duorl.rewards\nclass Mine(duorl.rewards.Reward):\n    pass\n")
    (tmp_path / "script.py").write_text(OWN_FOLDER)
    done = subprocess.run([sys.executable, "../script.py"], cwd=own, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "Mine", done.stderr[-2000:]


RESUMED = [
    (["--out", "here"], "duorl train --out here --resume"),
    (["--out=a b", "--overwrite"], "duorl train '--out=a b' --resume"),
    ([], "duorl train --out runs/ppo-1 --resume"),
]


@pytest.mark.parametrize(
    ("typed", "line"), RESUMED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_the_line_that_goes_on_with_a_run(typed, line, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/duorl", "train", *typed])
    assert resume_command(Path("runs/ppo-1")) == line
