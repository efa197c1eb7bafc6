"""Any function name can be imported from here; calling it raises."""

from collections.abc import Callable
from typing import Any, NoReturn


class ImageReadMode:
    UNCHANGED = 0
    GRAY = 1
    GRAY_ALPHA = 2
    RGB = 3
    RGB_ALPHA = 4


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"torchvision {name}: images are not available when serving on the CPU")

    missing.__name__ = name
    return missing
