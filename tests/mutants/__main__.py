"""make mutants: puts each mutant of list.py into a copy of the tree and runs its tests.

One that its tests fail on is noticed. The command fails below 95 %. Words given choose those whose
file or name has one of them: ``python tests/mutants kernels/ gae``.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from mutants.list import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
LEAST = 0.95


def copied(to: Path) -> Path:
    """The tree as git has it with what was changed, the kernels built in it."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).splitlines():
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    (to / "rlhf_fast" / "kernels").symlink_to(to / "kernels")  # as it is installed
    return to


def environment(tree: Path, **more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # for ninja
    return {**os.environ, "PATH": path, "PYTHONPATH": str(tree), **more}


def build(tree: Path) -> bool:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree, env=environment(tree), capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-2000:])
    return done.returncode == 0


def passes(tree: Path, tests: str) -> bool:
    """Whether these tests run and pass (one may end the interpreter by a write out of bounds); one
    that was selected by no test is a mistake of ours."""
    interpreted = {"TRITON_INTERPRET": "1"} if "triton_interpreter" in tests else {}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *shlex.split(tests)], cwd=tree, env=environment(tree, **interpreted),
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode > 1:
        raise SystemExit(f"pytest {tests}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.returncode == 0


def together(selections: Iterable[str]) -> list[str]:
    """One run for all selections of the same files: starting one takes as long as its tests."""
    words: dict[str, set[str]] = {}
    for selection in selections:
        files, _, chosen = selection.partition(" -k ")
        words.setdefault(files, set()).add(shlex.split(chosen)[0] if chosen else "")
    return [
        files
        if "" in some
        else f"{files} -k {shlex.quote(' or '.join(map('({})'.format, sorted(some))))}"
        for files, some in words.items()
    ]


def notices(tree: Path, mutant: Mutant) -> bool:
    file = tree / mutant.file
    text = file.read_text(encoding="utf-8")
    compiled = mutant.file.startswith("csrc/")
    file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        if compiled and not build(tree):
            raise SystemExit(f"{mutant.name} does not compile")
        return not passes(tree, mutant.tests)
    finally:
        file.write_text(text, encoding="utf-8")


def main(words: list[str]) -> None:
    chosen = [m for m in MUTANTS if not words or any(w in f"{m.file} {m.name}" for w in words)]
    lived = []
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(Path(folder).resolve())
        if not build(tree):
            raise SystemExit("the kernels cannot be built")
        for tests in together(m.tests for m in chosen):
            if not passes(tree, tests):
                raise SystemExit(f"without any mutant these tests fail: pytest {tests}")
        for mutant in chosen:
            began = time.perf_counter()
            noticed = notices(tree, mutant)
            if not noticed:
                lived.append(mutant)
            seconds = f"{time.perf_counter() - began:.0f} s"
            print(f"{'noticed' if noticed else 'LIVED'}  {mutant.file}: {mutant.name}  ({seconds})",
                  flush=True)  # fmt: skip
    share = 1 - len(lived) / len(chosen)
    print(f"{len(chosen) - len(lived)} of {len(chosen)} mutants noticed, {share:.0%}")
    raise SystemExit(share < LEAST)


if __name__ == "__main__":
    main(sys.argv[1:])
