"""Global and shared memory of a launch, and what a kernel may not do with them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int64]
BASE = 2**40  # of the addresses that kernels see
LINE = 32  # of every tensor's place: what a load of 16 bytes, or of 32 in two, touches
ALL = {size: int.from_bytes(size * b"\1", "little") for size in (1, 2, 4, 8)}  # bytes owned


class Fault(Exception):
    """Something that a kernel must not do."""


def typed(memory: Bytes, size: int) -> NDArray[np.unsignedinteger]:
    return memory.view(f"u{size}")


class Global:
    """The tensors of a launch, copied into one array: a byte that is no element's reads as 0xFF,
    which is NaN in every dtype."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.places: dict[int, tuple[int, torch.UntypedStorage]] = {}  # of storages, by address
        tensors, end = [x for x in tensors if x.numel()], LINE
        for x in tensors:
            storage = x.untyped_storage()
            if storage.data_ptr() not in self.places:
                start = end + (storage.data_ptr() - end) % 256  # as it lies, up to 256 bytes
                self.places[storage.data_ptr()] = start, storage
                end = start + -(-storage.nbytes() // LINE) * LINE + 2 * LINE
        size = -(-end // LINE) * LINE + LINE
        self.memory, self.owned = np.full(size, 0xFF, np.uint8), np.zeros(size, np.uint8)
        self.writer = np.full(size, -1, np.int32)  # the program that has written a byte
        self.exists = np.zeros(size, np.bool_)  # memory of a tensor's storage
        self.beyond = 0  # loads that read beyond their tensor
        for x in tensors:
            self.own(x)
        for start, storage in self.places.values():
            ours = self.part(self.owned, start, storage).view(np.bool_)
            self.part(self.memory, start, storage)[ours] = content(storage)[ours]
            self.exists[start : start + storage.nbytes()] = True
        self.lines = self.owned.reshape(-1, 16).any(1)
        self.pairs = self.owned.reshape(-1, LINE).any(1)

    def part(self, memory: Bytes, start: int, storage: torch.UntypedStorage) -> Bytes:
        return memory[start : start + storage.nbytes()]

    def own(self, x: Tensor) -> None:
        start, storage = self.places[x.untyped_storage().data_ptr()]
        width = x.element_size()
        elements = torch.zeros(storage.nbytes() // width, dtype=torch.bool)
        elements.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
        self.part(self.owned, start, storage)[:] |= np.repeat(elements.numpy(), width)

    def address(self, x: Tensor) -> int:
        if not x.numel():
            return 0
        start, storage = self.places[x.untyped_storage().data_ptr()]
        return BASE + start + x.data_ptr() - storage.data_ptr()

    def give_back(self) -> None:
        """What the launch has written, to the tensors."""
        for start, storage in self.places.values():
            ours = self.part(self.owned, start, storage).view(np.bool_)
            content(storage)[ours] = self.part(self.memory, start, storage)[ours]

    def located(self, addresses: Numbers, width: int, count: int) -> Numbers:
        """Indices [n, count] of elements of `width` bytes."""
        at = addresses - BASE
        if (at % (width * count)).any():
            raise Fault(f"misaligned access of {width * count} bytes")
        if (at < 0).any() or (at + width * count > self.memory.size).any():
            raise Fault(f"{self.where(addresses)} is in no tensor")
        return at[:, None] // width + np.arange(count)

    def load(self, addresses: Numbers, width: int, count: int) -> NDArray[np.unsignedinteger]:
        at = self.located(addresses, width, count)
        inside = (typed(self.owned, width)[at] == ALL[width]).all(1)
        if not inside.all():
            self.check_beyond(addresses[~inside])
        return typed(self.memory, width)[at]

    def check_beyond(self, addresses: Numbers) -> None:
        at = addresses - BASE
        if not (self.lines[at // 16] | self.exists[at] & self.pairs[at // LINE]).all():
            raise Fault(f"load of {self.where(addresses)}, which is in no tensor")
        self.beyond += at.size

    def store(
        self, addresses: Numbers, values: NDArray[np.unsignedinteger], programs: Numbers
    ) -> None:
        width = values.itemsize
        at = self.located(addresses, width, values.shape[1])
        if (typed(self.owned, width)[at] != ALL[width]).any():
            raise Fault(f"store to {self.where(addresses)} beyond a tensor")
        before, program = self.writer[at * width], programs[:, None]
        if ((before >= 0) & (before != program)).any():
            raise Fault("two programs write one element")
        self.writer[at * width] = program
        typed(self.memory, width)[at] = values
        if (typed(self.memory, width)[at] != values).any():
            raise Fault("two threads write different values to one element at once")

    def where(self, addresses: Numbers) -> str:
        return f"{addresses.size} addresses from {int(addresses.min()):#x}"


def content(storage: torch.UntypedStorage) -> Bytes:
    return torch.tensor([], dtype=torch.uint8).set_(storage).numpy()


class Shared:
    """Each block's own, side by side, and for every byte who touched it last and when.

    A barrier moves the block's time on: what was touched before it is ordered.
    """

    MANY = -2  # readers

    def __init__(self, blocks: int, size: int) -> None:
        self.size, self.stride = size, -(-size // 16) * 16
        self.memory = np.zeros(blocks * self.stride, np.uint8)
        self.writer, self.reader = (np.full(self.memory.size, -1, np.int32) for _ in range(2))
        self.written, self.read = (np.full(self.memory.size, -1, np.int32) for _ in range(2))
        self.now = np.zeros(blocks, np.int32)

    def barrier(self, blocks: Numbers) -> None:
        self.now[blocks] += 1

    def located(self, addresses: Numbers, blocks: Numbers, size: int) -> Numbers:
        """Indices [n, size] of bytes."""
        if (addresses % size).any():
            raise Fault(f"misaligned access of {size} bytes of shared memory")
        if (addresses < 0).any() or (addresses + size > self.size).any():
            raise Fault(f"shared memory has {self.size} bytes, not {addresses.max()} + {size}")
        return (blocks * self.stride + addresses)[:, None] + np.arange(size)

    def load(self, addresses: Numbers, blocks: Numbers, threads: Numbers, size: int) -> Bytes:
        at = self.located(addresses, blocks, size)
        now, thread = self.now[blocks][:, None], threads[:, None]
        if (self.written[at] < 0).any():
            raise Fault("read of shared memory that nobody has written")
        if ((self.written[at] == now) & (self.writer[at] != thread)).any():
            raise Fault("race: a read with no barrier after another thread's write")
        several = (self.read[at] == now) & (self.reader[at] != thread)
        self.reader[at] = np.where(several, self.MANY, thread)
        again = self.reader[at] != np.where(several, self.MANY, thread)  # in this one instruction
        self.reader[at[again]] = self.MANY
        self.read[at] = now
        return self.memory[at]

    def store(self, addresses: Numbers, blocks: Numbers, threads: Numbers, values: Bytes) -> None:
        at = self.located(addresses, blocks, values.shape[1])
        now, thread = self.now[blocks][:, None], threads[:, None]
        if ((self.written[at] == now) & (self.writer[at] != thread)).any():
            raise Fault("race: a write with no barrier after another thread's write")
        if ((self.read[at] == now) & (self.reader[at] != thread)).any():
            raise Fault("race: a write with no barrier after another thread's read")
        self.memory[at] = values
        if (self.memory[at] != values).any():
            raise Fault("race: two threads write different values to one byte of shared memory")
        self.writer[at], self.written[at] = thread, now
