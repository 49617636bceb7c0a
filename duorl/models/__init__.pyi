from .config import DuoConfig
from .conversion import convert
from .ffn import DuoFFN
from .frozen import require_frozen
from .loading import check_windows, load, load_tokenizer, model_folder
from .modeling import DuoForCausalLM

__all__ = [
    "DuoConfig",
    "DuoFFN",
    "DuoForCausalLM",
    "check_windows",
    "convert",
    "load",
    "load_tokenizer",
    "model_folder",
    "require_frozen",
]
