"""Python's garbage collector, kept from stopping a conversation."""

from __future__ import annotations

import gc


def exempt_what_is_here() -> None:
    """Let the collector look only at what will be made from now on.

    From time to time it looks at every object there is. With PyTorch and models loaded that takes
    0.3 s, in which nothing else runs: a reply would stall, or come late.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
