"""Notebooks: what they ask, how they are run, copied and packed."""

from vlmedit.extras import need

need("nbformat")
