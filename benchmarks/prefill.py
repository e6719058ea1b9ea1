"""Prefill of models with the shapes of an 8B Llama and a 7B Qwen, and a training step: times only.

The weights are random numbers, so that nothing is said about quality. Every run goes through the
same route of `hyperframe.integrations.transformers.apply`: the exact kernels of SDPA, each forced,
the default, and `sort_lsh` as published (blocks and samples of 256, recursion down to 4,096). A row
has the seconds of a whole forward (cache kept, logits of the last token), those that its attention
took by events on the device, and peak memory. `--train` times forward and backward of some layers,
without the head; `--checkpointing` does every forward twice.

    python benchmarks/prefill.py --shape llama-8b --length 32768 131072 --out rows.jsonl
    python benchmarks/prefill.py --shape llama-8b --length 32768 --train --layers 8 --out rows.jsonl
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from hyperframe import HyperAttention
from hyperframe.benchmarking.report import append_rows
from hyperframe.integrations.transformers import apply

_LLAMA = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "rope_theta": 500000.0, "max_position_embeddings": 131072,
}  # fmt: skip
_QWEN = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    "rope_theta": 1000000.0, "max_position_embeddings": 131072, "use_sliding_window": False,
}  # fmt: skip
_TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 131072,
}  # fmt: skip
SHAPES = {"llama-8b": ("Llama", _LLAMA), "qwen-7b": ("Qwen2", _QWEN), "tiny": ("Llama", _TINY)}
"""Configurations by name; `tiny` is for trying this script out."""

EXACT = {
    "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}  # fmt: skip
APPROXIMATE: dict[str, dict[str, Any]] = {
    "default": {},
    "fast": {"detector": "fast"},
    "sort_lsh as published": {
        "detector": "sort_lsh(block_size=256)", "num_samples": 256, "causal": "recursive",
        "min_seq_len": 4096,
    },
    # where min_seq_len=None would answer exactly
    "default from 0 keys": {"min_seq_len": 0},
    "fast from 0 keys": {"detector": "fast", "min_seq_len": 0},
    "sort_lsh, leaves of 1,024": {
        "detector": "sort_lsh(block_size=256)", "num_samples": 256, "causal": "recursive",
        "min_seq_len": 1024,
    },
}  # fmt: skip


class Timed:
    """An attention callable and the milliseconds that its calls take on their device."""

    def __init__(self, attention: Callable[..., torch.Tensor]) -> None:
        self.attention = attention
        self.seed = getattr(attention, "seed", 0)
        self.takes_stream = getattr(attention, "takes_stream", False)
        self._events: list[tuple[Any, Any]] = []

    def __call__(self, query: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """Attend, between two events."""
        if not query.is_cuda:
            return self.attention(query, *args, **options)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        out = self.attention(query, *args, **options)
        stop.record()
        self._events.append((start, stop))
        return out

    def seconds(self) -> float:
        """Return what the calls since the last time took; waits for the device."""
        events, self._events = self._events, []
        if events:
            torch.cuda.synchronize()
        return sum(start.elapsed_time(stop) for start, stop in events) / 1000


def exact(kernel: str) -> Callable[..., torch.Tensor]:
    """Return SDPA with one kernel, called as `HyperAttention` is."""

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, is_causal: bool,
        scale: float | None, key_padding_mask: None = None, generator: object = None,
    ) -> torch.Tensor:  # fmt: skip
        with sdpa_kernel(EXACT[kernel]):
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=is_causal, scale=scale, enable_gqa=True
            )

    return attend


def make_model(shape: str, layers: int | None, device: str, dtype: torch.dtype) -> Any:
    """Return a causal language model of a shape, with random weights."""
    family, sizes = SHAPES[shape]
    config = getattr(transformers, f"{family}Config")(**sizes)
    config.num_hidden_layers = layers or config.num_hidden_layers
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return getattr(transformers, f"{family}ForCausalLM")(config).eval()
    finally:
        torch.set_default_dtype(former)


def prefill(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Run a forward that keeps the cache, and return the logits of the last token."""
    with torch.no_grad():
        return model(tokens, use_cache=True, logits_to_keep=1).logits


def train(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Run forward and backward of the layers, and return the loss."""
    hidden = model.model(tokens, use_cache=False).last_hidden_state
    loss = hidden.float().square().mean()
    loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.detach()


def measure(
    model: Any, tokens: torch.Tensor, attention: Callable[..., torch.Tensor], repeats: int,
    step: Callable[[Any, torch.Tensor], torch.Tensor],
) -> dict[str, Any]:  # fmt: skip
    """Return seconds of whole steps and of their attention, medians, and the peak memory."""
    timed = Timed(attention)
    is_cuda = tokens.is_cuda
    whole, inside = [], []
    with apply(model, "all", attention=timed):
        for _ in range(repeats + 1):
            timed.seconds()
            if is_cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            result = step(model, tokens)
            if is_cuda:
                torch.cuda.synchronize()
            whole.append(time.perf_counter() - started)
            inside.append(timed.seconds())
    if not bool(torch.isfinite(result).all()):
        raise SystemExit("the result is not finite")
    return {
        "seconds": statistics.median(whole[1:]), "all_seconds": whole[1:],
        "attention_seconds": statistics.median(inside[1:]),
        "peak_bytes": torch.cuda.max_memory_allocated() if is_cuda else None,
    }  # fmt: skip


def main() -> None:
    """Measure, print, and append the rows to a file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", nargs="+", default=["llama-8b"], choices=tuple(SHAPES))
    parser.add_argument("--length", nargs="+", type=int, default=[32768, 131072])
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--exact", nargs="+", default=["cudnn", "flash"], choices=tuple(EXACT))
    parser.add_argument(
        "--run", nargs="+", default=list(APPROXIMATE)[:3], choices=tuple(APPROXIMATE)
    )
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--checkpointing", action="store_true", help="of gradients")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    device = options.device
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    what = "training step" if options.train else "prefill"
    for shape in options.shape:
        model = make_model(shape, options.layers, device, dtype)
        if options.train:
            model.train()
        if options.train and options.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for length in options.length:
            tokens = torch.randint(0, 100, (1, length), device=device)
            best: dict[str, float] = {}
            for name in (*options.exact, *options.run):
                attention = exact(name) if name in EXACT else HyperAttention(**APPROXIMATE[name])
                found = measure(
                    model, tokens, attention, options.repeats, train if options.train else prefill
                )
                if name in EXACT:
                    for part in ("seconds", "attention_seconds"):
                        best[part] = min(best.get(part, float("inf")), found[part])
                row = {
                    "what": what, "shape": shape, "layers": model.config.num_hidden_layers,
                    "length": length, "attention": name, "checkpointing": options.checkpointing,
                    **found,
                    "speedup": best["seconds"] / found["seconds"],
                    "attention_speedup": best["attention_seconds"] / found["attention_seconds"]
                    if found["attention_seconds"] else None,
                    "device": torch.cuda.get_device_name() if dtype == torch.bfloat16 else device,
                    "dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__,
                    "triton": triton.__version__, "transformers": transformers.__version__,
                }  # fmt: skip
                print(
                    f"{what}, {shape}, {length} tokens, {name}: {found['seconds']:.3f} s "
                    f"({row['speedup']:.2f}x), attention {found['attention_seconds']:.3f} s "
                    f"({row['attention_speedup'] or 0:.1f}x), "
                    f"{(found['peak_bytes'] or 0) / 1e9:.1f} GB",
                    flush=True,
                )
                if options.out:
                    append_rows(options.out, [row])
        del model


if __name__ == "__main__":
    main()
