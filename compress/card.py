"""The model card of an artifact. It holds nothing that differs between two runs of the same recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import yaml

from compress import __version__
from compress.checkpoint import BRANCHES, RESIDUALS
from compress.numerics.pattern import Pattern
from compress.passes.base import Prunes, Restructure, Rewrite, Transform
from compress.recipe import Recipe, cache_scheme
from compress.scheme import Scheme

LEFT_OUT = """
transformers and serving engines leave out what lies in {}; `compress eval` reads it. The report says what is lost with it and without.
"""
OPENED_BY_TRANSFORMERS = """
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
"""
OPENED_HERE = """
import compress

model = compress.load("PATH")
"""
FOLDERS = {what: f"`{path.partition('/')[0]}/`" for what, path in (("residuals", RESIDUALS), ("branch", BRANCHES))}


def write(
    model: str,
    recipe: Recipe,
    schemes: dict[str, Scheme],
    patterns: Mapping[str, Pattern],
    left_out: Sequence[str],
    factored: int,
    unquantized: int,
    opens: bool,
) -> str:
    """README.md of the artifact, in which so many linears are `factored` into two and so many not quantised; ``left_out`` says what of it engines do
    not read, `opens` whether transformers opens it."""
    kinds = sorted({scheme.text for scheme in schemes.values()})
    cache = cache_scheme(recipe)
    of_cache = f" Keys and values are cached as {cache.text}." if cache else ""
    kept = " and ".join(f"{list(patterns.values()).count(pattern)} to {pattern}" for pattern in dict.fromkeys(patterns.values()))
    pruned = f" Linears were pruned, {kept}: so many weights are left of every M inputs." if patterns else ""
    passes = ", ".join(name for name, _ in recipe.instances())
    remark = LEFT_OUT.format(" and ".join(FOLDERS[what] for what in left_out)) if left_out else ""
    gone = (
        " Parts of the model were taken out: `report.html` says which."
        if any(isinstance(step, Restructure) and step.removes for _, step in recipe.instances())
        else ""
    )
    rest = "Other tensors were rewritten without changing what the model computes, and rounded to the dtype they had."
    steps = [step for _, step in recipe.instances()]
    if any(isinstance(step, Restructure | Prunes) or (isinstance(step, Rewrite) and not isinstance(step, Transform)) for step in steps):
        rest = "What is not quantised may have been pruned or trained, in the dtype it had: the model computes something else than the source."
    elif all(not isinstance(step, Transform) for step in steps):
        rest = "All other values are as in the source."
    if all(not isinstance(step, Rewrite | Prunes | Restructure) for step in steps):
        rest = "Everything else is as in the source, byte for byte."
    made = [f"{len(schemes)} linears are {'; '.join(kinds)}"] if schemes else []
    made += [f"{unquantized} linears are not quantised"] if unquantized else []
    of_rank = f"{factored} linears became two of low rank, which only compress opens. " if factored else ""
    return f"""---
library_name: {"transformers" if opens else "compress"}
tags: [compress, compressed-tensors]
---

# {model}, compressed

{of_rank}{"; ".join(made)} ({passes}).{of_cache}{pruned}{gone} {rest}

```python
{(OPENED_BY_TRANSFORMERS if opens else OPENED_HERE).strip()}
```
{remark}
What was lost is in `report.html`; hashes of all other files are in `manifest.json`.

## Recipe

Made by compress {__version__} with:

```yaml
{yaml.safe_dump(recipe.resolved(), sort_keys=False).strip()}
```
"""
