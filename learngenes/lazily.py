"""diffusers, when something of it is needed: to import it takes a second, or three.

Modules of it that two threads import at once may see each other half made.
"""

import threading
from typing import Any

_importing = threading.RLock()


def from_diffusers(name: str) -> Any:
    with _importing:
        import diffusers

        return getattr(diffusers, name)
