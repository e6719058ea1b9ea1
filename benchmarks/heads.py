"""Queries, keys and values of real attention heads, for `hyperframe frontier` and `report`.

SmolLM2-135M-Instruct reads the texts of `examples/demo.py`; the inputs of a few of its 30 layers
are written to a file. `hyperframe capture` does the same for a model of your own.

    python benchmarks/heads.py --text prose --out heads-prose.safetensors
    python benchmarks/heads.py --text code --out heads-code.safetensors
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from demo import model_file, read_text

from hyperframe.integrations.capture import save
from hyperframe.integrations.capture_model import capture_model


def main() -> None:
    """Load, run once, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", default="prose", help="prose, code, or a file")
    parser.add_argument("--length", type=int, default=8192, help="tokens")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 8, 15, 22, 29])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    file = model_file()
    heads, about = capture_model(
        str(file.parent), gguf=file.name, text=read_text(options.text), layers=options.layers,
        length=options.length,
    )  # fmt: skip
    # the name and not the folder, which is another one elsewhere
    save(options.out, heads, about=about | {"model": "SmolLM2-135M-Instruct"})
    for layer, of_layer in heads.items():
        shape, key_shape = tuple(of_layer.query.shape), tuple(of_layer.key.shape)
        print(f"layer {layer}: query {shape}, key and value {key_shape}")


if __name__ == "__main__":
    main()
