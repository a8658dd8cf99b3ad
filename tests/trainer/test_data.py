import logging
import math
import random

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from trl.data_utils import apply_chat_template
from trl.data_utils import extract_prompt as trl_extract_prompt

from rlhf_fast.trainer.data.held_out import hold_out
from rlhf_fast.trainer.data.read import load_rows
from rlhf_fast.trainer.data.rows import (
    Prompt,
    batch_indices,
    extract_prompt,
    pad,
    preference_pairs,
    prompts,
    start,
)
from rlhf_fast.trainer.errors import InputError

PAIRS = [{"chosen": "good film", "rejected": "bad film"}, {"chosen": "good", "rejected": "bad"}]


# What split means, whatever is read.
SPLITS = {
    "train[1:]": PAIRS[1:], "train[:50%]": PAIRS[:1], "train[-1:]": PAIRS[1:],
    "train[1:]+train[:1]": PAIRS[::-1],
}  # fmt: skip


@pytest.fixture
def pairs_of(tiny_tokenizer, write_jsonl):
    def load(rows, max_tokens=64):
        source = write_jsonl(rows)
        return preference_pairs(
            load_rows(source), tiny_tokenizer, source=source, max_tokens=max_tokens
        )

    return load


@pytest.fixture
def prompts_of(tiny_tokenizer, write_jsonl):
    def load(rows, max_tokens=64):
        source = write_jsonl(rows)
        return prompts(load_rows(source), tiny_tokenizer, source=source, max_tokens=max_tokens)

    return load


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    "kind", ["jsonl", "json", "csv", "parquet", "folder", "dict folder", "folder of files"]
)
def test_sources(kind, tmp_path, write_jsonl):
    made = datasets.Dataset.from_list(PAIRS)
    path = tmp_path / f"d.{kind}"
    if kind in ("jsonl", "json"):
        path = write_jsonl(PAIRS, f"d.{kind}")
    elif kind == "folder of files":
        path.mkdir()
        made.to_parquet(path / "train.parquet")
    elif kind == "csv":
        made.to_csv(path)
    elif kind == "parquet":
        made.to_parquet(path)
    elif kind == "folder":
        made.save_to_disk(path)
    else:
        datasets.DatasetDict({"train": made, "other": made.select([0])}).save_to_disk(path)
    assert list(load_rows(str(path))) == PAIRS
    assert len(load_rows(str(path), max_rows=1)) == 1
    if kind == "dict folder":
        assert len(load_rows(str(path), split="other")) == 1
    with pytest.raises(InputError, match="no split 'nosplit'; its splits are 'train'"):
        load_rows(str(path), split="nosplit")
    for split, want in SPLITS.items():
        assert list(load_rows(str(path), split=split)) == want
    with pytest.raises(InputError, match=r"split=train\[1: expected|Unrecognized instruction"):
        load_rows(str(path), split="train[1:2:3]")


def test_hub_name(monkeypatch):
    """What is no path is asked of the hub, split and subset with it."""

    def load_dataset(*args, **kwargs):
        assert (args, kwargs) == (("owner/name", "main"), {"split": "test"})
        return datasets.Dataset.from_list(PAIRS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_rows("owner/name", split="test", subset="main")) == 2


def test_unreadable_sources(tmp_path, write_jsonl):
    empty = write_jsonl([], "empty.jsonl")
    with pytest.raises(InputError, match=r"empty\.jsonl is empty"):
        load_rows(empty)
    (tmp_path / "head.csv").write_text("chosen,rejected\n")
    with pytest.raises(InputError, match=r"head\.csv.* has no rows"):
        load_rows(str(tmp_path / "head.csv"))
    with pytest.raises(InputError, match=r"no\.jsonl: there is no such file"):
        load_rows(str(tmp_path / "no.jsonl"))
    with pytest.raises(InputError, match="/no/where: there is no such file or folder"):
        load_rows("/no/where")
    (tmp_path / "notes.txt").write_text("good\n")
    with pytest.raises(InputError, match=r"notes\.txt: expected a file ending in \.jsonl, "):
        load_rows(str(tmp_path / "notes.txt"))


def test_a_broken_line_is_one_error(tmp_path, monkeypatch):
    """datasets logs the same failure: once is enough."""
    logged = logging.Handler()
    monkeypatch.setattr(logged, "emit", lambda record: pytest.fail(record.getMessage()))
    monkeypatch.setattr(logging.getLogger("datasets"), "handlers", [logged])
    (tmp_path / "bad.jsonl").write_text('{"chosen": "a", "rejected": "b"}\n{"chosen": \n')
    with pytest.raises(InputError, match=r"bad\.jsonl .*cannot be read: JSON parse error.* row 1"):
        load_rows(str(tmp_path / "bad.jsonl"))


def test_pair_formats(pairs_of, tiny_tokenizer):
    def text(ids):
        return tiny_tokenizer.decode(ids)

    (pair,) = pairs_of([{"prompt": "the film is ", "chosen": "good", "rejected": "bad"}])
    assert (text(pair.chosen), text(pair.rejected)) == ("the film is good", "the film is bad")
    assert pairs_of([{"chosen": "good", "rejected": "bad", "margin": 2}])[0].margin == 2.0

    (pair,) = pairs_of(
        [
            {
                "prompt": [message("user", "the plot")],
                "chosen": [message("assistant", "good")],
                "rejected": [message("assistant", "bad")],
            }
        ]
    )
    assert text(pair.chosen) == "user the plot assistant good"
    (pair,) = pairs_of(
        [
            {
                "chosen": [message("user", "film"), message("assistant", "good")],
                "rejected": [message("user", "film"), message("assistant", "bad")],
            }
        ]
    )
    assert text(pair.rejected) == "user film assistant bad"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"chosen": "good", "rejected": " "}, "row 2: rejected is empty, expected text"),
        ({"chosen": 5, "rejected": "bad"}, "row 2: chosen is 5, expected text or a list of role"),
        (
            {"chosen": [message("user", "film")], "rejected": "bad"},
            "row 2: chosen and rejected must both be text or both messages",
        ),
        ({"chosen": "good", "rejected": "bad", "margin": "x"}, "row 2: margin is 'x', expected a"),
        ({"chosen": "good", "rejected": None}, "row 2: rejected is None"),
        (
            {"chosen": "good \ud83d", "rejected": "bad"},
            r"row 2: chosen has '.ud83d', expected text",
        ),
        ({"chosen": "good", "rejected": "bad", "margin": math.nan}, "row 2: margin is nan"),
    ],
)
def test_bad_pair_is_named(pairs_of, bad, message):
    with pytest.raises(InputError, match=message):
        pairs_of([*PAIRS, bad])


def test_pair_of_text_and_messages(pairs_of):
    row = {"prompt": [message("user", "film")], "chosen": "good", "rejected": "bad"}
    with pytest.raises(InputError, match="row 0: prompt and chosen must both be"):
        pairs_of([row])
    spoken = [{"role": "assistant", "content": ["good"]}]
    with pytest.raises(InputError, match=r"row 0: chosen has a message with content \['good'\]"):
        pairs_of([{"chosen": spoken, "rejected": spoken}])
    broken = [{"role": "assistant", "text": "good"}]
    with pytest.raises(InputError, match="row 0: chosen has a message without role and content"):
        pairs_of([{"chosen": broken, "rejected": broken}])


def test_missing_column_names_what_is_there(pairs_of, prompts_of):
    with pytest.raises(InputError, match="no column 'rejected'; its columns are 'chosen', 'worse'"):
        pairs_of([{"chosen": "good", "worse": "bad"}])
    with pytest.raises(InputError, match="no column 'prompt'"):
        prompts_of([{"text": "the film"}])


def test_long_rows_are_left_out(pairs_of, prompts_of, capsys):
    long = {"chosen": "good good good", "rejected": "bad"}
    assert len(pairs_of([*PAIRS, long], max_tokens=2)) == 2
    assert "1 of 3 rows are longer than max_tokens=2" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(InputError, match="no pair is at most max_tokens=2"):
        pairs_of([long], max_tokens=2)
    rows = [{"prompt": "the"}, {"prompt": "the film is"}]
    assert [p.prompt for p in prompts_of(rows, max_tokens=1)] == ["the"]
    with pytest.raises(InputError, match="max_prompt_tokens=1"):
        prompts_of(rows[1:], max_tokens=1)


def test_prompts_keep_their_columns(prompts_of, tiny_tokenizer):
    (plain,) = prompts_of([{"prompt": "the film", "label": 3}])
    assert (plain.prompt, plain.columns) == ("the film", {"label": 3})
    messages = [{"role": "user", "content": "the film"}]
    (chat,) = prompts_of([{"prompt": messages}])
    assert tiny_tokenizer.decode(chat.ids) == "user the film assistant"
    with pytest.raises(InputError, match="row 0: prompt is empty"):
        prompts_of([{"prompt": ""}])


def test_a_prompt_in_the_assistants_words_is_continued(tiny_tokenizer):
    """With and without such words, the text is that of TRL's apply_chat_template."""
    begun = [message("user", "the film"), message("assistant", "is very")]
    for prompt in (begun[:1], begun, [message("system", "good"), *begun]):
        expected = apply_chat_template({"prompt": prompt}, tiny_tokenizer)["prompt"]
        assert start(prompt, tiny_tokenizer, "d") == (expected, True)
    assert start(begun, tiny_tokenizer, "d")[0].endswith("is very")


def test_extracted_prompt_is_trls():
    rnd = random.Random(0)
    for _ in range(500):
        shared = "x" + "".join(rnd.choices("ab ", k=rnd.randint(0, 5)))
        texts = [shared + "".join(rnd.choices("ab ", k=rnd.randint(1, 4))) for _ in range(2)]
        chats = [[message(*pair) for pair in zip(text, text, strict=True)] for text in texts]
        for chosen, rejected in (texts, chats):
            expected = trl_extract_prompt({"chosen": chosen, "rejected": rejected})
            assert extract_prompt(chosen, rejected, "d") == expected


def test_prompts_of_preference_pairs(prompts_of, tiny_tokenizer):
    (plain,) = prompts_of([{"chosen": "the film is good", "rejected": "the film is bad"}])
    assert plain.prompt == "the film is"
    assert plain.columns == {"chosen": " good", "rejected": " bad"}
    asked = [message("user", "film")]
    (chat,) = prompts_of(
        [
            {
                "chosen": [*asked, message("assistant", "good")],
                "rejected": [*asked, message("assistant", "bad")],
            }
        ]
    )
    assert tiny_tokenizer.decode(chat.ids) == "user film assistant"
    with pytest.raises(InputError, match="row 1: chosen and rejected begin differently"):
        prompts_of([{"chosen": "a film", "rejected": "a plot"}, *PAIRS])


def test_columns_of_reward_functions_own_arguments(prompts_of):
    with pytest.raises(InputError, match="has a column 'completions'.*: rename it"):
        prompts_of([{"prompt": "the film", "completions": "good"}])


def test_a_template_that_refuses(tiny_tokenizer, write_jsonl, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{{ raise_exception('no system') }}")
    rows = load_rows(write_jsonl([{"prompt": [message("system", "film")]}]))
    with pytest.raises(InputError, match="d, row 0: the chat template refuses .*: no system"):
        prompts(rows, tiny_tokenizer, source="d", max_tokens=9)


def test_conversation_needs_a_template(tiny_tokenizer, write_jsonl, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    rows = load_rows(write_jsonl([{"prompt": [{"role": "user", "content": "film"}]}]))
    with pytest.raises(InputError, match="row 0: .*no chat template"):
        prompts(rows, tiny_tokenizer, source="d", max_tokens=9)


def test_pad():
    ids, mask = pad([[5], [6, 7, 8]], side="left")
    assert ids.tolist() == [[0, 0, 5], [6, 7, 8]]
    assert mask.tolist() == [[False, False, True], [True] * 3]
    ids, mask = pad([[5], [6, 7, 8]], side="right")
    assert ids.tolist() == [[5, 0, 0], [6, 7, 8]]
    assert mask.tolist() == [[True, False, False], [True] * 3]


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (7, 7), (3, 8)])
def test_batches_cover_every_row_once_an_epoch(size, batch):
    epochs = 4
    flat = [i for s in range(size * epochs) for i in batch_indices(size, batch, s, seed=1)]
    passes = [flat[e * size : (e + 1) * size] for e in range(epochs)]
    assert all(sorted(p) == list(range(size)) for p in passes)
    assert len({tuple(p) for p in passes}) > 1  # shuffled anew
    assert batch_indices(size, batch, 5, seed=1) != batch_indices(size, batch, 5, seed=2)


@pytest.mark.parametrize("prompt", ["a \ud83d", [message("user", "a \ud83d")]])
def test_half_a_character_of_json(prompts_of, prompt):
    with pytest.raises(InputError, match=r"row 1: prompt has '.ud83d', expected text of whole"):
        prompts_of([{"prompt": "the film"}, {"prompt": prompt}])


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "saved"])
def test_text_that_is_not_utf8(tmp_path, tiny_tokenizer, kind):
    file = tmp_path / f"latin.{kind}"
    if kind in ("jsonl", "csv"):
        text = {"jsonl": '{"prompt": "caf\xe9"}\n', "csv": "prompt\ncaf\xe9\n"}[kind]
        file.write_bytes(text.encode("latin-1"))
    else:
        broken = pa.table({"prompt": pa.array([b"caf\xe9"], pa.binary()).view(pa.string())})
        if kind == "parquet":
            pq.write_table(broken, file)
        else:
            datasets.Dataset(broken).save_to_disk(file)
    with pytest.raises(InputError, match="is not UTF-8 text: .*byte 0xe9"):
        prompts(load_rows(str(file)), tiny_tokenizer, source="here", max_tokens=64)


def test_pairs_with_equal_sides_are_left_out(pairs_of, prompts_of, capsys):
    tie = {"chosen": "the film", "rejected": "the film"}
    assert len(pairs_of([*PAIRS, tie])) == len(PAIRS)
    assert "1 of 3 rows have the same text" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(InputError, match="no pair of different texts"):
        pairs_of([tie])
    spoken = {name: [message("user", "film")] for name in ("chosen", "rejected")}
    assert len(pairs_of([*PAIRS, spoken][::2])) == 1
    # what of a tie is the prompt cannot be known
    assert len(prompts_of([{"chosen": "the film", "rejected": "the plot"}, tie])) == 1


EARLIER = [message("user", "plot"), message("assistant", "is")]
ASKED, GOOD, BAD = (
    message("user", "film"),
    message("assistant", "good"),
    message("assistant", "bad"),
)


@pytest.mark.parametrize(
    ("prompt", "begin"),
    [
        ("film", [ASKED]),  # UltraFeedback
        ("film", []),
        ([ASKED], [ASKED]),
        ([ASKED], []),
        (None, [ASKED]),
        ("film", [*EARLIER, ASKED]),
        ([*EARLIER, ASKED], [*EARLIER, ASKED]),
    ],
)
def test_conversations_beside_a_prompt(pairs_of, prompts_of, tiny_tokenizer, prompt, begin):
    """The sides may be whole conversations or answers, the prompt text, messages or not there."""
    row = {"prompt": prompt, "chosen": [*begin, GOOD], "rejected": [*begin, BAD], "score": 8.0}
    row = {name: value for name, value in row.items() if value is not None}
    (pair,) = pairs_of([row])
    spoken = "user plot assistant is " * (len(begin) == 3) + "user film assistant"
    assert tiny_tokenizer.decode(pair.chosen) == f"{spoken} good"
    assert tiny_tokenizer.decode(pair.rejected) == f"{spoken} bad"
    (asked,) = prompts_of([row])
    assert tiny_tokenizer.decode(asked.ids) == spoken
    assert asked.columns["score"] == 8.0


def test_pairs_of_one_prompt_are_known(pairs_of):
    """However the prompt is given: they are held out together."""
    for first, second in (
        ({"prompt": "film "}, {"prompt": "film "}),
        ({"prompt": [ASKED]}, {"prompt": [ASKED]}),
    ):
        text = isinstance(first["prompt"], str)
        sides = [("good", "bad"), ("a", "the")]
        rows = [
            row | {"chosen": a if text else [message("assistant", a)],
                   "rejected": b if text else [message("assistant", b)]}
            for row, (a, b) in zip((first, second), sides, strict=True)
        ]  # fmt: skip
        a, b = pairs_of(rows)
        assert a.asked == b.asked
    a, b = pairs_of([{"chosen": [ASKED, GOOD], "rejected": [ASKED, x]} for x in (BAD, ASKED)])
    assert a.asked == b.asked
    a, b, c = pairs_of([*PAIRS, {"chosen": "bad", "rejected": "good"}])
    assert a.asked != b.asked == c.asked  # turned round it is the same pair


@pytest.mark.parametrize(("margin", "want"), [("0.5", 0.5), ("", 0.0), ("1e-2", 0.01)])
def test_margin_of_a_csv(tmp_path, tiny_tokenizer, margin, want):
    (tmp_path / "d.csv").write_text(f"chosen,rejected,margin\ngood,bad,{margin}\n")
    rows = load_rows(str(tmp_path / "d.csv"))
    assert preference_pairs(rows, tiny_tokenizer, source="d", max_tokens=9)[0].margin == want


def test_held_out_prompts_are_not_trained_on(capsys):
    """Nor held out twice; where there are too few different ones, that is said."""
    made = [Prompt([i % 6], str(i % 6), {"n": i}) for i in range(18)]
    held_out, rest = hold_out(made, 4)
    assert [p.columns["n"] for p in held_out] == [0, 1, 2, 3]
    assert [p.columns["n"] for p in rest] == [4, 5, 10, 11, 16, 17]
    assert "8 rows with the same prompt" in " ".join(capsys.readouterr().out.split())
    assert [len(part) for part in hold_out(made, 6)] == [6, 12]
    assert "duplicates of only 6 different" in " ".join(capsys.readouterr().out.split())
    assert [len(part) for part in hold_out(made[:6], 4)] == [4, 2]
    assert not capsys.readouterr().out
