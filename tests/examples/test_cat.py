"""The cat's grid: the slides' rules, and every rung of the ladder against dynamic programming."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import TimeLimit

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from cat import env, exact, ladder, simulate, variance  # noqa: E402
from cat.env import BATH, BROOM, MEAT, CatEnv, cell_of, move, state_of  # noqa: E402
from cat.ladder import GAMMA, LADDER  # noqa: E402

UP, DOWN, LEFT, RIGHT = range(4)
BY_NAME = {rung.name: rung for rung in LADDER}


# ------------------------------------------------------------------------------ the environment


@pytest.mark.parametrize("slip", [0.0, 0.3])
def test_gymnasium_has_no_complaint(slip: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(env.ID, slip=slip).unwrapped)


def test_the_slides_rewards() -> None:
    """For moving onto a cell: broom −1, bath −10 and over, meat +100 and over, else 0."""
    special = {BROOM: (-1.0, False), BATH: (-10.0, True), MEAT: (100.0, True)}
    assert (BROOM, BATH, MEAT, env.START) == ((0, 1), (3, 2), (4, 4), (0, 0))
    entered = set()
    for state in range(25):
        row, column = cell_of(state)
        beside = {UP: (row - 1, column), DOWN: (row + 1, column),
                  LEFT: (row, column - 1), RIGHT: (row, column + 1)}  # fmt: skip
        for action, target in beside.items():
            if min(target) < 0 or max(target) > 4:
                assert move((row, column), action) == ((row, column), 0.0, False)
            else:
                assert move((row, column), action) == (target, *special.get(target, (0.0, False)))
                entered.add(target)
    assert len(entered) == 25


def test_an_episode_by_hand() -> None:
    cat = CatEnv()
    assert cat.reset()[0] == 0
    steps = [cat.step(a) for a in (UP, RIGHT, UP, DOWN, RIGHT, DOWN, DOWN)]
    assert [s[0] for s in steps] == [0, 1, 1, 6, 7, 12, 17]  # the two walls hold
    assert [s[1] for s in steps] == [0, -1, 0, 0, 0, 0, -10]
    assert [s[2] for s in steps] == [False] * 6 + [True]
    assert not any(s[3] for s in steps)
    assert cat.reset()[0] == 0  # respawned


def test_a_time_limit_truncates_and_does_not_terminate() -> None:
    cat = TimeLimit(CatEnv(), 3)
    cat.reset()
    ends = [cat.step(UP)[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]
    assert gymnasium.make(env.ID).spec.max_episode_steps == ladder.STEPS


@pytest.mark.parametrize("slip, moved", [(0.0, 0.0), (0.4, 0.3), (1.0, 0.75)])
def test_slipping_takes_another_of_the_four_moves(slip: float, moved: float) -> None:
    cat = CatEnv(slip=slip)
    cat.reset(seed=0)
    elsewhere = 0
    for _ in range(1000):
        cat.cell = (2, 1)
        elsewhere += cat.step(DOWN)[0] != state_of((3, 1))
    assert elsewhere / 1000 == pytest.approx(moved, abs=4 * 0.5 / 1000**0.5 * (0 < slip))


def test_renderings() -> None:
    cat = CatEnv(render_mode="ansi")
    cat.reset()
    assert cat.render() == "C b . . .\n. . . . .\n. . . . .\n. . ~ . .\n. . . . m\n"
    cat.step(DOWN)
    assert cat.render() == ". b . . .\nC . . . .\n. . . . .\n. . ~ . .\n. . . . m\n"
    picture = env.picture((0, 0))
    assert picture.shape == (240, 240, 3) and picture.dtype == np.uint8
    changed = (picture != env.picture((1, 0))).any(-1)
    assert changed[:48, :48].any() and changed[48:96, :48].any()
    assert not changed[:, 48:].any() and not changed[96:].any()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="slip must be a probability, got 1.5"):
        CatEnv(slip=1.5)
    with pytest.raises(ValueError, match="render_mode must be"):
        CatEnv(render_mode="human")


class Scripted:
    """Stands in for a generator: gives the simulator's own draws."""

    def __init__(self, draws: list[float]) -> None:
        self.draws = iter(draws)

    def random(self) -> float:
        return next(self.draws)


@pytest.mark.parametrize("slip", [0.0, 0.3])
def test_the_simulator_takes_the_environments_steps(slip: float) -> None:
    seeds, episodes, limit = 2, 20, 30
    logits = torch.randn(seeds, 25, 4, generator=torch.Generator().manual_seed(0))
    noise = simulate.draw_noise(simulate.generators([3, 4]), episodes, limit)
    batch = simulate.play(logits, noise, slip)
    ended = cut = 0
    for s, n in np.ndindex(seeds, episodes):
        cat = TimeLimit(CatEnv(slip=slip), limit)
        state, _ = cat.reset()
        cat.unwrapped.np_random = Scripted(noise[s, n, :, 1].tolist())
        for t in range(int(batch.mask[s, n].sum())):
            assert batch.states[s, n, t] == state
            state, reward, terminated, truncated, _ = cat.step(int(batch.actions[s, n, t]))
            assert (batch.rewards[s, n, t], batch.dones[s, n, t]) == (reward, terminated)
        assert batch.last[s, n] == state and (terminated or truncated)
        assert not batch.mask[s, n, t + 1 :].any() and not batch.rewards[s, n, t + 1 :].any()
        ended, cut = ended + terminated, cut + truncated
    assert ended > 5 and cut > 5  # both kinds were there


def test_actions_follow_the_policy() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5]).expand(1, 25, 4)
    batch = simulate.play(logits, simulate.draw_noise(simulate.generators([0]), 400, 10), 0.0)
    counts = torch.bincount(batch.actions[batch.mask], minlength=4).float()
    expected = logits[0, 0].softmax(-1)
    error = (counts / counts.sum() - expected) / (expected * (1 - expected) / counts.sum()).sqrt()
    assert error.abs().max() < 4


# --------------------------------------------------------------------------- dynamic programming


def random_logits(seed: int = 0, spread: float = 0.7) -> torch.Tensor:
    return spread * torch.randn(25, 4, generator=torch.Generator().manual_seed(seed))


def random_policy(seed: int = 0) -> torch.Tensor:
    """Any logits, with a leaning down and right, so that a good share of the episodes eats."""
    return random_logits(seed) + torch.tensor([0.0, 1.0, 0.0, 1.0])


@pytest.mark.parametrize("slip", [0.0, 0.3])
def test_values_satisfy_bellmans_equation_cell_by_cell(slip: float) -> None:
    """V(s) = E[r + γV(s')], with the expectation spelled out from the environment's moves."""
    policy = random_policy().double().softmax(-1)
    values, q, _ = exact.solve(policy, slip, GAMMA)
    for state in range(25):
        outcomes = []
        for action in range(4):
            cell, reward, over = move(cell_of(state), action)
            outcomes.append(reward + GAMMA * (0.0 if over else values[state_of(cell)].item()))
        for action in range(4):
            expected = (1 - slip) * outcomes[action] + slip * sum(outcomes) / 4
            assert q[state, action].item() == pytest.approx(expected, abs=1e-10)
        assert values[state].item() == pytest.approx((policy[state] @ q[state]).item(), abs=1e-10)


def test_the_exact_gradient_is_the_derivative_of_the_exact_return() -> None:
    logits = random_policy().double().requires_grad_()
    (derivative,) = torch.autograd.grad(exact.expected_return(logits, 0.2, GAMMA), logits)
    torch.testing.assert_close(exact.gradient(logits.detach(), 0.2, GAMMA), derivative)


def test_the_surrogates_gradient_is_exact_and_the_true_one_at_the_old_policy() -> None:
    old, logits = random_policy(0).double(), random_policy(1).double().requires_grad_()
    values, q, visits = exact.solve(old.softmax(-1), 0.2, GAMMA)
    surrogate = (visits[:, None] * logits.softmax(-1) * (q - values[:, None])).sum()
    (derivative,) = torch.autograd.grad(surrogate, logits)
    torch.testing.assert_close(
        exact.surrogate_gradient(logits.detach(), old, 0.2, GAMMA), derivative
    )
    same = exact.surrogate_gradient(old, old, 0.2, GAMMA)
    torch.testing.assert_close(same, exact.gradient(old, 0.2, GAMMA))


def test_the_sober_optimum_is_eight_moves() -> None:
    best, policy = exact.optimum(0.0, GAMMA)
    assert best == pytest.approx(100 * GAMMA**7)
    cell, path = env.START, []
    while cell != MEAT:
        cell, _, _ = move(cell, int(policy[state_of(cell)].argmax()))
        path.append(cell)
    assert len(path) == 8 and BROOM not in path and BATH not in path


# -------------------------------------------------------------------------- critics and advantages


def many(logits: torch.Tensor, *, slip: float, batches: int = 500, steps: int = ladder.STEPS):
    """`batches` independent batches of 16 episodes of one policy: S plays the part of K."""
    noise = simulate.draw_noise(simulate.generators([1]), batches * ladder.EPISODES, steps)
    noise = noise.view(batches, ladder.EPISODES, steps, 2)
    return simulate.play(logits.expand(batches, -1, -1), noise, slip)


@pytest.mark.long
@pytest.mark.parametrize("slip", [0.0, 0.3])
def test_the_learnt_critic_is_dynamic_programmings_value(slip: float) -> None:
    """value_loss on the Monte-Carlo returns of 1000 episodes of one policy."""
    logits = random_policy()
    noise = simulate.draw_noise(simulate.generators([1]), 1000, ladder.STEPS)
    batch = simulate.play(logits[None], noise, slip)
    critic = torch.zeros(1, 25, requires_grad=True)
    old = ladder.remember(ladder.VALUE, logits[None], critic, batch)
    optimizer = torch.optim.Adam([critic], lr=2.0)
    for i in range(150):
        optimizer.param_groups[0]["lr"] = 2.0 * (1 - i / 150)
        _, loss = ladder.losses(ladder.VALUE, logits[None], critic, batch, old)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    values, _, _ = exact.solve(logits.double().softmax(-1), slip, GAMMA)
    returns = old[3]
    for state in range(25):
        at = returns[batch.states.eq(state) & batch.mask]
        if len(at) > 200:
            # visits of one episode hang together: count each four as one
            error = 4 * at.std().item() / (len(at) / 4) ** 0.5
            assert critic[0, state].item() == pytest.approx(values[state].item(), abs=error)
            assert critic[0, state].item() == pytest.approx(at.mean().item(), rel=0.02, abs=0.02)
    assert critic[0, state_of(MEAT)] == 0  # never stood on: nothing is learnt there


@pytest.mark.parametrize("bootstrap", [True, False])
def test_an_episode_cut_short_is_bootstrapped(bootstrap: bool) -> None:
    """Cut after 5 steps, returns average to V(start) only if V of the last cell is added."""
    logits = random_policy()
    values, _, _ = exact.solve(logits.double().softmax(-1), 0.1, GAMMA)
    batch = many(logits, slip=0.1, batches=200, steps=5)
    table = values.float().expand(len(batch.states), -1)
    at_last = ladder.value_of(ladder.VALUE, table, batch.last)
    _, returns = ladder.generalized(
        batch, ladder.value_of(ladder.VALUE, table, batch.states), at_last * bootstrap, lam=1.0
    )
    first = returns[..., 0].flatten().double()
    z = (first.mean() - values[0]) / (first.std() / len(first) ** 0.5)
    assert abs(z) < 4 if bootstrap else z < -20


def test_gae_at_0_is_td_and_at_1_is_monte_carlo_and_n_steps_are_in_between() -> None:
    """Against loops over the slides' formulas, one episode at a time."""
    logits, table = random_policy(), torch.linspace(-5, 20, 25)
    batch = many(logits, slip=0.2, batches=2, steps=12)
    critic = table.expand(2, -1)
    values, last = (ladder.value_of(ladder.VALUE, critic, s) for s in (batch.states, batch.last))
    td, _ = ladder.generalized(batch, values, last, lam=0.0)
    mc, returns = ladder.generalized(batch, values, last, lam=1.0)
    three, _ = ladder.n_step(batch, values, last, n=3)
    all_steps, _ = ladder.n_step(batch, values, last, n=50)
    cut = 0
    for s, i in np.ndindex(2, ladder.EPISODES):
        steps = int(batch.mask[s, i].sum())
        r = batch.rewards[s, i, :steps].tolist()
        over = bool(batch.dones[s, i].any())
        cut += not over
        v = [*values[s, i, :steps].tolist(), 0.0 if over else last[s, i].item()]
        for t in range(steps):

            def advantage(n: int, t=t, steps=steps, r=r, v=v) -> float:
                n = min(n, steps - t)
                seen = sum(GAMMA**k * r[t + k] for k in range(n))
                return GAMMA**t * (seen + GAMMA**n * v[t + n] - v[t])

            assert td[s, i, t].item() == pytest.approx(advantage(1), abs=1e-4)
            assert three[s, i, t].item() == pytest.approx(advantage(3), abs=1e-4)
            assert mc[s, i, t].item() == pytest.approx(advantage(steps), abs=1e-4)
            to_go = advantage(steps) / GAMMA**t + v[t]
            assert returns[s, i, t].item() == pytest.approx(to_go, abs=1e-3)
    torch.testing.assert_close(all_steps, mc, rtol=1e-4, atol=1e-4)
    assert 0 < cut < 2 * ladder.EPISODES


# ---------------------------------------------------------------------------- gradients, unbiased

SLIP = 0.1
OLD, NEW = random_policy(0), random_policy(0) + random_logits(5, 0.25)
EXACT_CRITIC = exact.solve(NEW.double().softmax(-1), SLIP, GAMMA)[0].float()
OLD_CRITIC = exact.solve(OLD.double().softmax(-1), SLIP, GAMMA)[0].float()
WRONG_CRITIC = EXACT_CRITIC + 20 * torch.cos(torch.arange(25.0))


@pytest.fixture(scope="module")
def played() -> tuple[simulate.Batch, simulate.Batch]:
    return many(NEW, slip=SLIP, batches=600), many(OLD, slip=SLIP, batches=600)


def estimates(rung: ladder.Rung, played, critic: torch.Tensor) -> torch.Tensor:
    at = variance.Snapshot(0, NEW, OLD, critic)
    return variance.gradients(rung, at, SLIP, *played)


def chi_square(gradients: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean squared z over the 92 logits of cells the cat can stand on: 1, if unbiased."""
    gradients, truth = (x.flatten(-2)[..., VISITED] for x in (gradients, truth))
    error = gradients.std(0) / len(gradients) ** 0.5
    return (((gradients.mean(0) - truth) / error) ** 2).mean().item()


VISITED = [s * 4 + a for s in range(25) for a in range(4) if cell_of(s) not in env.ENDS]
UNBIASED = 1.7  # five unbiased rungs at 12 seeds: 0.66 to 1.52; the biased ones: 15 and above


@pytest.mark.parametrize("name", ["REINFORCE", "rewards-to-go", "baseline", "value function"])
@pytest.mark.parametrize("critic", [EXACT_CRITIC, WRONG_CRITIC], ids=["exact", "wrong"])
def test_monte_carlo_rungs_are_unbiased_with_any_critic(name, critic, played) -> None:
    found = estimates(BY_NAME[name], played, critic)
    assert chi_square(found, exact.gradient(NEW, SLIP, GAMMA)) < UNBIASED
    ends = [state_of(BATH), state_of(MEAT)]
    assert (found[:, ends] == 0).all()


@pytest.mark.parametrize("name", ["5-step", "GAE"])
def test_rungs_that_bootstrap_are_unbiased_with_the_exact_critic_only(name, played) -> None:
    truth = exact.gradient(NEW, SLIP, GAMMA)
    assert chi_square(estimates(BY_NAME[name], played, EXACT_CRITIC), truth) < UNBIASED
    assert chi_square(estimates(BY_NAME[name], played, WRONG_CRITIC), truth) > 3


def test_one_ratio_a_token_estimates_the_surrogate_and_not_the_policys_gradient(played) -> None:
    found = estimates(ladder.OFF_POLICY, played, OLD_CRITIC)
    assert chi_square(found, exact.surrogate_gradient(NEW, OLD, SLIP, GAMMA)) < UNBIASED
    assert chi_square(found, exact.gradient(NEW, SLIP, GAMMA)) > 3


def test_the_product_of_ratios_is_unbiased_and_noisier(played) -> None:
    truth = exact.gradient(NEW, SLIP, GAMMA)
    product = estimates(ladder.WHOLE_RATIO, played, EXACT_CRITIC)
    assert chi_square(product, truth) < UNBIASED
    on_policy = estimates(ladder.VALUE, played, EXACT_CRITIC)
    assert product.var(0).sum() > 1.5 * on_policy.var(0).sum()


def test_ppo_without_its_clip_and_entropy_is_the_rung_below(played) -> None:
    bare = replace(ladder.PPO, clip=None, entropy_coef=0.0)
    same = estimates(ladder.OFF_POLICY, played, OLD_CRITIC)
    torch.testing.assert_close(estimates(bare, played, OLD_CRITIC), same, rtol=0, atol=0)
    clipped = estimates(replace(bare, clip=0.05), played, OLD_CRITIC)
    assert chi_square(clipped, exact.surrogate_gradient(NEW, OLD, SLIP, GAMMA)) > 3


def test_the_slides_ratio_of_logs_is_no_gradient(played) -> None:
    """∇ log π / log π_old · Â, as the slide has it, against π/π_old · Â ∇ log π."""
    _, batch = played
    size = len(batch.states)
    expanded = OLD.expand(size, -1, -1), OLD_CRITIC.expand(size, -1)
    old_logp, _, credit, _ = ladder.remember(ladder.OFF_POLICY, *expanded, batch)
    logits = NEW.expand(size, -1, -1).clone().requires_grad_()
    logp, _ = ladder.log_probs(logits, batch)
    objective = (logp / old_logp * credit * batch.mask).sum() / ladder.EPISODES
    (slides,) = torch.autograd.grad(objective, logits)
    truth = exact.gradient(NEW, SLIP, GAMMA)
    right = variance.estimate(estimates(ladder.OFF_POLICY, played, OLD_CRITIC), truth)
    wrong = variance.estimate(slides.double(), truth)
    assert right.cosine > 0.95
    assert wrong.cosine < 0.0  # log π_old is negative: it even turns the direction round


@pytest.mark.parametrize(
    "spoil",
    [
        lambda batch: replace(batch, rewards=batch.rewards.roll(1, -1)),
        lambda batch: replace(batch, actions=batch.actions.flip(1)),
    ],
    ids=["rewards one late", "actions of another episode"],
)
def test_the_check_can_fail(spoil, played) -> None:
    spoilt = tuple(map(spoil, played))
    found = estimates(ladder.VALUE, spoilt, EXACT_CRITIC)
    assert chi_square(found, exact.gradient(NEW, SLIP, GAMMA)) > 3


def test_without_discounts_it_is_no_longer_the_gradient_of_j(played, monkeypatch) -> None:
    monkeypatch.setattr(ladder, "discounts", lambda batch: torch.ones(batch.rewards.shape[-1]))
    found = estimates(ladder.VALUE, played, EXACT_CRITIC)
    assert chi_square(found, exact.gradient(NEW, SLIP, GAMMA)) > 3


# ------------------------------------------------------------------------------------- training


def test_each_rung_changes_little() -> None:
    """At most one thing a rung; PPO's three belong together."""
    from dataclasses import fields

    for below, rung in zip(LADDER, LADDER[1:], strict=False):
        changed = {
            f.name for f in fields(rung)
            if f.name != "name" and getattr(below, f.name) is not getattr(rung, f.name)
        }  # fmt: skip
        allowed = {"clip", "value_clip", "entropy_coef"} if rung is ladder.PPO else None
        assert changed == allowed if allowed else len(changed) == 1, rung.name


@pytest.mark.long
def test_ppo_reaches_dynamic_programmings_optimum() -> None:
    """Sober, most seeds' likeliest moves are optimal; the others step over the broom, for −1."""
    for slip, sampled in ((0.0, 0.98), (SLIP, 0.965)):
        result = ladder.train(ladder.PPO, seeds=list(range(10)), batches=120, slip=slip)
        best, _ = exact.optimum(slip, GAMMA)
        assert (result.returns[:, 0] < 1).all() and (result.returns[:, -1] > sampled * best).all()
        greedy = torch.nn.functional.one_hot(result.logits[-1].argmax(-1), 4)
        likeliest = exact.solve(greedy, slip, GAMMA)[0][:, state_of(env.START)]
        if slip == 0:
            optimal = (likeliest - best).abs() < 1e-9
            assert optimal.sum() >= 7
            torch.testing.assert_close(
                likeliest[~optimal], torch.full_like(likeliest[~optimal], best - 1)
            )


@pytest.mark.long
def test_each_rung_learns_and_a_seed_is_itself_in_any_company() -> None:
    for rung in LADDER:
        together = ladder.train(rung, seeds=[5, 6, 7], batches=12, slip=SLIP)
        alone = ladder.train(rung, seeds=[6], batches=12, slip=SLIP)
        assert (together.returns[:, -1] > together.returns[:, 0] + 5).all(), rung.name
        torch.testing.assert_close(together.returns[1:2], alone.returns, rtol=1e-4, atol=1e-4)
    again = ladder.train(rung, seeds=[5, 6, 7], batches=12, slip=SLIP)
    torch.testing.assert_close(again.returns, together.returns, rtol=0, atol=0)


@pytest.mark.long
def test_variance_falls_where_it_should() -> None:
    run = ladder.train(ladder.GAE, seeds=[0], batches=40, slip=SLIP)
    at = variance.snapshot(run, 40)
    found = variance.measure(LADDER, at, batches=150, slip=SLIP, seed=0)
    names = ("rewards-to-go", "value function", "GAE")
    to_go, value, gae = (found[name].variance for name in names)
    assert to_go > 5 * value and value > 1.2 * gae
    assert found["baseline"].bias <= 2 * found["baseline"].bias_error


def test_estimate_by_hand() -> None:
    noise = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]]).double()
    found = variance.estimate(noise + torch.tensor([2.0, 1.0]), torch.tensor([2.0, 0.0]).double())
    assert found.variance == pytest.approx((18 + 2) / 3 / 4)
    assert found.bias_error == pytest.approx((20 / 3 / 4) ** 0.5 / 2)
    assert found.bias == pytest.approx(max(0, 1 - 20 / 3 / 4) ** 0.5 / 2)
    assert found.cosine == pytest.approx(2 / 5**0.5)


@pytest.mark.long
def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "cat_gridworld.py", "--quick", "--out", tmp_path / "cat"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for rung in LADDER:
        assert done.stdout.count(rung.name) >= 2  # in both tables
    made = {path.name for path in (tmp_path / "cat").iterdir()}
    assert made == {"returns.png", "variance.png", "importance.png", "path.gif"}
    from PIL import Image

    assert Image.open(tmp_path / "cat" / "path.gif").n_frames > 2
