"""The suite's own transformer, on pixels of one size. `vlmedit.networks.dit.DiT` speaks our conventions, so it needs no adapter: it is a
backbone itself, with its text encoder inside."""

from __future__ import annotations

from vlmedit.networks.backbones._base import Family

FAMILY = Family(transformer="DiT", library="vlmedit.networks.dit", title="shapes", multiple=1)
