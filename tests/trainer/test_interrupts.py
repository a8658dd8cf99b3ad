"""Signals: what was learnt is saved, the last line says so, the exit code is the scheduler's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_fast.trainer import cli, ppo, reward
from rlhf_fast.trainer.config import PPOConfig, RewardConfig
from rlhf_fast.trainer.rollout.sample import sample
from rlhf_fast.trainer.run import interrupts, lock
from rlhf_fast.trainer.run.folder import Run, read_metrics
from rlhf_fast.trainer.update import Stepper

HANDLERS = {number: signal.getsignal(number) for number in (*interrupts.ENDING, signal.SIGHUP)}


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert {number: signal.getsignal(number) for number in HANDLERS} == HANDLERS
    assert not lock.held and sys.stdout is not None


def checkpoints(config: PPOConfig | RewardConfig) -> list[int]:
    return list(Run(type(config)(**vars(config) | {"resume": True})).checkpoints())


def rows(config: PPOConfig | RewardConfig) -> list[int]:
    return [row["step"] for row in read_metrics(Path(config.output_dir) / "metrics.jsonl")]


def interrupting(number: int, call: int):
    """A rollout engine in whose call of this number a signal comes."""
    calls = iter(range(1, 99))

    def engine(*arguments):
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return sample(*arguments)

    return engine


def during_update(monkeypatch, number: int, call: int, times: int = 1) -> None:
    whole, calls = Stepper.step, iter(range(1, 99))

    def step(self, loss):
        if next(calls) == call:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return whole(self, loss)

    monkeypatch.setattr(Stepper, "step", step)


CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 138, signal.SIGXCPU: 152}


def run(train, config, **options) -> tuple[int, str]:
    """(exit code, the message) as the command line has them."""
    try:
        train(config, **options)
    except KeyboardInterrupt as error:
        return 130, str(error)
    except SystemExit as error:
        return error.code, ""
    return 0, ""


@pytest.fixture(autouse=True)
def interruptible():
    """What a shell runs in the background has SIGINT ignored, and what is ignored stays so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_before_the_update_of_a_step(configured, capsys, number):
    """The step is dropped, the weights are those of the step before."""
    config = configured(steps=5)
    code, text = run(ppo.train, config, engine=interrupting(number, call=3))
    assert code == CODES[number] and checkpoints(config) == [2] and rows(config) == [1, 2]
    said = text or capsys.readouterr().err
    assert "--resume goes on from the checkpoint of step 2" in said


ENDED = """
import os, signal
calls = 0
def ended():
    global calls
    calls += 1
    if calls == 4:  # held-out prompts, then two steps
        os.kill(os.getpid(), signal.SIGTERM)

def plain(prompts, completions, **columns):
    ended()
    return [1.0] * len(prompts)

async def one(first):
    if first:
        ended()
    return 1.0

def awaited(prompts, completions, **columns):
    return [one(row == 0) for row in range(len(prompts))]
"""


@pytest.mark.parametrize("who", ["plain", "awaited"])
def test_while_a_reward_is_waited_for(configured, tmp_path, who):
    """A signal is no error of the function that runs when it comes."""
    (tmp_path / "ended.py").write_text(ENDED)
    config = configured(steps=5, reward=f"{tmp_path / 'ended.py'}:{who}")
    assert run(ppo.train, config)[0] == 143
    assert checkpoints(config) == [2]


def test_the_same_numbers_as_without_a_signal(configured):
    whole, broken = configured("whole"), configured("broken")
    broken.data = whole.data
    ppo.train(whole, engine=sample)
    run(ppo.train, broken, engine=interrupting(signal.SIGTERM, call=3))
    broken.resume = True
    ppo.train(broken, engine=sample)
    models = [Path(c.output_dir, "model", "model.safetensors") for c in (whole, broken)]
    assert models[0].read_bytes() == models[1].read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_during_the_update(configured, monkeypatch, capsys, number):
    """The step is finished first: its weights are neither the old ones nor the new."""
    during_update(monkeypatch, number, call=6)  # of 4 in a step
    config = configured()
    code, text = run(ppo.train, config)
    assert code == CODES[number] and checkpoints(config) == [2] and rows(config) == [1, 2]
    said = capsys.readouterr()
    assert f"{number.name}: this step is finished and saved first" in said.out
    assert "--resume goes on from the checkpoint of step 2" in (text or said.err)


def test_a_second_signal_does_not_wait(configured, monkeypatch):
    during_update(monkeypatch, signal.SIGINT, call=6, times=2)
    config = configured(save_every=1)
    code, text = run(ppo.train, config)
    assert code == 130 and checkpoints(config) == [1] and rows(config) == [1]
    assert text == "interrupted; --resume goes on from the checkpoint of step 1"


def test_before_there_is_anything_to_save(configured):
    config = configured()
    assert run(ppo.train, config, engine=interrupting(signal.SIGINT, call=1)) == (
        130, "interrupted; there is no checkpoint yet",
    )  # fmt: skip
    assert checkpoints(config) == []


def test_while_the_results_are_written(configured, monkeypatch):
    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    config = configured(steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(ppo, "plot", interrupted)
        assert run(ppo.train, config)[0] == 143
    assert not [p.name for p in Path(config.output_dir).rglob("*partial")]
    assert not Path(config.output_dir, "plot.png").exists()
    config.resume = True
    ppo.train(config)
    assert Path(config.output_dir, "plot.png").exists() and rows(config) == [1]


def test_a_terminal_that_hangs_up_ends_nothing(configured):
    config = configured(steps=2)
    assert run(ppo.train, config, engine=interrupting(signal.SIGHUP, call=1)) == (0, "")
    assert rows(config) == [1, 2]


def test_handlers_of_the_user_stay(configured):
    came = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: came.append(number))
    try:
        run(ppo.train, configured(steps=1), engine=interrupting(signal.SIGUSR1, call=1))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert came == [signal.SIGUSR1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_the_reward_trainer(tiny_policy_folder, write_jsonl, tmp_path, monkeypatch, number):
    pairs = [{"chosen": f"the film {w}", "rejected": "the bad"} for w in ("good", "fun") * 6]
    config = RewardConfig(
        model=tiny_policy_folder, data=write_jsonl(pairs), output_dir=str(tmp_path / "run"),
        eval_pairs=2, batch_size=2, device="cpu",
    )  # fmt: skip
    during_update(monkeypatch, number, call=2)
    assert run(reward.train, config)[0] == CODES[number]
    assert checkpoints(config) == [2] and rows(config) == [1, 2]
    config.resume = True
    reward.train(config)
    assert rows(config) == [1, 2, 3]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt("interrupted; so it is"), 130, "rlhf-fast info: interrupted; so it is"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (interrupts.Ended(143), 143, ""),
    ],
)
def test_the_command_line(monkeypatch, capsys, error, code, words):
    def ends(argv):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "info", ends)
    assert cli.main(["info"]) == code
    assert capsys.readouterr().err.strip() == words


IMPORT = """
import signal, sys, threading, time, os
sys.argv, sys.orig_argv = ["-m"], ["python", "-m", "{module}", "ppo"]
threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
class Waits:  # in place of torch, whose import takes seconds
    def find_spec(self, name, *_):
        if name == "torch":
            try:
                time.sleep(20)
            except KeyboardInterrupt as error:
                raise ImportError("as libraries do") from error
sys.meta_path.insert(0, Waits())
import rlhf_fast
"""


@pytest.mark.parametrize(("module", "quiet"), [("rlhf_fast.cli", True), ("their.script", False)])
def test_while_torch_is_imported(module, quiet):
    """A command ends with one line; a program that imports the library is left as it is."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT.format(module=module)], capture_output=True, text=True
    )
    if quiet:
        assert done.returncode == 130 and done.stderr == "interrupted\n"
    else:
        assert "ImportError: as libraries do" in done.stderr


# -------------------------------------------------------------------------------------- the lock

HOLDER = """
import sys
from pathlib import Path
sys.modules["rlhf_fast"] = type(sys)("rlhf_fast")  # the lock needs no torch
sys.modules["rlhf_fast"].__path__ = [{package!r}]
import importlib.util, types
for name in ("trainer", "trainer.run"):
    module = types.ModuleType(f"rlhf_fast.{{name}}")
    module.__path__ = [f"{package}/{{name.replace('.', '/')}}"]
    sys.modules[f"rlhf_fast.{{name}}"] = module
from rlhf_fast.trainer.run import lock
lock.take(Path({folder!r}))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path/out."""
    (tmp_path / "out").mkdir()
    package = str(Path(interrupts.__file__).parents[2])
    code = HOLDER.format(package=package, folder=str(tmp_path / "out"))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("option", ["resume", "overwrite", None])
def test_a_folder_in_use(configured, holder, option):
    config = configured(**({option: True} if option else {}))
    before = list(Path(config.output_dir).iterdir())
    with pytest.raises(
        ValueError, match=f"in use by process {holder.pid} on {os.uname().nodename}"
    ):
        Run(config)
    assert list(Path(config.output_dir).iterdir()) == before


def test_the_lock_of_a_dead_process_is_taken(configured, holder):
    holder.kill()
    holder.wait()
    run = Run(configured())
    run.begin()
    text = (run.folder / lock.NAME).read_text()
    assert f'"pid": {os.getpid()}' in text
    lock.release()
    assert (run.folder / lock.NAME).read_text() == ""


def test_taken_while_the_models_were_loaded(configured, tmp_path, holder):
    """Both started before either began: the lock is asked for again when it is taken."""
    aside = tmp_path / "out" / lock.NAME
    aside.rename(tmp_path / "aside")
    run = Run(configured())
    (tmp_path / "aside").rename(aside)
    with pytest.raises(ValueError, match=f"in use by process {holder.pid}"):
        run.begin()


def test_another_run_came_and_went_meanwhile(configured):
    run = Run(configured())
    Run(configured()).begin()
    lock.release()
    with pytest.raises(ValueError, match="was written to by another run .* start it again"):
        run.begin()
    lock.release()


def test_a_file_system_without_locks(configured, holder, monkeypatch):
    def without(*_):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", without)
    with pytest.raises(ValueError, match=f"in use by process {holder.pid}"):
        Run(configured())
    holder.kill()
    holder.wait()
    Run(configured()).begin()
    lock.release()
