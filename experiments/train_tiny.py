"""Train the `tiny` model on Python's own standard library, bytes as tokens.

    python -m experiments.train_tiny
    python -m experiments.train_tiny --steps=50 --out=runs/short
    python -m experiments.train_tiny --minutes=5 --out=runs/short

The command prints the loss on held-out modules before and after, and a text by the
model. It makes a checkpoint, for `--set weights=FOLDER`. The checkpoint in
models/trained/tiny (`--set weights=trained`) is of this default; its `training.json`
names its sources.

The default takes about 420 CPU-seconds (14 minutes on 2 busy cores) and goes from 6.22
to 1.66 nats a byte. After --minutes it takes no more steps, and the checkpoint is of
those that were taken; as the learning rate had not come down, more steps would do more
than their share.

The training text is the source of a fixed list of modules in a fixed order, which ship
with any Python since 3.11; no network is needed. One release of Python always gives the
same bytes (`text_sha256` in training.json). Other releases change some lines, and so
the losses a little.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import pathlib
import platform
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app
from jax import Array

from disagg_jax.progress import Progress, Stop, never, silent
from experiments.cli.command import command
from experiments.cli.flags import Flags
from experiments.cli.progress import MinutesFlag, ProgressLines
from experiments.runs.folder import commit, write_json
from models import checkpoint, transformer
from models.config import ModelConfig, get_config
from models.tokenizer import ByteTokenizer

FLAGS = Flags()
_STEPS = FLAGS.integer("steps", 600, "Updates, each of 16 windows.", lower_bound=1)
_MINUTES = MinutesFlag(FLAGS, "steps")
_OUT = FLAGS.string("out", "runs/tiny-trained", "Folder of the checkpoint.")
_SEED = FLAGS.integer("seed", 0, "Of the first weights and the windows.")

# Modules that are one Python file (in a package its __init__) in 3.11 to 3.13.
TRAINING = """
argparse ast asyncio.base_events asyncio.queues asyncio.tasks base64 bdb calendar cmd
code collections concurrent.futures._base configparser contextlib copy csv dataclasses
decimal difflib dis doctest email.message enum filecmp fileinput fnmatch ftplib
functools getopt gettext glob gzip hashlib hmac html.parser http.client http.cookiejar
http.server imaplib inspect ipaddress json.decoder json.encoder keyword linecache
locale logging logging.handlers lzma mailbox mimetypes netrc numbers opcode operator
optparse pathlib pdb pickle pickletools platform plistlib poplib pprint profile pstats
queue quopri random reprlib sched secrets selectors shelve shutil signal smtplib socket
socketserver sqlite3.dbapi2 ssl statistics string struct subprocess symtable tarfile
tempfile threading timeit token tokenize trace traceback tracemalloc types typing
unittest.case unittest.mock urllib.parse urllib.request uuid warnings weakref
webbrowser xml.dom.minidom xmlrpc.client zipapp zipfile
""".split()
HELD_OUT = "bisect fractions heapq shlex textwrap wave".split()

LENGTH, BATCH = 256, 16  # of a window, in tokens; windows of an update
LEARNING_RATE = 4e-3
PROMPT = '    def read(self, size=-1):\n        """'


def stdlib_tokens(modules: Sequence[str]) -> np.ndarray:
    """Return the sources of `modules` as bytes, each followed by the end of a text."""
    tokenizer = ByteTokenizer()
    tokens: list[int] = []
    for name in modules:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ValueError(f"expected the source of module {name}, got none")
        text = pathlib.Path(spec.origin).read_text(encoding="utf-8")
        tokens += [*tokenizer.encode(text), tokenizer.eos_token]
    return np.array(tokens, np.int32)


def random_windows(tokens: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """Yield `[BATCH, LENGTH + 1]` without end, from places drawn uniformly."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(tokens) - LENGTH, BATCH)
        yield tokens[starts[:, None] + np.arange(LENGTH + 1)]


@functools.partial(jax.jit, static_argnums=0)
def mean_loss(config: ModelConfig, params: transformer.Params, BT: Array) -> Array:
    """Return the mean nats of a token of `[B, T]`, given the tokens before it."""
    forward = functools.partial(transformer.forward, config, params)
    logits_BTV = jax.vmap(forward)(BT[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, BT[:, 1:])
    return losses.mean()


def held_out_loss(
    config: ModelConfig, params: transformer.Params, windows: int = 64
) -> float:
    """Return the mean loss over windows evenly spaced in the held-out modules."""
    tokens = stdlib_tokens(HELD_OUT)
    starts = np.linspace(0, len(tokens) - LENGTH - 1, windows).astype(int)
    BT = tokens[starts[:, None] + np.arange(LENGTH + 1)]
    return float(mean_loss(config, params, jnp.asarray(BT)))


def train(
    config: ModelConfig,
    params: transformer.Params,
    windows: Iterator[np.ndarray],
    steps: int,
    progress: Progress = silent,
    stop: Stop = never,
) -> tuple[transformer.Params, int]:
    """Return `params` (donated) after `steps` updates by AdamW, and how many were done.

    Args:
      stop: asked before each update.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, LEARNING_RATE, warmup_steps=min(50, steps // 2), decay_steps=steps
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1)
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, state: Any, BT: Array) -> tuple[Any, Any, Array]:
        loss, gradients = jax.value_and_grad(mean_loss, argnums=1)(config, params, BT)
        changes, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, changes), state, loss

    state = optimizer.init(params)
    progress("steps", 0, steps, "")
    for step in range(steps):
        if stop():
            return params, step
        params, state, loss = update(params, state, jnp.asarray(next(windows)))
        # Waits for the step, so that its time is known.
        progress("steps", step + 1, steps, f"loss {float(loss):.3f} on its windows")
    return params, steps


@command(FLAGS)
def main() -> None:
    deadline = _MINUTES.start()
    out = pathlib.Path(_OUT.value)
    if checkpoint.is_checkpoint(out):
        raise app.UsageError(f"--out: expected no checkpoint in {out} yet, got one")
    config = get_config("tiny")
    tokens = stdlib_tokens(TRAINING)
    params = transformer.init_params(config, _SEED.value)
    before = held_out_loss(config, params)
    print(f"{len(tokens)} tokens; held-out loss {before:.3f} nats a byte", flush=True)
    start = time.monotonic()
    windows = random_windows(tokens, _SEED.value)
    steps, progress = _STEPS.value, ProgressLines().step
    params, done = train(config, params, windows, steps, progress, deadline.passed)
    if done < steps:
        print(f"NOT FINISHED, as --minutes were spent: {done} of {steps} steps")
    seconds = time.monotonic() - start
    after = held_out_loss(config, params)
    tokenizer = ByteTokenizer()
    sample = transformer.greedy(config, params, tokenizer.encode(PROMPT), 120)
    print(f"held-out loss {before:.3f} -> {after:.3f} in {seconds:.0f} s; it writes:")
    print(PROMPT + tokenizer.decode(sample))
    checkpoint.save(out, config, params)
    record = {
        "steps": done,
        "seed": _SEED.value,
        "held_out_loss_before": before,
        "held_out_loss_after": after,
        "seconds": round(seconds),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "commit": commit(),
        "text_sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
    }
    write_json(out / "training.json", record)
    print(f"checkpoint: {out}")


if __name__ == "__main__":
    main()
