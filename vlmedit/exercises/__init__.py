"""The exercises of the notebooks, one module per notebook: reference, cases and known mistakes of each.

The references are the package's own functions, or are proved equal to them by the tests.
"""

from vlmedit.exercises.dmd import DMD_GRADIENT, DMD_LOSS, FAKE_SCORE_LOSS
from vlmedit.exercises.evaluation import CALIBRATION_ERROR, HACKING_GAP, VIESCORE, WILSON_INTERVAL
from vlmedit.exercises.flow import FLOW_LOSS, GUIDE, SAMPLE
from vlmedit.exercises.judge import ANSWER_LOSS, ASCEND, SEE
from vlmedit.exercises.kernels import GATED_BLOCK, MODULATION_BACKWARD, NORMED_ROW
from vlmedit.exercises.npedit import FAKE_LOSS, NOTHING_LOSS, SEND_BACK
from vlmedit.exercises.real import PACK, STANDING, TWO_ROW_MARGIN
from vlmedit.exercises.rivals import CLIPPED_OBJECTIVE, GROUP_ADVANTAGE, RANDOM_STEP
from vlmedit.exercises.start import PSNR, RECOLORED
from vlmedit.exercises.unroll import NORM_PENALTY, ROLLOUT, TWO_CALL_SLOPE

__all__ = [
    "ANSWER_LOSS", "ASCEND", "CALIBRATION_ERROR", "CLIPPED_OBJECTIVE", "DMD_GRADIENT", "DMD_LOSS", "FAKE_LOSS",
    "FAKE_SCORE_LOSS", "FLOW_LOSS", "GATED_BLOCK", "GROUP_ADVANTAGE", "GUIDE", "HACKING_GAP", "MODULATION_BACKWARD",
    "NORMED_ROW", "NORM_PENALTY", "NOTHING_LOSS",
    "PACK", "PSNR", "RANDOM_STEP", "RECOLORED", "ROLLOUT", "SAMPLE", "SEE", "SEND_BACK", "STANDING",
    "TWO_CALL_SLOPE", "TWO_ROW_MARGIN", "VIESCORE", "WILSON_INTERVAL",
]  # fmt: skip
