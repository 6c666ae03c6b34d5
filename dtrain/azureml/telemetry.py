"""``azureml.telemetry``: nothing is ever sent."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


def set_diagnostics_collection(send_diagnostics: bool = True, verbose: bool = True) -> None:
    """Says that nothing is collected, where the script asks for it; never blocks."""
    if send_diagnostics:
        logger.warning("send_diagnostics=True has no effect: dtrain collects and sends nothing")
