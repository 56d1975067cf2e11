"""What runs on a borrowed accelerator, tried whole on a CPU with a tiny model."""

import dataclasses
import json
import math
import os
import time
import traceback

import pytest

from disagg_jax.calibration.profile_keys import read_profile
from disagg_jax.engine.attention import KERNELS, XlaAttention
from experiments import on_device
from experiments.benchmarks.attention import STEPS, step_error
from experiments.cli.progress import Deadline
from experiments.device import calibration, device_tests, kernels, parts
from experiments.device.part import Bench, Found, Part
from experiments.device.parts import PARTS
from experiments.device.process import WorkError, in_a_process
from experiments.device.sizes import Devices, DeviceSizes
from models.config import get_config
from tests.commands import run_code, run_command

GIB = 2**30
HERE = __name__
SMALL = dataclasses.replace(get_config("tiny"), name="small", layers=1)
CPU = Devices(platform="cpu", kind="cpu", count=2, memory_bytes=None)
GPU = Devices(platform="gpu", kind="NVIDIA H200", count=1, memory_bytes=125 * GIB)
SIZES = DeviceSizes(
    devices=CPU,
    model=f"{HERE}:SMALL",
    dtype="float32",
    batches=[2],
    contexts=[64, 128],
    prompts=[32],
    handoff_mib=[1],
    max_context=64,
    max_seqs=2,
    repeats=1,
)


def here(work, *args, most_s=None):
    """`in_a_process`, but in this one."""
    try:
        return work(*args)
    except Exception:
        raise WorkError(traceback.format_exc()) from None


def forbidden(work, *args, most_s=None):
    raise AssertionError(f"{args[0]} is run again")


# -- all of it -----------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def few_kernels():
    """Leaves out kernels that a CPU interprets, but for one: they take long."""
    with pytest.MonkeyPatch.context() as patch:
        listed = {name: KERNELS[name] for name in ("xla", "pallas_tpu")}
        patch.setattr(kernels, "KERNELS", listed)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("on_device")
    return out, *on_device.run(SIZES, out, list(PARTS), call=here)


@pytest.mark.slow
def test_a_whole_run_leaves_each_part_the_table_and_the_profile(whole):
    out, table, right = whole
    assert right, table
    records = {name: json.loads((out / f"{name}.json").read_text()) for name in PARTS}
    states = {name: record["status"] for name, record in records.items()}
    assert states == {**dict.fromkeys(PARTS, "done"), "tests": "skipped"}
    assert records["tests"]["result"] == "tests are marked gpu or tpu, this is a cpu"
    assert (out / "table.txt").read_text() == table + "\n"
    for name, record in records.items():
        assert any(
            line.startswith(name) and record["result"] in line
            for line in table.splitlines()
        )
    assert read_profile(str(out / "profile.json"), SMALL).held_out
    assert str(out / "profile.json") in table


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("tokens", ["small bfloat16 against float32", "greedy tokens agree"]),
        ("kernels", ["xla          chunks   error", "pallas_tpu   decodes  error"]),
        ("kernels", ["decodes, 2 over 128 tokens", "one read", "prompt of 32 tokens"]),
        ("calibration", ["held out", "in service", "1 rounds, drift"]),
        ("steps", ["decode 2 over 64", "decode 2 over 128", "prefill 32"]),
        ("handoff", ["plain device_put", "64 of 64 tokens as on one device"]),
        ("sweep", ["SLO:", "2xcolocated:tp1  prefill:tp1,decode:tp1"]),
    ],
)
@pytest.mark.slow
def test_what_a_part_prints_is_in_its_file(whole, part, expected):
    text = (whole[0] / f"{part}.txt").read_text()
    assert all(each in text for each in expected), text


@pytest.mark.slow
def test_the_sweep_has_the_step_times_of_the_profile(whole):
    out = whole[0]
    times = json.loads((out / "step_times.json").read_text())["seconds"]
    used = json.loads((out / "sweep" / "step_times.json").read_text())["seconds"]
    assert used == times
    (layout,) = read_profile(str(out / "profile.json"), SMALL).layouts.values()
    decode = {str(shape): parts for shape, parts in layout.measured.items()}
    (key,) = [key for key in times if "decode_B2_P" in key][:1]
    assert [times[key]] == list(decode[key.split("/")[-1]])


@pytest.mark.slow
def test_a_run_that_is_resumed_does_nothing_twice(whole):
    out, table, _ = whole
    assert on_device.run(SIZES, out, list(PARTS), call=forbidden) == (table, True)


@pytest.mark.slow
def test_a_folder_of_other_sizes_is_refused(whole):
    other = dataclasses.replace(SIZES, repeats=2)
    with pytest.raises(ValueError, match=r"another config \(repeats\)"):
        on_device.run(other, whole[0], ["kernels"], call=forbidden)


# -- parts that fail, and the time ---------------------------------------------------


@pytest.fixture
def fakes(monkeypatch):
    """Puts parts, by name, in the place of the real ones."""

    def put(**runs):
        made = {name: Part(name=name, about="", run=run) for name, run in runs.items()}
        for module in (on_device, parts):
            monkeypatch.setattr(module, "PARTS", made)

    return put


def good(bench):
    print("all is well")
    return Found("good")


def bad(bench):
    print("so far")
    raise KeyError("no cuDNN")


def test_a_part_that_raises_leaves_its_traceback_and_the_others_run(fakes, tmp_path):
    fakes(bad=bad, good=good)
    table, right = on_device.run(SIZES, tmp_path, ["bad", "good"], call=here)
    assert not right
    record = json.loads((tmp_path / "bad.json").read_text())
    assert record["status"] == "FAILED"
    assert "in bad\n" in record["error"] and "KeyError: 'no cuDNN'" in record["error"]
    assert (tmp_path / "bad.txt").read_text() == "so far\n"
    assert "FAILED" in table and "KeyError: 'no cuDNN'" in table
    assert json.loads((tmp_path / "good.json").read_text())["status"] == "done"

    fakes(bad=good, good=forbidden)
    table, right = on_device.run(SIZES, tmp_path, ["bad", "good"], call=here)
    assert right and "FAILED" not in table


def test_a_part_that_is_wrong_is_no_success(fakes, tmp_path):
    fakes(wrong=lambda bench: Found("2 of 3", wrong=True), good=good)
    table, right = on_device.run(SIZES, tmp_path, ["wrong", "good"], call=here)
    assert not right and "WRONG" in table
    assert on_device.run(SIZES, tmp_path, ["good"], call=forbidden)[1]


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def test_each_part_has_its_share_of_the_time_and_what_is_left_out_is_named(
    fakes, tmp_path
):
    """Of 3 minutes: 1, of the 2.5 that are left 1.25, and then there is no more.

    Each may have twice that, or all that is left, and a minute.
    """
    fakes(a=good, b=good, c=good)
    clock, asked = Clock(), []

    def spend(work, *args, most_s):
        asked.append((args[-1], most_s))
        clock.now_s += 30 if len(asked) == 1 else 150
        return Found("did it", "the rest" if len(asked) == 2 else "")

    deadline = Deadline(3, clock)
    table, right = on_device.run(SIZES, tmp_path, ["a", "b", "c"], deadline, spend)
    assert right
    assert asked == [(1.0, 180.0), (1.25, 210.0)]
    assert table.endswith("left out, as --minutes were spent: b: the rest; c")
    assert "in part" in table and not (tmp_path / "c.json").exists()

    ran = []

    def again(work, *args, most_s):
        ran.append(args[0])
        return Found("did it")

    table, _ = on_device.run(SIZES, tmp_path, ["a", "b", "c"], call=again)
    assert ran == ["b", "c"] and "left out" not in table


def test_a_fit_has_its_rounds_however_late_it_is():
    late = calibration._WithRounds(Deadline(1e-9))
    asked = [late.passed() for _ in range(6)]
    assert asked == [False] * 4 + [True] * 2  # the warm-up and 3 rounds


@pytest.mark.slow
def test_parts_end_at_their_deadline(whole, tmp_path, capsys):
    """Each says what it lacks; what was found before is there again."""
    spent = Deadline(1e-9)
    bench = Bench(sizes=SIZES, out=tmp_path, deadline=spent)
    assert PARTS["kernels"].run(bench).left_out == "times of 3 of 3 shapes"
    assert PARTS["steps"].run(bench).left_out == (
        "decodes over 64 tokens, decodes over 128 tokens"
    )
    assert PARTS["handoff"].run(bench).left_out == "tokens of two pools"
    assert PARTS["sweep"].run(bench).left_out == "all systems"
    capsys.readouterr()
    for name in ("kernels", "steps"):
        assert PARTS[name].run(dataclasses.replace(bench, out=whole[0])).left_out == ""
        assert capsys.readouterr().out == (whole[0] / f"{name}.txt").read_text()


# -- processes -----------------------------------------------------------------------


def test_work_in_a_process():
    assert in_a_process(math.sqrt, 4) == 2
    with pytest.raises(WorkError, match=r"(?s)Traceback.*JSONDecodeError: Expecting"):
        in_a_process(json.loads, "no")
    with pytest.raises(WorkError, match="its process died with status 3"):
        in_a_process(os._exit, 3)
    with pytest.raises(WorkError, match="killed: it had not ended after 1 s"):
        in_a_process(time.sleep, 600, most_s=1)


def test_the_command_itself_takes_no_device(tmp_path):
    """A GPU's memory is for the parts."""
    code = (
        "import sys\n"
        "from jax._src import xla_bridge\n"
        "from experiments import on_device\n"
        "try:\n"
        "    on_device.main(['on_device', '--parts=tests', *sys.argv[1:]])\n"
        "except SystemExit as end:\n"
        "    print('status', end.code, xla_bridge.backends_are_initialized())\n"
    )
    done = run_code(code, f"--out={tmp_path}")
    said = "tests  skipped  0  tests are marked gpu or tpu, this is a cpu"
    assert said in done.stdout
    assert done.stdout.endswith("status 0 False\n"), done.stderr


def test_an_unknown_part_is_refused_before_any_work(tmp_path):
    done = run_command("on_device", "--parts=kernels,x", f"--out={tmp_path / 'new'}")
    assert done.returncode == 1 and not (tmp_path / "new").exists()
    expected = f"--parts: expected some of {', '.join(PARTS)}, got 'x'"
    assert done.stderr.strip() == f"error: {expected}"


# -- single parts --------------------------------------------------------------------


class Doubled(XlaAttention):
    name = "doubled"

    def decodes(self, *args):
        return super().decodes(*args) * 2


class Broken(XlaAttention):
    name = "broken"

    def chunks(self, *args):
        raise RuntimeError("cuDNN\nis not there")


class Unimportable(XlaAttention):
    name = "unimportable"

    def problem(self, config, block_tokens):
        raise ImportError("no mosaic")


class Elsewhere(XlaAttention):
    name = "elsewhere"

    def problem(self, config, block_tokens):
        return "expected a TPU"


ALL = (XlaAttention, Doubled, Broken, Elsewhere, Unimportable)


def test_kernels_that_are_wrong_or_cannot_run_are_rows(monkeypatch, tmp_path, capsys):
    listed = {k.name: k for k in ALL}
    monkeypatch.setattr(kernels, "KERNELS", listed)
    bench = Bench(sizes=SIZES, out=tmp_path, deadline=Deadline(1e-9))
    found = kernels.run(bench)
    assert found.wrong
    assert found.result == "xla right; doubled WRONG; broken cannot run"
    lines = capsys.readouterr().out.splitlines()
    said = "elsewhere: expected a TPU; unimportable: cannot run: ImportError: no mosaic"
    assert f"cannot serve it: {said}" in lines
    rows = {tuple(line.split()[:2]): line for line in lines}
    assert "error 1.0e+00 WRONG, over 0.0001" in rows["doubled", "decodes"]
    assert "RuntimeError: cuDNN is not there" in rows["broken", "chunks"]
    assert "WRONG" not in rows["broken", "decodes"]


@pytest.mark.parametrize("step", STEPS)
def test_an_error_of_any_kind_of_attention_is_seen(step):
    class Off(XlaAttention):
        name = "off"

    def off(self, *args):
        return getattr(XlaAttention, step)(self, *args) * 1.01

    setattr(Off, step, off)
    assert step_error(XlaAttention("cpu"), SMALL, step) < 1e-6
    # Of chunks and decodes in a step some are right.
    assert 5e-3 < step_error(Off("cpu"), SMALL, step) < 1.1e-2


@pytest.mark.parametrize(
    ("body", "wrong", "said"),
    [
        ("pass", False, "1 passed, 1 deselected"),
        ("assert False", True, "1 failed, 1 deselected"),
    ],
)
def test_device_tests_are_those_marked_gpu(
    body, wrong, said, monkeypatch, tmp_path, capsys
):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_gpu():\n"
        f"    {body}\ndef test_cpu():\n    assert False\n"
    )
    monkeypatch.setattr(device_tests, "_ROOT", tmp_path)
    sizes = dataclasses.replace(SIZES, devices=GPU)
    assert device_tests.problem(sizes) == ""
    found = device_tests.run(Bench(sizes=sizes, out=tmp_path))
    assert found.wrong == wrong and said in found.result
    assert said in capsys.readouterr().out


def test_one_device_stands_for_two_pools():
    code = (
        "import jax\n"
        "from experiments.benchmarks.handoff import rates\n"
        "from experiments.two_meshes import Cut, build, check_tokens\n"
        "from models.config import get_config\n"
        "config = get_config('tiny')\n"
        "found = rates(config, [(1, 1)], [2**16], 64, None, 1)\n"
        "meshes = build(config, Cut(prefill=1, decode=1), virtual=True)\n"
        "print(len(jax.devices()), len(found), check_tokens(config, meshes))\n"
    )
    done = run_code("import jax; jax.config.update('jax_num_cpu_devices', 1)\n" + code)
    assert done.stdout.startswith("1 2 64 of 64 tokens"), done.stderr


# -- sizes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gib", "model"), [(125, "llama-3-8b"), (20, "qwen3-0.6b"), (4, "tiny")]
)
def test_the_default_model_fits_the_device(gib, model):
    assert (
        DeviceSizes.of(dataclasses.replace(GPU, memory_bytes=gib * GIB)).model == model
    )
    assert DeviceSizes.of(CPU).model == "tiny"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"model": "x"}, "model: expected"),
        ({"contexts": [4096]}, "sizes: expected at most 1024 tokens, got 4096"),
        ({"prompts": [0]}, r"sizes: expected numbers >= 1, got \[0\]"),
        ({"attention": "flash"}, "attention kernel: expected one of"),
    ],
)
def test_bad_sizes(asked, message):
    with pytest.raises(ValueError, match=message):
        DeviceSizes.of(CPU, **asked)


def test_batches_whose_kv_has_no_room_are_left_out():
    """A token of Llama-3-8B has 2^17 bytes of KV, its weights 16 GB.

    Three quarters of the other 118 GB are 676,000 tokens: 256 rows of 2048, 64 of 8192.
    """
    sizes = DeviceSizes.of(GPU)
    assert sizes.batches_at(2048) == [1, 16, 64, 256]
    assert sizes.batches_at(8192) == [1, 16, 64]
    small = dataclasses.replace(GPU, memory_bytes=40 * GIB)
    assert DeviceSizes.of(small).batches_at(8192) == [1, 16]


def test_steps_need_room():
    small = dataclasses.replace(GPU, memory_bytes=15 * GIB)
    assert PARTS["steps"].problem(DeviceSizes.of(GPU)) == ""
    why = PARTS["steps"].problem(DeviceSizes.of(small, "llama-3-8b"))
    assert why == "no batch of these contexts has room beside the weights"


def test_two_copies_of_the_weights_need_room():
    """bfloat16 16 GB and float32 32 GB, with three tenths more: 58 GiB."""
    problem = PARTS["tokens"].problem
    assert problem(DeviceSizes.of(GPU)) == ""
    small = DeviceSizes.of(dataclasses.replace(GPU, memory_bytes=40 * GIB))
    assert problem(small) == "needs 58 GiB, a device has 40"
