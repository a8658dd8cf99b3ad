"""What scores an answer: functions, models with tokenizers of their own, sums of them."""

import asyncio
import copy
import math
import signal
import time

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from rlhf_fast.trainer.errors import InputError
from rlhf_fast.trainer.rewards import functions
from rlhf_fast.trainer.rewards.awaiting import Patience
from rlhf_fast.trainer.rewards.scorers import load_scorer

CPU = torch.device("cpu")
PROMPTS = ["the film", "a plot"]
ANSWERS = ["is good", "was very bad"]
MESSAGES = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]

FUNCTIONS = """
import asyncio, signal, time, numpy
import torch

def length(prompts, completions, **columns):
    return [len(c) for c in completions]

def good(prompts, completions, **columns):
    return ["good" in c for c in completions]

def asked(prompts, completions, label, **columns):
    return [None if x is None else float(x) for x in label]

def seen(prompts, completions, **columns):
    raise KeyError((prompts, completions))

def deeper(prompts, completions, **columns):
    return helper(completions)

def helper(completions):
    return [float("x")]  # line 21

def array(prompts, completions, **columns):
    return numpy.array([1.5, 2.5])

def tensor(prompts, completions, **columns):
    return torch.tensor([1.5, 2.5])

def no_columns(prompts, completions):
    return [0.0, 0.0]

def text(prompts, completions, **columns):
    return ["1.0", "2.0"]

def short(prompts, completions, **columns):
    return [1.0]

def infinite(prompts, completions, **columns):
    return [1.0, float("inf")]

def large(prompts, completions, **columns):
    return [1.0, 1e39]

def huge(prompts, completions, **columns):
    return [10**400, 1.0]

def lazy(prompts, completions, **columns):
    return (1.0 for _ in prompts)

def empties(prompts, completions, **columns):
    scores = [float(len(c)) for c in completions]
    prompts.clear(), completions.clear()
    return scores

def nothing(prompts, completions, **columns):
    return [1.0, None]

async def promised(prompts, completions, **columns):
    await asyncio.sleep(0.001)
    return [1.0, 2.0]

async def fails_late(prompts, completions, **columns):
    await asyncio.sleep(0.001)
    raise OSError("gone")

def pairs(prompts, completions, **columns):
    return [torch.tensor([1.0, 2.0]) for _ in prompts]

def column(prompts, completions, **columns):
    return torch.ones(2, 1)

def single(prompts, completions, **columns):
    return [torch.tensor(1.0), torch.tensor([2.0], dtype=torch.bfloat16)]

def leaves(prompts, completions, **columns):
    raise SystemExit(0)

def meddles(prompts, completions, *, tags, table, **columns):
    for p, c, t, d in zip(prompts, completions, tags, table):
        t.append("seen")
        d["deep"]["list"].clear()
        if isinstance(p, list):
            p.extend(c)
            p[0]["content"] = c[0]["role"] = "mine"
    columns["new"], tags[0] = 1, None
    table.sort(key=str)
    return [0.0, 0.0]

def sleeps(prompts, completions, **columns):
    try:
        time.sleep(30)
    except Exception:
        pass
    return [1.0, 2.0]

async def waits(prompts, completions, **columns):
    await asyncio.sleep(30)

def alarmed(prompts, completions, **columns):  # as math_verify does
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(1)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    return [1.0, 2.0]
"""


@pytest.fixture
def scored(tmp_path):
    """scored("length") -> the scores of PROMPTS and ANSWERS; the scorer is its attribute."""
    (tmp_path / "mine.py").write_text(FUNCTIONS)

    def score(*names: str, weights=None, prompts=PROMPTS, answers=ANSWERS, **columns):
        specs = [f"{tmp_path / 'mine.py'}:{name}" for name in names]
        score.scorer = load_scorer(specs, weights, field="reward", device=CPU)
        return score.scorer(prompts, answers, columns).tolist()

    return score


@pytest.fixture
def save(tmp_path, tiny_tokenizer):
    """save(config, tokenizer) -> the folder of a random sequence classifier, and the model."""

    def write(config, tokenizer=tiny_tokenizer, name="classifier"):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config).eval()
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name), model

    return write


def reverse_tokenizer(**options) -> PreTrainedTokenizerFast:
    """Another vocabulary than tiny_tokenizer's, and it splits between characters, not words."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    letters = ["<pad>", "<eos>", *"zyxwvutsrqponmlkjihgfedcba ", ":", "!"]
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="!"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="!", **options
    )


def llama(vocabulary: int, **options) -> LlamaConfig:
    sizes = {
        "vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "initializer_range": 0.5, "pad_token_id": 0, "num_labels": 1,
        "max_position_embeddings": 64,
    }  # fmt: skip
    return LlamaConfig(**sizes | options)


# ---------------------------------------------------------------------------------- functions


def test_weighted_sum_and_its_components(scored):
    assert scored("length") == [7, 12]
    assert scored.scorer.components == {}  # one score is the sum
    assert scored("length", "good", weights=[0.1, 2.0]) == pytest.approx([2.7, 1.2])
    components = {name: part.tolist() for name, part in scored.scorer.components.items()}
    assert components == {"length": [7, 12], "good": [1, 0]}
    assert scored("length", "good") == [8, 12]


def test_none_leaves_a_reward_out_of_the_sum(scored):
    assert scored("length", "asked", weights=[1.0, 10.0], label=[None, 2]) == [7, 32]
    assert scored.scorer.components["asked"].isnan().tolist() == [True, False]
    with pytest.raises(
        InputError, match=r"reward=.*:asked and reward=.*:nothing returned None .*1"
    ):
        scored("asked", "nothing", label=[1, None])


@pytest.mark.parametrize("name", ["array", "tensor"])
def test_arrays_are_lists_of_numbers(scored, name):
    assert scored(name) == [1.5, 2.5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "mine.py:short returned 1 scores, expected a list of 2 numbers"),
        ("text", "returned '1.0' for row 0, expected a finite number; prompt 'the film', answer"),
        ("infinite", "returned inf for row 1"),
        ("large", r"returned 1e\+39 for row 1, expected a finite number"),  # not in float32
        ("huge", "returned 10000.* for row 0, expected a finite number"),
        ("lazy", "lazy returned <generator object .*, expected a list of 2 numbers"),
        ("nothing", "returned None for row 1, expected a finite number; prompt 'a plot', answer"),
        ("pairs", r"pairs returned tensor\(\[1., 2.\]\) for row 0, expected a finite number"),
        ("column", r"column returned \[1.0\] for row 0, expected a finite number"),
        ("leaves", "leaves raised SystemExit: 0 .*mine.py, line "),
        ("fails_late", "fails_late raised OSError: gone"),
        ("deeper", r"mine.py:deeper raised ValueError: .*'x' \(.*mine.py, line 21\)"),
        ("no_columns", "no_columns cannot be called with prompts, completions, label: .*'label'"),
    ],
)
def test_errors_of_functions_are_named(scored, name, message):
    with pytest.raises(InputError, match=message):
        scored(name, label=[1, 2])


def test_a_function_that_empties_its_lists_harms_no_other(scored):
    assert scored("empties", "length") == [2 * len(answer) for answer in ANSWERS]


def test_one_reward_is_named_once(scored):
    with pytest.raises(InputError, match="names the same reward twice"):
        scored("length", "length")


def test_functions_see_conversations(scored):
    """A prompt that begins the answer is part of the answer, as in TRL."""
    begun = [*MESSAGES[0], {"role": "assistant", "content": "is very"}]
    with pytest.raises(InputError) as error:
        scored("seen", prompts=[begun], answers=[" good"])
    answer = [[{"role": "assistant", "content": "is very good"}]]
    assert str(([MESSAGES[0]], answer)) in str(error.value)


# ------------------------------------------------------------------------------------- models


def test_reward_model_with_another_vocabulary(save):
    """Text goes across: the ids are the reward model's own."""
    tokenizer = reverse_tokenizer()
    folder, model = save(llama(len(tokenizer)), tokenizer)
    scores = load_scorer(folder, field="reward", device=CPU)(PROMPTS, ANSWERS, {})
    for prompt, answer, score in zip(PROMPTS, ANSWERS, scores, strict=True):
        ids = torch.tensor([[tokenizer.get_vocab()[c] for c in prompt + answer]])
        assert score.item() == pytest.approx(model(ids).logits.item(), abs=1e-5)


def test_conversations_go_through_the_reward_models_own_template(save):
    template = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}!{% endfor %}"
    tokenizer = reverse_tokenizer(chat_template=template)
    folder, model = save(llama(len(tokenizer)), tokenizer)
    scores = load_scorer(folder, field="reward", device=CPU)(MESSAGES, ANSWERS, {})
    for prompt, answer, score in zip(PROMPTS, ANSWERS, scores, strict=True):
        ids = torch.tensor([[tokenizer.get_vocab()[c] for c in f"u:{prompt}!a:{answer}!"]])
        assert score.item() == pytest.approx(model(ids).logits.item(), abs=1e-5)

    folder, _ = save(llama(len(tokenizer)), reverse_tokenizer(), "plain")
    with pytest.raises(InputError, match="reward=.*plain: a conversation, but .*no chat template"):
        load_scorer(folder, field="reward", device=CPU)(MESSAGES, ANSWERS, {})


@pytest.mark.parametrize("kind", [BertConfig, GPT2Config, BloomConfig, LlamaConfig])
def test_any_sequence_classifier(save, kind, tiny_tokenizer):
    """Padding moves no score: a batch gives what its rows give alone."""
    sizes = {
        "vocab_size": len(tiny_tokenizer), "hidden_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "initializer_range": 0.5, "pad_token_id": 0, "num_labels": 1,
    }  # fmt: skip
    folder, model = save(kind(**sizes))
    scores = load_scorer(folder, field="reward", device=CPU)(PROMPTS, ANSWERS, {})
    for prompt, answer, score in zip(PROMPTS, ANSWERS, scores, strict=True):
        ids = tiny_tokenizer(prompt + answer, return_tensors="pt")["input_ids"]
        assert score.item() == pytest.approx(model(ids).logits.item(), abs=1e-5)
    assert abs(scores[0] - scores[1]) > 1e-3


def test_label_of_a_classifier(save, tiny_tokenizer):
    labels = {0: "bad", 1: "so so", 2: "good"}
    config = llama(len(tiny_tokenizer), num_labels=3, id2label=labels)
    folder, model = save(config)
    scores = load_scorer(f"{folder}#so so", field="reward", device=CPU)(PROMPTS, ANSWERS, {})
    for prompt, answer, score in zip(PROMPTS, ANSWERS, scores, strict=True):
        ids = tiny_tokenizer(prompt + answer, return_tensors="pt")["input_ids"]
        p = torch.softmax(model(ids).logits[0], -1)[1].item()
        assert score.item() == pytest.approx(math.log(p / (1 - p)), abs=1e-4)

    for spec in (folder, f"{folder}#great"):
        with pytest.raises(InputError, match="gives 3 scores, expected one: .*#bad or .*#so so or"):
            load_scorer(spec, field="reward", device=CPU)


def test_label_of_several_that_do_not_exclude_each_other(save, tiny_tokenizer):
    config = llama(
        len(tiny_tokenizer), num_labels=2, id2label={0: "rude", 1: "long"},
        problem_type="multi_label_classification",
    )  # fmt: skip
    folder, model = save(config)
    (score,) = load_scorer(f"{folder}#long", field="reward", device=CPU)(["the film"], ["is"], {})
    ids = tiny_tokenizer("the filmis", return_tensors="pt")["input_ids"]
    p = torch.sigmoid(model(ids).logits[0, 1]).item()
    assert score.item() == pytest.approx(math.log(p / (1 - p)), abs=1e-4)


def test_text_longer_than_the_reward_model_reads(save, tiny_tokenizer, capsys):
    """Refused before the run where it can be known; later its end is scored, and that is said."""
    folder, model = save(llama(len(tiny_tokenizer), max_position_embeddings=6))
    scorer = load_scorer(folder, field="reward", device=CPU)
    scorer.check_lengths(["the film", "a"], 4)
    with pytest.raises(InputError, match="reads at most 6 tokens, but the longest prompt has 2 of"):
        scorer.check_lengths(["a", "the film"], 5)
    with pytest.raises(InputError, match="the longest prompt has 3 of its tokens and max_new_tok"):
        scorer.check_lengths([[{"role": "user", "content": "film"}]], 4)  # as its template has it
    for _ in range(2):
        long = scorer(["the plot was the film "], ["is very very good"], {})
    cut = model(tiny_tokenizer("the film is very very good", return_tensors="pt")["input_ids"])
    assert long.item() == pytest.approx(cut.logits.item(), abs=1e-5)
    assert " ".join(capsys.readouterr().out.split()).count("it scores the end of such texts") == 1


def test_what_begins_and_ends_a_text_is_kept_of_a_long_one(save, tiny_tokenizer):
    sizes = {
        "vocab_size": len(tiny_tokenizer), "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 16, "num_labels": 1, "pad_token_id": 0,
    }  # fmt: skip
    folder, _ = save(RobertaConfig(**sizes, max_position_embeddings=8))
    (part,) = load_scorer(folder, field="reward", device=CPU).parts
    assert part.limit == 7  # of 8 positions: they are counted from the pad on
    assert part.fitted([1, *range(3, 12)]) == [1, *range(6, 12)]
    part([("a " * 20)], ["good"], {})  # an index beyond the table would be an error


def test_models_and_functions_in_one_sum(scored, save, tiny_tokenizer, tmp_path):
    folder, _ = save(llama(len(tiny_tokenizer)), name="model")
    alone = load_scorer(folder, field="reward", device=CPU)(PROMPTS, ANSWERS, {})
    both = load_scorer(
        [folder, f"{tmp_path / 'mine.py'}:length"], [1.0, -0.5], field="reward", device=CPU
    )
    assert both(PROMPTS, ANSWERS, {}).tolist() == pytest.approx(
        (alone - torch.tensor([3.5, 6])).tolist()
    )
    assert list(both.components) == [tmp_path.name, "length"]  # <output_dir>/model, and a function


DATA = {"tags": [["a"], ["b"]], "table": [{"deep": {"list": [1, 2]}}, {"deep": {"list": [3]}}]}


@pytest.mark.parametrize("prompts", [PROMPTS, MESSAGES])
def test_nothing_a_function_does_reaches_the_data(scored, prompts):
    """Nor the next function: lists, what is in them, and their order."""
    prompts, columns = copy.deepcopy(prompts), copy.deepcopy(DATA)
    before = copy.deepcopy((prompts, ANSWERS, columns))
    scored("meddles", prompts=prompts, **columns)
    assert (prompts, ANSWERS, columns) == before


def test_async_functions_are_awaited(scored):
    assert scored("promised") == [1.0, 2.0]

    async def in_a_notebook():  # whose loop runs already
        return scored("promised", "length")

    assert asyncio.run(in_a_notebook()) == [1.0 + 7, 2.0 + 12]


def test_scores_of_one_number_each(scored):
    assert scored("single") == [1.0, 2.0]


@pytest.mark.parametrize("name", ["sleeps", "waits"])
def test_a_function_that_hangs(scored, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(functions, "PATIENCE", 0.2)
    scored("length")
    slow = load_scorer(
        f"{tmp_path / 'mine.py'}:{name}", field="judge", device=CPU, patience=Patience(1)
    )
    began = time.perf_counter()
    with pytest.raises(InputError, match=f"judge=.*:{name} took longer than reward_timeout=1 sec"):
        slow(PROMPTS, ANSWERS, {})
    assert time.perf_counter() - began < 10
    said = "".join(capsys.readouterr().out.split())
    assert f"{name}hasnotreturnedfor0.2s" in said and "for0.4s" in said
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_a_function_with_an_alarm_of_its_own(scored, tmp_path):
    scored("length")
    scorer = load_scorer(
        f"{tmp_path / 'mine.py'}:alarmed", field="reward", device=CPU, patience=Patience(9)
    )
    assert scorer(PROMPTS, ANSWERS, {}).tolist() == [1.0, 2.0]


# ------------------------------------------------------------------- functions that wait for others

WAITING = """
import asyncio, time
running = most = 0
calls = []

def judged(prompts, completions, **columns):
    calls.append(list(completions))
    return [judge(c) for c in completions]

async def judge(text):
    global running, most
    running += 1
    most = max(most, running)
    await asyncio.sleep(0.01)
    running -= 1
    if text == "hangs":
        await asyncio.sleep(30)
    while text == "stubborn":
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            pass
    if text == "blocks":
        time.sleep(30)
    if text == "exits":
        raise SystemExit("bye")
    if text == "cancelled":
        raise asyncio.CancelledError
    if text == "nested":
        return asyncio.sleep(0)
    if text == "fails" or text == "fails once" and sum("fails once" in c for c in calls) < 2:
        raise ConnectionError("no route")
    return len(text)

def some(prompts, completions, **columns):
    return [0.5 if c == "known" else judge(c) for c in completions]

async def tasks(prompts, completions, **columns):
    return [asyncio.ensure_future(judge(c)) for c in completions]

def fewer(prompts, completions, **columns):
    return [judge(c) for c in completions[1:]]

async def at_once(prompts, completions, **columns):
    calls.append(list(completions))
    if len(calls) < 3:
        raise ConnectionError("no route")
    return [float(len(c)) for c in completions]
"""


@pytest.fixture
def waiting(tmp_path):
    """waiting("judged", answers, patience) -> scores; the functions' module is its attribute."""
    (tmp_path / "waiting.py").write_text(WAITING)

    def score(name, answers, field="reward", **patience):
        spec = f"{tmp_path / 'waiting.py'}:{name}"
        ran = {}
        scorer = load_scorer(spec, field=field, device=CPU, patience=Patience(**patience), ran=ran)
        (score.module,) = ran.values()
        return scorer(["a"] * len(answers), answers, {}).tolist()

    return score


def test_awaitables_are_awaited_side_by_side(waiting):
    assert waiting("judged", ["x" * n for n in range(9)]) == list(range(9))
    assert waiting.module.most == 9
    assert waiting("judged", ["x" * n for n in range(9)], concurrency=2) == list(range(9))
    assert waiting.module.most == 2
    assert waiting("some", ["known", "abc"]) == [0.5, 3]


def test_what_fails_or_hangs_costs_its_answers(waiting, capsys):
    scores = waiting("judged", ["abc", "fails", "hangs", "ab"], timeout=0.2)
    assert scores[0] == 3 and scores[3] == 2 and math.isnan(scores[1]) and math.isnan(scores[2])
    said = " ".join(capsys.readouterr().out.split())
    assert "failed for 2 of 4 answers, which are left out: ConnectionError: no route" in said
    with pytest.raises(InputError, match="failed for 1 of 2 answers: it took longer than reward_t"):
        waiting("judged", ["abc", "hangs"], timeout=0.2, failures="end")
    with pytest.raises(InputError, match="failed for 1 of 1 answers: ConnectionError: no route"):
        waiting("judged", ["fails"])  # nothing would be left
    with pytest.raises(InputError, match="returned 1 scores, expected a list of 2"):
        waiting("fewer", ["a", "b"])


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("stubborn", "it took longer than reward_timeout=0.5 seconds"),
        ("blocks", "it took longer than reward_timeout=0.5 seconds without letting others go on"),
        ("exits", "SystemExit: bye"),
        ("cancelled", "it was cancelled"),
    ],
)
def test_nothing_that_an_awaitable_does_costs_more_than_its_answer(waiting, capsys, answer, why):
    """Not the time of one that takes no notice of it, or blocks the loop; nor the run."""
    began = time.monotonic()
    scores = waiting("judged", ["abc", answer, "ab"], timeout=0.5)
    assert scores[0] == 3 and scores[2] == 2 and math.isnan(scores[1])
    assert time.monotonic() - began < 10
    assert f"failed for 1 of 3 answers, which are left out: {why}" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.filterwarnings("ignore:coroutine 'sleep' was never awaited")
def test_awaitables_that_cannot_be_scores(waiting):
    with pytest.raises(InputError, match="judged returned <coroutine object sleep .* for row 1"):
        waiting("judged", ["abc", "nested"])
    with pytest.raises(InputError, match="tasks failed for 2 of 2 answers: it was cancelled"):
        waiting("tasks", ["abc", "ab"])  # a task ends with the loop that it was made in


def test_only_what_failed_is_tried_again(waiting):
    assert waiting("judged", ["abc", "fails once"], retries=1) == [3, 10]
    assert waiting.module.calls == [["abc", "fails once"], ["fails once"]]
    with pytest.raises(InputError, match="at_once raised ConnectionError"):
        waiting("at_once", ["abc"], retries=1)
    assert waiting("at_once", ["abc"], retries=2) == [3.0]


def test_a_lost_answer_has_no_sum(tmp_path):
    (tmp_path / "waiting.py").write_text(WAITING + "def one(prompts, completions): return [1, 1]")
    specs = [f"{tmp_path / 'waiting.py'}:{name}" for name in ("judged", "one")]
    scorer = load_scorer(specs, field="reward", device=CPU)
    total = scorer(["a", "a"], ["ab", "fails"], {})
    assert total[0] == 3 and total[1].isnan() and scorer.components["judged"][1].isnan()
    assert scorer.components["one"].tolist() == [1, 1]
    assert scorer.take_seconds()["judged"] > 0.009 and scorer.take_seconds()["judged"] == 0
