from .bases import Base, find_base
from .config import DuoConfig
from .conversion import convert
from .ffn import DuoFFN
from .frozen import require_frozen
from .loading import check_windows, load, load_tokenizer, model_folder
from .modeling import DuoForCausalLM
from .pace import Pace
from .shared import save_small
from .transcript import Transcript

__all__ = [
    "Base",
    "DuoConfig",
    "DuoFFN",
    "DuoForCausalLM",
    "Pace",
    "Transcript",
    "check_windows",
    "convert",
    "find_base",
    "load",
    "load_tokenizer",
    "model_folder",
    "require_frozen",
    "save_small",
]
