"""Functions that a person names, `file.py:function` or `module:function`, and calls of them."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.util
import inspect
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from rich.markup import escape

from rlhf_fast.trainer.errors import Ended, InputError
from rlhf_fast.trainer.run.console import console

FUNCTION = re.compile(r"(.+):([A-Za-z_]\w*)")
LAST_WORDS = 1.0  # seconds that what is cancelled has to end
PATIENCE = 60.0  # seconds until a call that does not return is named; then twice as long each time

folders: set[Path] = set()  # of the files that were run: what lies beside one, it can import


def load_function(spec: str, field: str, ran: dict[Path, ModuleType] | None = None) -> Callable:
    """The function that `spec` names. ran: files that were run already, which are not run again."""
    named = FUNCTION.fullmatch(spec)
    if not named:
        raise InputError(f"{field}={spec}: expected file.py:function or module:function")
    module, name = named.groups()
    try:
        if module.endswith(".py"):
            path = Path(module).expanduser()
            if not path.is_file():
                raise InputError(f"{field}={spec}: there is no file {module}")
            path, ran = path.resolve(), {} if ran is None else ran
            loaded = ran[path] = ran.get(path) or run_file(path)
        else:
            if "" not in sys.path:  # a console script, unlike `python -m`, leaves out the folder
                sys.path.insert(0, "")  # one stands in
            loaded = importlib.import_module(module)
    except InputError:
        raise
    except Ended:  # a signal's
        raise
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        raise InputError(
            f"{field}={spec}: {module} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    function = getattr(loaded, name, None)
    if not callable(function):
        raise InputError(f"{field}={spec}: {module} has no function {name}")
    return function


def source_of(spec: str) -> Path | None:
    """The file that a function's spec names, once it was loaded."""
    named = FUNCTION.fullmatch(spec)
    if not named:
        return None
    if named[1].endswith(".py"):
        path = Path(named[1]).expanduser()
    else:
        path = Path(getattr(sys.modules.get(named[1]), "__file__", None) or "")
    return path if path.is_file() else None


class FromSource(SourceFileLoader):
    """Compiles anew: Python's cache takes an edit of the same second and length for none."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def run_file(path: Path) -> ModuleType:
    """A file as a module like others: known to pickle and dataclasses, importing its neighbours.

    Run anew each time: its state is that of one run, and it may have been edited since the last.
    """
    name = module_name(path)
    loader = FromSource(name, str(path))
    found = importlib.util.spec_from_file_location(name, path, loader=loader)
    module = importlib.util.module_from_spec(found)
    forget_namesakes(path.parent)
    sys.modules[name] = module
    folder = str(path.parent)
    sys.path.insert(0, folder)  # as `python file.py` does
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:  # at the end, for imports inside of functions and processes:
            sys.path.append(folder)  # it must not stand before what the trainer imports later
    folders.add(path.parent)
    return module


def module_name(path: Path) -> str:
    """The file's own, which other processes can import, unless another module has it."""
    name = re.sub(r"\W", "_", path.stem)
    known = sys.modules.get(name)
    if known is not None:
        free = Path(getattr(known, "__file__", None) or "") == path
    else:
        found = importlib.util.find_spec(name)
        free = found is None or Path(found.origin or "") == path
    return name if free else f"{name}_{hashlib.blake2b(str(path).encode()).hexdigest()[:8]}"


def forget_namesakes(folder: Path) -> None:
    """Two files' neighbours may have one name: each file is to import its own."""
    for neighbour in folder.iterdir():
        known = sys.modules.get(neighbour.stem)
        file = Path(getattr(known, "__file__", None) or "")
        if file.parent in folders - {folder} or file.parent.parent in folders - {folder}:
            del sys.modules[neighbour.stem]


def call(function: Callable, arguments: dict[str, Any], who: str, timeout: float | None) -> Any:
    """function(**arguments); an async one is awaited. What it raises is an error with its line."""
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise InputError(
            f"{who} cannot be called with {', '.join(arguments)}: {error}; "
            "expected a function of (prompts, completions, **columns)"
        ) from None
    except ValueError:  # a function of C has no signature to check
        pass
    try:
        with named_if_slow(who), at_most(timeout):
            result = function(**arguments)
            return awaited(result) if inspect.isawaitable(result) else result
    except TimedOut:
        raise InputError(f"{who} took longer than reward_timeout={timeout} seconds") from None
    except Ended:  # a signal's
        raise
    except (Exception, SystemExit) as error:  # whatever the user's function raises
        raise InputError(f"{who} raised {reason_of(error, function)}") from error


def reason_of(error: BaseException, function: Callable) -> str:
    """What was raised, and the line of the function's own file."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename == getattr(code_of(function), "co_filename", None)]
    at = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    return " ".join(f"{type(error).__name__}: {error}".split()) + at


def code_of(function: Callable) -> Any:
    return getattr(inspect.unwrap(function), "__code__", None)


def awaited(result: Any) -> Any:
    async def wait() -> Any:
        return await result

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return run(wait())
    with ThreadPoolExecutor(1) as pool:  # a notebook's loop runs already, and one thread has one
        return pool.submit(run, wait()).result()


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """asyncio.run, but tasks and threads that do not end when they are told to are left behind:
    that would wait for them as long as they like."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(main)
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left, timeout=LAST_WORDS))
        for task in asyncio.all_tasks(loop):
            task._log_destroy_pending = False  # as asyncio.gather says it of its own
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


@contextmanager
def named_if_slow(who: str) -> Iterator[None]:
    """Nobody should have to guess what a run is waiting for."""
    done = threading.Event()

    def watch() -> None:
        waited = PATIENCE
        while not done.wait(waited if waited == PATIENCE else waited / 2):
            console.print(f"[bold yellow]{escape(who)} has not returned for {waited:g} s[/]")
            waited *= 2

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


class TimedOut(BaseException):
    """Not an Exception: a function that catches those and tries again must not catch this one."""


@contextmanager
def at_most(seconds: float | None) -> Iterator[None]:
    """Raises TimedOut inside, by an alarm: functions with alarms of their own replace it."""
    if seconds is None:
        yield
        return
    if not can_ring():
        raise InputError("reward_timeout needs Unix and training in the process's main thread")

    def ring() -> None:
        raise TimedOut

    with alarm(seconds, 0, ring):
        yield


def can_ring() -> bool:
    in_main = threading.current_thread() is threading.main_thread()
    return in_main and hasattr(signal, "SIGALRM")


@contextmanager
def alarm(seconds: float, again: float, ring: Callable[[], None]) -> Iterator[None]:
    """Calls ring in the main thread, whatever that does, after so many seconds, and again after
    that so often."""
    before = signal.signal(signal.SIGALRM, lambda number, frame: ring())
    signal.setitimer(signal.ITIMER_REAL, seconds, again)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
