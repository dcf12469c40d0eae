"""Input and output embeddings that share one weight, adapted on either side or on both."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from tied_models import adapted, assert_close, every_case, logits

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
]


@every_case
def test_merging_and_unmerging(make, tied, targets):
    model = adapted(make, targets)
    layers = {name: getattr(m := model.base_model.model.get_submodule(name), "base_layer", m) for name in tied}
    shared = layers[tied[0]].weight
    assert all(layer.weight is shared for layer in layers.values())
    W0, y = shared.detach().clone(), logits(model)
    for _ in range(2):
        model.merge_adapter()
        assert_close(logits(model), y)
        for name, layer in layers.items():
            assert (layer.weight is shared) == (name not in targets)
            assert torch.equal(layer.weight, W0) == (name not in targets)
        model.unmerge_adapter()
        assert all(layer.weight is shared for layer in layers.values())
        assert torch.equal(shared, W0)
        assert torch.equal(logits(model), y)


@every_case
def test_saved_and_loaded(make, tied, targets, tmp_path):
    model = adapted(make, targets)
    y = logits(model)
    with model.disable_adapter():
        assert not torch.allclose(logits(model), y)
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(make().eval(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), y)
    merged = model.merge_and_unload()
    assert_close(logits(merged), y)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path / "merged").eval()), logits(merged))
