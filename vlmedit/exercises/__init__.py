"""The exercises of the notebooks, one module per notebook: reference, cases and known mistakes of each.

The references are the package's own functions, or are proved equal to them by the tests.
"""

from vlmedit.exercises.start import PSNR, RECOLORED

__all__ = ["PSNR", "RECOLORED"]
