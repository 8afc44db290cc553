"""README.md of a converted folder: its origin, how to load it, the comparison table and the settings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_rfa.evaluation.results import source_name


def write_model_card(
    folder: str | Path, *, base_model: str, table: str, settings: Mapping[str, Any], data: str
) -> Path:
    """Writes `folder/README.md`.

    Args:
        base_model: id or folder of the original. Of folders, here and in `settings`, only the last name is shown.
        table: Markdown, from `hf_rfa.evaluation.columns.markdown_table`.
        settings: all settings of the run, JSON-ready.
        data: source of the documents.
    """
    name = source_name(base_model)
    shown = {key: source_name(value) if isinstance(value, str) else value for key, value in settings.items()}
    text = f"""---
library_name: hf_rfa
tags: [random-feature-attention, linear-attention]
base_model: {name}
---

# {name} with random-feature attention

Converted from softmax attention by hf_rfa and trained on `{source_name(data)}`. Without `pip install hf_rfa` it does
not load.

```python
import hf_rfa
model = hf_rfa.from_pretrained("{Path(folder).name}")
```

## Beside the original

On held-out documents of the same source. *Window only* sees the exact window and the sinks and nothing else; only in
*fine-tuned*, which is this folder, are weights of the model trained.

{table}

## How it was made

```json
{json.dumps(shown, indent=2, default=str)}
```
"""
    path = Path(folder) / "README.md"
    path.write_text(text, encoding="utf-8")
    return path
