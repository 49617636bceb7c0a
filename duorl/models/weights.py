"""What transformers found in the files of a model's weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def require_weights(where: str, found: Mapping[str, Any]) -> None:
    """Refuse a loaded model whose weights were not all there: transformers would make random ones.

    Args:
        where: `of` a model or `in` a folder, for the message.
        found: loading information of transformers. It does not count weights that are tied to others as missing.

    Raises:
        ValueError: a weight is missing, or has another shape; names the first one.
    """
    if found["mismatched_keys"]:
        name, kept, expected = min(found["mismatched_keys"])
        sizes = f"{tuple(kept)} and not {tuple(expected)}"
        raise ValueError(f"the weights {where}: {name} has shape {sizes}, which config.json says")
    if found["missing_keys"]:
        raise ValueError(f"the weights {where} lack {min(found['missing_keys'])}: fetch or save them again")


@contextmanager
def without_report() -> Iterator[None]:
    """transformers tells in a table which weights it lacks; here it is an error, in one line."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_error)  # a higher level of this logger would make transformers report on sharding
    try:
        yield
    finally:
        logger.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
