"""A port for the processes of an engine, where programs that start many side by side do not meet."""

from __future__ import annotations

import os


def own_port() -> int:
    """Below the ports that systems hand out: SGLang asks for one of those half a minute before it binds it."""
    return 20_000 + os.getpid() % 10_000
