from .config import DuoConfig
from .conversion import convert
from .ffn import DuoFFN
from .frozen import require_frozen
from .loading import load, load_tokenizer, model_folder
from .modeling import DuoForCausalLM

__all__ = [
    "DuoConfig",
    "DuoFFN",
    "DuoForCausalLM",
    "convert",
    "load",
    "load_tokenizer",
    "model_folder",
    "require_frozen",
]
