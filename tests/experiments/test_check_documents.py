"""Documents with something wrong in them, and the project's own."""

import pytest

from experiments import check_documents
from experiments.check_documents import ROOT, check, documents


@pytest.fixture
def root(tmp_path):
    """A checkout with one module that has two flags, and one that does not run."""
    experiments = tmp_path / "experiments"
    experiments.mkdir()
    (experiments / "sweep.py").write_text(
        "from experiments.cli.more import More\n"
        'FLAGS = Flags()\n_A = FLAGS.string("out", None, "Where.")\n'
        "_B = More(FLAGS)\n"
        'if __name__ == "__main__":\n    pass\n'
    )
    (experiments / "cli").mkdir()
    (experiments / "cli" / "more.py").write_text(
        'def more(own):\n    return own.boolean("fast", True, "How.")\n'
    )
    (experiments / "library.py").write_text("X = 1\n")
    (experiments / "reports").mkdir()
    return tmp_path


def found(root, text, name="README.md"):
    path = root / name
    path.write_text(text)
    return [str(problem) for problem in check(root, path)]


@pytest.mark.parametrize(
    "text",
    [
        "`python -m experiments.sweep --out=a --nofast --help`",
        "```\n.venv/bin/python -m experiments.sweep \\\n    --out=a --fast\n```",
        "# ```\n# python -m experiments.sweep \\\n#     --out=a\n# ```",
        "| `python -m experiments.sweep` | a row | --of a table |",
        "# python -m experiments.sweep   commit abc",
        "| `python -m experiments.` | |\n|---|---|\n| `sweep --out=a` | `b` |",
        "| `python -m experiments.` | |\n|---|---|\n\n| `not a command` |",
        "`experiments/sweep.py`, `experiments/reports/`, `runs/none.txt`, `a/b`",
        "[a](experiments/sweep.py) [b](experiments/library.py#part)",
        "## It's here: `A`\n[c](#its-here-a) [d](README.md#its-here-a)",
        "[d](https://example.org/none) ![e](experiments/library.py)",
    ],
)
def test_what_holds(root, text):
    assert found(root, text) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "a\n`python -m experiments.swep`",
            "README.md:2: expected a module of experiments, got 'experiments.swep'",
        ),
        (
            "`python -m experiments.library`",
            "README.md:1: expected a module that can be run, got 'experiments.library'",
        ),
        (
            "a\n\npython -m experiments.sweep \\\n    --out=a \\\n --seed=3",
            "README.md:3: experiments.sweep: expected a flag of ['fast', 'out'], got "
            "'--seed=3'",
        ),
        (
            "python -m experiments.sweep -n 2",
            "README.md:1: experiments.sweep: expected flags like --name=value, got "
            "'-n'",
        ),
        (
            "| `python -m experiments.` | |\n|---|---|\n| `sweep` | |\n| `swep` | |",
            "README.md:4: expected a module of experiments, got 'experiments.swep'",
        ),
        (
            "see `experiments/none.py`",
            "README.md:1: expected a file or folder of the project, got "
            "'experiments/none.py'",
        ),
        (
            "\n![a](experiments/none.png)",
            "README.md:2: expected a link to something that exists, got "
            "'experiments/none.png'",
        ),
        (
            "# Here\n[a](#there)",
            "README.md:2: expected a link to something that exists, got '#there'",
        ),
    ],
)
def test_what_does_not(root, text, expected):
    assert found(root, text) == [expected]


def test_links_are_relative_to_their_document(root):
    text = "[a](../sweep.py) [b](experiments/sweep.py)"
    (problem,) = found(root, text, "experiments/reports/a.md")
    assert "got 'experiments/sweep.py'" in problem


def test_a_badge_has_to_open_a_notebook_that_is_there(root):
    colab = "https://colab.research.google.com/github/disagg-jax/disagg-jax/blob/main"
    assert found(root, f"[a]({colab}/experiments/sweep.py)") == []
    (problem,) = found(root, f"[a]({colab}/experiments/none.ipynb)")
    assert "none.ipynb" in problem


def test_a_kind_of_document_that_is_missing(root):
    (root / "README.md").write_text("")
    with pytest.raises(ValueError, match="expected documents like disagg_jax/README"):
        documents(root)


def test_the_command_finds_that_the_projects_own_documents_hold(capsys):
    assert len(documents(ROOT)) > 10
    with pytest.raises(SystemExit) as end:
        check_documents.main(["check_documents"])
    said = capsys.readouterr().out
    assert not end.value.code, said
    assert "0 problems" in said
