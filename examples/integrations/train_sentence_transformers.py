"""Fine-tunes by SentenceTransformerTrainer: python examples/integrations/train_sentence_transformers.py [--model PATH]

Names of emoji in English, paired with those in German. Needs contrastile[sentence-transformers,demo], accelerate and
datasets. With CONTRASTILE_INTEGRATIONS=0 the same with the library's own loss; --cached for the cached one.
"""

from __future__ import annotations

import argparse

import torch
from contrastile.integrations.sentence_transformers import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from datasets import Dataset
from emoji import EMOJI_DATA, config
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

PAIRS, BATCH = 1024, 64


def main(model_name: str, cached: bool) -> None:
    torch.manual_seed(0)
    model = SentenceTransformer(model_name, device="cpu")
    loss = CachedMultipleNegativesRankingLoss(model) if cached else MultipleNegativesRankingLoss(model)
    print(f"{type(loss).__module__}.{type(loss).__qualname__}")
    arguments = SentenceTransformerTrainingArguments(
        output_dir="out/sentence_transformers",
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        logging_steps=4,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=names(), loss=loss).train()


def names() -> Dataset:
    """Names of emoji, (PAIRS,) rows of two columns; each name once."""
    config.load_language("de")
    found = {}
    for entry in EMOJI_DATA.values():
        english, german = (entry.get(language, "").strip(":").replace("_", " ") for language in ("en", "de"))
        if german and "skin tone" not in english:
            found[english] = german
    step = len(found) // PAIRS
    kept = list(found.items())[::step][:PAIRS]
    return Dataset.from_dict({"anchor": [each for each, _ in kept], "positive": [each for _, each in kept]})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help="a name or a folder (default %(default)s)")
    parser.add_argument("--cached", action="store_true")
    options = parser.parse_args()
    main(options.model, options.cached)
