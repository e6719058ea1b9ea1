"""Bridges to other libraries, one module each.

Nothing is imported here: `import hyperframe` stays light, and a bridge is loaded by its own name,
for instance `from hyperframe.integrations import transformers`. A bridge whose library is not
installed raises `MissingDependencyError` with the install command when it is imported.
"""

from __future__ import annotations

__all__: list[str] = []
