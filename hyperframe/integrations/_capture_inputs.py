"""What models of the transformers library read: texts and images as tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, MissingDependencyError, UnsupportedError
from ._model_files import load_part

__all__ = ["RANDOM", "image_inputs", "kind_of", "load_model", "text_inputs"]

RANDOM = "random"
"""What is asked for instead of an image file: pixels drawn from a seed."""

_LONGEST = 4096  # tokens where no length is asked for


def kind_of(config: Any) -> str:
    """Return what a model reads: "text" or "image".

    Raises:
        UnsupportedError: a model of several stacks, or one that reads something else.
    """
    name = type(config).__name__
    known = sorted(getattr(config, "sub_configs", {}))
    # a part that has layers is a model; others hold options, of attention for example
    parts = [part for part in known if hasattr(getattr(config, part, None), "num_hidden_layers")]
    if getattr(config, "is_encoder_decoder", False):
        parts = ["encoder", "decoder"]
    if parts:
        raise UnsupportedError(
            f"{name} is made of several models ({', '.join(parts)}), so a layer index does not "
            "name one layer; save one of them with save_pretrained, and name its folder"
        )
    if getattr(config, "vocab_size", None):
        return "text"
    if getattr(config, "image_size", None) and getattr(config, "num_channels", None):
        return "image"
    raise UnsupportedError(
        f"{name} reads neither tokens (vocab_size) nor images (image_size and num_channels); in "
        "Python, hyperframe.integrations.capture.capture takes other inputs"
    )


def load_model(
    model: str, *, gguf: str | None, device: torch.device | str, dtype: torch.dtype
) -> nn.Module:
    """Return the stack of layers of a model, without its head, in eval mode.

    Args:
        model: as for `find_model`.
        gguf: likewise.
        device: where it goes.
        dtype: of its weights.

    Raises:
        ArgumentError: transformers cannot read it.
    """
    # a GGUF file is read as the causal model that it is
    kind = "AutoModel" if gguf is None else "AutoModelForCausalLM"
    found = load_part(kind, model, gguf=gguf, dtype=dtype)
    stack: nn.Module = getattr(found, "base_model", found)
    if hasattr(stack.config, "use_cache"):
        stack.config.use_cache = False
    return stack.to(device).eval()


def text_inputs(
    model: str, config: Any, text: str, *, length: int | None, gguf: str | None = None
) -> dict[str, Tensor]:
    """Return the first tokens of a text.

    Args:
        model: as for `find_model`: where the tokenizer is.
        config: of the model.
        text: the text.
        length: tokens; None takes what there is, up to 4,096 and to the positions of the model.
        gguf: as for `find_model`.

    Raises:
        ArgumentError: the text has fewer tokens, or the model fewer positions.
    """
    positions = getattr(config, "max_position_embeddings", None) or _LONGEST
    if length is not None and length > positions:
        raise ArgumentError(
            f"--length {length}: {type(config).__name__} has {positions} positions; ask for at "
            f"most {positions}"
        )
    tokenizer = load_part("AutoTokenizer", model, gguf=gguf)
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
        model: as for `find_model`: where the processor is.
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
    processor = load_part("AutoImageProcessor", model)
    return {"pixel_values": processor(images=pixels, return_tensors="pt").pixel_values}
