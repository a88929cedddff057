"""The training loop and what it needs: processes, optimizers, checkpoints, logs."""

from vlmedit.extras import need

need("accelerate")
