#!/usr/bin/env bash
# transformers 5.24.0: the warning of a renamed argument is attributed to torch.
#
# `LlamaModel.forward` renamed `past_key_values` to `cache`.  The old name still works, and gives a
# FutureWarning whose file is torch/nn/modules/module.py, for a module is called through torch's
# __call__.  So a filter for transformers, or for the module that made the call, does not see it.
#
# Seen on Python 3.11:
#   torch/nn/modules/module.py: `past_key_values` is deprecated and will be removed in version
#       5.40.0 for `LlamaModel.forward`. Use `cache` instead.
#   filters for transformers and for the caller's module: silent
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.24.0
"$place/venv/bin/python" - <<'PYTHON'
import inspect
import warnings
from importlib.metadata import version

import torch
from transformers import DynamicCache, LlamaConfig, LlamaModel

print("transformers", version("transformers"), "torch", version("torch"))
sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
model = LlamaModel(LlamaConfig(**sizes, num_attention_heads=2))
names = list(inspect.signature(LlamaModel.forward).parameters)
print("arguments:", ", ".join(names))
assert "cache" in names and "past_key_values" not in names, "the arguments have other names now"


def call(**arguments):
    """Where the call's FutureWarnings are attributed to, with every filter reset."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model(torch.tensor([[1, 2, 3]]), **arguments)
    return [w for w in seen if issubclass(w.category, FutureWarning)]


(warning,) = call(past_key_values=DynamicCache(config=model.config))
print(f"{warning.filename.rpartition('site-packages/')[2]}: {warning.message}")
assert warning.filename == inspect.getsourcefile(torch.nn.Module), "attributed elsewhere now"
assert call(cache=DynamicCache(config=model.config)) == [], "the new name warns, too"

with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", module="transformers")
    warnings.filterwarnings("error", module="__main__")
    model(torch.tensor([[1, 2, 3]]), past_key_values=DynamicCache(config=model.config))
print("filters for transformers and for the caller's module: silent")
PYTHON
