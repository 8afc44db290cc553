"""The model card of a converted model: README.md of a repository or folder."""

import json
from pathlib import Path
from typing import Any

from hf_rfa.config import RFAConfig, seen_exactly
from hf_rfa.report import CalibrationReport
from hf_rfa.runtime.record import conversion_config, original_class, stored_report

CARD_FILE = "README.md"


def write_card(model: Any, folder: Path, *, name: str, tags: list[str] | None = None) -> None:
    """Write the card of a converted model into an existing folder.

    Args:
        name: How the model is loaded: a hub id or the folder's name.
        tags: More than those that every converted model has.
    """
    (folder / CARD_FILE).write_text(model_card(model, name=name, tags=tags), encoding="utf-8")


def model_card(model: Any, *, name: str, tags: list[str] | None = None) -> str:
    """The text of the card: where the model comes from, how to load it, what each part of its attention does."""
    config, report = conversion_config(model), stored_report(model)
    origin = str(getattr(model.config, "_name_or_path", "") or "")
    on_hub = origin.count("/") == 1 and not Path(origin).exists()
    shown = Path(origin).name if origin else original_class(model).__name__
    head = [
        "library_name: transformers",
        f"tags: {json.dumps([*_TAGS, *dict.fromkeys(tag for tag in tags or [] if tag not in _TAGS)])}",
        *([f"base_model: {origin}"] if on_hub else []),
    ]
    return f"""---
{chr(10).join(head)}
---

# {shown} with random-feature attention

The softmax attention of {origin if on_hub else shown} ({original_class(model).__name__}) was converted by hf_rfa.
{_summary(config, report)}

```python
import hf_rfa  # pip install hf_rfa
model = hf_rfa.from_pretrained("{name}")
```

With that import every class of Transformers loads it, too; without it
`AutoModelFor....from_pretrained("{name}", trust_remote_code=True)` does. Without hf_rfa installed it does not load.

## Conversion

```json
{json.dumps(_changed(config), indent=2)}
```
"""


_TAGS = ("hf_rfa", "random-feature-attention", "linear-attention", "custom_code")


def _summary(config: RFAConfig, report: CalibrationReport | None) -> str:
    kept = f" and up to {config.most_kept_keys} far ones" if config.most_kept_keys else ""
    text = f"A query sees {seen_exactly(config.window, config.sink_tokens)} exactly{kept}; the rest through features."
    if report is None:
        return text
    return f"{text} {len(report.softmax_heads)} of {len(report.heads)} key heads stay exact softmax."


def _changed(config: RFAConfig) -> dict[str, Any]:
    """The fields that differ from their defaults, as JSON."""
    defaults = RFAConfig().to_dict()
    return {key: value for key, value in config.to_dict().items() if value != defaults[key]}
