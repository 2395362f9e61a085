"""The table of all settings for the documentation, made from the class that reads them.

`python -m blocks.settings_table docs/settings.md` writes it anew into that file.
"""

import re
import sys
from pathlib import Path
from typing import Any, cast

from blocks.settings import Settings

_HEAD = "| variable | default | meaning | used by |\n|---|---|---|---|\n"


def settings_table() -> str:
    """The settings with their defaults, their meaning and who uses them, in Markdown."""
    return _HEAD + "".join(_row(name) for name in Settings.model_fields)


def _row(name: str) -> str:
    field = Settings.model_fields[name]
    said = cast(dict[str, Any], field.json_schema_extra)
    default = said["without"]
    if default is None:
        default = "" if field.default in (None, "") else f"`{field.default}`"
    cells = (f"`{Settings.variable(name)}`", default, field.description or "", said["used_by"])
    return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|\n"


def with_table(page: str) -> str:
    """The page with the table in the place of its former one."""
    return re.sub(re.escape(_HEAD) + r"(\|.*\n)+", lambda _: settings_table(), page, count=1)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text()))
