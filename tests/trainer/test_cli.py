import json
import subprocess
import sys

import pytest

from rlhf_fast.trainer.cli import COMMANDS, main


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("reward", "ppo", "generate", "plot", "info"))
    assert main([]) == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name, capsys):
    with pytest.raises(SystemExit) as done:
        main([name, "--help"])
    assert done.value.code == 0 and f"rlhf-fast {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["pppo"], "rlhf-fast pppo: no such command (did you mean ppo?)"),
        (["generate", "--model", "/no/where", "--prompt", "x"], "model=/no/where: there is no"),
        (["plot", "--run", "/no/where"], "run=/no/where has no metrics.jsonl"),
        (["ppo", "--stepps", "3"], "--steps"),
        (["generate", "--model", "m", "--prompt", "a \udc80"], r"prompt has '\udc80', expected"),
    ],
)
def test_errors_are_one_line(argv, message, capsys):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert message in captured.err


def test_a_wrong_flag_of_info_is_one_line(capsys):
    with pytest.raises(SystemExit) as done:
        main(["info", "--markdwon"])
    assert done.value.code == 2
    assert capsys.readouterr().err == "rlhf-fast info: unrecognized arguments: --markdwon\n"


def test_a_plot_takes_no_folders_place(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").touch()
    row = {"step": 1, "objective/scores": 0.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    for output, reason in (
        ("model", "is a folder"),
        ("no/where.png", "cannot be written: No such file"),
    ):
        assert main(["plot", str(tmp_path), "--output", str(tmp_path / output)]) == 2
        assert f"{output} {reason}" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "model"]
    assert (tmp_path / "model" / "weights").exists()


def test_more_than_the_model_reads(tiny_policy_folder, capsys):
    flags = ["--model", tiny_policy_folder, "--prompt", "the film", "--max_new_tokens"]
    assert main(["generate", *flags, "127"]) == 2
    assert "at most 128 tokens, but the prompt has 2 and max_new" in capsys.readouterr().err
    assert main(["generate", *flags, "126"]) == 0


def test_help_needs_no_transformers_model(tmp_path):
    """--help answers without the modules that train."""
    code = (
        "import sys; from rlhf_fast.trainer.cli import main; main(['--help'])\n"
        "assert not {'datasets', 'matplotlib', 'rlhf_fast.trainer.ppo'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_generate(tiny_policy_folder, capsys):
    flags = ["--model", tiny_policy_folder, "--max_new_tokens", "5", "--prompt", "the film"]
    assert main(["generate", *flags, "--samples", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and len(set(lines)) > 1
    assert all(len(line.split()) <= 5 for line in lines)
    assert main(["generate", *flags, "--samples", "2", "--temperature", "0"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    for narrow in (["--top_k", "1"], ["--top_p", "1e-6"]):  # nothing is left to chance
        assert main(["generate", *flags, *narrow]) == 0
        assert capsys.readouterr().out.splitlines() == [first]
    for seed in ("0", "1"):
        assert main(["generate", *flags, "--samples", "3", "--seed", seed]) == 0
        assert (capsys.readouterr().out.splitlines() == lines) is (seed == "0")
    assert main(["generate", *flags, "--chat", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.strip() != first  # the template reached the model
    tab = ["generate", "--model", tiny_policy_folder, "--prompt"]
    assert main([*tab, "\t"]) == 2
    assert "prompt is empty" in capsys.readouterr().err


def test_plot(tmp_path, capsys):
    rows = [{"step": s, "objective/scores": s / 3, "objective/kl": 0.1 * s} for s in range(5)]
    rows.append({"step": 5, "objective/scores": None})  # not finite, and missing
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["plot", str(tmp_path)]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    target = tmp_path / "other.png"
    assert main(["plot", "--run", str(tmp_path), "--output", str(target)]) == 0
    assert target.stat().st_size > 1000
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "other": 2}\n')
    assert main(["plot", "--run", str(tmp_path)]) == 2
    assert "no metrics to plot" in capsys.readouterr().err
