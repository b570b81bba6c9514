"""Other frameworks, one module each: how their users write normfused's layers. Nothing of theirs is imported before it is used.

``normfused.integrations.timm`` and the like are imported when they are first named.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

__all__: list[str] = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"normfused.integrations: name must be one of {', '.join(__all__)}, got {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return __all__
