"""Makes the Auto classes of transformers know duo models once duorl is imported, without importing transformers.

    import duorl
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)

Our configuration, model and tokenizer are imported, and so registered, right after the modules that hold the Auto
classes.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder

_AFTER = {
    "transformers.models.auto.configuration_auto": "duorl.models.config",
    "transformers.models.auto.modeling_auto": "duorl.models.modeling",
    "transformers.models.auto.tokenization_auto": "duorl.models.auto_tokenizer",
}


class _Finder:
    """Finds these modules where they are, and imports ours after each."""

    def find_spec(self, name, path=None, target=None) -> ModuleSpec | None:
        """The module's own, if it is one of them."""
        if name not in _AFTER or (spec := PathFinder.find_spec(name, path, target)) is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module) -> None:
            execute(module)
            import_module(_AFTER[name])

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register duo models, now or as soon as the Auto classes are imported."""
    for name, ours in _AFTER.items():
        if name in sys.modules:
            import_module(ours)
    sys.meta_path.insert(0, _Finder())
