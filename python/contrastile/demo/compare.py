"""The comparison: each method with each seed, then the loss alone; tables, pictures and the results file."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from contrastile.bench.cases import Case
from contrastile.bench.harness import Row, refusal, run_job
from contrastile.demo import pictures, report
from contrastile.demo.data import CREDIT, load_pairs
from contrastile.demo.models import EMBEDDING_DIM, TwoTowers
from contrastile.demo.train import Dataset, Method, Result, steps_of, train

# Learning rate and first scale: each method's best of one grid, judged on a part of the training families.
METHODS: tuple[Method, ...] = (
    Method("info_nce", 32, learning_rate=1e-3, init_scale=7.0),
    Method("gamma", 32, learning_rate=1e-3, init_scale=7.0),
    Method("info_nce", 512, learning_rate=2e-3, init_scale=7.0),
)
SHOWN_METHOD = 1  # whose retrievals are drawn, at the first seed

# The quick form shows that everything runs; its figures mean nothing.
QUICK_KEEPS_ONE_IN = 12  # families
QUICK_EPOCHS = 3
QUICK_LARGE_BATCH = 128

LOSSES_ALONE = (("symmetric", "dense"), ("symmetric", "contrastile"), ("gamma", "contrastile"))
SMALLEST_N, LARGEST_N, QUICK_N = 4096, 65536, 512
LIMIT_SECONDS = 90.0  # of one case


def run(out: Path, seeds: int, epochs: int, *, quick: bool, with_table: bool) -> None:
    begin = time.perf_counter()
    console = report.make_console()
    out.mkdir(parents=True, exist_ok=True)
    methods = METHODS
    if quick:
        seeds, epochs = 1, QUICK_EPOCHS
        methods = tuple(replace(method, batch_size=min(method.batch_size, QUICK_LARGE_BATCH)) for method in METHODS)

    pairs = load_pairs(out, keep_one_in=QUICK_KEEPS_ONE_IN if quick else 1)
    dataset = Dataset.of(pairs)
    families, trained_on, held_out = len(set(pairs.families)), len(dataset.train), len(dataset.held_out)
    console.print(
        f"{pairs.rendered} emoji with {len(pairs.captions)} distinct drawings, in {families} families; {trained_on} "
        f"pairs to train on, {held_out} held out,\nno family in both. {CREDIT}.\n"
    )
    with one_thread():
        models, results = train_all(dataset, methods, seeds, epochs)
    report.print_training(console, results, held_out)
    pictures.draw_curves(out / "curves.png", results, held_out)
    shown = SHOWN_METHOD * seeds
    pictures.draw_examples(out / "retrieved.png", models[shown], dataset, pairs, results[shown].method.name)

    rows = losses_alone([QUICK_N] if quick else sizes_until_dense_is_refused()) if with_table else []
    if rows:
        report.print_losses_alone(console, rows)
    settings = {
        "quick": quick, "seeds": seeds, "epochs": epochs, "families": families,
        "trained_on": trained_on, "held_out": held_out, "seconds": round(time.perf_counter() - begin, 1),
    }  # fmt: skip
    report.write_results(out / "results.json", settings, results, rows)
    console.print(f"{out}/retrieved.png, {out}/curves.png, {out}/results.json; {settings['seconds']} s in all")


@contextmanager
def one_thread() -> Iterator[None]:
    """A batch of 32 gains little from a second thread, and loses much where another program wants the core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_all(
    dataset: Dataset, methods: Sequence[Method], seeds: int, epochs: int
) -> tuple[list[TwoTowers], list[Result]]:
    """Every method with every seed, seeds varying fastest."""
    runs = [(method, seed) for method in methods for seed in range(seeds)]
    # Threads and libraries start here, not in the first run that is timed.
    few = replace(dataset, train=dataset.train[: 2 * methods[0].batch_size])
    train(few, methods[0], seed=0, epochs=1, on_step=lambda pairs: None)
    trained = []
    total = sum(steps_of(dataset, method, epochs) * method.batch_size for method, _ in runs)
    with tqdm(total=total, unit=" pairs", unit_scale=True, disable=None) as bar:
        for method, seed in runs:
            bar.set_description(f"{method.name}, seed {seed}")
            trained.append(train(dataset, method, seed, epochs, bar.update))
    return [model for model, _ in trained], [result for _, result in trained]


def sizes_until_dense_is_refused() -> Iterator[int]:
    """Powers of two up to the first whose score matrices do not fit in the memory at hand, or to LARGEST_N."""
    size = SMALLEST_N
    while size <= LARGEST_N:
        yield size
        if refusal([case_of("symmetric", "dense", size)]):
            return
        size *= 2


def losses_alone(sizes: Iterable[int]) -> list[Row]:
    """Each case in a fresh process; one that would not fit in memory is refused before it starts."""
    cases = [case_of(loss, implementation, size) for size in sizes for loss, implementation in LOSSES_ALONE]
    bar = tqdm(cases, desc="the loss alone", unit="case", disable=None)
    return [row for case in bar for row in run_job([case], repeats=1, limit_seconds=LIMIT_SECONDS)]


def case_of(loss: str, implementation: str, size: int) -> Case:
    return Case(loss, implementation, size, size, dim=EMBEDDING_DIM, threads=torch.get_num_threads())
