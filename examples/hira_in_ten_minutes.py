# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # HiRA in ten minutes
#
# HiRA fine-tunes a model by multiplying each frozen weight, entry by entry, with one plus a low-rank matrix:
#
# $$W' = W_0 \odot (1 + B A), \qquad A: r \times in, \quad B: out \times r$$
#
# It trains as many parameters as LoRA of the same rank. This notebook makes a small language model, adapts it with
# HiRA and with LoRA, looks at the two updates, and saves, loads, merges and uses the result. It needs no GPU and no
# model hub:
#
#     pip install '.[train]'     # in a clone of hira
#
# `hira_in_ten_minutes.py` is the same notebook as a script. After a change of either:
#
#     jupytext --sync examples/hira_in_ten_minutes.ipynb

# %%
import copy
import math
import sysconfig
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hira import HiraConfig

torch.manual_seed(0)
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## What HiRA is
#
# LoRA adds $BA$ to a weight, so its update has rank $r$ at most. HiRA's update is $W_0 \odot BA$. It usually has the
# full rank of $W_0$, though $A$ and $B$ are as small as before.

# %%
W0, A, B = torch.randn(32, 32), torch.randn(2, 32), torch.randn(32, 2)
print("rank of B A, LoRA's update:     ", int(torch.linalg.matrix_rank(B @ A)))
print("rank of W0 * B A, HiRA's update:", int(torch.linalg.matrix_rank(W0 * (B @ A))))

# %% [markdown]
# That is more freedom in one sense, not in all: HiRA scales the entries that $W_0$ has, and an entry that is zero
# stays zero.
#
# ## A model to adapt
#
# A real run begins with `AutoModelForCausalLM.from_pretrained(...)`. Here it is a Llama of two layers that reads
# bytes, trained for a few seconds on Python source code. The text to adapt it to is Python's language reference:
# prose instead of code.

# %%
MODULES = ("argparse", "ast", "calendar", "csv", "enum", "fractions", "random", "shutil", "statistics", "textwrap")
CONTEXT = 64


def in_bytes(text):
    return torch.tensor(list(text.encode()))


code = in_bytes("".join(Path(sysconfig.get_path("stdlib"), f"{name}.py").read_text("utf-8") for name in MODULES))
prose = in_bytes("\n".join(topics[name] for name in sorted(topics)))
train_text, test_text = prose[:-20_000], prose[-20_000:]


def batch(text, size=16):
    starts = torch.randint(len(text) - CONTEXT, (size,))
    return torch.stack([text[start : start + CONTEXT] for start in starts])


def train(model, text, steps, rate):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    for _ in range(steps):
        ids = batch(text)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def test_loss(model):
    ids = test_text[: 64 * CONTEXT].view(64, CONTEXT)
    return model(input_ids=ids, labels=ids).loss.item()


sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes, bos_token_id=None, eos_token_id=None))
train(base, code, steps=200, rate=1e-2)
print(f"loss on prose before it is adapted: {test_loss(base):.3f}, without any knowledge: {math.log(256):.3f}")

# %% [markdown]
# ## Train it, beside LoRA
#
# HiRA and LoRA differ in one line, that of the configuration. `hira_alpha` is LoRA's `lora_alpha`: with it HiRA
# trains at LoRA's learning rate. Without it you have the paper's HiRA, whose rate is 3 to 30 times LoRA's.

# %%
configs = {
    "LoRA": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    "HiRA": HiraConfig(r=4, hira_alpha=8, target_modules="all-linear"),
}
models = {}
for name, config in configs.items():
    torch.manual_seed(1)
    models[name] = get_peft_model(copy.deepcopy(base), config)
    train(models[name], train_text, steps=100, rate=1e-2)
    print(f"{name}: {models[name].get_nb_trainable_parameters()[0]:,} parameters, loss {test_loss(models[name]):.3f}")

# %% [markdown]
# One run of a small model says nothing about which of the two is better. With Transformers or TRL nothing changes
# either: give `Trainer` the adapted model, or `SFTTrainer` the configuration as `peft_config`. `hira finetune` trains
# without a script.
#
# ## Look at the updates
#
# The trained update of one layer, and how many of its singular values matter.

# %%
name = "model.layers.0.mlp.down_proj"
before = base.get_submodule(name).weight.detach()
for method, model in models.items():
    merged = copy.deepcopy(model).merge_and_unload()
    update = merged.get_submodule(name).weight.detach() - before
    values = torch.linalg.svdvals(update)
    strong = int((values > 0.01 * values[0]).sum())
    size = (update.norm() / before.norm()).item()
    print(f"{method}: {strong} of {len(values)} singular values above 1 % of the largest; size {size:.2f} of W0's")

# %% [markdown]
# `hira inspect ADAPTER --base MODEL` shows this of every layer of a saved adapter, without loading the model.
#
# ## Save and load
#
# PEFT's own files: a small folder, which PEFT without hira reads too.

# %%
model = models["HiRA"].eval()
model.save_pretrained(folder / "adapter")
loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder / "adapter").eval()
ids = batch(test_text, size=4)
with torch.no_grad():
    logits = model(ids).logits
    print("loaded, the same logits:", torch.equal(logits, loaded(ids).logits))
print({file.name: file.stat().st_size for file in (folder / "adapter").iterdir()})

# %% [markdown]
# ## Merge, and serve
#
# Merging writes $W'$ in the place of $W_0$, bit for bit the weight that the adapted model computed with. What is left
# is a plain model, as fast as before and with no need of PEFT or hira: any server takes the folder. For a model that
# is too large to load, `hira merge MODEL ADAPTER -o OUT` does so from file to file.

# %%
model.merge_and_unload().save_pretrained(folder / "merged")
served = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
with torch.no_grad():
    print(f"merged, largest difference of the logits: {(served(ids).logits - logits).abs().max().item():.0e}")


def continued(model, prompt):
    torch.manual_seed(0)
    written = model.generate(in_bytes(prompt)[None], max_new_tokens=60, do_sample=True, temperature=0.6, pad_token_id=0)
    return bytes(written[0].tolist()).decode(errors="replace")


print("before:", repr(continued(base.eval(), "The value of the ")))
print("after: ", repr(continued(served, "The value of the ")))

# %% [markdown]
# ## Where to go on
#
# - [docs/training.md](../docs/training.md): `hira finetune`, learning rates, HiRA with LoRA, axolotl and ms-swift.
# - [docs/checkpoints.md](../docs/checkpoints.md): merge, inspect and convert files.
# - [examples/trl](trl) and [examples/transformers](transformers): scripts that differ from LoRA's in one line.
