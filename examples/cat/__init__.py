"""The slides' cat, on the ops the language model uses; `examples/cat_gridworld.py` is the command.

env.py         the grid as a gymnasium Env
simulate.py    many cats at once, on tensors; the same steps
exact.py       dynamic programming: what every estimate is measured against
ladder.py      REINFORCE to PPO, each rung one change to the rung before
variance.py    noise and bias of each rung's gradient, at the same policies
figures.py     the pictures
"""
