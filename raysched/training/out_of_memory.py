"""Running out of memory: recognised whatever raised it, and mended by smaller micro-batches.

Half the micro-batch and twice the accumulation are the same global batch: the same samples, the
same draws, the same mean; only the order in which the gradient's parts are added differs.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from raysched.config.run import RunConfig
from raysched.errors import EXIT_FAILED, RunFailedError, UserError
from raysched.training.files import write_json

# What C++ code says; oneDNN has no better words when its buffers can't be had.
ALLOCATOR_WORDS = (
    "out of memory",
    "you tried to allocate",
    "bad_alloc",
    "cannot allocate memory",
    "could not create a primitive",
    "could not create a memory",
)
# Only Ray's own: it also guesses at the kernel's killer whenever a process is gone.
KILLER_WORDS = ("running low on memory", "node_out_of_memory")
# What the run has learned about its memory, for later starts.
ADJUSTMENT_FILE = "out_of_memory.json"


class StepMemoryError(UserError):
    """A step needed more memory than there is; the work up to the last checkpoint is kept."""

    exit_code = EXIT_FAILED


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, however a library dressed it, says that memory ran out."""
    if isinstance(error, StepMemoryError | MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    if isinstance(error, RuntimeError) and any(word in text for word in ALLOCATOR_WORDS):
        return True
    return any(word in text for word in KILLER_WORDS)


@contextlib.contextmanager
def _told(tell: Callable[[BaseException], UserError]) -> Iterator[None]:
    """Let an allocator's error become another, which has no traceback of its own."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise tell(error) from None


def memory_errors(config: RunConfig, step: int) -> AbstractContextManager[None]:
    """Turn what an allocator raises in a training step into one clear message.

    Raises:
        StepMemoryError: naming the step, the micro-batch and the ways out.
    """

    def tell(error: BaseException) -> StepMemoryError:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return StepMemoryError(f"step {step}: {advice(config)} ({first[:200]})")

    return _told(tell)


def memory_for(what: str) -> AbstractContextManager[None]:
    """Turn what an allocator raises outside training into one clear message.

    Args:
        what: the options, with their values, that want so much.

    Raises:
        RunFailedError: naming them.
    """
    return _told(lambda error: RunFailedError(f"memory ran out with {what}; lower them"))


def advice(config: RunConfig) -> str:
    """What ran out, and what to do."""
    return (
        f"out of memory at micro-batches of {micro_batch(config)} samples: raise "
        "training.gradient_accumulation (the same global batch), lower training.batch_size, or "
        "set scaling.retry_out_of_memory: true to have that done"
    )


def micro_batch(config: RunConfig) -> int:
    """Samples of a rank's micro-batch."""
    parts = max(config.scaling.num_workers, 1) * config.training.gradient_accumulation
    return -(-config.training.batch_size // parts)


def halved(config: RunConfig) -> RunConfig | None:
    """The same run at half the micro-batch; None where that can't be or is not wished."""
    accumulation = 2 * config.training.gradient_accumulation
    workers = max(config.scaling.num_workers, 1)
    if not config.scaling.retry_out_of_memory:
        return None
    if config.training.batch_size % (workers * accumulation):
        return None
    return with_accumulation(config, accumulation)


def with_accumulation(config: RunConfig, accumulation: int) -> RunConfig:
    """The run with another number of micro-batches."""
    training = config.training.model_copy(update={"gradient_accumulation": accumulation})
    return config.model_copy(update={"training": training})


def remember(config: RunConfig, run_dir: Path) -> None:
    """Keep what was learned, so that a resumed run doesn't run out of memory again."""
    content = {"gradient_accumulation": config.training.gradient_accumulation}
    write_json(run_dir / ADJUSTMENT_FILE, content)


def recalled(config: RunConfig, run_dir: Path) -> RunConfig:
    """The run with what an earlier start learned about its memory, if it may use that."""
    path = run_dir / ADJUSTMENT_FILE
    if not config.scaling.retry_out_of_memory or not path.is_file():
        return config
    learned = int(json.loads(path.read_text(encoding="utf-8"))["gradient_accumulation"])
    workers = max(config.scaling.num_workers, 1)
    fits = config.training.batch_size % (workers * learned) == 0
    more = learned > config.training.gradient_accumulation
    return with_accumulation(config, learned) if fits and more else config
