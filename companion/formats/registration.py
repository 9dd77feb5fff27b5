"""transformers told of the quantization method "companion", whichever of the two is imported first.

transformers looks for methods in two tables and knows no entry points. Importing it here would make
``import companion`` take seconds; so the tables are written to when they come to be. Built in
chapter 15.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder

TABLES = "transformers.quantizers.auto"
METHOD = "companion"


def register_with_transformers() -> None:
    """Register the method now if transformers has its tables, or else when it imports them.

    Examples
    --------
    >>> import transformers.quantizers.auto as tables
    >>> tables.AUTO_QUANTIZER_MAPPING["companion"].__name__
    'CompanionHfQuantizer'
    """
    if TABLES in sys.modules:
        _register()
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported:
    """Finds one module, as ever, and registers the method once that has run."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != TABLES:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module) -> None:
                run(module)
                _register()

            spec.loader.exec_module = run_and_register
        return spec


def _register() -> None:
    from companion.formats import quantizer

    auto = sys.modules[TABLES]
    complete = hasattr(quantizer, "CompanionHfQuantizer")  # else it asks again at its end
    if complete and METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(METHOD)(quantizer.CompanionConfig)
        auto.register_quantizer(METHOD)(quantizer.CompanionHfQuantizer)
