"""Options under the name of the method that they make up: `rlhf-fast ppo --recipe NAME`.

One YAML file each, of the keys that `--config` takes. Its comment says where the numbers are from.
"""

from __future__ import annotations

from pathlib import Path

FILES = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}
