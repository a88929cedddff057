"""The exercises of the notebooks, one module per notebook: reference, cases and known mistakes of each.

The references are the package's own functions, or are proved equal to them by the tests.
"""

from vlmedit.exercises.dmd import DMD_GRADIENT, DMD_LOSS, FAKE_SCORE_LOSS
from vlmedit.exercises.flow import FLOW_LOSS, GUIDE, SAMPLE
from vlmedit.exercises.judge import ANSWER_LOSS, ASCEND, SEE
from vlmedit.exercises.rivals import CLIPPED_OBJECTIVE, GROUP_ADVANTAGE, RANDOM_STEP
from vlmedit.exercises.start import PSNR, RECOLORED
from vlmedit.exercises.unroll import NORM_PENALTY, ROLLOUT, TWO_CALL_SLOPE

__all__ = [
    "ANSWER_LOSS", "ASCEND", "CLIPPED_OBJECTIVE", "DMD_GRADIENT", "DMD_LOSS", "FAKE_SCORE_LOSS", "FLOW_LOSS",
    "GROUP_ADVANTAGE", "GUIDE", "NORM_PENALTY", "PSNR", "RANDOM_STEP", "RECOLORED", "ROLLOUT",
    "SAMPLE", "SEE", "TWO_CALL_SLOPE",
]  # fmt: skip
