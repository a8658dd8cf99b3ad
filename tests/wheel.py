"""The wheel beside the oldest and the newest torch that pyproject.toml allows: `make wheel-test`.

Built once, beside the torch of the environment that runs this, and installed in empty ones: what
torch's stable ABI promises, seen. Outside CI, because a torch is some GB to fetch.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCHES = ("torch==2.10.0", "torch")

SMOKE = """
import torch
import torch.nn.functional as F
import rlhf_fast
from rlhf_fast import info
from rlhf_fast.ops import registry

print("torch", torch.__version__, info.facts()["C++ kernels"])
assert registry.extension is not None, info.facts()["C++ kernels"]
for name, op in registry.OPS.items():  # every op's C++ kernels are there, beside this torch
    on_cpu = [kernel.implementation("cpu") for kernel in op.kernels]
    assert "PyTorch" not in on_cpu, (name, on_cpu)
    generator = torch.Generator().manual_seed(0)
    for sample in op.samples(generator):
        op.function(**sample.arguments)

torch.manual_seed(0)
logits, labels = torch.randn(8, 1000, requires_grad=True), torch.randint(1000, (8,))
loss = -rlhf_fast.token_logprobs(logits, labels).mean()
grad, = torch.autograd.grad(loss, logits)
expected = F.cross_entropy(logits, labels)
torch.testing.assert_close(loss, expected)
torch.testing.assert_close(grad, torch.autograd.grad(expected, logits)[0])
"""


def run(*command: str | Path, **options) -> subprocess.CompletedProcess:
    print("$", *(word if len(str(word)) < 100 else "…" for word in command), flush=True)
    return subprocess.run(command, check=True, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "torches", nargs="*", default=TORCHES, help="what pip installs (default: %(default)s)"
    )
    torches = parser.parse_args().torches
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, ROOT)
        (wheel,) = Path(folder).glob("*.whl")
        for i, torch in enumerate(torches):
            python = Path(folder, f"venv{i}", "bin", "python")
            run(sys.executable, "-m", "venv", python.parents[1])
            run(python, "-m", "pip", "install", "--quiet", torch)
            run(python, "-m", "pip", "install", "--quiet", wheel)
            run(python, "-c", SMOKE, cwd=folder)
            refused = subprocess.run(
                [python.with_name("rlhf-fast"), "ppo", "--help"], capture_output=True, text=True
            )
            assert refused.returncode == 2, refused
            # the last line: torch 2.10 warns of a NumPy that is not there in lines of its own
            assert "rlhf_fast[train]" in refused.stderr.splitlines()[-1], refused
            assert "Traceback" not in refused.stderr, refused
            run(python.with_name("rlhf-fast"), "info")
    print("the wheel works beside", *torches)


if __name__ == "__main__":
    main()
