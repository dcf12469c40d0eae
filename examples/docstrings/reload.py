"""Load a saved adapter in a fresh process, merge it, and compare three sets of logits; demo.py runs this.

python reload.py FOLDER
"""

import argparse
import json
from pathlib import Path

import quiet  # noqa: F401

# isort: split
import torch
from peft import PeftModel
from safetensors.torch import load_file

import hira  # noqa: F401  registers HiRA with PEFT
from model import compute_logits, load_base

# The three sets differ only in the order of float32 sums, of some hundred terms through six layers: at most some
# hundred units of 2^-24, relative to the largest logit.
TOLERANCE = 256 * 2**-24


def main() -> None:
    """Exit with an error if loaded or merged logits are not those of the trained model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what demo.py wrote: adapter, texts.json, logits.safetensors")
    folder = parser.parse_args().folder
    trained = load_file(folder / "logits.safetensors")["logits"]
    texts = json.loads((folder / "texts.json").read_text())

    model = PeftModel.from_pretrained(load_base(classes=trained.shape[1]), folder / "adapter")
    loaded = compute_logits(model, texts)
    merged = compute_logits(model.merge_and_unload(), texts)
    for name, logits in (("loaded", loaded), ("merged", merged)):
        difference = float((logits - trained).abs().max() / trained.abs().max())
        print(f"  {name}: largest difference to the trained model's logits {difference:.1e} of the largest logit")
        if not difference <= TOLERANCE:
            raise SystemExit(f"{name} logits differ by more than rounding, {TOLERANCE:.1e}")
    print(f"  same predictions for all {len(texts)} texts: {torch.equal(merged.argmax(-1), trained.argmax(-1))}")


if __name__ == "__main__":
    main()
