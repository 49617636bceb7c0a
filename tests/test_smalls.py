"""Making small networks: against closed forms, naive computation, and an uninterrupted run."""

import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from conftest import COMMIT, make_duo, make_original, refused
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import kl_div

import duorl
from duorl import hub
from duorl.corpus import load_windows
from duorl.costs import BIG
from duorl.experiments.convert import _base, _run
from duorl.models.footprint import Batch, peak_bytes
from duorl.models.shared import WEIGHTS, small_weights
from duorl.models.trainer import random_routes
from duorl.routed_pass import RoutedPass
from duorl.runs import interrupts
from duorl.runs.pretraining import Saving
from duorl.smalls import (
    ChooseOptions,
    ConvertOptions,
    Distil,
    DistilOptions,
    Making,
    RegressOptions,
    choose,
    held_out_losses,
    regress,
)
from duorl.smalls.choose import last_map
from duorl.smalls.recipe import STAGES
from duorl.smalls.recording import big_passes, token_weights

FAMILIES = ["llama", "phi3", "gpt2", "opt", "bloom", "falcon", "gemma2"]  # gated, fused, biases, Conv1D, adapters


def tokens_of(model, windows=4, length=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (windows, length + 1), generator=generator)


def make_trainable(family="llama"):
    model = make_duo(family)
    for ffn in model.stack.ffns:
        ffn.small.requires_grad_(True)
    return model


@torch.no_grad()
def use_few_neurons(ffn):
    """Make most neurons of big write nothing, so that the small network can be equal to it."""
    last = last_map(ffn)
    weight = last.weight if type(last).__name__ == "Conv1D" else last.weight.T  # (inner, d)
    kept = torch.randperm(len(weight), generator=torch.Generator().manual_seed(1))[: len(weight) // 4]
    mask = torch.zeros(len(weight), 1)
    mask[kept] = 1
    weight *= mask


@pytest.mark.parametrize("family", FAMILIES)
def test_the_neurons_that_write_are_chosen_and_nothing_is_lost(family):
    model = make_duo(family)
    for ffn in model.stack.ffns:
        use_few_neurons(ffn)
    tokens = tokens_of(model, 24)
    before = {name: weight.clone() for name, weight in model.named_parameters() if ".small." not in name}
    choose(model, tokens)
    for layer, read, written in big_passes(model, tokens):
        made = model.stack.ffns[layer].small(read)
        assert (made - written).norm() < 0.02 * written.norm()  # the ridge moves it a little
    assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters() if name in before)


def test_the_last_map_is_the_weighted_least_squares_fit():
    model = make_duo("gpt2")
    tokens = tokens_of(model, 24)
    choose(model, tokens)
    layer, read, written = next(iter(big_passes(model, tokens)))
    small = model.stack.ffns[layer].small
    inner = small.act(small.c_fc(read))
    scale = token_weights(written).sqrt()[:, None]
    columns = torch.cat([inner, torch.ones(len(inner), 1)], dim=1) * scale
    fitted = torch.linalg.lstsq(columns, written * scale).solution

    def error(solution):
        return (columns @ solution - written * scale).square().sum()

    ours = torch.cat([small.c_proj.weight, small.c_proj.bias[None]])
    assert error(fitted) <= error(ours) <= 1.01 * error(fitted)


def test_no_token_rules():
    written = torch.randn(101, 8)
    written[0] *= 1e4
    weights = token_weights(written)
    shares = weights * written.square().sum(-1)
    assert shares.max() <= 1 + 1e-5 and shares[0] == pytest.approx(1, rel=1e-4)
    assert weights.max() == weights[written.norm(dim=-1) <= written.norm(dim=-1).median()].min()


def test_regress_is_0_for_a_copy_and_learns_each_layer_by_itself():
    model, coins = make_trainable(), torch.Generator()
    tokens = tokens_of(model)
    loss = regress(model, tokens, coins)
    loss.backward()
    for ffn in model.stack.ffns:
        assert all(weight.grad.abs().sum() > 0 for weight in ffn.small.parameters())
        assert all(weight.grad is None for weight in ffn.big.parameters())
    naive = []
    for layer, read, written in big_passes(model, tokens):
        error = (model.stack.ffns[layer].small(read) - written).square().sum(-1)
        sizes = written.norm(dim=-1)
        naive.append((error / sizes.clamp(min=sizes.median()) ** 2).mean())
    assert loss.item() == pytest.approx(sum(naive).item() / len(naive), rel=1e-5)
    for ffn in model.stack.ffns:
        ffn.small = ffn.big
    assert regress(model, tokens, coins).item() == 0


def test_distil_is_the_distance_to_all_big_under_random_routes():
    model = make_trainable()
    tokens = tokens_of(model)
    loss = Distil()(model, tokens, torch.Generator().manual_seed(3))
    coins = torch.Generator().manual_seed(3)
    share = torch.randint(8, (), generator=coins).item() / 8
    routes = random_routes(tokens[:, 1:].numel(), model.num_layers, big_share=share, generator=coins)
    routes = routes.view(*tokens[:, 1:].shape, -1)
    inputs = tokens[:, :-1]
    teacher, own = model(input_ids=inputs).logits.log_softmax(-1), model(input_ids=inputs, routes=routes).logits
    naive = kl_div(own.log_softmax(-1), teacher.detach(), reduction="none", log_target=True).sum(-1).mean()
    assert 0 < share < 1 and BIG in routes
    assert loss.item() == pytest.approx(naive.item(), rel=1e-4)
    weights = list(small_weights(model).values())
    parameters = [weight for ffn in model.stack.ffns for weight in ffn.small.parameters()]
    for ours, expected in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(naive, parameters), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)
    assert len(weights) == len(parameters)


def test_distil_draws_every_share_and_always_has_something_to_learn():
    model, shares = make_trainable(), set()
    tokens = tokens_of(model, 2, 8)
    for seed in range(40):
        coins = torch.Generator().manual_seed(seed)
        shares.add(torch.randint(8, (), generator=torch.Generator().manual_seed(seed)).item())
        assert Distil()(model, tokens, coins).requires_grad
    assert shares == set(range(8))


def test_distil_can_follow_the_text():
    model = make_trainable()
    tokens = tokens_of(model)
    loss = Distil("text")(model, tokens, torch.Generator().manual_seed(3))
    walk, coins = RoutedPass(model, tokens), torch.Generator().manual_seed(3)
    share = torch.randint(8, (), generator=coins).item() / 8
    routes = random_routes(tokens[:, 1:].numel(), model.num_layers, big_share=share, generator=coins)
    while not walk.done:
        walk.step(routes.view(*tokens[:, 1:].shape, -1)[..., walk.layer])
    assert loss.item() == walk.losses().mean().item()


def options(**given):
    stages = {
        "choose": ChooseOptions(48),
        "regress": RegressOptions(288, 48, 1e-2),
        "distil": DistilOptions(288, 48, 1e-2),
    }
    return ConvertOptions(model="m", out="o", window=12, evaluation_windows=2, **{**stages, **given})


def test_every_stage_comes_closer_to_all_big(tmp_path):
    torch.manual_seed(0)
    model = make_duo("llama")
    making = Making(model, options(distil=DistilOptions(4800, 96, 3e-3)), tokens_of(model, 64), tokens_of(model, 4))
    losses = [Distil()(model, making.held_out, torch.Generator().manual_seed(0)).item()]
    place = None
    for stage in ("choose", "regress", "distil"):
        found = making.run(stage, tmp_path / stage, lambda **said: None, after=place)
        assert set(found) == {"all_small", "half_big", "all_big"}
        place = tmp_path / stage
        losses.append(Distil()(model, making.held_out, torch.Generator().manual_seed(0)).item())
    assert losses[1] < losses[0] and losses[3] < losses[2]
    assert model.config.use_cache and model.config.backbone.use_cache  # it generates as fast as before


def test_big_is_recorded_and_measured_without_dropout(tmp_path, capsys):
    model = make_duo("gpt2")
    assert any(module.p > 0 for module in model.modules() if isinstance(module, torch.nn.Dropout))
    making, modes = Making(model, options(), tokens_of(model, 16), tokens_of(model, 4)), []
    handle = model.stack.layers[0].register_forward_pre_hook(lambda layer, _: modes.append(layer.training))
    losses = making.run("regress", tmp_path, lambda **said: None)
    handle.remove()
    assert modes and not any(modes)
    assert losses == held_out_losses(model.eval(), making.held_out)
    assert not capsys.readouterr().out  # of the Trainer, which prints dictionaries


def test_a_stage_that_was_stopped_goes_on_to_the_same_bit(tmp_path, monkeypatch):
    def run(folder, stop_at=None):
        model = make_duo("llama")
        making = Making(model, options(), tokens_of(model, 16), tokens_of(model, 4))
        done = []

        def tell(**said):
            done.append(said)
            if len(done) == stop_at:
                monkeypatch.setattr(interrupts, "pending", lambda: True)
                monkeypatch.setattr(interrupts, "check", stop)

        def stop():
            raise interrupts.Interrupted(2)

        try:
            making.run("distil", folder, tell, callbacks=[Saving(tell, 1e9)])
        finally:
            monkeypatch.undo()
        return model

    whole = run(tmp_path / "whole")
    with pytest.raises(interrupts.Interrupted):
        run(tmp_path / "parts", stop_at=3)
    kept = next((tmp_path / "parts" / "checkpoints").glob("checkpoint-*"))
    assert kept.name == "checkpoint-3" and (kept / "model.safetensors").stat().st_size < 60_000  # small networks alone
    resumed = run(tmp_path / "parts")
    for name, weight in small_weights(whole).items():
        assert torch.equal(weight, small_weights(resumed)[name])
    assert (tmp_path / "parts" / WEIGHTS).is_file() and not (tmp_path / "parts" / "checkpoints").exists()


def test_the_first_stage_stops_after_a_pass():
    model = make_duo("llama")
    making, passes = Making(model, options(choose=ChooseOptions(288)), tokens_of(model, 24), tokens_of(model, 4)), []

    def tell(**said):
        passes.append(said)
        os.kill(os.getpid(), signal.SIGINT)

    with interrupts.listening(), pytest.raises(interrupts.Interrupted), interrupts.deferred():
        _run(making, "choose", Path("nowhere"), None, tell)
    assert passes == [{"completed": 96, "total": 576}]


def test_a_run_goes_on_with_the_commit_of_the_hub_with_which_it_began(hub_cache):
    make_original("llama").save_pretrained(hub_cache("someone/llama"))
    now = _base("someone/llama", None)
    kept = hub.fetch("someone/llama", "config.json").parent
    shutil.copytree(kept, kept.with_name("0" * 40))
    assert now.revision == COMMIT == _base("someone/llama", {"revision": COMMIT}).revision
    assert _base("someone/llama", {"revision": "0" * 40}).revision == "0" * 40


def test_activations_that_are_no_numbers_are_refused():
    model = make_duo("llama")
    model.stack.ffns[1].big.down_proj.weight.data[0, 0] = float("nan")
    said = "layer 1: the big network gives numbers that are not finite on this text in "
    with pytest.raises(ValueError, match=f"{said}float32: the weights or the text are at fault"):
        Making(model, options(), tokens_of(model, 16), tokens_of(model, 4))
    with pytest.raises(ValueError, match=f"{said}bfloat16: give --dtype float32"):
        list(big_passes(model.bfloat16(), tokens_of(model)))


def test_a_training_that_leads_nowhere_is_not_kept(tmp_path):
    model = make_duo("llama")
    making = Making(model, options(regress=RegressOptions(96, 48, 1e30)), tokens_of(model, 16), tokens_of(model, 4))
    with pytest.raises(ValueError, match=r"not finite: lower --regress\.learning_rate"):
        making.run("regress", tmp_path, lambda **said: None)
    assert not (tmp_path / WEIGHTS).exists()


@pytest.fixture
def place(tmp_path, small_corpus, monkeypatch):
    """A folder with a language model of transformers and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=2048, **sizes)).save_pretrained("original")
    duorl.load_tokenizer().save_pretrained("original")
    return tmp_path


def not_tried(corpus):
    """Tokens that are neither in the window that is tried first, nor in the comparison with the original."""
    first = load_windows(corpus, duorl.load_tokenizer(), length=16, split="model")[0]
    return sorted({*range(9, 2048)} - {*first.tolist()})


@contextmanager
def changed_base(name, rows, number):
    """In this block, the language model has another number in all of some rows."""
    kept = Path("original/model.safetensors").read_bytes()
    weights = load_file("original/model.safetensors")
    weights[name][rows] = number
    save_file(weights, "original/model.safetensors", {"format": "pt"})
    yield
    Path("original/model.safetensors").write_bytes(kept)


@pytest.mark.slow
def test_the_command_stops_after_a_stage_and_goes_on(place, small_corpus, capsys):
    from duorl.cli import main

    words = ["convert", "--model", "original", "--out", "small", "--corpus", str(small_corpus), "--window", "16"]
    words += ["--choose.tokens=256", "--regress.tokens=128", "--regress.tokens_per_update=64"]
    words += ["--distil.tokens=128", "--distil.tokens_per_update=64", "--evaluation_windows=2"]
    main([*words, "--until", "choose"])
    assert "choose: takes" in capsys.readouterr().out
    assert not Path("small/stages/regress").exists() and duorl.load("small").num_layers == 2
    with changed_base("model.layers.1.mlp.up_proj.weight", 0, 1.0):
        line = refused([*words, "--resume"], capsys)
        assert "original has other big networks than the model with which the run in small began: give that one" in line
    with changed_base("model.embed_tokens.weight", not_tried(small_corpus), torch.nan):
        assert "numbers that are not finite on this text" in refused([*words, "--resume"], capsys)
    assert duorl.load("small").num_layers == 2  # a usable model is kept
    main([*words, "--resume"])
    said = capsys.readouterr().out
    assert "regress: learns" in said and "choose: takes" not in said
    assert yaml.safe_load(Path("small/config.yaml").read_text())["until"] == "distil"
    tags = [set(EventAccumulator(f"small/stages/{stage}/tensorboard").Reload().Tags()["scalars"]) for stage in STAGES]
    assert tags[0] == {"eval/all_small", "eval/half_big", "eval/all_big"} and tags[0] < tags[1] == tags[2]
    card = Path("small/README.md").read_text()
    assert "# Small networks for original" in card and "| distil | 128 |" in card
    assert "The weights of original are not in this folder" in card
    assert Path("small/small.safetensors").is_file() and not Path("small/model.safetensors").exists()
    apart = duorl.load("small")
    main([*words[:4], "whole", *words[5:], "--whole"])
    assert Path("whole/model.safetensors").is_file() and not Path("whole/small.safetensors").exists()
    assert "The weights of original are in this folder too" in Path("whole/README.md").read_text()
    for (name, weight), (_, other) in zip(
        duorl.load("whole").named_parameters(), apart.named_parameters(), strict=True
    ):
        assert torch.equal(weight, other), name
    main([*words[:4], "whole", *words[5:], "--resume"])
    assert Path("whole/small.safetensors").is_file() and not Path("whole/model.safetensors").exists()
    assert "The weights of original are not in this folder" in Path("whole/README.md").read_text()


def test_a_text_that_a_model_cannot_read_is_one_line_and_leaves_nothing(place, small_corpus, capsys):
    words = ["convert", "--model", "original", "--corpus", small_corpus, "--window=16", "--choose.tokens=256"]
    words += ["--regress.tokens_per_update=64", "--distil.tokens_per_update=64", "--evaluation_windows=2"]
    with changed_base("model.embed_tokens.weight", not_tried(small_corpus), torch.nan):
        line = refused([*words, "--out", "small"], capsys)
    assert "layer 0: the big network gives numbers that are not finite" in line
    assert [path.name for path in Path("small").iterdir()] == [".duorl"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--model", "nowhere"], "no base model 'nowhere'"),
        (["--model", "."], "config.json"),
        (["--model", "original", "--corpus", "nothing.txt"], "nothing.txt"),
        (["--model", "original", "--small_ratio", "0"], "small_ratio must be at least 1"),
        (["--model", "original", "--distil.learning_rate", "0"], "learning_rate must be above 0"),
    ],
)
def test_bad_input_is_one_line(place, small_corpus, capsys, words, line):
    from duorl.cli import main

    corpus = [] if "--corpus" in words else ["--corpus", str(small_corpus)]
    with pytest.raises(SystemExit) as stop:
        main(["convert", "--out", "small", "--window", "16", *corpus, *words])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and line in said and said.count("\n") == 1 and not Path("small").exists()


def test_a_model_names_the_price_of_its_commands(tmp_path):
    from duorl.cli.parser import parse

    (tmp_path / "config.json").write_text('{"price": 1.25}')
    model = ["--model", str(tmp_path)]

    def price(*words):
        options = parse(words[0], words[1:])[0]
        return options.price if words[0] == "evaluate" else options.reward.price

    assert price("train", *model) == 1.25 and price("evaluate", "--router=r", *model) == 1.25
    assert (
        price("train", *model, "--reward.price=0.5") == 0.5
        and price("evaluate", "--router=r", *model, "--price=0.5") == 0.5
    )
    assert price("train") == 0.3 and price("train", "--model=nowhere") == 0.3
    (tmp_path / "config.json").write_text('{"price": "much"}')
    assert price("train", *model) == 0.3


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(place, capsys, monkeypatch):
    import duorl.devices
    from duorl.cli import main
    from duorl.models.bases import Base

    monkeypatch.setattr(duorl.devices, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(Base, "tokenizer", lambda base: pytest.fail("read"))
    with pytest.raises(SystemExit) as stop:
        main(["convert", "--model", "original", "--out", "small"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "original and its duo model do not fit into memory: they take about 1." in said
    monkeypatch.setattr(duorl.devices, "free_bytes", lambda device: 1000 if device.type == "cuda" else 2**40)
    monkeypatch.setattr("duorl.experiments.convert.pick_trainers_device", lambda name: torch.device("cuda"))
    line = refused(["convert", "--model", "original", "--out", "small"], capsys)
    assert "the weights of the duo model of original do not fit" in line and "cuda has 0.0 MiB free" in line


@pytest.mark.parametrize(
    ("changed", "fix"),
    [
        ({}, r"96 tokens at once .*; lower --window \(12\)"),
        ({"regress": RegressOptions(480, 480)}, r"480 tokens at once .*; lower --regress\.tokens_per_update \(480\)"),
        ({"distil": DistilOptions(480, 240)}, r"240 tokens at once .*; lower --distil\.tokens_per_update \(240\)"),
    ],
)
def test_a_stage_that_does_not_fit_is_refused_before_it_starts(changed, fix, monkeypatch):
    model = make_duo("llama")
    free = peak_bytes(model.config, Batch(12, 12, "everything"), torch.float32) if changed else 1000
    monkeypatch.setattr(duorl.devices, "free_bytes", lambda device: free)
    with pytest.raises(ValueError, match=fix):
        Making(model, options(**changed), tokens_of(model, 40), tokens_of(model, 4))


@pytest.mark.parametrize(("objective", "keeps"), [(regress, "errors"), (Distil("text"), "everything")])
def test_what_the_derivatives_of_a_stage_need_is_what_is_stated(objective, keeps):
    model = make_trainable()
    tokens, kept = tokens_of(model, 64, 32), []
    weights = {weight.data_ptr() for weight in model.parameters()}

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = objective(model, tokens, torch.Generator().manual_seed(0))
    loss.backward()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    needed = sum(size for place, size in storages.items() if place not in weights)
    stated = peak_bytes(model.config, Batch(64, 32, keeps), torch.float32)
    if keeps == "errors":
        stated -= peak_bytes(model.config, Batch(64, 32), torch.float32)
    assert 0.2 * stated < needed < 1.1 * stated
