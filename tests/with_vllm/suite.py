"""vLLM in this process, and as a server: `make test-vllm`, in its own environment."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_fast.trainer import ppo
from rlhf_fast.trainer.conformance import PROMPTS, check_engine, is_greedy, running
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.models.lora import LoRA
from rlhf_fast.trainer.models.policy import load_policy
from rlhf_fast.trainer.rollout.protocol import Sampling
from rlhf_fast.trainer.rollout.vllm_in_process import VLLMEngine
from rlhf_fast.trainer.rollout.vllm_server import VLLMServerEngine
from rlhf_fast.trainer.run.folder import read_metrics


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB


@pytest.fixture
def model_folder(tmp_path, tiny_tokenizer):
    """A random Llama whose heads have a size that vLLM's kernels know."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=128,
        initializer_range=0.2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


SERVER = {"max_model_len": 128}


@pytest.mark.parametrize("kind", [VLLMEngine, partial(VLLMServerEngine, **SERVER)])
def test_conformance(model_folder, tiny_tokenizer, kind, tmp_path, monkeypatch):
    # With nothing in the cache vLLM has torch compile something, by threads that must end, too.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    model = LlamaForCausalLM.from_pretrained(model_folder).eval()
    check_engine(lambda: kind(model, tiny_tokenizer), model, gap=1e-3)


def no_weights():
    raise AssertionError("the merged weights are asked for")
    yield


@pytest.mark.parametrize("kind", [VLLMEngine, partial(VLLMServerEngine, **SERVER)])
def test_adapters_alone(model_folder, tiny_tokenizer, kind):
    """New ones count, and nothing but them is sent."""
    model = load_policy(
        model_folder, trainable_layers=None, device=torch.device("cpu"), lora=LoRA(4, 8.0, None, 0)
    ).model
    before = running()
    engine = kind(model, tiny_tokenizer, enable_lora=True)
    try:
        for _ in range(3):
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if "lora_B" in name:
                        p.normal_(std=0.3)
            engine.sync(no_weights())
            whole = Sampling(6, 0.0, [])
            is_greedy(engine.generate(PROMPTS, whole, 0), model, PROMPTS, gap=1e-3)
    finally:
        engine.close()
    assert running()["processes"] <= before["processes"]


def test_a_run_with_adapters_alone(model_folder, configured):
    config = configured(
        model=model_folder, rollout_engine="vllm", steps=3, top_k=8, lora_r=4, learning_rate=0.03,
        rollout_engine_options=["dtype=float32", "enable_lora=true"],
    )  # fmt: skip
    ppo.train(config)
    rows = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    assert rows[-1]["objective/kl"] > 0.05  # another policy than at first
    assert max(row["val/rollout_ratio_max"] for row in rows) < 1.01


def test_an_option_that_vllm_has_not():
    VLLMEngine.check_options({"enable_lora": True, "max_model_len": 8, "enforce_eager": True})
    with pytest.raises(InputError, match="options=max_len=8: vLLM's LLM has no such argument"):
        VLLMEngine.check_options({"max_len": 8})


@pytest.mark.parametrize("engine", ["vllm", "vllm-server"])
def test_a_run_learns(model_folder, configured, engine):
    """The reward rises, and the trainer's log-probs stay those of the engine."""
    config = configured(
        model=model_folder, rollout_engine=engine, steps=12, tis_cap=2.0, top_k=8,
        batch_size=32, rollout_engine_options=["dtype=float32"],
    )  # fmt: skip
    summary = ppo.train(config)
    rows = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    assert summary["score_rise"] > 0.2
    assert max(row["val/rollout_ratio_max"] for row in rows) < 1.01
    assert all(abs(row["rollout/is_mean"] - 1) < 1e-2 for row in rows)
    assert all(row["rollout/is_eff_sample_size"] > 0.99 for row in rows)


def test_a_server_that_is_killed(model_folder, configured, monkeypatch):
    """One error, a checkpoint of what was learnt, nothing left; resumed, the run ends."""
    config = configured(
        model=model_folder, rollout_engine="vllm-server", steps=3, save_every=50,
        rollout_engine_options=["max_model_len=128"],
    )  # fmt: skip
    generate, calls, before = VLLMServerEngine.generate, [], psutil.pids()

    def killed_in_the_middle(self, *arguments):
        calls.append(self.server)
        if len(calls) == 3:
            os.kill(self.server.pid, signal.SIGKILL)
            self.server.wait()
        return generate(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(InputError, match="the server is gone"):
        patch.setattr(VLLMServerEngine, "generate", killed_in_the_middle)
        ppo.train(config)
    assert (Path(config.output_dir) / "checkpoints" / "step_2.pt").exists()
    left = [p for p in psutil.process_iter() if p.pid not in before and "VLLM" in p.name()]
    assert not psutil.wait_procs(left, timeout=10)[1]  # a large process needs a moment to end
    config.resume = True
    ppo.train(config)
    rows = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
