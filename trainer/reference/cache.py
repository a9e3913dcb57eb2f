"""Reference log-probs on disk: one small table per reference model and data set.

A table's file is named by what its numbers depend on, and by nothing else:

    MODEL-DATA.logps    MODEL: parameters, model config, logit transform, type of the matmuls
                        DATA:  token ids of all pairs, and which of them are trained on

So it serves every run of a sweep over learning rates or losses, and another model, chat template,
data set or `max_length` is another file. It holds a row of 12 bytes per pair: chosen, rejected, and
a checksum of the two and the row's number. A row whose checksum is 0 was never computed, one whose
checksum is wrong is damaged; either is computed, so a run that was killed is continued by the next
one, and a broken file is mended.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import xxhash
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel

from trainer.console import say
from trainer.data.pairs import Pair
from trainer.errors import InputError

ROW = np.dtype([("logps", "<f4", 2), ("check", "<u4")])
# What a model's config says about its file and this program rather than about its function.
INCIDENTAL = ("_name_or_path", "transformers_version", "use_cache", "dtype", "architectures")


def weights_key(model: PreTrainedModel) -> str:
    """16 hex digits that change with any weight.

    Every rank must call it; of weights that are partitioned each hashes its own part.
    """
    own = xxhash.xxh3_128()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_meta:
            continue
        part = getattr(tensor, "ds_tensor", tensor).detach()  # ZeRO-3's part of a parameter
        own.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
        own.update(part.reshape(-1).contiguous().view(torch.uint8).cpu().numpy())
    parts = dict.fromkeys(gather_object([own.hexdigest()]))  # replicas count once
    return xxhash.xxh3_64(" ".join(parts).encode()).hexdigest()


def model_key(model: PreTrainedModel, dtype: str) -> str:
    """16 hex digits that change with any weight, the config, the logit transform and `dtype`.

    Every rank must call it.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in INCIDENTAL}
    head = model.get_output_embeddings()
    transform = {"logit_scale": head.logit_scale, "logit_softcap": head.logit_softcap}
    identity = [weights_key(model), config, transform, dtype]
    return xxhash.xxh3_64(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def data_key(pairs: Iterable[Pair]) -> str:
    """16 hex digits that change with any token id or label."""
    digest = xxhash.xxh3_64()
    for pair in pairs:
        for sequence in (pair.chosen, pair.rejected):
            ids = np.asarray((sequence.ids, sequence.labels), dtype=np.int64)
            digest.update(f"{ids.shape[1]} ".encode())
            digest.update(ids.data)
    return digest.hexdigest()


def _check(index: int, logps: np.ndarray) -> int:
    return zlib.crc32(index.to_bytes(8, "little") + logps.tobytes())


class Table:
    """Log-probs (pairs, 2) in nats, and which of them are known; on disk for the main process."""

    def __init__(self, path: Path, pairs: int, on_disk: bool) -> None:
        """Open the table, or begin an empty one; `on_disk`: False keeps it in memory only.

        Raises:
            InputError: the folder cannot be written.
        """
        self.path = path
        self.disk = _open(path, pairs) if on_disk else None
        self.rows = np.zeros(pairs, ROW) if self.disk is None else np.array(self.disk)
        """This table's own: another run, or another split of the same pairs, may write the file."""
        self.logps = torch.from_numpy(self.rows["logps"])
        checks = [_check(i, logps) for i, logps in enumerate(self.rows["logps"])]
        self.known = self.rows["check"] == np.array(checks, np.uint32)
        damaged = int((~self.known & (self.rows["check"] != 0)).sum())
        if damaged:
            say(f"warning: {path} is damaged in {damaged} of {pairs} rows; they are computed again")

    def write(self, indices: list[int], logps: Tensor) -> None:
        """Store the rows (n, 2) at `indices`."""
        self.rows["logps"][indices] = logps.numpy()
        self.rows["check"][indices] = [_check(i, self.rows["logps"][i]) for i in indices]
        self.known[indices] = True
        if self.disk is not None:
            self.disk[indices] = self.rows[indices]

    def forget(self) -> None:
        """Begin an empty table."""
        self.rows[:] = np.zeros((), ROW)
        self.known[:] = False
        if self.disk is not None:
            self.disk[:] = self.rows

    def state(self) -> Tensor:
        """(pairs, 3): the rows, and 1 where they are known."""
        return torch.cat([self.logps, torch.from_numpy(self.known)[:, None].float()], 1)

    def receive(self, state: Tensor) -> None:
        """Take over another process's `state`; a table on disk is what the others receive."""
        if self.disk is None:
            self.logps.copy_(state[:, :2])
            self.known = state[:, 2].cpu().numpy() != 0


def _open(path: Path, pairs: int) -> np.memmap:
    size = pairs * ROW.itemsize
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size != size:
            say(f"warning: {path} is damaged: expected {size} bytes; it is computed again")
            path.unlink()
        if not path.exists():  # complete before it has its name
            blank = path.with_suffix(f".{os.getpid()}")
            blank.write_bytes(bytes(size))
            blank.replace(path)
        return np.memmap(path, ROW, "r+", shape=(pairs,))
    except OSError as error:
        raise InputError(
            f"ref_cache_dir: cannot write {path} ({error}); give a folder that can be written"
        ) from None
