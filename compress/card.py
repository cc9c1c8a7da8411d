"""The model card of an artifact. It holds nothing that differs between two runs of the same recipe."""

from __future__ import annotations

import yaml

from compress import __version__
from compress.passes.base import Scheme
from compress.recipe import Recipe

LEFT_OUT = """
transformers and serving engines leave out what lies in `residuals/`; `compress eval` reads it. The report says what is lost with it and without.
"""


def write(model: str, recipe: Recipe, schemes: dict[str, Scheme]) -> str:
    """README.md of the artifact."""
    kinds = sorted({scheme.text for scheme in schemes.values()})
    passes = ", ".join(name for name, _ in recipe.instances())
    left_out = LEFT_OUT if any(scheme.residuals for scheme in schemes.values()) else ""
    return f"""---
library_name: transformers
tags: [compress, compressed-tensors]
---

# {model}, compressed

{len(schemes)} linears are {"; ".join(kinds) or "unchanged"} ({passes}). Everything else is as in the source, byte for byte.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```
{left_out}
What was lost is in `report.html`; hashes of all other files are in `manifest.json`.

## Recipe

Made by compress {__version__} with:

```yaml
{yaml.safe_dump(recipe.resolved(), sort_keys=False).strip()}
```
"""
