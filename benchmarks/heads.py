"""Queries, keys and values of real attention heads, for `hyperframe frontier`.

SmolLM2-135M-Instruct reads the texts of `examples/demo.py`; the inputs of a few of its 30 layers
are written to a file.

    python benchmarks/heads.py --text prose --out heads-prose.safetensors
    python benchmarks/heads.py --text code --out heads-code.safetensors
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from demo import load_model, read_text

from hyperframe.integrations.capture import capture, save


def main() -> None:
    """Load, run once, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", default="prose", help="prose, code, or a file")
    parser.add_argument("--length", type=int, default=8192, help="tokens")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 8, 15, 22, 29])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    warnings.filterwarnings("ignore", module="gguf")
    model, tokenizer = load_model()
    tokens = tokenizer(read_text(options.text), return_tensors="pt").input_ids
    if tokens.shape[1] < options.length:
        parser.error(f"the text has {tokens.shape[1]} tokens, fewer than {options.length}")
    heads = capture(model, options.layers, input_ids=tokens[:, : options.length])
    save(options.out, heads)
    for layer, of_layer in heads.items():
        shape, key_shape = tuple(of_layer.query.shape), tuple(of_layer.key.shape)
        print(f"layer {layer}: query {shape}, key and value {key_shape}")


if __name__ == "__main__":
    main()
