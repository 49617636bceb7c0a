"""Duo models: configuration, modules, conversion, loading and stage-1 training."""

from duorl.models.config import DuoConfig
from duorl.models.conversion import convert
from duorl.models.ffn import DuoFFN
from duorl.models.loading import load, load_tokenizer, require_frozen
from duorl.models.modeling import DuoForCausalLM

__all__ = ["DuoConfig", "DuoFFN", "DuoForCausalLM", "convert", "load", "load_tokenizer", "require_frozen"]
