from ..io import __getattr__  # noqa: F401  (any function name: one that raises)
from . import InterpolationMode  # noqa: F401
