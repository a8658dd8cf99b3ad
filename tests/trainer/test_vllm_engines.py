"""The vLLM engines without vLLM: what they ask for, what they make of answers, what they refuse."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.models.lora import LoRA
from rlhf_fast.trainer.models.policy import load_policy
from rlhf_fast.trainer.rollout.adapters import Adapter
from rlhf_fast.trainer.rollout.protocol import Sampling
from rlhf_fast.trainer.rollout.vllm_in_process import VLLMEngine, drawn, parameters
from rlhf_fast.trainer.rollout.vllm_server import VLLMServerEngine, flag


@pytest.mark.parametrize(
    ("options", "logprobs"),
    [({}, 0), ({"top_k": 5}, 5), ({"top_k": 99}, 17), ({"top_p": 0.9}, -1), ({"min_p": 0.1}, -1)],
)
def test_log_probs_are_asked_of_all_that_can_be_left(options, logprobs):
    assert parameters(Sampling(4, 1.0, [1], **options), 17)["logprobs"] == logprobs
    assert parameters(Sampling(4, 0.0, [1], **options), 17)["logprobs"] == 0  # greedy


def test_what_was_drawn_among_is_what_has_a_probability():
    said = [[{4: -0.5, 7: -1.0, 9: -math.inf}], [{3: 0.0}, {3: -0.7, 5: -0.7}]]
    done = drawn([[7], [3, 5]], said, Sampling(2, 1.0, [], top_k=3))
    assert done.tokens.tolist() == [[7, 0], [3, 5]] and done.mask.tolist() == [[1, 0], [1, 1]]
    torch.testing.assert_close(done.logp, torch.tensor([[-1.0, 0.0], [0.0, -0.7]]))
    assert done.support.tolist() == [[[4, 7], [-1, -1]], [[3, -1], [3, 5]]]
    assert drawn([[7]], [[{7: -1.0}]], Sampling(2, 1.0, [])).support is None


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (VLLMEngine, {"load_format": "auto"}, "load_format=auto: the engine's own"),
        (VLLMServerEngine, {"start_timeout": 0}, "start_timeout=0: expected seconds, above 0"),
        (VLLMServerEngine, {"served_model_name": "m"}, "served_model_name=m: the engine's own"),
        (VLLMServerEngine, {"python": "/nowhere/python"}, "cannot be run: No such file"),
        (VLLMServerEngine, {"python": sys.executable}, "vllm is not installed in .*python=…"),
    ],
)
def test_options_that_cannot_be(kind, options, message):
    with pytest.raises(InputError, match=message):
        kind.check_options(options)


class Stub(BaseHTTPRequestHandler):
    """A server that answers 5 to everything, or refuses."""

    asked: list = []  # noqa: RUF012

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body))
        self.send_response(400 if body.get("prompt") == [2] else 200)
        self.end_headers()
        first = {"token_id:5": -0.1, "token_id:6": -9999.0}
        logprobs = {"tokens": ["token_id:5"], "token_logprobs": [-0.1], "top_logprobs": [first]}
        self.wfile.write(json.dumps({"choices": [{"logprobs": logprobs}]}).encode())

    def log_message(self, *_): ...


@pytest.fixture
def engine(tiny_policy_folder, tiny_tokenizer):
    """One whose server is a stub; the server is its attribute."""
    Stub.asked = []
    server = HTTPServer(("127.0.0.1", 0), Stub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_folder)
    engine = VLLMServerEngine(model, tiny_tokenizer)
    engine.port, engine.stub = server.server_address[1], server
    yield engine
    server.shutdown()
    server.server_close()
    thread.join()
    engine.close()


def test_each_prompt_is_a_request_with_its_own_seed(engine):
    done = engine.generate([[3, 4], [5]], Sampling(2, 1.0, [1], top_k=2), seed=7)
    asked = sorted((body["seed"], body["prompt"]) for _, body in Stub.asked)
    assert asked == [(7, [3, 4]), (8, [5])]
    assert done.tokens.tolist() == [[5], [5]] and done.support.tolist() == [[[5]], [[5]]]


def started(script):
    """A process as the engine starts its server."""
    return subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, start_new_session=True)


def test_what_a_killed_server_had_started_ends(engine):
    """Nobody's child any more, it would keep its memory."""
    engine.server, engine.log = started("sleep 60 & echo $!; wait"), SimpleNamespace(close=int)
    child = psutil.Process(int(engine.server.stdout.readline()))
    engine.server.kill()
    engine.server.wait()
    assert child.status() != psutil.STATUS_ZOMBIE
    engine.close()
    for _ in range(50):  # a signal needs a moment
        if not child.is_running() or child.status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.1)
    else:
        child.kill()
        raise AssertionError("it runs on")


def no_weights():
    raise AssertionError("the merged weights are asked for")
    yield


def test_adapters_alone_are_sent(engine, tiny_policy_folder):
    """The frozen weights once, the adapter in a new folder each time, which requests then name."""
    adapted = load_policy(
        tiny_policy_folder, trainable_layers=None, device=torch.device("cpu"),
        lora=LoRA(9, 8.0, None, 0),
    ).model  # fmt: skip
    adapter = Adapter(adapted)
    assert adapter.options["max_lora_rank"] == 16
    adapter.save_the_rest(engine.folder)
    plain = AutoModelForCausalLM.from_pretrained(tiny_policy_folder)
    frozen = load_file(engine.folder / "model.safetensors")
    assert frozen.keys() == plain.state_dict().keys()
    assert all(torch.equal(x, plain.state_dict()[name]) for name, x in frozen.items())

    engine.adapter, engine.server, engine.log = (
        adapter,
        started("sleep 60"),
        SimpleNamespace(close=int),
    )
    for _ in range(2):
        engine.sync(no_weights())
        path, body = Stub.asked[-2]
        assert path == "/v1/load_lora_adapter" and body["load_inplace"]
        assert load_file(f"{body['lora_path']}/adapter_model.safetensors")
    assert Stub.asked[-4][1]["lora_path"] != body["lora_path"]
    assert [file.name for file in adapter.folder.iterdir()] == ["2"]  # the newest alone is kept
    engine.generate([[3]], Sampling(2, 1.0, [1]), seed=7)
    assert Stub.asked[-1][1]["model"] == body["lora_name"]
    engine.close()
    assert not adapter.folder.exists()


def test_adapters_that_are_not_there(tiny_policy_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_folder)
    with pytest.raises(InputError, match="enable_lora=true: the policy has no adapters, set lora"):
        Adapter(model)


def test_truth_values_as_the_server_takes_them():
    assert flag("a", True) + flag("b", False) + flag("c", 3) == ["--a", "--no-b", "--c", "3"]


def test_what_the_server_refuses_and_a_server_that_is_gone(engine):
    with pytest.raises(InputError, match="server: the server refuses /v1/completions: 400"):
        engine.generate([[2]], Sampling(2, 1.0, []), 0)
    (engine.folder / "log").write_text("fine\nOutOfMemoryError: 3 GB\nbye\n")
    engine.stub.shutdown()
    engine.stub.server_close()
    with pytest.raises(InputError, match="server is gone .*; its last words: OutOfMemoryError: 3"):
        engine.generate([[3]], Sampling(2, 1.0, []), 0)
    folder = engine.folder
    engine.close()
    engine.close()
    assert not folder.exists()
