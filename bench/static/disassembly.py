"""Reads a disassembled kernel: its blocks, its loops, and the least that any warp runs of it.

A kernel has blocks that an ordinary tile does not run: those for positives and padding, those that repeat a tile's
sums at any magnitude, those that wait again. So the counts are those of the path with the fewest instructions from the
entry to the exit, among the paths with all matrix instructions, stores and atomic additions: these last are branched
around where all lanes are past the bounds, which no inner tile is. That is a lower bound whichever way a tile takes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

_SASS_LINE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_SASS_LABEL = re.compile(r"^(\.L_\w+):")
_SASS_TARGET = re.compile(r"`\((\.L_\w+)\)")
_AMD_LINE = re.compile(r"^\s+([a-z]\w+)\s*([^;]*)")
_AMD_LABEL = re.compile(r"^(\.LBB\w+):")
RESULTS = (
    *("STG.", "RED.", "REDG.", "ATOM.", "ATOMG."),
    *("global_store", "global_atomic", "buffer_store", "buffer_atomic"),
)


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: str


@dataclass
class Block:
    """Instructions without a branch in or out."""

    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Counts:
    """How often a warp runs each instruction."""

    before: Counter[Instruction]  # the main loop, or up to the last matrix instruction where there is no loop
    loop: Counter[Instruction]  # in one round
    after: Counter[Instruction]


def parse_sass(text: str) -> list[Block]:
    """Blocks of the first kernel in nvdisasm's output; the first block is the entry."""
    builder = _Builder()
    for line in text.splitlines():
        if label := _SASS_LABEL.match(line):
            builder.label(label.group(1))
        elif found := _SASS_LINE.match(line):
            predicate, opcode, operands = found.groups()
            name = opcode.split(".")[0]
            if predicate == "!PT":  # never runs: it only spaces out others
                opcode, operands = "NOP", ""
            builder.add(Instruction(opcode, operands))
            target = _SASS_TARGET.search(operands)
            # A call to a label of the kernel's own is a branch over more than the reach of one.
            if name == "BRA" or (name == "CALL" and target is not None):
                if target is None:
                    raise RuntimeError(f"a branch without a target: {line.strip()}")
                # "BRA.U UP0, L" and "BRA P2, L" are conditional without a predicate in front.
                always = predicate is None and operands.startswith("`")
                builder.branch(target.group(1), always)
            elif name in ("EXIT", "RET") and predicate is None:
                builder.stop()
            elif name in ("BRX", "JMX", "JMP"):
                raise RuntimeError(f"an indirect branch: {line.strip()}")
    return builder.blocks()


def parse_amd(text: str) -> list[Block]:
    """Blocks of the kernel in LLVM's AMD assembly."""
    lines = text.splitlines()
    builder = _Builder()
    for number, line in enumerate(lines):
        if line.startswith(".Lfunc_end"):
            break
        if label := _AMD_LABEL.match(line):
            builder.label(label.group(1))
        elif found := _AMD_LINE.match(line):
            opcode, operands = found.group(1), found.group(2).strip()
            builder.add(Instruction(opcode, operands))
            if opcode == "s_endpgm":
                builder.stop()
            if opcode.startswith(("s_branch", "s_cbranch")) and not _guards_a_store(lines, number, operands):
                builder.branch(operands, opcode == "s_branch")
    return builder.blocks()


def _guards_a_store(lines: list[str], number: int, target: str) -> bool:
    """Whether a branch for the case that no lane is active skips a store: lanes within the tile's bounds are."""
    if "s_cbranch_execz" not in lines[number]:
        return False
    for line in lines[number + 1 :]:
        if line.startswith(f"{target}:"):
            return False
        if "global_store" in line or "buffer_store" in line:
            return True
    return False


def count(
    blocks: list[Block],
    matrix: list[int],
    is_before: Callable[[Instruction], bool],
    up_to_first: bool = False,
    others: list[int] | None = None,
) -> Counts:
    """What a warp runs. `matrix` says how many matrix instructions of a block every warp must run, `others` how many
    instructions beside these, by default all stores and atomic additions. What follows the loop up to the last (or
    first) instruction that `is_before` counts as before. Raises RuntimeError where two loops have matrix instructions.
    """
    main = main_loop(blocks, matrix)
    required = _required(blocks, matrix, others)
    loop = Counter(loop_round(blocks, matrix, others))
    before, after = _path_around(blocks, main, required)
    first = [i for index in before for i in blocks[index].instructions]
    rest = [i for index in after for i in blocks[index].instructions]
    marked = [place + 1 for place, instruction in enumerate(rest) if is_before(instruction)] or [0]
    split = marked[0] if up_to_first else marked[-1]
    return Counts(Counter(first + rest[:split]), loop, Counter(rest[split:]))


def loop_round(blocks: list[Block], matrix: list[int], others: list[int] | None = None) -> list[Instruction]:
    """What a warp runs in one round of the main loop, in order; empty where there is none. Loops within run once."""
    main = main_loop(blocks, matrix)
    if not main:
        return []
    path = _round_of(blocks, main, _required(blocks, matrix, others))
    return [i for index in path for i in blocks[index].instructions]


def whole_path(blocks: list[Block], matrix: list[int]) -> list[Instruction]:
    """What a warp runs of a kernel without a main loop, in order."""
    path = _path(blocks, 0, _exits(blocks), frozenset(), _required(blocks, matrix, None))
    return [i for index in path for i in blocks[index].instructions]


def inner_round(blocks: list[Block], matrix: list[int], others: list[int] | None = None) -> list[Instruction]:
    """The same of the loop with matrix instructions within the main loop; empty where there is none."""
    main = main_loop(blocks, matrix)
    head = _head(blocks, main)
    if head is None:
        return []
    inside = [
        Block(block.instructions, [s for s in block.successors if s in main and s != head] if i in main else [])
        for i, block in enumerate(blocks)
    ]
    # Before the loop, a block that enters it, since blocks begin where the first one is.
    entered = [Block([], [head + 1]), *(Block(b.instructions, [s + 1 for s in b.successors]) for b in inside)]
    return loop_round(entered, [0, *matrix], [0, *(number_of(blocks, RESULTS) if others is None else others)])


def without_recomputed(
    blocks: list[Block], numbers: list[int], matrix: list[int], is_exponential: Callable[[Instruction], bool]
) -> list[int]:
    """`numbers` of instructions without those of a slow path that computes a tile's logits again: of blocks that come
    after exponentials, and that some way from these to the exit, or to the main loop's next round, leaves out.
    """
    loops = _loops(blocks, matrix)
    if not loops:
        return numbers
    main = loops[-1]  # the others come after it
    head = _head(blocks, main)
    ends = _exits(blocks) | {i for i in main if head in blocks[i].successors}
    back: list[list[int]] = [[] for _ in blocks]
    for i, block in enumerate(blocks):
        for successor in block.successors:
            if successor != head or i not in main:
                back[successor].append(i)
    exponentials = {i for i, block in enumerate(blocks) if any(map(is_exponential, block.instructions))}
    return [
        0 if n and (exponentials - {i}) & _before({i}, back) & _before(ends - {i}, back, without=i) else n
        for i, n in enumerate(numbers)
    ]


def number_of(blocks: list[Block], opcodes: tuple[str, ...]) -> list[int]:
    """Of each block, how many instructions begin so."""
    return [sum(i.opcode.startswith(opcodes) for i in block.instructions) for block in blocks]


def main_loop(blocks: list[Block], matrix: list[int]) -> frozenset[int]:
    """Indices of the blocks of the loop with matrix instructions; empty where it is unrolled."""
    loops = _loops(blocks, matrix)
    if len(loops) > 1:
        raise RuntimeError(f"{len(loops)} loops have matrix instructions: expected one at most")
    return loops[0] if loops else frozenset()


class _Builder:
    def __init__(self) -> None:
        self._blocks = [Block()]
        self._labels: dict[str, int] = {}
        self._branches: list[tuple[int, str]] = []
        self._open = True  # whether the last block falls through into the next

    def label(self, name: str) -> None:
        if self._blocks[-1].instructions or not self._open:
            self._next()
        self._labels[name] = len(self._blocks) - 1

    def add(self, instruction: Instruction) -> None:
        if not self._open:  # padding behind a branch or an exit
            self._next()
        self._blocks[-1].instructions.append(instruction)

    def branch(self, target: str, always: bool) -> None:
        self._branches.append((len(self._blocks) - 1, target))
        if always:
            self._open = False
        else:
            self._next()

    def stop(self) -> None:
        self._open = False

    def _next(self) -> None:
        if self._open:
            self._blocks[-1].successors.append(len(self._blocks))
        self._blocks.append(Block())
        self._open = True

    def blocks(self) -> list[Block]:
        for source, target in self._branches:
            if target not in self._labels:
                raise RuntimeError(f"a branch to {target}, which is no label of this kernel")
            self._blocks[source].successors.append(self._labels[target])
        return self._blocks


def _required(blocks: list[Block], matrix: list[int], others: list[int] | None) -> list[int]:
    """Of each block, how many instructions no path may leave out."""
    return [n + m for n, m in zip(matrix, others or number_of(blocks, RESULTS), strict=True)]


def _loops(blocks: list[Block], matrix: list[int]) -> list[frozenset[int]]:
    """Those with matrix instructions, the last ones first."""
    return [c for c in _components(blocks) if _is_loop(blocks, c) and any(matrix[i] for i in c)]


def _head(blocks: list[Block], main: frozenset[int]) -> int | None:
    """The block where a loop is entered."""
    heads = {s for i, block in enumerate(blocks) if i not in main for s in block.successors if s in main}
    return min(heads or main, default=None)


def _before(ends: set[int], back: list[list[int]], without: int | None = None) -> set[int]:
    """Blocks from where one of `ends` can be reached, those included; not through `without`."""
    found, waiting = set(ends), list(ends)
    while waiting:
        for i in back[waiting.pop()]:
            if i not in found and i != without:
                found.add(i)
                waiting.append(i)
    return found


def _is_loop(blocks: list[Block], component: frozenset[int]) -> bool:
    return len(component) > 1 or any(i in blocks[i].successors for i in component)


def _components(blocks: list[Block]) -> list[frozenset[int]]:
    """Strongly connected components, those that lead nowhere first (Tarjan, without recursion)."""
    number: dict[int, int] = {}
    lowest: dict[int, int] = {}
    stack: list[int] = []
    waiting: set[int] = set()
    found: list[frozenset[int]] = []
    work = [(0, iter(blocks[0].successors))]
    number[0] = lowest[0] = 0
    stack.append(0)
    waiting.add(0)
    while work:
        node, successors = work[-1]
        for successor in successors:
            if successor not in number:
                number[successor] = lowest[successor] = len(number)
                stack.append(successor)
                waiting.add(successor)
                work.append((successor, iter(blocks[successor].successors)))
                break
            if successor in waiting:
                lowest[node] = min(lowest[node], number[successor])
        else:
            work.pop()
            if work:
                lowest[work[-1][0]] = min(lowest[work[-1][0]], lowest[node])
            if lowest[node] == number[node]:
                members = set()
                while node not in members:
                    members.add(stack.pop())
                waiting -= members
                found.append(frozenset(members))
    return found


def _path_around(blocks: list[Block], main: frozenset[int], matrix: list[int]) -> tuple[list[int], list[int]]:
    """Blocks before and after the main loop, on the path from the entry through that loop to the exit."""
    if not main:
        return [], _path(blocks, 0, _exits(blocks), frozenset(), matrix)
    before = _path(blocks, 0, main, frozenset(), matrix)[:-1]
    ways_out = {s for i in main for s in blocks[i].successors if s not in main}
    found = [_path_if_any(blocks, start, _exits(blocks), main, matrix) for start in sorted(ways_out)]
    after = [path for path in found if path is not None]
    if not after:
        raise RuntimeError("no path from the main loop to the exit")
    return before, min(after, key=lambda path: _cost(blocks, path, matrix))


def _round_of(blocks: list[Block], main: frozenset[int], matrix: list[int]) -> list[int]:
    """Blocks of one round of the main loop, from the block where it is entered back to that."""
    others = [i for i in range(len(blocks)) if i not in main]
    head = _head(blocks, main)
    assert head is not None
    ends = {i for i in main if head in blocks[i].successors}
    return _path(blocks, head, ends, frozenset(others), matrix)


def _exits(blocks: list[Block]) -> set[int]:
    return {i for i, block in enumerate(blocks) if not block.successors}


def _cost(blocks: list[Block], path: Iterable[int], matrix: list[int]) -> tuple[int, int]:
    indices = list(path)
    return -sum(matrix[i] for i in indices), sum(len(blocks[i].instructions) for i in indices)


def _path(blocks: list[Block], start: int, ends: Iterable[int], closed: frozenset[int], matrix: list[int]) -> list[int]:
    path = _path_if_any(blocks, start, ends, closed, matrix)
    if path is None:
        raise RuntimeError("no path through the kernel")
    return path


def _path_if_any(
    blocks: list[Block], start: int, ends: Iterable[int], closed: frozenset[int], matrix: list[int]
) -> list[int] | None:
    """From start to any end, most matrix instructions first, fewest instructions second. A loop on the way (waiting
    for a barrier) is walked once at most: the branch back is left out.
    """
    goals = set(ends)
    best: dict[int, tuple[tuple[int, int], list[int]] | None] = {}
    on_the_way: set[int] = set()
    # Depth-first with an explicit stack; a node is settled after all of its successors.
    work = [(start, False)]
    while work:
        node, settled = work.pop()
        if settled:
            on_the_way.discard(node)
            own = (-matrix[node], len(blocks[node].instructions))
            if node in goals:
                best[node] = (own, [node])
                continue
            options = [best[s] for s in blocks[node].successors if best.get(s) is not None]
            found = min((o for o in options if o is not None), key=lambda o: o[0], default=None)
            best[node] = None
            if found is not None:
                best[node] = ((own[0] + found[0][0], own[1] + found[0][1]), [node, *found[1]])
        elif node not in best and node not in on_the_way:
            on_the_way.add(node)
            work.append((node, True))
            if node not in goals:
                work += [(s, False) for s in blocks[node].successors if s not in closed and s not in best]
    result = best[start]
    return None if result is None else result[1]
