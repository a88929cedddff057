"""Whether the model Hub can be reached, so that nothing waits for it in vain."""

from __future__ import annotations

import functools
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants


def looks_like_id(place: str) -> bool:
    """Whether this is no folder but reads OWNER/NAME, as an id of the Hub does."""
    return place.count("/") == 1 and all(place.split("/")) and not place.startswith((".", "~")) and not Path(place).exists()


@functools.cache
def reachable() -> bool:
    """Whether the Hub answers, asked once: its client alone would try half a minute for every file. Behind a proxy it is believed to."""
    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname, address.port or (80 if address.scheme == "http" else 443)), timeout=5).close()
    except OSError:
        return False
    return True
