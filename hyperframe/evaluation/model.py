"""A causal language model, as an evaluation uses it: loading, scoring tokens, answering."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..integrations._capture_inputs import kind_of
from ..integrations._model_files import DEMO, find_model, load_config, load_part
from ..integrations._transformers_layers import attention_layers
from ..integrations._transformers_masks import transformers_library
from ..integrations.transformers import apply

__all__ = ["DEMO", "LanguageModel", "find_model", "load_language_model"]

_CHUNK = 512  # positions whose logits are held at once: those of all would take gigabytes


@dataclass(frozen=True, kw_only=True, eq=False)
class LanguageModel:
    """A model and its tokenizer.

    Attributes:
        name: as it was asked for.
        model: of transformers, with its head.
        tokenizer: the tokenizer.
        weights: digest of the weights: shapes, and the first numbers of each.
    """

    name: str
    model: Any
    tokenizer: Any
    weights: str

    @property
    def depth(self) -> int:
        """Number of attention layers."""
        return len(attention_layers(self.model))

    @property
    def positions(self) -> int | None:
        """Most tokens that the model was made for; None where it does not say."""
        found: int | None = getattr(self.model.config, "max_position_embeddings", None)
        return found

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        found: torch.device = next(self.model.parameters()).device
        return found

    @property
    def dtype(self) -> str:
        """Of the weights."""
        return str(next(self.model.parameters()).dtype).removeprefix("torch.")

    def tokens(self, text: str, *, starts: bool = False) -> list[int]:
        """Return the tokens of a text.

        Args:
            text: the text.
            starts: whether it is the beginning, with the token that the tokenizer puts there.
        """
        found: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        first = self.tokenizer.bos_token_id
        if starts and first is not None and self.tokenizer("a").input_ids[:1] == [first]:
            found = [first, *found]
        return found

    @torch.no_grad()
    def score(self, tokens: Tensor, *, first: int = 1) -> tuple[Tensor, Tensor]:
        """Return how well each token is predicted from those before it, in one forward pass.

        Args:
            tokens: `[n]`.
            first: the first token that is scored, 1 or more.

        Returns:
            Losses in nats, float64 `[n - first]`, and whether the token is the most likely one,
            bool. On the CPU.

        Memory: the logits of 512 positions. The head is the model's own, with its scaling and
        softcap: the layers run once, and their output is handed to the model's forward.
        """
        batch = tokens.to(self.device)[None]
        losses, hits = [], []
        with self._forward_of_head(batch) as logits_of:
            for rows in torch.arange(first - 1, tokens.shape[0] - 1).split(_CHUNK):
                logits = logits_of(rows.to(self.device)).float()
                targets = batch[0, rows.to(self.device) + 1]
                losses.append(nn.functional.cross_entropy(logits, targets, reduction="none").cpu())
                hits.append((logits.argmax(dim=-1) == targets).cpu())
        return torch.cat(losses).double(), torch.cat(hits)

    @contextmanager
    def _forward_of_head(self, batch: Tensor) -> Iterator[Any]:
        stack = self.model.base_model
        takes = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        if stack is self.model or not takes:
            logits = self.model(input_ids=batch, use_cache=False).logits[0]
            yield lambda rows: logits[rows]
            return
        hidden = stack(input_ids=batch, use_cache=False)
        stack.forward = lambda *arguments, **options: hidden
        try:
            yield lambda rows: self.model(
                input_ids=batch, use_cache=False, logits_to_keep=rows
            ).logits[0]
        finally:
            del stack.forward

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> None:
        """Run a prefill, as `generate` does: the cache is filled, the last position has logits."""
        batch = tokens.to(self.device)[None]
        takes = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.model(input_ids=batch, use_cache=True, **({"logits_to_keep": 1} if takes else {}))

    @torch.no_grad()
    def answer(self, tokens: Tensor, *, max_new_tokens: int) -> str:
        """Return what the model writes behind some tokens, by the most likely token each time."""
        batch = tokens.to(self.device)[None]
        padding = self.tokenizer.pad_token_id
        if padding is None:
            padding = self.tokenizer.eos_token_id
        with quiet():
            written = self.model.generate(
                batch, attention_mask=torch.ones_like(batch), max_new_tokens=max_new_tokens,
                do_sample=False, pad_token_id=padding,
            )  # fmt: skip
        text: str = self.tokenizer.decode(written[0, batch.shape[1] :], skip_special_tokens=True)
        return text


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from warning of options of sampling that are not used."""
    logging = transformers_library.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def load_language_model(
    name: str, *, gguf: str | None = None, device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LanguageModel:  # fmt: skip
    """Load a causal language model.

    Args:
        name: as for `find_model`.
        gguf: likewise.
        device: where it goes.
        dtype: of its weights.

    Raises:
        ArgumentError: transformers cannot read it, or a file is damaged.
        UnsupportedError: it is no causal language model, or its attention cannot be routed.

    Cost: beside reading it, a forward of two tokens.
    """
    config = load_config(name, gguf=gguf)
    if kind_of(config) != "text":
        raise UnsupportedError(f"{name}: {type(config).__name__} reads images, not text")
    tokenizer = load_part("AutoTokenizer", name, gguf=gguf)
    model = load_part("AutoModelForCausalLM", name, gguf=gguf, dtype=dtype)
    modules = attention_layers(model)
    if not all(getattr(module, "is_causal", True) for module in modules.values()):
        raise UnsupportedError(
            f"{name}: {type(model).__name__} does not attend causally, so that it predicts no next "
            "token; evaluate a decoder"
        )
    model = model.to(device).eval()
    _check_attention(model, name)
    return of_parts(model, tokenizer, name=name)


@torch.no_grad()
def _check_attention(model: Any, name: str) -> None:
    """Refuse here, once, what attention of every layer refuses in any call: softcap, sinks."""
    try:
        with apply(model, "none"):
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device))
    except UnsupportedError as error:
        raise UnsupportedError(f"{name}: {type(model).__name__}: {error}") from error
    except RuntimeError:  # whatever else goes wrong is said by what is measured
        return


def of_parts(model: Any, tokenizer: Any, *, name: str) -> LanguageModel:
    """Return a loaded model and its tokenizer as one, with the digest of the weights."""
    found = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        found.update(f"{key} {tuple(value.shape)}".encode())
        found.update(str(value.flatten()[:4].float().tolist()).encode())
    return LanguageModel(
        name=name, model=model, tokenizer=tokenizer, weights=found.hexdigest()[:12]
    )
