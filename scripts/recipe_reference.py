"""Write docs/recipe.md from the models that validate recipes, so that the two cannot disagree.

python scripts/recipe_reference.py          # write it
python scripts/recipe_reference.py --check  # exit 1 if it is stale
"""

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from compress import errors, recipe
from compress.passes import base

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "recipe.md"

EXIT_CODES = {
    errors.Exit.ACCEPTED: "accepted: the artifact is written and every gate passed",
    errors.Exit.BUG: "a bug of ours, with a traceback",
    errors.Exit.BAD_INPUT: "the recipe, the model or the data is at fault; every mistake is named, nothing is written to `--out`",
    errors.Exit.GATE_FAILED: "a gate failed; the artifact is written and says `accepted: false`. Of `compress pattern`: none is so fast",
    errors.Exit.INTERRUPTED: "interrupted; the same command continues with the block it was in",
}


def kind(schema: dict[str, Any]) -> str:
    """A field's JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(kind(part) for part in schema["anyOf"])
    if "$ref" in schema:
        return "mapping"
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    match schema.get("type"):
        case "array":
            items = kind(schema["items"])
            return f"list of exactly one {items}" if schema.get("maxItems") == 1 else f"list of {items}s"
        case "object":
            return "mapping"
        case "null":
            return "`null`"
        case "boolean":
            return "`true`, `false`"
        case other:
            return f"{other}{limits(schema)}"


def limits(schema: dict[str, Any]) -> str:
    """The bounds of a number, or nothing."""
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    found = [f"{word} {schema[key]:g}" for key, word in words.items() if key in schema]
    return ", " + ", ".join(found) if found else ""


def table(model: type[BaseModel]) -> str:
    """One row per key of a section."""
    schema = model.model_json_schema()
    rows = ["| key | value | default | |", "|---|---|---|---|"]
    for name, field in schema["properties"].items():
        sections = [part for part in field.get("anyOf", [field]) if "$ref" in part]
        default = "**required**" if name in schema.get("required", ()) else "below" if sections else f"`{json.dumps(field.get('default'))}`"
        rows.append(f"| `{name}` | {kind(field)} | {default} | {field.get('description', '')} |")
    return "\n".join(rows)


def pairs(left: str, items: dict[str, str]) -> str:
    """A table of two columns."""
    return "\n".join([f"| {left} | |", "|---|---|", *(f"| `{key}` | {text} |" for key, text in items.items())])


def passes() -> str:
    parts = []
    for name in recipe.pass_names():
        module = importlib.import_module(f"compress.passes.{name}")
        cls = module.Pass
        data = "measured on the calibration data" if cls.needs_data else "needs no data"
        parts.append(f"### `{name}`\n\n{(module.__doc__ or '').strip()}\n\nStage `{cls.stage}`, {data}.\n\n{table(cls)}")
    return "\n\n".join(parts)


def reference() -> str:
    """The whole page."""
    example = (ROOT / "recipes" / "w4.yaml").read_text().strip()
    exports = {name: (recipe.export_module(name).__doc__ or "").strip().splitlines()[0] for name in recipe.export_names()}
    return f"""<!-- written by scripts/recipe_reference.py; do not edit -->
# Recipes

A recipe is YAML. It is checked completely - against itself, the model's config and the export target - before a weight is read, and every
mistake is reported at once. Unknown keys are refused. `compress check RECIPE MODEL` does only that; `compress plan` adds what the run will
cost and give; the artifact holds the recipe with every default filled in.

```yaml
{example}
```

## The file

{table(recipe.Recipe)}

## `calibration`

{table(recipe.Calibration)}

Samples of a text start at random places, or are documents in random order from the first 16 times
`samples`, what lies behind being read only if they do not suffice; nothing is padded.

## `passes`

Each entry is one pass with its options: `- gptq: {{bits: 4}}`. They run in order, and a pass may not come after one of a later stage:
{" < ".join(f"`{stage}`" for stage in base.STAGES)}. Each linear may be quantised once; `include` and `exclude` share them out.

A pattern is matched against the name of a linear on disk, without `.weight`: a shell pattern (`*.mlp.down_proj`), or `re:` and a regular
expression that may match anywhere (`re:layers\\.[01]\\.`). A pattern that matches nothing is a mistake.

{passes()}

## `evaluate`

{table(recipe.Evaluation)}

### `evaluate.retrieval`

{table(recipe.Retrieval)}

## `gates`

Each gate is a name with `max`, `min` or both: `perplexity_ratio: {{max: 1.02}}`. Those of the first table need an evaluation.

{pairs("measured", recipe.MEASURED_GATES)}

{pairs("recorded", recipe.RECORDED_GATES)}

## `export`

{pairs("target", exports)}

What it writes, byte for byte, is in [formats.md](formats.md).

## Exit codes

{pairs("code", {str(int(code)): text for code, text in EXIT_CODES.items()})}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if docs/recipe.md is stale")
    arguments = parser.parse_args()
    text = reference()
    if not arguments.check:
        TARGET.write_text(text)
        return 0
    if TARGET.is_file() and TARGET.read_text() == text:
        return 0
    print("docs/recipe.md is stale: run python scripts/recipe_reference.py")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
