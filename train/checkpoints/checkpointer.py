"""Write checkpoints in the background: aside, hashed, then published whole.

A checkpoint holds t, the weights, the optimizer's moments and a little JSON: the data order is a
pure function of the rows read, curriculum, layer dropout and learning rate are of t. It is loaded
in `train/checkpoints/resume.py`.
"""

import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from data.urls import Location
from models.checkpoint_format import CHAT_TEMPLATE, TOKENIZER, Manifest
from models.llama import Llama
from train.checkpoints.checkpoint_config import CheckpointConfig
from train.checkpoints.content import (
    RunIdentity,
    Tensors,
    refuse_non_finite,
    training_tensors,
)
from train.checkpoints.folder import CheckpointFolder, amount
from train.checkpoints.folders import folder_at
from train.checkpoints.local_folder import LocalFolder
from train.optimizer.optim import Optimizers
from train.parallel.runtime import Runtime

T = TypeVar("T")
logger = logging.getLogger(__name__)

# Beyond the watchdog's limit, whose message names the rank that hangs.
_TIMEOUT = timedelta(hours=4)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time. Every rank makes the same calls.

    A failed checkpoint leaves no files and is not fatal: it is logged, and the next one is written
    when due. The end of the `with` block waits for the one in flight.
    """

    def __init__(
        self,
        folder: Location,
        model: Llama,
        optimizer: Optimizers,
        *,
        config: CheckpointConfig,
        identity: RunIdentity,
        runtime: Runtime,
    ) -> None:
        """Start the thread; `folder` holds the checkpoints of the run."""
        self._folder, self._model, self._optimizer = folder_at(folder), model, optimizer
        self._config, self._identity, self._runtime = config, identity, runtime
        # Read once: the file may change during the run.
        self._texts = _tokenizer_files(identity.tokenizer_path) if runtime.is_main else {}
        # The thread's collectives run concurrently with those of training, so in another group.
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        self._on_gpu = runtime.device.type == "cuda"
        self._thread = ThreadPoolExecutor(1, "checkpoint", self._enter_thread)
        # Keeps its host memory for the next checkpoint. `DefaultStager` closes it after the first
        # one in torch 2.11, whose second then ends in a KeyError.
        self._stager = StateDictStager(pin_memory=self._on_gpu)
        self._in_flight: Future[str] | None = None
        self._failures = 0
        self.saved_step = 0
        """The step of the last checkpoint that was written; 0: none since the start."""

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for the checkpoint in flight, also after an error."""
        self._thread.shutdown()
        self._stager.close()

    def save(self, t: int, state: dict[str, Any], *, required: bool = False) -> None:
        """Write the checkpoint of step t, after the one in flight.

        Args:
            t: Optimizer steps done.
            state: JSON to be returned by `resume`.
            required: Wait until it is written, and raise if that fails.

        Raises:
            FloatingPointError: If a weight is not finite; no checkpoint is written then.
            OSError: On rank 0, if it was required or one too many in a row could not be written.
            SystemExit: On the other ranks then.
        """
        self.wait()
        refuse_non_finite(self._model, t, self._gather)
        tensors: Tensors = training_tensors(self._model, self._optimizer)
        at_once = required or not self._config.asynchronous
        if not at_once:
            tensors = self._stage(tensors)
        manifest = self._identity.manifest(t, json.loads(json.dumps(state)), self._runtime)
        self._in_flight = self._thread.submit(
            self._write, self._folder, f"step-{t:08d}", tensors, manifest, not required
        )
        if at_once:
            self.wait(required=required)

    def wait(self, *, required: bool = False) -> None:
        """Wait until the checkpoint in flight, if any, is written or has failed.

        Raises:
            OSError: On rank 0, if it has failed and is `required`, or is one too many in a row.
            SystemExit: On the other ranks then.
        """
        if self._in_flight is None:
            return
        future, self._in_flight = self._in_flight, None
        problem = future.result()
        self._failures = self._failures + 1 if problem else 0
        if not problem or not (required or self._failures >= self._config.max_failures):
            return
        if not self._runtime.is_main:
            raise SystemExit(2)
        count = f" ({self._failures} in a row have failed)" if self._failures > 1 else ""
        raise OSError(self._folder.refusal(problem + count))

    def write_model(self, path: Path, t: int) -> None:
        """Write the weights alone, or their average, in the dtype of `config.final_model`.

        "none" writes nothing.

        Raises:
            OSError: On rank 0, if they could not be written.
            SystemExit: On the other ranks then.
        """
        self.wait()
        if self._config.final_model == "none":
            return
        refuse_non_finite(self._model, t, self._gather)
        dtype = _DTYPES[self._config.final_model]
        average = self._optimizer.average
        state = self._model.state_dict() if average is None else average.tensors
        weights = {name: value.to(dtype) for name, value in state.items()}
        manifest = self._identity.manifest(t, {}, self._runtime)
        self._in_flight = self._thread.submit(
            self._write, LocalFolder(path.parent), path.name, {"model": weights}, manifest, False
        )
        self.wait(required=True)

    def _stage(self, tensors: Tensors) -> Tensors:
        """Return a copy in host memory, complete when this returns."""
        staged: Tensors = self._stager.stage(tensors, non_blocking=self._on_gpu)
        if self._on_gpu:
            torch.cuda.synchronize()
        return staged

    def _enter_thread(self) -> None:
        """Set this rank's GPU in the thread too, where torch would use the first."""
        if self._on_gpu:
            torch.cuda.set_device(self._runtime.device)

    def _write(
        self,
        folder: CheckpointFolder,
        name: str,
        tensors: Tensors,
        manifest: Manifest,
        tolerated: bool,
    ) -> str:
        """Write and commit a checkpoint, in the writer's thread.

        Args:
            folder: The folder of the checkpoint.
            name: Its name there.
            tensors: Its tensors.
            manifest: Its manifest, but for the files.
            tolerated: Whether training continues if it fails.

        Returns:
            The error, on every rank if on any; empty if there is none.
        """
        num_bytes = sum(v.numel() * v.element_size() for d in tensors.values() for v in d.values())
        begin = time.monotonic()
        try:
            self._on_main(lambda: folder.begin(name))
            save(tensors, storage_writer=folder.writer(name), process_group=self._group)
            entries = self._agree(lambda: folder.written(name, self._runtime.rank))
            files = {name: entry for rank in entries for name, entry in rank.items()}
            self._on_main(lambda: folder.commit(name, manifest, self._texts, files))
        except (CheckpointException, OSError) as error:  # the same on every rank
            if not self._runtime.is_main:
                return "failed"
            folder.discard(name)
            problem = f"could not write {name}, {folder.explain(error, num_bytes)}"
            if tolerated:
                logger.warning(
                    "checkpoint: %s; training continues (%d of at most %d failures in a row)",
                    problem,
                    self._failures + 1,
                    self._config.max_failures,
                )
            return problem
        if self._runtime.is_main:
            seconds = time.monotonic() - begin
            logger.info(
                "checkpoint: wrote %s, %s in %.1f s", folder.path / name, amount(num_bytes), seconds
            )
            self.saved_step = manifest.step
            self._folder.prune(self._config.keep_latest, self._config.keep_every_steps)
        return ""

    def _on_main(self, action: Callable[[], None]) -> None:
        """Run `action` on rank 0; the other ranks wait for it."""
        self._agree(action if self._runtime.is_main else lambda: None)

    def _agree(self, action: Callable[[], T]) -> list[T]:
        """Return every rank's result of `action`, or raise its OSError on every rank."""
        result: T | OSError
        try:
            result = action()
        except OSError as error:
            result = error
        results = self._gather(result)
        for found in results:
            if isinstance(found, OSError):
                raise found
        return results  # type: ignore[return-value]

    def _gather(self, value: T) -> list[T]:
        """Return every rank's value, by rank, in the writer's own group."""
        values: list[T] = [value] * self._runtime.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values


def _tokenizer_files(tokenizer: Path) -> dict[str, bytes]:
    """Return the tokenizer and the chat template beside it, if there is one, by their names."""
    template = tokenizer.with_name(CHAT_TEMPLATE)
    kept = {CHAT_TEMPLATE: template.read_bytes()} if template.is_file() else {}
    return {TOKENIZER: tokenizer.read_bytes()} | kept
