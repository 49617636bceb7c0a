"""A model keeps its precision, and what routes it computes in float32 beside it."""

from __future__ import annotations

import gymnasium
import pytest
import torch
import yaml
from conftest import make_original
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import duorl
from duorl import agents, envs, learners
from duorl.cli.parser import parse
from duorl.devices import pick_trainers_device
from duorl.evaluation.compare import measure
from duorl.inputs import View, update_norm
from duorl.models.pretrain import Pretraining, PretrainOptions, backbone_config
from duorl.models.training_options import in_precision
from duorl.oracle import beam, exhaustive
from duorl.rewards import LogitLensShaping, TeacherKL
from duorl.routed_pass import RoutedPass
from duorl.routers import HeadRouter

_HALVES = [torch.bfloat16, torch.float16]
_WINDOWS = torch.randint(61, (6, 9), generator=torch.Generator().manual_seed(5))


def saved_and_loaded(folder, dtype, family="llama"):
    make_original(family).to(dtype).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.fixture(scope="module", params=_HALVES, ids=str)
def half(request):
    """A frozen duo in a half precision."""
    return duorl.convert(make_original("llama").to(request.param), small_ratio=4).eval().requires_grad_(False)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma3_text", "phi"])
@pytest.mark.parametrize("dtype", _HALVES, ids=str)
def test_a_converted_model_keeps_weights_and_rotary_frequencies(family, dtype, tmp_path):
    original = saved_and_loaded(tmp_path, dtype, family)
    duo = duorl.convert(original, small_ratio=4)
    assert {weight.dtype for weight in duo.parameters()} == {dtype}
    theirs = dict(original.named_buffers())
    for name, buffer in duo.backbone.named_buffers():
        assert torch.equal(buffer.float(), theirs[name].float()), name
        assert buffer.dtype == torch.float32 or "inv_freq" not in name
    assert torch.equal(duo(input_ids=_WINDOWS).logits, original(input_ids=_WINDOWS).logits)


def test_each_weight_keeps_its_own_precision(tmp_path):
    """A head and its norm in float32, as trainings prepare models."""
    original = saved_and_loaded(tmp_path, torch.bfloat16)
    original.model.norm.float(), original.lm_head.float()
    duo = duorl.convert(original)
    found = {name for name, weight in duo.named_parameters() if weight.dtype == torch.float32}
    assert found == {"backbone.model.norm.weight", "backbone.lm_head.weight"}
    assert torch.equal(duo(input_ids=_WINDOWS).logits, original(input_ids=_WINDOWS).logits)


@pytest.mark.parametrize("context", ["routed", "reference"])
@pytest.mark.parametrize("agent", ["PPO", "REINFORCE", "ReinMax", "DQN", "GFlowNet"])
def test_agents_learn_beside_a_half(half, agent, context):
    reward = TeacherKL(share=0.5) + LogitLensShaping()
    options = {"windows_per_batch": 2, "group_size": 2, "prices": (0.1, 1.0), "inputs": ["update_norm"]}
    learner = getattr(agents, agent)(envs.Lockstep(half, _WINDOWS, context=context, reward=reward, **options))
    router = learner.learn(2 * learner.decisions_per_update).at(price=0.3)
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in router.parameters())
    assert measure(half, router, _WINDOWS, context=context).loss.isfinite().all()


@pytest.mark.parametrize("kind", [learners.Soft, learners.Supervised, learners.KNN])
def test_learners_learn_beside_a_half(half, kind):
    options = {} if kind is learners.Soft else {"windows": 2}
    learner = kind(envs.Lockstep(half, _WINDOWS, windows_per_batch=2), **options, **_FEW.get(kind, {}))
    router = learner.learn(2 * learner.decisions_per_update)
    written = half.generate(_WINDOWS[:, :4], router=router, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert written.shape == (6, 6) and measure(half, router, _WINDOWS).loss.dtype == torch.float32


_FEW = {learners.KNN: {"neighbours": 4}}


def test_an_oracle_and_an_environment_beside_a_half(half):
    for context in ("reference", "uniform", "routed"):
        assert exhaustive(half, _WINDOWS, context=context).losses.isfinite().all()
    assert beam(half, _WINDOWS, width=2).losses.dtype == torch.float32
    env = gymnasium.make("duorl/Routing-v0", model=half, windows=_WINDOWS)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert sum(env.step(1)[2] for _ in range(3)) == 1


def test_compute_is_not_rounded(half, tokens):
    """In 8 bits the share of a layer would be."""
    walk = RoutedPass(half, tokens)
    for action in (1, 2, 1):
        walk.take(action)
    small, big = half.action_compute[0, 1:]
    assert torch.equal(walk.compute, (small + big + small).expand(2, 7))
    seen = []
    half(input_ids=tokens, router=lambda hidden, layer, compute: seen.append(compute) or torch.ones(2, 8).long())
    assert all(compute.dtype == torch.float32 for compute in seen)


def test_a_mixture_is_the_mean_in_a_half(half, tokens):
    walk = RoutedPass(half, tokens)
    ffn, hidden, residual = half.stack.ffns[0], walk.hidden, walk.residual
    expected = residual + (ffn.run(hidden, 1) + ffn.run(hidden, 2)) / 2
    walk.mix(torch.full((2, 7, 2), 0.5), (1, 2))
    assert torch.allclose(walk.layer_input, expected, rtol=0.02, atol=0.02)


def test_heads_and_inputs_see_what_they_were_trained_on():
    """Environments show float32: a deployed head must not normalise in the model's precision."""
    router = HeadRouter(3, 32, prices=(0.1, 1.0), inputs=["update_norm"]).at(price=0.3)
    now, before = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    seen, shown = (View(a, 1, torch.rand(5), b) for a, b in ((now, before), (now.float(), before.float())))
    shown = View(shown.hidden, 1, seen.compute, shown.previous)
    assert torch.equal(router.logits(seen), router.logits(shown))
    assert torch.equal(update_norm(seen), update_norm(shown))


# Stage 1


_TRAINING = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01, "report_to": "none"}
_QUIET = {"disable_tqdm": True, "save_strategy": "no"}


def stage_one(folder, corpus, **options):
    Pretraining(recipe(folder, corpus, **options)).train()
    return load_file(folder / "model.safetensors")


def recipe(folder, corpus, **options):
    sizes = {"window": 16, "evaluation_windows": 2, "vocab_size": 300, "small_ratio": 4}
    options = {"corpus": corpus, "training": {**_TRAINING, **_QUIET}, **sizes, **options}
    return PretrainOptions(out=str(folder), **options)


def test_stage_one_trains_in_the_precision_that_is_given_or_else_in_that_of_the_recipe():
    mixed = {"max_steps": 2, "bf16": True}
    assert in_precision(mixed, "auto") == mixed
    assert in_precision(mixed, "float32") == {**mixed, "bf16": False, "fp16": False}
    assert in_precision(mixed, "float16") == {**mixed, "bf16": False, "fp16": True}
    _, text = parse("pretrain", ["--out", "x", "--dtype", "bfloat16", "--device", "cpu"])
    assert {"device": "cpu", "dtype": "bfloat16", "threads": None}.items() <= yaml.safe_load(text).items()


def test_stage_one_trains_where_it_is_told_to(tmp_path, small_corpus, monkeypatch):
    backbone = {"backbone": _BACKBONE}
    made = Pretraining(recipe(tmp_path, small_corpus, **backbone), device="cpu", dtype="bfloat16")
    assert made.arguments.bf16 and made.arguments.use_cpu and made.arguments.device == torch.device("cpu")
    with pytest.raises(ValueError, match="device mps is not there"):
        Pretraining(recipe(tmp_path, small_corpus, **backbone), device="mps")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_trainers_device("cuda") == torch.device("cuda")
    with pytest.raises(ValueError, match="takes all GPUs that are visible: set CUDA_VISIBLE_DEVICES=1, and give cuda"):
        Pretraining(recipe(tmp_path, small_corpus, **backbone), device="cuda:1")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, *_HALVES], ids=str)
def test_training_the_small_networks_leaves_the_rest_to_the_bit(dtype, tmp_path, small_corpus):
    model = duorl.convert(AutoModelForCausalLM.from_config(backbone_config(_BACKBONE, vocab_size=2048)).to(dtype))
    model.save_pretrained(tmp_path / "given")
    duorl.load_tokenizer().save_pretrained(tmp_path / "given")
    trained = stage_one(tmp_path / "out", small_corpus, model=str(tmp_path / "given"), trained="small")
    for name, given in load_file(tmp_path / "given" / "model.safetensors").items():
        assert trained[name].dtype == dtype
        assert torch.equal(trained[name], given) == (".small." not in name), name


_BACKBONE = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
_BACKBONE["num_attention_heads"] = 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_fresh_model_is_saved_as_its_configuration_says(dtype, tmp_path, small_corpus):
    backbone = _BACKBONE if dtype is None else {**_BACKBONE, "dtype": dtype}
    weights = stage_one(tmp_path, small_corpus, backbone=backbone)
    assert {weight.dtype for weight in weights.values()} == {getattr(torch, dtype or "bfloat16")}
    assert duorl.load_tokenizer(tmp_path).pad_token_id == duorl.load(tmp_path).generation_config.pad_token_id == 0


def test_a_precision_must_be_one():
    with pytest.raises(ValueError, match="backbone names 'float23' as dtype"):
        backbone_config({"model_type": "llama", "dtype": "float23"})
