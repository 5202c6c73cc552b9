"""The pages' templates, read when the code that fills them is: a process that outlives an upgrade would else fill newer ones."""

from __future__ import annotations

from pathlib import Path

from jinja2 import DictLoader

TEMPLATES = DictLoader({path.name: path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.j2")})
