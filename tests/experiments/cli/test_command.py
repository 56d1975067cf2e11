"""Commands: errors in one line, one interrupt is enough, no noise."""

import errno
import gc
import os
import pathlib
import signal
import subprocess
import sys
import time
import weakref

import pytest
from absl.flags import DuplicateFlagError

from experiments.cli.command import command
from experiments.cli.flags import REQUIRED, Flags
from experiments.configs.named import get_config
from experiments.sweep.request_source import RequestSource
from tests.commands import run_code, run_command
from tests.experiments.calibrating import make_model

ROOT = pathlib.Path(__file__).parents[3]
PATIENCE_S = 20  # a lost interrupt is lost forever; a slow machine is not


@pytest.fixture(autouse=True)
def a_shell_that_can_interrupt():
    """Whatever pytest itself was started with, as a background job ignores SIGINT."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for signum, handler in before.items():  # which an interrupted command keeps
        signal.signal(signum, handler)


def fails(error):
    @command()
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        main(["x"])
    return end.value.code


def ends_well(main):
    with pytest.raises(SystemExit) as end:
        main(["x"])
    assert not end.value.code


def test_a_users_error_is_one_line():
    assert fails(ValueError("rates: expected > 0")) == "error: rates: expected > 0"
    missing = FileNotFoundError(errno.ENOENT, "No such file or directory", "a.csv")
    assert fails(missing) == "error: 'a.csv': No such file or directory"
    assert fails(OSError("no file in it")) == "error: no file in it"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_what_to_do(number):
    said = fails(OSError(number, os.strerror(number)))
    assert said.startswith("error: no space left on the disk. What was saved is kept")
    said = fails(OSError(number, os.strerror(number), "runs/a"))
    assert "for 'runs/a'" in said


def test_an_error_that_no_user_caused_keeps_its_traceback():
    @command()
    def main():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        main(["x"])


def test_words_beside_the_flags_are_refused(capsys):
    with pytest.raises(SystemExit) as end:
        command()(lambda: None)(["x", "y"])
    assert end.value.code == 1
    assert "expected flags only, got ['y']" in capsys.readouterr().err


def test_a_command_gets_the_words_that_it_asks_for(capsys):
    seen = []
    main = command(words=("A", "B"))(lambda *words: seen.append(words))
    with pytest.raises(SystemExit) as end:
        main(["x", "one", "two"])
    assert not end.value.code and seen == [("one", "two")]
    with pytest.raises(SystemExit) as end:
        main(["x", "one"])
    assert end.value.code and seen == [("one", "two")]
    assert "expected A B, got ['one']" in capsys.readouterr().err


def test_two_commands_have_flags_of_one_name_and_each_its_own_values():
    seen = []

    def made(default):
        own = Flags()
        rate = own.float("rate", default, "Requests/s.")
        return command(own)(lambda: seen.append((rate.value, own.asked())))

    first, second = made(1.0), made(2.0)
    for main, argv in [
        (first, ["x", "--rate=5"]),
        (second, ["x"]),
        (first, ["x"]),  # what was asked before is forgotten
    ]:
        with pytest.raises(SystemExit) as end:
            main(argv)
        assert not end.value.code
    assert seen == [(5.0, {"rate": 5.0}), (2.0, {"rate": 2.0}), (1.0, {"rate": 1.0})]


def test_a_flag_that_must_be_given_is_named(capsys):
    own = Flags()
    own.string("run", REQUIRED, "A folder.")
    own.string("out", None, "Another.")
    with pytest.raises(SystemExit) as end:
        command(own)(lambda: None)(["x"])
    assert end.value.code == 1
    assert "--run must have a value" in capsys.readouterr().err


def test_a_name_taken_twice_in_a_command_is_an_error():
    own = Flags()
    own.string("run", None, "A folder.")
    with pytest.raises(DuplicateFlagError):
        own.integer("run", None, "A number.")


def test_what_was_asked_leaves_out_where_and_how_fast():
    own = Flags()
    own.string("out", "a", "A folder.")
    own.integer("workers", 2, "Processes.")
    own.integer("seed", 3, "First seed.")
    own.values.mark_as_parsed()
    assert own.asked() == {"seed": 3}


@pytest.mark.parametrize(
    ("text", "found"),
    [("2", 2), ("ray", "ray"), ("head:6379", "head:6379")]
    + [(address, address) for address in ("ray://head:10001", "127.0.0.1:1")],
)
def test_workers_are_processes_or_a_cluster(text, found):
    own = Flags()
    workers = own.workers()
    own.values(["x", f"--workers={text}"])
    assert workers.value == found


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "rays", ""])
def test_what_are_no_workers_is_named(text, capsys):
    own = Flags()
    own.workers()
    with pytest.raises(SystemExit):
        command(own)(lambda: None)(["x", f"--workers={text}"])
    expected = "expected processes >= 1, ray, or an address HOST:PORT, got '" + text
    assert expected in capsys.readouterr().err


# -- interrupts -----------------------------------------------------------------------


def in_the_collector(send):
    def callback(phase, info):
        gc.callbacks.remove(callback)
        send()

    gc.callbacks.append(callback)
    gc.collect()


class Object:
    pass


def in_a_weak_reference(send):
    target = Object()
    reference = weakref.ref(target, lambda _: send())
    del target
    assert reference() is None


def in_a_finalizer(send):
    class Finalized:
        def __del__(self):
            send()

    Finalized()


def in_a_finalizer_of_the_collector_twice(send):
    in_a_finalizer(lambda: in_the_collector(send))


def in_plain_code(send):
    send()


PLACES = [
    in_plain_code,
    in_the_collector,
    in_a_weak_reference,
    in_a_finalizer,
    in_a_finalizer_of_the_collector_twice,
]


@pytest.mark.parametrize(
    ("place", "signum"),
    [(place, signal.SIGINT) for place in PLACES] + [(in_the_collector, signal.SIGTERM)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_one_interrupt_ends_a_command_wherever_it_comes(place, signum, capsys):
    cleaned = []

    @command()
    def main():
        try:
            place(lambda: signal.raise_signal(signum))
            end = time.monotonic() + PATIENCE_S
            while time.monotonic() < end:
                pass
        finally:
            cleaned.append(time.monotonic() < end if "end" in locals() else True)

    with pytest.raises(SystemExit) as ended:
        main(["x"])
    assert ended.value.code == 128 + signum
    assert cleaned == [True]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("interrupted: what was saved is kept. To go on: ")


def test_clean_up_is_not_interrupted_again():
    done = []

    @command()
    def main():
        try:
            in_the_collector(lambda: signal.raise_signal(signal.SIGINT))
            time.sleep(PATIENCE_S)
        finally:
            time.sleep(0.2)  # ten times what a lost one takes to come again
            done.append(True)

    with pytest.raises(SystemExit):
        main(["x"])
    assert done


@pytest.mark.parametrize("late", [False, True])
def test_a_second_interrupt_ends_a_command_at_once(late):
    """While it cleans up, or after it, when Python waits for its threads."""
    done = run_code(f"""
import signal
from experiments.cli.command import command

def again():
    signal.raise_signal(signal.SIGTERM)
    print("went on", flush=True)

@command()
def main():
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        {late} or again()

signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    main(["x"])
finally:
    again()
""")
    assert (done.returncode, done.stdout) == (128 + signal.SIGINT, "")
    said = done.stderr.splitlines()
    assert len(said) == 1 + late  # it was said before
    assert all(line.startswith("interrupted: what was saved") for line in said)


def test_other_errors_that_cannot_be_raised_are_shown_as_ever(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: shown.append(lost.exc_type))

    @command()
    def main():
        in_a_finalizer(lambda: 1 / 0)

    ends_well(main)
    assert shown == [ZeroDivisionError]


def test_a_command_leaves_handlers_as_they_were():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    hook = sys.unraisablehook
    ends_well(command()(lambda: None))
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    assert sys.unraisablehook is hook


def test_a_background_job_still_ignores_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ends_well(command()(lambda: signal.raise_signal(signal.SIGINT)))


# -- as a user sees it ----------------------------------------------------------------


def shell(*args, **env):
    return subprocess.run(
        [sys.executable, "-m", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **env},
    )


def test_no_noise_of_libraries():
    done = shell("experiments.machine", JAX_PLATFORMS="")
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.parametrize(
    "platform", ["cuda", "nonsense", pytest.param("tpu", marks=pytest.mark.slow)]
)
def test_a_platform_that_is_not_there_is_one_line(platform):
    done = shell("experiments.machine", JAX_PLATFORMS=platform)
    if done.returncode == 0:
        pytest.skip(f"there is a {platform} here")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: JAX_PLATFORMS={platform}: expected a device that")
    assert "Unset JAX_PLATFORMS" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("goodput_sweep", "--set", "rates=inf"),
            "--set rates: expected a finite number, got 'inf'",
        ),
        (
            ("goodput_sweep", "--set", "slo.ttft_s=nan"),
            "--set slo.ttft_s: expected a finite number, got 'nan'",
        ),
        (
            ("goodput_sweep", "--set", "workload.output_tokens=fixed:inf"),
            "lengths 'fixed:inf': cannot convert float infinity to integer",
        ),
        (
            ("interference", "--rate=inf"),
            "--rate: expected a finite number, got inf",
        ),
        (
            ("simulate", "--trace=no.csv", "--config=opt13b_a100", "--out=x")
            + ("--deployment=colocated:tp1",),
            "'no.csv': No such file or directory",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_bad_values_are_one_line(flags, message):
    name, *rest = flags
    done = run_command(name, *rest)
    assert done.returncode == 1
    assert done.stderr == f"error: {message}\n"


def test_a_default_trace_that_is_not_there_names_the_flag_for_another(monkeypatch):
    config = get_config("azure_trace")
    monkeypatch.chdir(ROOT / "tests")  # the default is relative to a checkout
    with pytest.raises(
        ValueError, match=r"^workload.trace: expected a trace file, g"
    ) as e:
        RequestSource.load(config, make_model())
    assert config.workload.trace in str(e.value)
    assert "--set workload.trace=FILE" in str(e.value)
