"""Models and tokenizers of other families than the one at hand: right, or one line before a run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from rlhf_fast.trainer.data.rows import Prompt, pad, tokenize
from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.models import (
    LoRA,
    choose_pad,
    load_critic,
    load_policy,
    load_reward_model,
    load_tokenizer,
    new_reward_model,
    score_texts,
    softcap,
)
from rlhf_fast.trainer.models.loading import context_length
from rlhf_fast.trainer.rollout.memory import Way, way_of_decoding
from rlhf_fast.trainer.rollout.sample import Sampling, decode, sample

CPU = torch.device("cpu")
LLAMA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
STATES = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def words_tokenizer(ending: str = "") -> PreTrainedTokenizerFast:
    """As the sentencepiece tokenizers of Llama 2 and Mistral: <s> first, spaces as U+2581."""
    words = ["<unk>", "<s>", "</s>", "<think>", *(f"\u2581{w}" for w in ("say", "hi", "yes", "no"))]
    backend = Tokenizer(
        tokenizer_models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    strip = [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(strip)
    backend.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {ending}".strip(), special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<think>"],
    )  # fmt: skip


def tiny(kind: str, auto: type = AutoModelForCausalLM, **options):
    options = {
        "vocab_size": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    } | options
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(kind, **options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.2)
    return model


@pytest.fixture
def save(tmp_path):
    def save(model, name: str = "m", tokenizer=None) -> str:
        model.save_pretrained(tmp_path / name)
        (tokenizer or words_tokenizer()).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture
def peft(monkeypatch):
    """Any version of it: the newest ones of transformers and peft do not always fit."""
    peft = pytest.importorskip("peft")
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", peft.__version__)
    return peft


# ------------------------------------------------------------------------------------ decoding

FAMILIES = [
    ("llama", LLAMA, Way.OURS),
    ("mistral", LLAMA | {"sliding_window": 8}, Way.OURS),
    ("mixtral", LLAMA | EXPERTS, Way.OURS),
    ("jamba", LLAMA | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
                       "mamba_d_state": 8, "use_mamba_kernels": False}, Way.OURS),
    ("mamba", STATES, Way.STATE),
    ("openai-gpt", {"n_embd": 32, "n_layer": 2, "n_head": 4}, Way.NONE),
    ("minimax", LLAMA | {"num_local_experts": 2, "block_size": 16,
                         "layer_types": ["linear_attention", "full_attention"]}, Way.NONE),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "way"), FAMILIES)
def test_decoding_is_the_models_own(kind, options, way):
    """Padded on the left, in rows that end early: log-probs of one pass over each text alone."""
    model = tiny(kind, vocab_size=40, **options)
    assert way_of_decoding(model, sample) is way
    prompts = [[7, 5, 9], list(range(10, 24)), [9]]
    ids, mask = pad(prompts, side="left")
    draws = torch.rand(3, 8, generator=torch.Generator().manual_seed(3))
    done = sample(model, ids, mask, Sampling(8, 1.0, [*range(12, 24)]), draws)
    assert len(set(done.mask.sum(1).tolist())) > 1
    for row, prompt in enumerate(prompts):
        answer = done.tokens[row][done.mask[row]]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer.tolist()]), use_cache=False).logits[0]
        logp = logits[len(prompt) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(
            done.logp[row][done.mask[row]], logp.gather(1, answer[:, None])[:, 0],
            rtol=1e-3, atol=1e-3,
        )  # fmt: skip


def test_a_family_that_reads_padding_as_text(save):
    options = {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}
    model = tiny("rwkv", context_length=64, **options)
    with pytest.raises(InputError, match=r"model=.*RwkvForCausalLM.*token by token"):
        way_of_decoding(model, sample)
    with pytest.raises(InputError, match=r"model=.*RwkvForCausalLM.*reads padding as text"):
        load_policy(save(model), trainable_layers=None, device=CPU)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "llama4_text",
            LLAMA | {"num_local_experts": 2, "intermediate_size_mlp": 64},
            "body apart",
        ),
        ("xlstm", {"hidden_size": 32, "num_heads": 4, "num_hidden_layers": 2}, "xLSTMForCausalLM"),
    ],
)
def test_families_that_cannot_be_trained_say_so(kind, options, message, save):
    with pytest.raises(InputError, match=rf"^model=[^\n]*{message}[^\n]*$"):
        load_policy(save(tiny(kind, **options)), trainable_layers=None, device=CPU)


def test_a_scale_that_is_none(save):
    """MPT's config has logit_scale: None."""
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 48, "expansion_ratio": 2}
    policy = load_policy(save(tiny("mpt", **sizes)), trainable_layers=None, device=CPU)
    assert context_length(policy.model) == 48


def test_what_the_text_model_of_a_wrapper_says(save):
    """Gemma 3 and 4 as released: context and softcap are in config.text_config."""
    text = LLAMA | {"num_hidden_layers": 6, "max_position_embeddings": 24, "sliding_window": 8,
                    "vocab_size": 8, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
    gemma4 = tiny("gemma4", vision_config=None, audio_config=None, text_config=text | {
        "final_logit_softcapping": 5.0, "hidden_size_per_layer_input": 8, "global_head_dim": 8,
        "vocab_size_per_layer_input": 8, "num_kv_shared_layers": 0})  # fmt: skip
    policy = load_policy(save(gemma4), trainable_layers=None, device=CPU)
    assert softcap(policy.model) == 5.0 and context_length(policy.model) == 24


# ------------------------------------------------------------------------------------ tokenizers


@pytest.mark.parametrize("ending", ["", "</s>"])
@pytest.mark.parametrize("text", ["say hi", "<s> say hi"])
def test_what_a_tokenizer_puts_around_a_text_is_there_once(text, ending):
    """And nothing behind a prompt: there is nothing to say after an eos."""
    tokenizer = words_tokenizer(ending)
    assert tokenize(text, False, tokenizer, goes_on=True) == [1, 4, 5]
    whole = [1, 4, 5, *([2] if ending else [])]
    assert tokenize(text, False, tokenizer) == whole
    if ending:
        assert tokenize(text + "</s>", False, tokenizer) == whole
    assert tokenize("<s> say hi", True, tokenizer) == [1, 4, 5]  # by a chat template


def test_answers_are_read_behind_their_prompt():
    """A decoder that drops the first space of a text does not drop that of an answer."""
    tokenizer = words_tokenizer()
    tokens, mask = torch.tensor([[6, 2], [3, 7]]), torch.ones(2, 2, dtype=torch.bool)
    user = [{"role": "user", "content": "say hi"}]
    begun = [*user, {"role": "assistant", "content": "yes"}]
    prompts = [Prompt([1, 4, 5], text, {}) for text in ("say hi", user, begun)]
    for prompt, expected in zip(prompts, (" yes", "yes", " yes"), strict=True):
        assert decode(tokenizer, tokens[:1], mask[:1], [prompt]) == [expected]
    assert decode(tokenizer, tokens, mask, prompts[:1] * 2) == [" yes", " no"]
    special = decode(tokenizer, tokens, mask, prompts[:1] * 2, special_tokens=True, stop_ids=[2])
    assert special == [" yes", "<think> no"]


@pytest.mark.parametrize("padded", ["", "eos", "<think>", "<unk>"])
def test_a_pad_is_a_token_without_a_meaning(padded):
    tokenizer = words_tokenizer()
    tokenizer.chat_template = "{{ '<think>' }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.pad_token = {"": None, "eos": "</s>"}.get(padded, padded)
    choose_pad(tokenizer, used={4, 5, 0})
    assert tokenizer.pad_token == "<|pad|>" and tokenizer.pad_token_id == 8
    choose_pad(tokenizer, used={4, 5, 0})  # its own from now on
    assert len(tokenizer) == 9


def test_a_pad_that_is_there_is_found():
    tokenizer = words_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "<|image_pad|>"]})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved_special_token_3|>"]})
    choose_pad(tokenizer)
    assert tokenizer.pad_token == "<|reserved_special_token_3|>"
    tokenizer.pad_token = None
    tokenizer.add_special_tokens({"additional_special_tokens": ["<pad>"]})
    choose_pad(tokenizer)
    assert tokenizer.pad_token == "<pad>"


def test_a_policys_tokenizer_stays_as_it_was(save):
    tokenizer = load_tokenizer(save(tiny("llama", **LLAMA)), field="model")
    assert tokenizer.pad_token is None


def test_a_reward_model_with_a_new_pad_scores_alike_in_transformers(save, tmp_path):
    """In batches, too; and its policy's tokens can be a critic's."""
    folder = save(tiny("llama", **LLAMA))
    tokenizer = load_tokenizer(folder, field="model")
    choose_pad(tokenizer, used={4, 5, 2})
    model = new_reward_model(folder, tokenizer, trainable_layers=None, seed=0, device=CPU)
    save(model, "rm", tokenizer)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    rows = [[1, 4, 5, 2], [1, 4, 2]]
    ids, mask = pad(rows, side="right", fill=tokenizer.pad_token_id)
    with torch.no_grad():
        theirs = loaded(ids, attention_mask=mask.long()).logits[:, 0]
        torch.testing.assert_close(score_texts(model, rows), theirs)
    load_critic(str(tmp_path / "rm"), load_tokenizer(folder, field="model"), CPU, None)


# ------------------------------------------------------------------------------------ loading


def changed(folder: str, name: str, drop=(), **change) -> str:
    """A copy with another config.json."""
    path = Path(shutil.copytree(folder, Path(folder).parent / name), "config.json")
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in drop} | change))
    return str(path.parent)


def test_what_does_not_load_is_one_line(save, tmp_path):
    folder = save(tiny("llama", **LLAMA))
    bits = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    expected = {
        changed(folder, "larger", vocab_size=16): r"weight is \[8, 32\] where .*\[16, 32\]",
        changed(folder, "bits", quantization_config=bits): r"quantised \(bitsandbytes\)",
        changed(folder, "code", auto_map={"AutoConfig": "own.Config"}, model_type="own"):
            r"--trust_remote_code",
    }  # fmt: skip
    for name, content in (
        ("pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        ("pickle", b"\x80\x04cos\nsystem\n."),
    ):
        copied = changed(folder, name)
        Path(copied, "model.safetensors").unlink()
        Path(copied, "pytorch_model.bin").write_bytes(content)
        expected[copied] = "Git LFS" if name == "pointer" else "cannot be loaded"
    for name, message in expected.items():
        with pytest.raises(InputError, match=rf"^model={name}[^\n]*{message}[^\n]*$"):
            load_policy(name, trainable_layers=None, device=CPU)
    Path(folder, "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"^model=[^\n]*no tokenizer that can be read[^\n]*$"):
        load_policy(folder, trainable_layers=None, device=CPU)


def test_a_models_own_code_runs_only_when_trusted(save, tmp_path, monkeypatch):
    """Not a line of it, and nobody is asked on stdin."""
    folder = save(tiny("llama", **LLAMA))
    Path(folder, "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "class Config(LlamaConfig):\n    model_type = 'own'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    own = changed(folder, "own", auto_map=auto_map, model_type="own")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(InputError, match="--trust_remote_code"):
        load_policy(own, trainable_layers=None, device=CPU)
    assert not (tmp_path / "ran").exists()
    policy = load_policy(own, trainable_layers=None, device=CPU, trust=True)
    assert (tmp_path / "ran").exists()
    assert type(policy.model).__name__ == "Model"


def test_a_classifier_becomes_a_reward_model(save):
    """One whose config names no labels has as many as its head; one with two gets a new head."""
    one = save(tiny("llama", AutoModelForSequenceClassification, num_labels=1, **LLAMA))
    nameless = changed(one, "nameless", drop=("id2label", "label2id"))
    model, _ = load_reward_model(nameless, field="reward", device=CPU)
    named, _ = load_reward_model(one, field="reward", device=CPU)
    assert torch.equal(model.score.weight, named.score.weight)
    two = save(tiny("llama", AutoModelForSequenceClassification, num_labels=2, **LLAMA), "two")
    tokenizer = load_tokenizer(two, field="model")
    choose_pad(tokenizer)
    model = new_reward_model(two, tokenizer, trainable_layers=None, seed=0, device=CPU)
    assert model.score.weight.shape == (1, 32) and 0.1 < model.score.weight.std() * 33**0.5 < 2


# ------------------------------------------------------------------------------------ saving


@pytest.mark.parametrize("asked", [None, "float16"])
def test_a_model_is_saved_in_its_sources_dtype(asked, save, tmp_path):
    folder = save(tiny("llama", tie_word_embeddings=True, **LLAMA).bfloat16())
    policy = load_policy(folder, trainable_layers=None, device=CPU, save_dtype=asked)
    assert policy.model.dtype == torch.float32
    policy.save(tmp_path / "out", policy.state())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert saved.dtype == (torch.float16 if asked else torch.bfloat16)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == (asked or "bfloat16")
    sizes = [Path(f, "model.safetensors").stat().st_size for f in (folder, tmp_path / "out")]
    assert abs(sizes[0] - sizes[1]) < 100  # tied weights are there once; headers may differ
    if not asked:
        for name, weight in policy.model.state_dict().items():
            assert torch.equal(weight, saved.state_dict()[name].float())


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3_moe"])
def test_a_merged_model_is_the_one_that_was_trained(kind, peft, save, tmp_path):
    options = LLAMA | {
        "mixtral": EXPERTS,
        "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    }.get(kind, {})
    folder = save(tiny(kind, **options))
    stops = {"eos_token_id": [2, 5], "do_sample": True, "temperature": 0.6}
    Path(folder, "generation_config.json").write_text(json.dumps(stops))
    policy = load_policy(
        folder,
        trainable_layers=None,
        device=CPU,
        lora=LoRA(r=2, alpha=4, target_modules=None, seed=0),
    )
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = policy.model(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        torch.testing.assert_close(before, plain)  # adapters add nothing yet
        for name in policy.trained().keys() - policy.critic().keys():
            p = policy.trained()[name]
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
        trained = policy.model(ids).logits
        assert (trained - before).abs().max() > 0.01
        policy.save(tmp_path / "out", policy.state())
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(saved(ids).logits, trained, rtol=1e-4, atol=1e-4)
        assert policy.stop_ids == saved.generation_config.eos_token_id == [2, 5]
        assert saved.generation_config.temperature == 0.6
        assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()


def test_adapters_on_a_tied_embedding_are_refused(peft, save):
    lora = LoRA(r=2, alpha=4, target_modules=["embed_tokens", "q_proj"], seed=0)
    tied = save(tiny("llama", tie_word_embeddings=True, **LLAMA))
    with pytest.raises(InputError, match=r"lora_target_modules=embed_tokens,q_proj .*embedding"):
        load_policy(tied, trainable_layers=None, device=CPU, lora=lora)
    apart = save(tiny("llama", tie_word_embeddings=False, **LLAMA), "apart")
    assert load_policy(apart, trainable_layers=None, device=CPU, lora=lora).trained()


def test_adapters_that_cannot_be_merged_are_refused(peft, save, monkeypatch):
    from peft.tuners.lora import Linear

    folder = save(tiny("llama", **LLAMA))
    for merge, message in (
        (lambda self: None, "another model than the one that would be trained"),
        (lambda self: 1 / 0, "cannot merge .*ZeroDivisionError"),
    ):
        monkeypatch.setattr(Linear, "merge", merge)
        with pytest.raises(InputError, match=f"^lora_r=2: .*{message}"):
            lora = LoRA(r=2, alpha=4, target_modules=None, seed=0)
            load_policy(folder, trainable_layers=None, device=CPU, lora=lora)
