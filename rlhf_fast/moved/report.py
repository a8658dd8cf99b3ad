from rlhf_fast.moved import moved

moved(__name__, "rlhf_fast.trainer.run.report")
