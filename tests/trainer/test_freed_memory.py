"""What is freed while training is used again, and goes back to the system afterwards."""

import ctypes
import resource

import pytest
import torch

from rlhf_fast.trainer import ppo, reward
from rlhf_fast.trainer.freed_memory import freed_memory_kept

SIZE = 2**26  # bytes: a block that glibc gives back once it is freed

pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another malloc than glibc's"
)


def faults() -> int:
    """Of pages, in making and freeing a large tensor three times, and many small ones."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(SIZE // 4)
        many = [torch.ones(SIZE // 4 // 64) for _ in range(64)]
        del many
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    """Bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_freed_memory_is_used_again_and_goes_back_at_the_end() -> None:
    before = faults()
    with freed_memory_kept():
        faults()
        kept, held = faults(), resident()
    assert kept * 10 < before
    assert resident() < held - SIZE / 2
    assert faults() > 10 * kept


@pytest.mark.parametrize("which", ["ppo", "reward"])
def test_in_training(which, configured, write_jsonl, tiny_policy_folder, tmp_path) -> None:
    before, during = faults(), []

    def measure(*_: object) -> None:
        faults()
        during.append(faults())

    if which == "ppo":
        config, train = configured(steps=1), ppo.train
    else:
        pairs = write_jsonl([{"chosen": "good film", "rejected": "bad film"}] * 16)
        config = reward.RewardConfig(
            model=tiny_policy_folder, data=pairs, eval_pairs=4, device="cpu", batch_size=12,
            output_dir=str(tmp_path / "out"),
        )  # fmt: skip
        train = reward.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "zero_grad", measure)
        train(config)
    assert max(during) * 10 < before
