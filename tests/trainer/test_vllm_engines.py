"""The vLLM engines without vLLM: what they ask for, what they make of answers, what they refuse."""

from __future__ import annotations

import json
import math
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.rollout.protocol import Sampling
from rlhf_fast.trainer.rollout.vllm_in_process import VLLMEngine, drawn, parameters
from rlhf_fast.trainer.rollout.vllm_server import VLLMServerEngine


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


def test_what_the_server_refuses_and_a_server_that_is_gone(engine):
    with pytest.raises(RuntimeError, match="the vLLM server refuses /v1/completions: 400"):
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
