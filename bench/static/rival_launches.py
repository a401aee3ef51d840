"""What other packages' losses would launch on a target, and how often their kernels' loops run.

Their launches are not copied from their source: their own code runs on tensors without memory, as on the target, and
what it would launch is recorded. Only the loops of their kernels are described here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from math import prod
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from contrastile.bench.static.compile import Buffer
from contrastile.bench.static.disassembly import Block, Instruction, count, main_loop
from contrastile.bench.static.instructions import K_BYTES, Work, is_matrix, work_of

N = 65536  # pairs


@dataclass(frozen=True)
class Cache:
    """L2. Of bytes that are walked again and again and do not fit all at once it keeps nothing, as a cache that forgets
    what was used longest ago, or as much as fits, which no cache can better.
    """

    size: int
    keeps: bool

    def beyond(self, size: int) -> float:
        """The share of so many bytes that comes from DRAM with every walk."""
        return max(0, size - self.size) / size if self.keeps else float(size > self.size)

    def again(self, size: int, walks: int, written: int = 0) -> float:
        """Bytes of all walks; a part is written back."""
        return (size + written) * (1 + (walks - 1) * self.beyond(size))


@dataclass(frozen=True)
class Product:
    """Of matrices, that a program of another's takes in one round of a loop."""

    rows: int
    cols: int
    depth: int
    is_tf32: bool = False
    left_is_near: bool = False  # tcgen05 finds its left operand in tensor memory

    @property
    def flop(self) -> int:
        return 2 * self.rows * self.cols * self.depth

    def tcgen05(self) -> Work:
        """Of its instructions. Flop of tf32 count twice, everywhere here: their rate is half."""
        rows, cols, depth = min(self.rows, 128), min(self.cols, 256), K_BYTES // (4 if self.is_tf32 else 2)
        times, read = self.flop // (2 * rows * cols * depth), cols if self.left_is_near else rows + cols
        return Work(matrix=self.flop * (1 + self.is_tf32), shared=times * read * K_BYTES)


@dataclass(frozen=True)
class Loop:
    rounds: int
    products: tuple[Product, ...] = ()
    inner: tuple[Loop, ...] = ()

    def taken(self) -> Iterator[tuple[int, Product]]:
        """Every product within, and how often."""
        yield from ((self.rounds, p) for p in self.products)
        yield from ((self.rounds * times, p) for loop in self.inner for times, p in loop.taken())


@dataclass(frozen=True)
class Launch:
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]
    programs: int

    def sizes(self) -> tuple[int, int, int]:
        """Rows, columns and features of a tile."""
        a = self.arguments
        if "BLOCK_M" in a:
            return a["BLOCK_M"], a["BLOCK_N"], a["BLOCK_HEADDIM"]
        return a["BLOCK_SIZE_I"], a["BLOCK_SIZE_J"], a.get("BLOCK_SIZE_D") or a["D_POW2"]

    def loops(self, depth: int) -> tuple[Loop, ...]:
        rows, cols, features = self.sizes()
        logits = Product(rows, cols, features, is_tf32="BLOCK_M" in self.arguments)
        name, steps, parts = self.kernel.__name__, N // cols, depth // features
        if name == "clip_denom_kernel":
            return (Loop(parts, (logits,)),)
        if name == "clip_fa_grad_kernel":
            return (Loop(steps, (logits, Product(rows, features, cols, left_is_near=True))),)
        if name == "clip_grad_both_kernel":
            both = Product(rows, features, cols, is_tf32=True), Product(cols, features, rows, is_tf32=True)
            return Loop(parts, (logits,)), Loop(parts, both)
        inner = Loop(parts, (logits,)), Loop(parts, (Product(rows, features, cols, is_tf32=True),))
        return (Loop(steps, inner=inner[: 1 if name == "_prob_fwd_kernel" else 2]),)

    def dram(self, depth: int, resident: int, cache: Cache) -> float:
        """Bytes. Programs side by side, `resident` at a time, share what they walk in step."""
        rows, cols, _ = self.sizes()
        name, tower, gradient = self.kernel.__name__, 2 * N * depth, 4 * N * depth
        if name == "clip_denom_kernel":  # walks all rows for every column of tiles
            return tower + cache.again(tower, N // cols)
        if name == "clip_grad_both_kernel":  # and their gradient, by atomic additions
            return tower + 2 * gradient + cache.again(tower + gradient, N // cols, written=gradient)
        waves = -(-self.programs // resident)
        if name == "clip_fa_grad_kernel":  # all columns for every wave of programs
            return tower + gradient + cache.again(tower, waves)
        tower *= 2  # float32; with every step it walks its own rows again, and their gradient
        own = resident * rows * depth * 4
        written = 0 if name == "_prob_fwd_kernel" else own
        return cache.again(tower, waves) + waves * cache.again(own + written, N // cols, written)


class Recorder:
    """In a kernel's place."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*values: Any, **named: Any) -> None:
            options: dict[str, int] = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
            options["enable_fp_fusion"] = True  # Triton 3.9 does so unasked
            arguments = {**dict(zip(self.kernel.arg_names, values, strict=False)), **named}
            programs = prod(grid(arguments) if callable(grid) else grid)
            tensors = {k: Buffer(v.dtype, tuple(v.shape)) for k, v in arguments.items() if isinstance(v, torch.Tensor)}
            self.launches.append(Launch(self.kernel, arguments | tensors, options, programs))

        return launch


class Elsewhere(torch.Tensor):
    """A tensor of the meta device that passes for one of a GPU."""

    is_cuda = True  # type: ignore[assignment]


def run_memeff(x: Any, y: Any) -> None:
    context = SimpleNamespace()
    context.save_for_backward = lambda *tensors: setattr(context, "saved_tensors", tensors)
    loss = import_module("memeff.clip_loss").MemoryEfficientCLIPLossNormed
    loss.forward(context, x, y, 20.0, 20.0, None, 0.0)
    loss.backward(context, torch.ones((), device=x.device))


def run_inf_cl(x: Any, y: Any) -> None:
    """A call for each direction. A row goes in as heads of 256 features, in float32."""
    q, k = (t.float().view(len(t), -1, 256) for t in (x, y))
    for anchors, candidates in ((q, k), (k, q)):
        context = SimpleNamespace()
        context.save_for_backward = lambda *tensors, to=context: setattr(to, "saved_tensors", tensors)
        loss = import_module("inf_cl.flash").FlashProb
        loss.backward(context, torch.ones_like(loss.forward(context, anchors, candidates)))


@dataclass(frozen=True)
class Rival:
    """Another's loss: CLIP's."""

    package: str
    modules: tuple[str, ...]  # that hold kernels
    run: Callable[[Any, Any], None]

    @property
    def version(self) -> str | None:
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    def launches(self, target: str, depth: int) -> list[Launch]:
        found: list[Launch] = []
        with ExitStack() as stack:
            for module in map(import_module, self.modules):
                for name, kernel in list(vars(module).items()):
                    if isinstance(kernel, triton.JITFunction):
                        stack.enter_context(patch.object(module, name, Recorder(kernel, found)))
            capability = divmod(int(target.removeprefix("sm_")), 10)
            stack.enter_context(patch("torch.cuda.get_device_capability", return_value=capability))
            x, y = (torch.empty(N, depth, dtype=torch.bfloat16, device="meta").as_subclass(Elsewhere) for _ in "xy")
            self.run(x, y)
        return found


RIVALS = {
    "memeff": Rival("memeff", ("memeff.clip_loss", "memeff.distributed_clip_loss"), run_memeff),
    "Inf-CL": Rival("inf-cl", ("inf_cl.flash",), run_inf_cl),
}


@dataclass(frozen=True)
class Repeated(Instruction):
    times: float


def work_of_warp(blocks: list[Block], loops: Sequence[Loop]) -> Work:
    """What a warp runs on the shortest way through, each loop as often as it is described; of tcgen05, all but it."""
    marks = [sum(map(is_matrix, block.instructions)) for block in blocks]
    is_given_by_one = any(i.opcode.startswith("UTC") for block in blocks for i in block.instructions)
    times, heads = [1.0] * len(blocks), set[int]()
    _unroll(blocks, marks, loops, frozenset(range(len(blocks))), times, heads)
    for block, often in zip(blocks, times, strict=True):
        block.instructions = [Repeated(i.opcode, i.operands, often) for i in block.instructions]
    # Other warps jump over the blocks of the one that gives the matrix instructions, but not over the loops.
    required = [int(n in heads) for n in range(len(blocks))] if is_given_by_one else marks
    total = Work()
    for instruction, n in count(blocks, required, lambda _: False).after.items():
        assert isinstance(instruction, Repeated)
        work = work_of(instruction) * (n * instruction.times)
        total += work + Work(matrix=work.matrix) if "TF32" in instruction.opcode else work
    return total


def _unroll(
    blocks: list[Block],
    marks: list[int],
    loops: Sequence[Loop],
    of: frozenset[int],
    times: list[float],
    heads: set[int],
) -> None:
    """Takes the way back out of each loop and notes how often its blocks run instead."""
    alone = ([marks[n] if n == m else 0 for n in range(len(blocks))] for m in of if marks[m])
    found = sorted({main_loop(blocks, only) for only in alone} - {frozenset()}, key=min)
    if len(found) != len(loops):
        raise RuntimeError(f"{len(found)} loops have matrix instructions: expected {len(loops)}")
    before = sum(marks[n] for n in of) - sum(marks[n] for members in found for n in members)
    for members, loop in zip(found, loops, strict=True):
        # Rounds that the compiler has put in front of the first loop are no rounds of it.
        peeled, before = before / sum(marks[n] for n in members), 0
        head = min(s for n, block in enumerate(blocks) if n not in members for s in block.successors if s in members)
        heads.add(head)
        ways_out = sorted({s for n in members for s in blocks[n].successors} - members)
        for n in members:
            times[n] *= loop.rounds - peeled
            if head in blocks[n].successors:
                blocks[n].successors = [s for s in blocks[n].successors if s != head] + ways_out
        if loop.inner:
            _unroll(blocks, marks, loop.inner, members, times, heads)
