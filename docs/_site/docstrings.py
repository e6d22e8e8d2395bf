"""A Griffe extension: Sphinx roles in docstrings (:class:`wavemix_kernels.backend`) become links on the site.

Editors know these roles, Markdown does not. A name that has no page of its own stays plain code.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|data):`~?([\w.]+)`")


class SphinxRoles(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        _rewrite(pkg)


def _rewrite(parent: griffe.Object) -> None:
    if parent.docstring is not None:
        parent.docstring.value = _ROLE.sub(lambda match: _link(match[1], parent), parent.docstring.value)
    for member in parent.members.values():
        if isinstance(member, griffe.Object):
            _rewrite(member)


def _link(name: str, scope: griffe.Object) -> str:
    try:
        path = scope.resolve(name)
    except griffe.NameResolutionError:
        path = name
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'
