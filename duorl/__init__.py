"""DuoRL: reinforcement-learning routers for language models with a big and a small FFN in every layer.

model = duorl.load("duo-tiny")
tokenizer = duorl.load_tokenizer("duo-tiny")
tokens = duorl.load_windows(["stdlib-code"], tokenizer, split="evaluation", length=128)
table = duorl.oracle.exhaustive(model, tokens[:4], context="reference", actions=("small", "big"))
"""

from duorl.corpus import load_windows
from duorl.models import DuoConfig, DuoForCausalLM, convert, load, load_tokenizer
from duorl.routed_pass import RoutedPass

__all__ = ["DuoConfig", "DuoForCausalLM", "RoutedPass", "convert", "load", "load_tokenizer", "load_windows"]
