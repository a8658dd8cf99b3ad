"""vLLM as a server of its own, on this machine: it may live in another Python environment.

It is started with the policy's weights at the first `sync`, listens on 127.0.0.1, and reads later
weights from the folder that both see (`reload_weights`, of its development mode), or with
`enable_lora` adapters alone (`/v1/load_lora_adapter`). Each prompt is a request with a seed of its
own: those of one request would share it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.rollout.adapters import adapter_of
from rlhf_fast.trainer.rollout.protocol import Completions, Sampling, check_prompts
from rlhf_fast.trainer.rollout.vllm_in_process import (
    ALL,
    OURS,
    beside_the_trainer,
    drawn,
    parameters,
    refuse,
)

# What `vllm serve` calls. That asks for a package named vllm, and the CPU build has another name.
SERVE = "vllm.entrypoints.openai.api_server"
POLICY, ADAPTER = "policy", "adapter"  # as requests name the model
IS_THERE = "import sys, importlib.util; sys.exit(importlib.util.find_spec('vllm') is None)"


class VLLMServerEngine:
    """python: the interpreter of an environment that has vLLM. start_timeout: seconds until it must
    answer. options: arguments of `vllm serve`."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        python: str = sys.executable,
        start_timeout: float = 600.0,
        **options: Any,
    ) -> None:
        self.adapter = adapter_of(model, options)
        self.folder = Path(tempfile.mkdtemp(prefix="vllm_server_"))
        model.config.save_pretrained(self.folder)
        tokenizer.save_pretrained(self.folder)
        self.python, self.start_timeout = python, start_timeout
        adapters = self.adapter.options if self.adapter else {}
        self.options = beside_the_trainer(model) | adapters | options
        self.vocabulary = model.get_input_embeddings().weight.size(0)
        self.server: subprocess.Popen | None = None
        self.port = 0

    @staticmethod
    def check_options(options: dict[str, Any]) -> None:
        refuse(options, (*OURS, "host", "port", "served_model_name", "generation_config"))
        patience = options.get("start_timeout", 1)
        if isinstance(patience, bool) or not isinstance(patience, int | float) or patience <= 0:
            raise InputError(
                f"rollout_engine_options=start_timeout={patience}: expected seconds, above 0"
            )
        python = str(options.get("python", sys.executable))
        try:
            absent = subprocess.run([python, "-c", IS_THERE], capture_output=True).returncode
        except OSError as error:
            raise InputError(
                f"rollout_engine_options=python={python} cannot be run: {error.strerror}"
            ) from None
        if absent:
            raise InputError(
                f"rollout_engine=vllm-server: vllm is not installed in {python} (pip install vllm, "
                "or rollout_engine_options=python=… of an environment that has it)"
            )

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int
    ) -> Completions:
        check_prompts(prompts, self.vocabulary)
        asked = parameters(sampling, self.vocabulary)
        del asked["detokenize"]
        if asked["logprobs"] == ALL:
            asked["logprobs"] = self.vocabulary
        asked |= {"model": ADAPTER if self.adapter else POLICY, "return_tokens_as_token_ids": True}
        bodies = [
            {**asked, "prompt": list(prompt), "seed": (seed + row) % 2**31}
            for row, prompt in enumerate(prompts)
        ]
        with ThreadPoolExecutor(min(64, len(bodies))) as pool:
            answers = list(pool.map(lambda body: self.ask("/v1/completions", body), bodies))
        tokens, said = [], []
        for answer in answers:
            logprobs = answer["choices"][0]["logprobs"]
            ids = [number(token) for token in logprobs["tokens"]]
            own = zip(ids, logprobs["token_logprobs"], strict=True)
            among = logprobs["top_logprobs"] or [{}] * len(ids)
            tokens.append(ids)
            said.append([
                {**{number(t): p if p > LEAST else -math.inf for t, p in of.items()}, token: p_own}
                for of, (token, p_own) in zip(among, own, strict=True)
            ])  # fmt: skip
        return drawn(tokens, said, sampling)

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        if self.adapter is not None:
            if self.server is None:
                self.adapter.save_the_rest(self.folder)
                self.start()
            where = {"lora_name": ADAPTER, "lora_path": str(self.adapter.save())}
            self.ask("/v1/load_lora_adapter", where | {"load_inplace": True})
            self.ask("/reset_prefix_cache", {})
            return
        whole = {name: weight.detach().cpu().clone() for name, weight in weights}
        save_file(whole, self.folder / "model.safetensors", metadata={"format": "pt"})
        if self.server is None:
            self.start()
            return
        change = {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}}
        self.ask("/collective_rpc", change)
        self.ask("/reset_prefix_cache", {})

    def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        arguments = {
            "host": "127.0.0.1", "port": self.port, "served-model-name": POLICY,
            "max-logprobs": ALL, "logprobs-mode": "processed_logprobs", "generation-config": "vllm",
        }  # fmt: skip
        arguments |= {name.replace("_", "-"): value for name, value in self.options.items()}
        words = [word for name, value in arguments.items() for word in flag(name, value)]
        command = [self.python, "-m", SERVE, "--model", str(self.folder)]
        self.log = open(self.folder / "log", "w")
        self.server = subprocess.Popen(
            [*command, *words], stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
        )  # fmt: skip
        began = time.monotonic()
        while True:
            try:
                with urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except OSError:
                pass
            if self.server.poll() is not None or time.monotonic() - began > self.start_timeout:
                raise InputError(f"rollout_engine=vllm-server did not start: {self.last_words()}")
            time.sleep(0.3)

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        """The server's answer; whatever is in its way is one error."""
        url = f"http://127.0.0.1:{self.port}{path}"
        request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urlopen(request) as answer:
                text = answer.read()
        except HTTPError as error:
            said = " ".join(error.read().decode(errors="replace").split())[:500]
            raise InputError(
                f"rollout_engine=vllm-server: the server refuses {path}: {error.code} {said}"
            ) from None
        except (URLError, OSError, EOFError) as error:
            raise InputError(
                f"rollout_engine=vllm-server: the server is gone ({error}); its last words: "
                f"{self.last_words()}"
            ) from None
        return json.loads(text) if path == "/v1/completions" else None

    def last_words(self) -> str:
        lines = (self.folder / "log").read_text(errors="replace").splitlines()
        wrong = [line for line in lines if "Error" in line]
        return (wrong or lines or ["none"])[-1].strip()[:300]

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None:
        server, self.server = self.server, None
        if server is not None:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
            with suppress(ProcessLookupError):  # its engine outlives a server that was killed
                os.killpg(server.pid, signal.SIGKILL)
            self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.adapter is not None:
            self.adapter.close()


LEAST = -9000.0  # the server writes −9999 for −∞, which JSON has not


def flag(name: str, value: Any) -> list[str]:
    """As `vllm serve` takes it."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(value)]


def number(token: str) -> int:
    """Of `token_id:7`."""
    return int(token.removeprefix("token_id:"))
