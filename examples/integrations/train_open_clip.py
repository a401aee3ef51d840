"""open_clip's model, tokenizer and loss factory on emoji: python examples/integrations/train_open_clip.py

Needs contrastile[open-clip,demo]. With CONTRASTILE_INTEGRATIONS=0 the same with open_clip's own loss; --siglip for the
sigmoid loss.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import open_clip
import torch
from contrastile.demo.data import IMAGE_SIZE, load_pairs
from contrastile.integrations import open_clip as drop_in

WIDTH, TOKENS, BATCH, EPOCHS = 64, 24, 128, 3


def main(siglip: bool) -> None:
    drop_in.install()
    loss = open_clip.create_loss(arguments(siglip))
    print(f"create_loss makes {type(loss).__module__}.{type(loss).__qualname__}")
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=WIDTH,
        vision_cfg={"image_size": IMAGE_SIZE, "patch_size": 8, "layers": 2, "width": WIDTH, "head_width": 32},
        text_cfg={"context_length": TOKENS, "layers": 2, "width": WIDTH, "heads": 2},
        **({"init_logit_scale": 2.3, "init_logit_bias": -10.0} if siglip else {}),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    emoji = load_pairs(Path("out"), keep_one_in=2)
    images = (emoji.images.float() / 255 - 0.5) / 0.25
    tokens = open_clip.SimpleTokenizer(context_length=TOKENS)(emoji.captions)
    for epoch in range(EPOCHS):
        total = torch.zeros(())
        batches = torch.randperm(len(images)).split(BATCH)[:-1]  # all of one size
        for index in batches:
            found = loss(**named(model(images[index], tokens[index])), output_dict=True)["contrastive_loss"]
            optimizer.zero_grad()
            found.backward()
            optimizer.step()
            total += found.detach()
        print(f"epoch {epoch}: loss {total / len(batches):.4f}", flush=True)


def named(found: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    return dict(zip(("image_features", "text_features", "logit_scale", "logit_bias"), found, strict=False))


def arguments(siglip: bool) -> argparse.Namespace:
    """Those of open_clip's training script that create_loss reads."""
    return argparse.Namespace(
        model="", distill=False, siglip=siglip, local_loss=False, gather_with_grad=False, rank=0, world_size=1,
        horovod=False, loss_dist_impl=None,
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--siglip", action="store_true")
    main(parser.parse_args().siglip)
