"""What 0.1 had in one module, `rlhf_fast.report`: console and plot."""

from rlhf_fast.trainer.run.console import *  # noqa: F403
from rlhf_fast.trainer.run.plot import PANELS, plot  # noqa: F401
