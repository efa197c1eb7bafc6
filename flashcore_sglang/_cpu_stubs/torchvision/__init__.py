"""Stand-in for torchvision: can be imported, has no image operation."""

from . import io, transforms

__version__ = "0.28.0"
__all__ = ["io", "transforms"]
