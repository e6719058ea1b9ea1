"""Models of the transformers library by name, and what they are run on to capture their heads."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, MissingDependencyError, UnsupportedError
from ._transformers_masks import transformers_library

__all__ = [
    "RANDOM",
    "image_inputs",
    "kind_of",
    "load_config",
    "load_model",
    "reading",
    "text_inputs",
]

RANDOM = "random"
"""What is asked for instead of an image file: pixels drawn from a seed."""

_LONGEST = 4096  # tokens where no length is asked for
_REFUSED = (OSError, ValueError, KeyError)  # what transformers raises for what it cannot read


def load_config(model: str, *, gguf: str | None = None) -> Any:
    """Return the configuration of a model.

    Args:
        model: a folder, or a name on the hub.
        gguf: name of a GGUF file in it.

    Raises:
        ArgumentError: there is none that transformers can read.
    """
    folder = Path(model)
    if not folder.is_dir() and (folder.is_absolute() or model.startswith((".", "~"))):
        raise ArgumentError(f"{model}: there is no such folder; save_pretrained makes one")
    if gguf is not None and folder.is_dir() and not (folder / gguf).is_file():
        raise ArgumentError(f"--gguf {gguf}: there is no such file in {model}")
    with reading(model):
        return transformers_library.AutoConfig.from_pretrained(model, **_file(gguf))


def kind_of(config: Any) -> str:
    """Return what a model reads: "text" or "image".

    Raises:
        UnsupportedError: a model of several stacks, or one that reads something else.
    """
    name = type(config).__name__
    known = sorted(getattr(config, "sub_configs", {}))
    parts = [part for part in known if getattr(config, part, None) is not None]
    if getattr(config, "is_encoder_decoder", False):
        parts = ["encoder", "decoder"]
    if parts:
        raise UnsupportedError(
            f"capture: {name} is made of several models ({', '.join(parts)}), so a layer index "
            "does not name one layer; save one of them with save_pretrained and capture that, or "
            "call hyperframe.integrations.capture.capture on it"
        )
    if getattr(config, "vocab_size", None):
        return "text"
    if getattr(config, "image_size", None) and getattr(config, "num_channels", None):
        return "image"
    raise UnsupportedError(
        f"capture: {name} reads neither tokens (vocab_size) nor images (image_size and "
        "num_channels); call hyperframe.integrations.capture.capture with its inputs"
    )


def load_model(
    model: str, *, gguf: str | None, device: torch.device | str, dtype: torch.dtype
) -> nn.Module:
    """Return the stack of layers of a model, without its head, in eval mode.

    Args:
        model: as for `load_config`.
        gguf: likewise.
        device: where it goes.
        dtype: of its weights.

    Raises:
        ArgumentError: transformers cannot read it.
    """
    # a GGUF file is read as the causal model that it is
    kind = "AutoModel" if gguf is None else "AutoModelForCausalLM"
    with reading(model):
        found = getattr(transformers_library, kind).from_pretrained(
            model, dtype=dtype, **_file(gguf)
        )
    stack: nn.Module = getattr(found, "base_model", found)
    if hasattr(stack.config, "use_cache"):
        stack.config.use_cache = False
    return stack.to(device).eval()


def text_inputs(
    model: str, config: Any, text: str, *, length: int | None, gguf: str | None = None
) -> dict[str, Tensor]:
    """Return the first tokens of a text.

    Args:
        model: as for `load_config`: where the tokenizer is.
        config: of the model.
        text: the text.
        length: tokens; None takes what there is, up to 4,096 and to the positions of the model.
        gguf: as for `load_config`.

    Raises:
        ArgumentError: the text has fewer tokens, or the model fewer positions.
    """
    positions = getattr(config, "max_position_embeddings", None) or _LONGEST
    if length is not None and length > positions:
        raise ArgumentError(
            f"--length {length}: {type(config).__name__} has {positions} positions; ask for at "
            f"most {positions}"
        )
    with reading(model):
        tokenizer = transformers_library.AutoTokenizer.from_pretrained(model, **_file(gguf))
    wanted = min(_LONGEST, positions) if length is None else length
    tokens = tokenizer(text, truncation=True, max_length=wanted, return_tensors="pt").input_ids
    found = tokens.shape[1]
    if found < (2 if length is None else length):
        raise ArgumentError(
            f"--text: has {found} tokens, fewer than {length or 2}; pass a longer text"
            + ("" if length is None else f", or --length {found}")
        )
    return {"input_ids": tokens.long()}


def image_inputs(model: str, config: Any, image: str, *, seed: int) -> dict[str, Tensor]:
    """Return the pixels of an image, as the processor of the model prepares them, or random ones.

    Args:
        model: as for `load_config`: where the processor is.
        config: of the model.
        image: a file, or "random": standard normal pixels.
        seed: of random pixels.

    Raises:
        ArgumentError: there is no such file, or no processor.
        MissingDependencyError: Pillow is not installed.
    """
    if image == RANDOM:
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        generator = torch.Generator().manual_seed(seed)
        shape = (1, config.num_channels, height, width)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "hyperframe capture --image needs Pillow, which is not installed; pip install pillow, "
            f"or pass --image {RANDOM}"
        ) from error
    try:
        with Image.open(image) as file:
            pixels = file.convert("RGB")
    except (FileNotFoundError, IsADirectoryError, UnidentifiedImageError) as error:
        raise ArgumentError(f"--image {image}: is no image file; pass one, or {RANDOM}") from error
    with reading(model):
        processor = transformers_library.AutoImageProcessor.from_pretrained(model)
    return {"pixel_values": processor(images=pixels, return_tensors="pt").pixel_values}


def _file(gguf: str | None) -> dict[str, str]:
    return {} if gguf is None else {"gguf_file": gguf}


@contextmanager
def reading(model: str) -> Iterator[None]:
    """Keep transformers quiet, and say in one line what it cannot read."""
    logging = transformers_library.utils.logging
    verbosity, is_drawn = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="gguf")
            yield
    except ImportError as error:
        # gguf and accelerate for GGUF files, the libraries of some tokenizers
        line = next(iter(str(error).strip().splitlines()), "a package is missing")
        raise MissingDependencyError(
            f"{model}: transformers needs a package to read this model: {line.rstrip('.')}; "
            "pip install 'hyperframe-attention[hf]'"
        ) from error
    except _REFUSED as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ArgumentError(
            f"{model}: transformers cannot read this model: {line.rstrip('.')}; pass the folder "
            "of a model of transformers 5, or its name on the hub"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if is_drawn:
            logging.enable_progress_bar()
