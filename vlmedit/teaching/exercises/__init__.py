"""The exercises of the notebooks, one module per notebook: reference, cases and known mistakes of each.

The references are the package's own functions, or are proved equal to them by the tests.
"""

from vlmedit.teaching.exercises.dmd import DMD_GRADIENT, DMD_LOSS, FAKE_SCORE_LOSS
from vlmedit.teaching.exercises.evaluation import CALIBRATION_ERROR, HACKING_GAP, VIESCORE, WILSON_INTERVAL
from vlmedit.teaching.exercises.flow import FLOW_LOSS, GUIDE, SAMPLE
from vlmedit.teaching.exercises.judge import ANSWER_LOSS, ASCEND, SEE
from vlmedit.teaching.exercises.kernels import GATED_BLOCK, MODULATION_BACKWARD, NORMED_ROW
from vlmedit.teaching.exercises.npedit import FAKE_LOSS, NOTHING_LOSS, SEND_BACK
from vlmedit.teaching.exercises.real import PACK, STANDING, TWO_ROW_MARGIN
from vlmedit.teaching.exercises.rivals import CLIPPED_OBJECTIVE, GROUP_ADVANTAGE, RANDOM_STEP
from vlmedit.teaching.exercises.start import PSNR, RECOLORED
from vlmedit.teaching.exercises.unroll import NORM_PENALTY, ROLLOUT, TWO_CALL_SLOPE

__all__ = [
    "ANSWER_LOSS", "ASCEND", "CALIBRATION_ERROR", "CLIPPED_OBJECTIVE", "DMD_GRADIENT", "DMD_LOSS", "FAKE_LOSS",
    "FAKE_SCORE_LOSS", "FLOW_LOSS", "GATED_BLOCK", "GROUP_ADVANTAGE", "GUIDE", "HACKING_GAP", "MODULATION_BACKWARD",
    "NORMED_ROW", "NORM_PENALTY", "NOTHING_LOSS",
    "PACK", "PSNR", "RANDOM_STEP", "RECOLORED", "ROLLOUT", "SAMPLE", "SEE", "SEND_BACK", "STANDING",
    "TWO_CALL_SLOPE", "TWO_ROW_MARGIN", "VIESCORE", "WILSON_INTERVAL",
]  # fmt: skip
